"""Problems that a calculator makes easy, their answers, and the split into training and held-out.

The split is a property of a problem's operands alone, so it was fixed before any training and holds
whatever the wording: a problem whose operands hash into the held-out bucket is never trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("arithmetic", "two_step", "string", "list")
HELD_OUT_FILE = Path(__file__).with_name("held_out.jsonl")
HELD_OUT_SEED = 20_240_229
HELD_OUT_COUNTS = {"arithmetic": 160, "two_step": 128, "string": 112, "list": 112}
HELD_OUT_BUCKETS = 16
"""One of this many buckets of operands is held out."""

MINIMUM_DIGITS = 2
MAXIMUM_DIGITS = 5

_ANSWER = re.compile(r"The answer is (.+)\.\s*\Z")


@dataclass(frozen=True, slots=True)
class Step:
    """One block of a solution: its code, and what it shows ("" where it shows nothing)."""

    code: str
    shown: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the answer as it must be written, and the blocks of code that find it.

    ``operands`` are the numbers and words that the question gives; they decide the split.
    """

    kind: str
    question: str
    answer: str
    operands: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class FixedProblem:
    """One line of a file of problems, such as ``held_out.jsonl``."""

    id: str
    kind: str
    question: str
    answer: str
    operands: tuple[str, ...]


def prompt_text(question: str) -> str:
    """What the model is given; it goes on right after the colon."""
    return f"Q: {question}\nA:"


def parse_answer(completion: str) -> str | None:
    """The answer that a finished completion states, or None where it states none.

    ``completion`` is the text after the prompt, without the end-of-sequence token.
    """
    found = _ANSWER.search(completion)
    return found.group(1) if found else None


def is_correct(completion: str, answer: str) -> bool:
    """Whether a finished completion states exactly ``answer``."""
    return parse_answer(completion) == answer


def is_held_out(operands: Iterable[str]) -> bool:
    """Whether problems with these operands, in any order and with any wording, are held out."""
    key = " ".join(sorted(operands))
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_BUCKETS == 0


def _number(rng: random.Random, maximum_digits: int) -> int:
    digits = rng.randint(MINIMUM_DIGITS, maximum_digits)
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _texts(*operands: object) -> tuple[str, ...]:
    return tuple(str(operand) for operand in operands)


def _arithmetic(rng: random.Random, maximum_digits: int) -> Problem:
    a, b, c = (_number(rng, maximum_digits) for _ in range(3))
    operator = rng.choice(["+", "-", "*", "//", "%"])
    values = {"+": a + b, "-": a - b, "*": a * b, "//": a // b, "%": a % b}
    code, value, operands = f"{a} {operator} {b}", values[operator], _texts(a, b)
    words = {
        "+": f"What is {a} plus {b}?",
        "-": f"What is {a} minus {b}?",
        "*": f"What is {a} times {b}?",
        "//": f"How many times does {b} go into {a}?",
        "%": f"What is left when {a} is divided by {b}?",
    }
    form = rng.randrange(4)
    if form == 0:
        question = words[operator]
    elif form == 1:
        code, value, operands = rng.choice(
            [
                (f"({a} + {b}) * {c}", (a + b) * c, _texts(a, b, c)),
                (f"({a} - {b}) * {c}", (a - b) * c, _texts(a, b, c)),
                (f"{a} * {b} + {c}", a * b + c, _texts(a, b, c)),
                (f"{a} * {b} % {c}", a * b % c, _texts(a, b, c)),
            ]
        )
        question = f"What is {code}?"
    else:
        question = f"What is {code}?" if form == 2 else f"Compute {code}."
    if rng.random() < 0.15:
        code = f"print({code})"
    return Problem("arithmetic", question, str(value), operands, (Step(code, str(value)),))


def _two_step(rng: random.Random, maximum_digits: int) -> Problem:
    a, b, c = (_number(rng, maximum_digits) for _ in range(3))
    name = rng.choice(["k", "m", "n", "s", "x", "y"])
    stories = [
        (f"Let {name} = {a} * {b}. What is {name} - {c}?", name, "*", "-"),
        (f"Let {name} = {a} + {b}. What is {name} * {c}?", name, "+", "*"),
        (f"Let {name} = {a} - {b}. What is {name} + {c}?", name, "-", "+"),
        (f"Let {name} = {a} * {b}. What is {name} % {c}?", name, "*", "%"),
        (f"A farm has {a} rows of {b} trees. A tree gives {c} apples. How many apples?", "trees", "*", "*"),
        (f"A shop has {a} boxes of {b} pens and buys {c} pens. How many pens?", "pens", "*", "+"),
        (f"A library has {a} books and buys {b}. A shelf takes {c}. How many full shelves?", "books", "+", "//"),
        (f"There are {a} red and {b} blue beads for {c} people. How many are left over?", "beads", "+", "%"),
    ]
    question, name, first, second = rng.choice(stories)
    apply: dict[str, Callable[[int, int], int]] = {
        "+": lambda left, right: left + right,
        "-": lambda left, right: left - right,
        "*": lambda left, right: left * right,
        "//": lambda left, right: left // right,
        "%": lambda left, right: left % right,
    }
    between = apply[first](a, b)
    value = apply[second](between, c)
    assignment = Step(f"{name} = {a} {first} {b}", "")
    if rng.random() < 0.3:
        assignment = Step(f"{name} = {a} {first} {b}; print({name})", str(between))
    steps = (assignment, Step(f"{name} {second} {c}", str(value)))
    return Problem("two_step", question, str(value), _texts(a, b, c), steps)


_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


def _word(rng: random.Random) -> str:
    letters = [rng.choice(alphabet) for _ in range(rng.randint(2, 4)) for alphabet in (_CONSONANTS, _VOWELS)]
    if rng.random() < 0.5:
        letters.append(rng.choice(_CONSONANTS))
    if rng.random() < 0.3:
        letters.insert(0, rng.choice(_VOWELS))
    return "".join(letters)


def _string(rng: random.Random, maximum_digits: int) -> Problem:
    del maximum_digits  # words keep their lengths throughout
    word, other = _word(rng), _word(rng)
    letter, new_letter = rng.choice(word), rng.choice(_CONSONANTS + _VOWELS)
    forms: list[tuple[str, str, object, tuple[str, ...]]] = [
        (f"Reverse '{word}'.", "{}[::-1]", word[::-1], (word,)),
        (f"Write '{word}' in capital letters.", "{}.upper()", word.upper(), (word,)),
        (f"Write '{word}' with a capital letter.", "{}.capitalize()", word.capitalize(), (word,)),
        (f"How many letters has '{word}'?", "len({})", len(word), (word,)),
        (f"How many times is '{letter}' in '{word}'?", f"{{}}.count('{letter}')", word.count(letter), (word,)),
        (f"Sort the letters of '{word}'.", "''.join(sorted({}))", "".join(sorted(word)), (word,)),
        (f"Join '{word}' and '{other}'.", f"{{}} + '{other}'", word + other, (word, other)),
        (
            f"Replace '{letter}' by '{new_letter}' in '{word}'.",
            f"{{}}.replace('{letter}', '{new_letter}')",
            word.replace(letter, new_letter),
            (word,),
        ),
    ]
    question, expression, value, operands = rng.choice(forms)
    shape = rng.random()
    steps: tuple[Step, ...]
    if shape < 0.7:
        steps = (Step(expression.format(repr(word)), repr(value)),)
    elif shape < 0.85:
        steps = (Step(f"word = '{word}'", ""), Step(expression.format("word"), repr(value)))
    else:
        steps = (Step(f"word = '{word}'\n{expression.format('word')}", repr(value)),)
    return Problem("string", question, repr(value), operands, steps)


def _list(rng: random.Random, maximum_digits: int) -> Problem:
    digits = min(maximum_digits, 3)
    numbers = [_number(rng, digits) for _ in range(rng.randint(3, 6))]
    evens = [number for number in numbers if number % 2 == 0]
    squares = sum(number * number for number in numbers)
    forms: list[tuple[str, str, object]] = [
        (f"What is the sum of {numbers}?", f"sum({numbers})", sum(numbers)),
        (f"What is the largest of {numbers}?", f"max({numbers})", max(numbers)),
        (f"What is the smallest of {numbers}?", f"min({numbers})", min(numbers)),
        (f"Sort {numbers}.", f"sorted({numbers})", sorted(numbers)),
        (f"Reverse {numbers}.", f"{numbers}[::-1]", numbers[::-1]),
        (
            f"What is the largest minus the smallest of {numbers}?",
            f"numbers = {numbers}\nmax(numbers) - min(numbers)",
            max(numbers) - min(numbers),
        ),
        (f"Which of {numbers} are even?", f"[n for n in {numbers} if n % 2 == 0]", evens),
        (
            f"What is the sum of the squares of {numbers}?",
            f"total = 0\nfor n in {numbers}:\n    total += n * n\nprint(total)",
            squares,
        ),
    ]
    question, code, value = rng.choice(forms)
    return Problem("list", question, repr(value), _texts(*numbers), (Step(code, repr(value)),))


_MAKERS: dict[str, Callable[[random.Random, int], Problem]] = {
    "arithmetic": _arithmetic,
    "two_step": _two_step,
    "string": _string,
    "list": _list,
}


def make_problem(rng: random.Random, kind: str, *, held_out: bool, maximum_digits: int = MAXIMUM_DIGITS) -> Problem:
    """A random problem of ``kind`` from one side of the split.

    ``maximum_digits`` bounds the length of its numbers (from 2; training starts with short ones).
    """
    while True:
        problem = _MAKERS[kind](rng, maximum_digits)
        if is_held_out(problem.operands) is held_out:
            return problem


def training_problems(
    seed: int, weights: dict[str, float], maximum_digits: Callable[[], int] = lambda: MAXIMUM_DIGITS
) -> Iterator[Problem]:
    """Training problems without end; never one that is held out.

    ``weights`` says how often each kind comes; ``maximum_digits`` is asked anew for each problem.
    """
    rng = random.Random(seed)
    kinds, shares = zip(*weights.items(), strict=True)
    while True:
        (kind,) = rng.choices(kinds, shares)
        yield make_problem(rng, kind, held_out=False, maximum_digits=maximum_digits())


def make_held_out() -> list[FixedProblem]:
    """The held-out problems, made anew: what ``held_out.jsonl`` holds."""
    rng = random.Random(HELD_OUT_SEED)
    made: dict[str, FixedProblem] = {}
    for kind, count in HELD_OUT_COUNTS.items():
        wanted = len(made) + count
        while len(made) < wanted:
            problem = make_problem(rng, kind, held_out=True)
            identifier = f"{kind}-{len(made) - wanted + count:03d}"
            made.setdefault(
                problem.question,
                FixedProblem(identifier, kind, problem.question, problem.answer, problem.operands),
            )
    return list(made.values())


def load_problems(path: Path) -> list[FixedProblem]:
    """The problems of a file, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [FixedProblem(**{**entry, "operands": tuple(entry["operands"])}) for entry in map(json.loads, lines)]


def save_problems(problems: Iterable[FixedProblem], path: Path) -> None:
    """Writes a file of problems, one a line."""
    lines = [
        json.dumps(
            {
                "id": problem.id,
                "kind": problem.kind,
                "question": problem.question,
                "answer": problem.answer,
                "operands": list(problem.operands),
            }
        )
        for problem in problems
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_held_out() -> list[FixedProblem]:
    """The held-out problems of the repository, kind after kind."""
    return load_problems(HELD_OUT_FILE)


if __name__ == "__main__":
    save_problems(make_held_out(), HELD_OUT_FILE)
