"""The images that a block shows: matplotlib's figures, Pillow's images, and those that tools gave.

Nothing here imports matplotlib or Pillow: where code does, their ways of showing something are led here.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from midstream.sandbox.inside.capture import Capture
from midstream.types import IMAGE_SIGNATURES, Media

MOST_IMAGES = 32
"""Images of one block that are kept, however small they are."""

_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
_PNG_BEGINNING = IMAGE_SIGNATURES["image/png"] + b"\0\0\0\rIHDR"
_PNG_SIZE = slice(16, 24)  # two big-endian integers


class Pictures:
    """The images of one block: at most ``maximum_bytes`` of them, where each stands named in the output."""

    def __init__(self, capture: Capture, maximum_bytes: int) -> None:
        self._capture = capture
        self._maximum = maximum_bytes
        self.clear()

    def clear(self) -> None:
        """Begin a block."""
        self._kept: list[dict[str, str]] = []
        self._room = self._maximum

    def watch(self) -> None:
        """See to it that what is imported, or was, shows its images here."""
        adapters = {"matplotlib.pyplot": self._adapt_pyplot, "PIL.ImageShow": self._adapt_pillow}
        for name, adapt in adapters.items():
            if name in sys.modules:
                adapt(sys.modules[name])
        sys.meta_path.insert(0, _AfterImport(adapters))

    def take(self) -> list[dict[str, str]]:
        """The block's images, to be told: ``mime``, and ``data`` in base64."""
        kept = self._kept
        self.clear()
        return kept

    def text_of(self, value: object) -> str | None:
        """A block's value that is an image is shown; its name then stands for it. None for any other value."""
        if isinstance(value, Media):
            known = value.data.startswith(IMAGE_SIGNATURES.get(value.mime, ()))
            return self._keep(value.mime, value.data, _size(value.data)) if known else None
        figures, images = sys.modules.get("matplotlib.figure"), sys.modules.get("PIL.Image")
        if figures is not None and isinstance(value, figures.Figure):
            text = self._keep_png(_drawn(value))
            _close(value)
            return text
        if images is not None and isinstance(value, images.Image):
            return self._keep_png(_saved(value))
        return None

    @property
    def open(self) -> bool:
        """Whether there are figures that the code has left open."""
        helpers = sys.modules.get("matplotlib._pylab_helpers")
        return helpers is not None and bool(helpers.Gcf.figs)

    def show_open(self) -> None:
        """Show the figures that are open, and close them. Raises what drawing them raises."""
        for number in sys.modules["matplotlib.pyplot"].get_fignums():
            figure = sys.modules["matplotlib.pyplot"].figure(number)
            # Closed first: what cannot be drawn must not come again with each block.
            _close(figure)
            self._capture.write_line(self._keep_png(_drawn(figure)))

    def _adapt_pyplot(self, pyplot: Any) -> None:
        def show(block: bool | None = None) -> None:
            """Show the open figures, and close them."""
            if block is not False and self.open:
                self.show_open()

        pyplot.show = show

    def _adapt_pillow(self, image_show: Any) -> None:
        pictures = self

        class Viewer:
            def show(self, image: Any, **_: object) -> bool:
                pictures._capture.write_line(pictures._keep_png(_saved(image)))
                return True

        image_show.register(Viewer(), 0)

    def _keep_png(self, data: bytes) -> str:
        return self._keep("image/png", data, _size(data))

    def _keep(self, mime: str, data: bytes, size: str) -> str:
        if len(data) > self._room or len(self._kept) == MOST_IMAGES:
            return f"<image{size}, more than can be kept>"
        self._room -= len(data)
        self._kept.append({"mime": mime, "data": base64.b64encode(data).decode("ascii")})
        return f"<image{size}>"


def _size(data: bytes) -> str:
    if not data.startswith(_PNG_BEGINNING) or len(data) < _PNG_SIZE.stop:
        return ""
    numbers = data[_PNG_SIZE]
    return f" of {int.from_bytes(numbers[:4], 'big')}x{int.from_bytes(numbers[4:], 'big')} pixels"


def _drawn(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _saved(image: Any) -> bytes:
    file = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(file, "PNG")
    return file.getvalue()


def _close(figure: Any) -> None:
    """Of pyplot's figures alone: whoever holds it can go on with it."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)


class _AfterImport:
    """Finds no module itself: calls ``adapters`` with those that were imported."""

    def __init__(self, adapters: dict[str, Callable[[Any], None]]) -> None:
        self._adapters = adapters
        self._finding: set[str] = set()

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        adapt = self._adapters.get(name)
        if adapt is None or name in self._finding:
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                adapt(module)

            loader.exec_module = exec_module
        return spec
