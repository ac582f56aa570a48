"""One line that changes while something takes its time."""

from __future__ import annotations

import sys
from typing import Any, Self

from ..report.record import in_notebook

WIDTH = 110


class Progress:
    """Shows a label, and beside it for the time being what goes on; at the end the label stays alone.

    So what a notebook keeps is the same in every run. Outside a notebook and a terminal only the label is printed.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._handle: Any = None
        self._terminal = not in_notebook() and sys.stdout.isatty()

    def __enter__(self) -> Self:
        """Show the label."""
        if in_notebook():
            from IPython.display import display

            self._handle = display(_Line(self.label), display_id=True)
        elif not self._terminal:
            print(self.label, flush=True)
        return self

    def say(self, text: str) -> None:
        """Show a line of text beside the label."""
        line = f"{self.label}  {text}".replace("\n", " ")[:WIDTH]
        if self._handle is not None:
            self._handle.update(_Line(line))
        elif self._terminal:
            print(f"\r{line:{WIDTH}}", end="", flush=True)

    def __exit__(self, *_: object) -> None:
        """Leave the label alone."""
        if self._handle is not None:
            self._handle.update(_Line(self.label))
        elif self._terminal:
            print(f"\r{self.label:{WIDTH}}")


class _Line:
    """Text that IPython shows without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text
