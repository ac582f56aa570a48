"""Plots that everybody can read: colours that stay apart for colour-blind readers, and a text for those who hear."""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError
from .record import format_value, in_notebook

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000"]
"""Eight colours told apart with any colour vision: M. Okabe and K. Ito, "Color Universal Design", 2008."""

DPI = 80


def style() -> None:
    """Set matplotlib's defaults for the series: palette, light grid, no box."""
    import matplotlib
    from matplotlib import cycler

    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=OKABE_ITO),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "figure.figsize": (7, 3.5),
            "figure.dpi": DPI,
            "legend.frameon": False,
        }
    )


def show(fig: Figure, alt: str) -> None:
    """Display a figure with a text alternative, and close it.

    JupyterLab gives an image/png output no alternative text, so the picture travels in an HTML ``img``. The sanitiser
    of tests/nbval.cfg blanks the picture's bytes; the text is compared. Outside Jupyter the text is printed.

    Args:
        fig: a matplotlib figure.
        alt: what the picture tells, for readers who do not see it. Not the machine's own numbers, unless the cell is
            tagged ``nbval-ignore-output``.

    Raises:
        HelpersError: ``alt`` is empty.
    """
    _display(fig, alt)


class LivePicture:
    """A picture that is drawn anew in its place while something goes on.

        live = LivePicture()
        live.show(fig, alt="...")  # again and again

    What was drawn last is what a notebook keeps.
    """

    def __init__(self) -> None:
        self._place, self._is_there = {"display_id": secrets.token_hex(8)}, False

    def show(self, fig: Figure, alt: str) -> None:
        """Display a figure, from the second time on in the place of the one before; else as the function ``show``."""
        _display(fig, alt, transient=self._place, update=self._is_there)
        self._is_there = True


def _display(fig: Figure, alt: str, **place: Any) -> None:
    """Do what ``show`` says; ``place`` goes to ``publish_display_data``."""
    import matplotlib.pyplot as plt
    from PIL import Image

    if not alt.strip():
        raise HelpersError("cannot show this figure", "its alt text is empty", "say in alt= what the figure tells")
    drawn, picture = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight")
    plt.close(fig)
    if not in_notebook():
        print(alt)
        return
    from IPython.display import publish_display_data

    # A chart has few colours: with a palette it takes a quarter of the bytes, which git keeps for ever.
    chart = Image.open(drawn).convert("RGB").quantize(64, method=Image.Quantize.FASTOCTREE)
    chart.save(picture, "png", optimize=True)
    data = base64.b64encode(picture.getvalue()).decode()
    html = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}" style="max-width: 100%">'
    publish_display_data({"text/html": html, "text/plain": alt}, **place)


def memory_bar(parts: Mapping[str, float], title: str = "", recorded: Mapping[str, float] | None = None) -> Figure:
    """Draw what fills a memory as one stacked bar, and what was recorded elsewhere as a second one below it.

    Args:
        parts: name -> GiB, from left to right, e.g. ``{"weights": 12.2, "KV cache": 0.5, "rest of the peak": 0.4}``.
        title: heading of the plot.
        recorded: the same parts, e.g. from ``recorded_parts``; empty or None for no second bar.

    Returns:
        The figure, for ``show(memory_bar(parts), alt=describe_parts(parts))``.
    """
    import matplotlib.pyplot as plt

    style()
    bars = {"here": parts} | ({"recorded": recorded} if recorded else {})
    fig, axes = plt.subplots(figsize=(7, 1 + 0.6 * len(bars)))
    for number, part in enumerate(parts):
        sizes = [bar[part] for bar in bars.values()]
        before = [sum(list(bar.values())[:number]) for bar in bars.values()]
        said = ", ".join(f"{format_value(float(size))} GiB {name}" for name, size in zip(bars, sizes, strict=True))
        axes.barh(list(bars), sizes, left=before, height=0.6, label=f"{part}: {said}")
    axes.set(xlabel="GiB", title=title)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.65 / len(bars)))
    return fig


def describe_parts(parts: Mapping[str, float], recorded: Mapping[str, float] | None = None) -> str:
    """Say in words what ``memory_bar`` draws, as its alt text."""
    text = ", ".join(f"{name} {format_value(float(size))} GiB" for name, size in parts.items())
    total = f"{text}; together {format_value(float(sum(parts.values())))} GiB"
    return f"{total}. Recorded at full size: {describe_parts(recorded)}" if recorded else total
