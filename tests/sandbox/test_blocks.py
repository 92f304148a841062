"""Rules 12 to 15 of docs/semantics.md: what a block is, what it leaves behind, what is shown of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from midstream.sandbox import SandboxPool, Session

Shown = Callable[[str], str]


class TestRule12OneSession:
    def test_names_imports_functions_classes_and_generators_live_on(self, shown: Shown) -> None:
        assert (
            shown("import math\nx = 3\ndef f(n): return n * x\nclass P:\n    v = 7\ng = (i * i for i in range(9))")
            == ""
        )
        assert shown("next(g), next(g), next(g)") == "(0, 1, 4)"
        assert shown("f(2) + P.v + math.floor(0.5) + next(g)") == "22"

    def test_files_in_the_working_directory_live_on(self, shown: Shown) -> None:
        shown("import os\nos.mkdir('d')\nwith open('d/a.txt', 'w') as f: f.write('kept')")
        assert shown("open('d/a.txt').read()") == "'kept'"
        assert shown(
            "import shutil\nshutil.copy('d/a.txt', 'b.txt')\nos.rename('b.txt', 'd/c.txt')\nsorted(os.listdir('d'))"
        ) == ("['a.txt', 'c.txt']")

    def test_a_module_written_by_the_code_can_be_imported(self, shown: Shown) -> None:
        shown("open('helper.py', 'w').write('def twice(n): return 2 * n')")
        assert shown("import helper, os\nhelper.twice(21), os.listdir()") == "(42, ['helper.py'])"

    def test_nothing_crosses_between_sessions(self, pool: SandboxPool) -> None:
        with pool.session() as one, pool.session() as other:
            one.run("import os, builtins, math\nsecret = 1\nos.environ['SECRET'] = '1'\nopen('s', 'w').write('1')")
            one.run("builtins.secret = 1; math.pi = 3")
            assert other.run("secret").text == "NameError(\"name 'secret' is not defined\")"
            assert other.run("import os, math\nos.environ.get('SECRET'), os.listdir(), math.pi").text == (
                "(None, [], 3.141592653589793)"
            )


class TestRule13OneNamespace:
    def test_recursion_and_helpers_calling_helpers(self, shown: Shown) -> None:
        shown("def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)")
        assert shown("even(10), odd(10)") == "(True, False)"

    def test_comprehensions_and_imports_used_inside_functions(self, shown: Shown) -> None:
        assert (
            shown("import math\nk = 2\ndef f(): return [math.sqrt(i) * k for i in (1, 4) if i * k]\nf()")
            == "[2.0, 4.0]"
        )

    def test_global_and_dataclasses_and_pickle(self, shown: Shown) -> None:
        shown("from dataclasses import dataclass\nimport pickle\n@dataclass\nclass P:\n    x: int\ncount = 0")
        shown("def up():\n    global count\n    count += 1")
        assert shown("up(); up()\npickle.loads(pickle.dumps(P(3))), count, __name__") == "(P(x=3), 2, '__main__')"

    def test_future_features_stay_on(self, shown: Shown) -> None:
        shown("from __future__ import annotations")
        assert shown("def f(x: undefined): pass\nf.__annotations__") == "{'x': 'undefined'}"

    def test_asyncio_works(self, shown: Shown) -> None:
        assert (
            shown("import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\nasyncio.run(f())")
            == "5"
        )

    def test_threads_work(self, shown: Shown) -> None:
        code = (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "with ThreadPoolExecutor(4) as e: r = list(e.map(str, range(3)))\nr"
        )
        assert shown(code) == "['0', '1', '2']"

    @pytest.mark.parametrize(
        ("code", "text"),
        [
            ("  1 + 1  ", "2"),
            ("\n\n   1 + 1\n\n", "2"),
            ("\n    a = 1\n\n    if a:\n        a += 1\n    a\n  ", "2"),
            ("\tb = 5\n\tb", "5"),
            ("if True:\n    c = '''\n  x\n    y'''\nc", "'\\n  x\\n    y'"),
            ("    d = '''\nx\n      y'''\n    d", "'\\nx\\n  y'"),
            ("    e = (1,\n  2)\n    e", "(1, 2)"),
            ("    f = 1\n# a comment\n    f", "1"),
            ("'a\\u2028b'", "'a\\u2028b'"),
            ("'a\u2028b'", "'a\\u2028b'"),
            ("1 + \\\n1", "2"),
            ("x = 5;", ""),
            ("", ""),
            ("   \n \n", ""),
            ("# nothing", ""),
            ("    # a comment\ng = 1\ng", "1"),
            ("1\r\n2\r\n", "2"),
        ],
    )
    def test_blank_lines_and_uniform_indentation_are_not_code(self, shown: Shown, code: str, text: str) -> None:
        assert shown(code) == text

    @pytest.mark.parametrize("code", ["    x = 1\ny = 2", "  x = 1\n    y = 2", "x = 1\n  y = 2"])
    def test_other_indentation_is_an_error_as_written(self, session: Session, code: str) -> None:
        error = session.run(code).error
        assert error is not None
        assert error.type == "IndentationError"

    def test_tracebacks_call_the_file_code_and_show_the_right_block(self, shown: Shown) -> None:
        shown("# first\ndef f():\n    return 1 / 0  # in the first")
        text = shown(
            "import traceback\n\ntry:\n    f()  # in the second\nexcept ZeroDivisionError:\n    traceback.print_exc()"
        )
        assert '  File "<code>", line 4, in <module>\n    f()  # in the second' in text
        assert '  File "<code>", line 3, in f\n    return 1 / 0  # in the first' in text
        assert "sandbox" not in text

    def test_source_of_functions_can_be_had(self, shown: Shown) -> None:
        shown("def f():\n    return 1")
        shown("def g():\n    return 2")
        assert shown("import inspect\nprint(inspect.getsource(f) + inspect.getsource(g))") == (
            "def f():\n    return 1\ndef g():\n    return 2"
        )

    def test_sources_that_the_code_forgets_or_gives_itself(self, shown: Shown) -> None:
        shown("def f():\n    return 1")
        shown("import inspect, linecache\nlinecache.clearcache()")
        assert shown("linecache.checkcache()\nprint(inspect.getsource(f))") == "def f():\n    return 1"
        assert shown("linecache.getline('<code>', 1)") == "\"linecache.getline('<code>', 1)\\n\""
        shown("linecache.cache['mine'] = (4, None, ['mine\\n'], 'mine')")
        assert shown("linecache.getline('mine', 1), linecache.getline('none', 1)") == "('mine\\n', '')"


class TestRule14WhatIsShown:
    def test_the_last_expression_is_shown_by_pformat_and_none_is_not(self, shown: Shown) -> None:
        assert shown("list(range(40))").startswith("[0,\n 1,\n 2,")
        assert shown("None") == ""
        assert shown("x = 3") == ""
        assert shown("'text'") == "'text'"

    def test_worked_example_with_a_long_string(self, shown: Shown) -> None:
        text = "Nvidia was established in 1993 by Jen-Hsun Huang, Curtis Priem, and Chris Malachowsky. More"
        assert shown(f"[{text!r}]").startswith(
            "['Nvidia was established in 1993 by Jen-Hsun Huang, Curtis Priem, and Chris '\n 'Malachowsky."
        )

    def test_output_comes_first_and_the_value_on_its_own_line(self, session: Session) -> None:
        result = session.run("print('a', end='')\n5")
        assert (result.text, result.stdout, result.value, result.error) == ("a\n5", "a", "5", None)
        assert session.run("print('a')\n5").text == "a\n5"
        assert session.run("print('a\\n\\n')").text == "a"
        assert session.run("print('a', end='')\n1/0").text == "a\nZeroDivisionError('division by zero')"

    def test_stdout_and_stderr_come_in_order(self, shown: Shown) -> None:
        code = (
            "import sys, os\nprint(1)\nprint(2, file=sys.stderr)\nos.write(1, b'3\\n')\n"
            "sys.stdout.buffer.write(b'4\\n')\nprint(5)"
        )
        assert shown(code) == "1\n2\n3\n4\n5"

    def test_what_c_code_prints_is_caught(self, shown: Shown) -> None:
        assert shown("import ctypes\nctypes.CDLL(None).puts(b'from C') and None") == "from C"

    def test_streams_behave_like_streams(self, shown: Shown) -> None:
        code = (
            "import sys\nsys.stdout.reconfigure(encoding='utf-8'); sys.stdout.close()\n"
            "sys.stdout.writelines(['a', 'b'])\n"
        )
        assert (
            shown(code + "sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.fileno()") == "ab\n(False, 'utf-8', 1)"
        )
        assert shown("sys.stdout.write(5)") == "TypeError('write() argument must be str, not int')"
        assert shown("print = None; sys.stdout = None; sys.stderr = None") == ""
        assert shown("del print\nprint('back')") == "back"

    def test_characters_that_cannot_be_encoded_are_escaped(self, shown: Shown) -> None:
        assert shown("print('\\ud800'); 'é😀\\x00'") == "\\ud800\n'é😀\\x00'"

    def test_a_repr_that_fails_is_an_error(self, shown: Shown) -> None:
        shown("class R:\n    def __repr__(self): raise ValueError('no')\nclass S:\n    def __repr__(self): return 5")
        assert shown("R()") == "ValueError('no')"
        assert shown("S()") == "TypeError('__repr__ returned non-string (type int)')"


class TestRule15WhatGoesWrongIsAResult:
    @pytest.mark.parametrize(
        ("code", "text", "kind"),
        [
            ("1/0", "ZeroDivisionError('division by zero')", "ZeroDivisionError"),
            ("raise SystemExit(3)", "SystemExit(3)", "SystemExit"),
            ("import sys; sys.exit()", "SystemExit()", "SystemExit"),
            ("exit()", "SystemExit(None)", "SystemExit"),
            ("raise KeyboardInterrupt", "KeyboardInterrupt()", "KeyboardInterrupt"),
            ("raise GeneratorExit", "GeneratorExit()", "GeneratorExit"),
            ("input()", "EOFError('EOF when reading a line')", "EOFError"),
            ("def f(): f()\nf()", "RecursionError('maximum recursion depth exceeded')", "RecursionError"),
            ("x x", "SyntaxError('invalid syntax', ('<code>', 1, 3, 'x x\\n', 1, 4))", "SyntaxError"),
            ("'\\0'[", "SyntaxError", "SyntaxError"),
        ],
    )
    def test_exceptions_of_every_kind(self, session: Session, code: str, text: str, kind: str) -> None:
        session.run("x = 1")
        result = session.run(code)
        assert result.text.startswith(text)
        assert result.error is not None
        assert result.error.type == kind
        assert not result.state_lost
        assert session.run("x").text == "1"

    def test_an_error_knows_its_line(self, session: Session) -> None:
        session.run("def f():\n\n\n    1/0")
        result = session.run("\nx = 1\nf()")
        assert result.error is not None
        assert (result.error.line, result.error.message) == (2, "division by zero")
        assert result.error.traceback.splitlines()[0] == "Traceback (most recent call last):"
        assert "sandbox" not in result.error.traceback
        syntax = session.run("x = 1\ny = = 2").error
        assert syntax is not None
        assert syntax.line == 2

    def test_errors_that_cannot_be_shown(self, shown: Shown) -> None:
        shown("class E(Exception):\n    def __repr__(self): 1/0\n    __str__ = __repr__")
        assert shown("raise E") == "E(<exception repr() failed>)"
        shown("class F(Exception):\n    def __repr__(self): raise SystemExit\n    __str__ = __repr__")
        assert shown("raise F") == "F(<SystemExit while it was shown>)"

    def test_exception_groups_and_causes_hide_our_frames(self, level: str) -> None:
        with SandboxPool(isolation=level, preload=[], error_style="traceback") as pool, pool.session() as session:  # type: ignore[arg-type]
            text = session.run(
                "try:\n    1/0\nexcept Exception as e:\n    raise ExceptionGroup('g', [ValueError(1)]) from e"
            ).text
            assert "ZeroDivisionError" in text
            assert "ValueError: 1" in text
            assert "sandbox" not in text
            assert session.run("def f():\n    return 1/0\n\nf()").text == (
                "Traceback (most recent call last):\n"
                '  File "<code>", line 4, in <module>\n    f()\n'
                '  File "<code>", line 2, in f\n    return 1/0\n           ~^~\n'
                "ZeroDivisionError: division by zero"
            )


class TestSeeds:
    CODE = (
        "import random, numpy as np\n"
        "random.random(), np.random.rand(), np.random.default_rng().random(), hash('a'), {'b', 'a'}"
    )

    def test_33_the_same_seed_gives_the_same_numbers(self, pool: SandboxPool) -> None:
        with pool.session(seed=5) as one, pool.session(seed=5) as two, pool.session(seed=6) as other:
            assert one.run(self.CODE).text == two.run(self.CODE).text != other.run(self.CODE).text

    def test_33_also_from_another_fork_server(self, pool: SandboxPool, level: str) -> None:
        with SandboxPool(isolation=level) as another, another.session(seed=5) as two, pool.session(seed=5) as one:  # type: ignore[arg-type]
            assert one.run(self.CODE).text == two.run(self.CODE).text

    @pytest.mark.parametrize(
        "way", ["import numpy as np", "from numpy.random import rand", "import numpy.random.mtrand"]
    )
    def test_33_also_where_the_code_itself_imports_numpy_first(self, pool: SandboxPool, level: str, way: str) -> None:
        with SandboxPool(isolation=level, preload=[]) as bare, bare.session(seed=5) as two, pool.session(seed=5) as one:  # type: ignore[arg-type]
            assert two.run("import sys; 'numpy' in sys.modules").text == "False"
            two.run(way)
            assert one.run(self.CODE).text == two.run(self.CODE).text

    def test_without_a_seed_sessions_differ(self, pool: SandboxPool) -> None:
        with pool.session() as one, pool.session() as other:
            assert one.run(self.CODE).text != other.run(self.CODE).text
            assert one.seed != other.seed
