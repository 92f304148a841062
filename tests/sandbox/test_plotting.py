"""Code that draws: it works within a session's means, and what it shows comes back."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator

import pytest

from midstream import ToolSet
from midstream.sandbox import SandboxLimits, SandboxPool, Session
from midstream.tools import ToolHost
from midstream.types import Media

pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")

DRAW = """
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
sheet, axis = pyplot.subplots()
axis.plot([0, 1, 2], [0, 1, 4], label="squares")
axis.set_title("x squared")
axis.legend()
sheet.savefig("plot.png")
"""


@pytest.mark.parametrize("preload", [["numpy"], ["numpy", "matplotlib.pyplot"]], ids=["imported inside", "preloaded"])
def test_a_plot_is_drawn_and_fetched(level: str, preload: list[str]) -> None:
    with SandboxPool(isolation=level, preload=preload) as pool, pool.session() as session:  # type: ignore[arg-type]
        result = session.run(DRAW)
        assert result.error is None, result.text
        picture = session.get("plot.png")
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(picture) > 5000
        # Nobody has to choose a backend: there is no display to draw on.
        assert session.run("pyplot.figure(); pyplot.close('all'); matplotlib.get_backend().lower()").text == "'agg'"


def test_without_a_choice_of_backend(level: str) -> None:
    with SandboxPool(isolation=level, preload=["numpy"]) as pool, pool.session() as session:  # type: ignore[arg-type]
        code = "from matplotlib import pyplot\npyplot.plot([1, 2])\npyplot.savefig('p.png')"
        result = session.run(code)
        assert result.error is None, result.text
        assert session.get("p.png")[:4] == b"\x89PNG"


# --- what is shown


LOADED = {"imported": ["numpy"], "preloaded": ["matplotlib.pyplot", "PIL.ImageShow"]}


@pytest.fixture(scope="module", params=LOADED)
def drawing(request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    with SandboxPool(preload=LOADED[request.param]) as pool:
        yield pool


IMPORTS = "from matplotlib import pyplot as plt\nfrom PIL import Image\nred = Image.new('RGB', (30, 20), 'red')"


@pytest.fixture
def session(drawing: SandboxPool) -> Iterator[Session]:
    with drawing.session() as session:
        session.run(
            "from matplotlib import pyplot as plt\nfrom PIL import Image\nred = Image.new('RGB', (30, 20), 'red')"
        )
        yield session


def sizes(media: tuple[Media, ...]) -> list[tuple[int, int]]:
    """Of images, as another reader of PNG files than the one that made them has it."""
    from PIL import Image

    assert all(each.mime == "image/png" for each in media)
    return [Image.open(io.BytesIO(each.data), formats=["PNG"]).size for each in media]


def test_figures_come_in_the_order_in_which_they_were_shown(session: Session) -> None:
    result = session.run(
        "print('first', end='')\nplt.figure(figsize=(2, 1))\nplt.plot([1, 2])\nplt.show()\n"
        "print('second')\nplt.figure(figsize=(3, 1))\nplt.plot([2, 1])\nplt.figure(figsize=(4, 1))\n7"
    )
    assert result.text.splitlines() == [
        "first",
        "<image of 200x100 pixels>",
        "second",
        "<image of 300x100 pixels>",
        "<image of 400x100 pixels>",
        "7",
    ]
    assert sizes(result.media) == [(200, 100), (300, 100), (400, 100)]


def test_a_figure_is_shown_once_and_lives_on(session: Session) -> None:
    first = session.run("sheet, axis = plt.subplots(figsize=(2, 2))\naxis.plot([1, 2])\nNone")
    assert len(first.media) == 1
    assert session.run("1 + 1").media == ()
    again = session.run("axis.set_title('more')\nsheet")
    assert again.text == "<image of 200x200 pixels>"
    assert len(again.media) == 1
    assert again.media != first.media
    assert session.run("plt.figure(figsize=(1, 1))\nplt.gcf()").media == session.run("plt.figure(figsize=(1, 1))").media


def test_no_figure_is_lost_to_an_error_of_the_code(session: Session) -> None:
    result = session.run("plt.figure(figsize=(1, 1))\n1 / 0")
    assert result.text == "<image of 100x100 pixels>\nZeroDivisionError('division by zero')"
    assert len(result.media) == 1


def test_what_cannot_be_drawn_is_the_codes_error_once(session: Session) -> None:
    result = session.run("plt.title(r'$\\nosuch{x}$')\nNone")
    assert result.error is not None
    assert result.error.type == "ValueError"
    assert "<sandbox" not in result.error.traceback
    assert result.media == ()
    assert session.run("1").text == "1"


def test_a_drawing_that_takes_too_long_is_interrupted() -> None:
    limits = SandboxLimits(wall_time=1.0, grace=30.0)
    with SandboxPool(preload=["matplotlib.pyplot"], limits=limits) as pool, pool.session() as session:
        slow = "import itertools\nfrom matplotlib import pyplot as plt, figure\n"
        slow += "plt.figure().savefig = lambda *_, **__: sum(itertools.count())"
        result = session.run(slow)
        assert result.timed_out
        assert session.run("1").text == "1"


def test_images_that_are_shown_and_that_are_values(session: Session) -> None:
    result = session.run("red.show()\nred.convert('CMYK').show()\nred.resize((3, 2))")
    assert result.text == "<image of 30x20 pixels>\n<image of 30x20 pixels>\n<image of 3x2 pixels>"
    assert sizes(result.media) == [(30, 20), (30, 20), (3, 2)]
    assert result.value == "<image of 3x2 pixels>"


def test_a_block_that_comes_in_pieces_shows_the_same() -> None:
    pieces = ["plt.figure(figsize=(1, 1))\nplt.plot([1])\n", "plt.show()\nplt.figure(figsize=(2, 1))\n", "red"]
    with SandboxPool(preload=LOADED["preloaded"], forkable=True) as pool, pool.session() as session:
        session.run(IMPORTS)
        whole = session.run("".join(pieces))
        for piece in pieces:
            session.feed(piece)
        fed = session.commit()
    assert len(whole.media) == 3
    assert (fed.text, fed.media) == (whole.text, whole.media)


def test_images_are_bounded_in_bytes_and_number() -> None:
    limits = SandboxLimits(image_bytes=2000)
    with SandboxPool(preload=["PIL.ImageShow"], limits=limits) as pool, pool.session() as session:
        session.run("from PIL import Image\nimport os")
        noise = "Image.frombytes('L', (40, 40), os.urandom(1600)).show()"
        result = session.run(f"{noise}\n{noise}")
        assert result.text == "<image of 40x40 pixels>\n<image of 40x40 pixels, more than can be kept>"
        assert sizes(result.media) == [(40, 40)]
        dots = session.run("for _ in range(33):\n    Image.new('1', (1, 1)).show()")
        assert len(dots.media) < 33
        assert dots.text.count("more than can be kept") == 33 - len(dots.media)
    with SandboxPool(preload=["PIL.ImageShow"], limits=SandboxLimits(image_bytes=0)) as pool, pool.session() as session:
        assert session.run("from PIL import Image\nImage.new('1', (1, 1))").media == ()


async def test_an_image_that_a_tool_gave_is_shown_as_a_value() -> None:
    images = {
        "gif": Media("image/gif", b"GIF89a..."),
        "none": Media("image/gif", b"..."),
        "sound": Media("audio/wav", b"..."),
    }

    def photo(kind: str) -> Media:
        return images[kind]

    tools = ToolSet([photo])
    host = ToolHost(tools)
    with SandboxPool(preload=[]) as pool:
        session = await pool.session_async(tools=tools.offers, call_tool=host.row().call)
        shown = await session.run_async("photo('gif')")
        assert (shown.text, shown.media) == ("<image>", (images["gif"],))
        other = await session.run_async("photo('sound'), photo('none')")
        assert (other.text, other.media) == ("(Media('audio/wav', 3 bytes), Media('image/gif', 3 bytes))", ())
        assert (await session.run_async("photo('none')")).media == ()
        session.close()
    host.close()
