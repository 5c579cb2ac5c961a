"""What the explorers share: controls above a picture, and a still picture where nothing is live."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

from stepmoe.charts.style import new_figure, style

# A row of controls: a name and what belongs to it.
_DESCRIPTION = {"description_width": "7em"}


class Explorer(ipywidgets.VBox):  # type: ignore[misc]
    """Controls over one picture, drawn anew whenever a control changes.

    A subclass makes its controls, hands them to `__init__` and defines `figures` and `summary`.
    Displayed, it is the live widget; an export to HTML and a page without a kernel show the
    picture, a terminal and a comparison of outputs the summary, which holds no measured number.

    Attributes:
        picture: the Image widget.
        message: HTML beside it, for errors and answers.
    """

    def __init__(self, rows: Sequence[Sequence[ipywidgets.Widget]]) -> None:
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        self.message = ipywidgets.HTML()
        self._paused = False
        lines = [ipywidgets.HBox(list(row), layout={"flex_flow": "row wrap"}) for row in rows]
        super().__init__([*lines, self.message, self.picture])
        self.refresh()

    def figures(self) -> list[Figure]:
        """The picture at the present setting, its parts from top to bottom."""
        raise NotImplementedError("an explorer draws something")

    def summary(self) -> str:
        """What the picture shows, in a sentence that is the same on every machine."""
        raise NotImplementedError("an explorer says what it draws")

    def refresh(self, *_: Any) -> None:
        """Draw the present setting. Controls call this."""
        if not self._paused:
            self.picture.value = self.png()

    def png(self) -> bytes:
        """The picture at the present setting as a PNG file."""
        return to_png(self.sheets())

    def sheets(self) -> list[Image.Image]:
        """The figures, drawn."""
        return [drawn(figure) for figure in self.figures()]

    def still(self) -> bytes:
        """The PNG file for where nothing is live; what is shown, unless a subclass knows better."""
        value: bytes = self.picture.value
        return value

    def watch(self, *controls: ipywidgets.Widget, then: Callable[..., None] | None = None) -> None:
        """Call `then` (None: refresh) whenever one of the controls changes."""
        for control in controls:
            control.observe(then or self.refresh, names="value")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Change several controls and draw once, afterwards."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
        self.refresh()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """The live view, the still picture for an export, and the words for everything else."""
        bundle: dict[str, str] = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = self.summary()
        bundle["image/png"] = base64.b64encode(self.still()).decode()
        return bundle, {"image/png": {"alt": self.summary()}}


def choice(description: str, options: Sequence[Any], value: Any) -> ipywidgets.Dropdown:
    """A list to choose from."""
    return ipywidgets.Dropdown(
        description=description,
        options=options,
        value=value,
        style=_DESCRIPTION,
        layout={"width": "20em"},
    )


def slider(kind: type[ipywidgets.Widget], description: str, **settings: Any) -> ipywidgets.Widget:
    """A slider of this kind, as wide as the others."""
    return kind(description=description, style=_DESCRIPTION, layout={"width": "26em"}, **settings)


def notice(text: str) -> Figure:
    """A picture of a message, for pages that show nothing else."""
    with style():
        figure = new_figure(8.0, 0.9)
        figure.text(0.5, 0.5, text, size=11, ha="center", va="center", wrap=True)
    return figure


def drawn(figure: Figure) -> Image.Image:
    """A figure as pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba")
    width, height = figure.canvas.get_width_height()
    return Image.frombytes("RGBA", (width, height), buffer.getvalue()).convert("RGB")


def to_png(sheets: Sequence[Image.Image]) -> bytes:
    """One PNG file of pictures below each other."""
    width = max(sheet.width for sheet in sheets)
    page = Image.new("RGB", (width, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    buffer = io.BytesIO()
    # A slider waits for this: little compression is faster than much.
    page.save(buffer, format="png", compress_level=1)
    return buffer.getvalue()
