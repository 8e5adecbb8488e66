"""How results come to show themselves in a notebook, and the only way from below into the `notebook` room.

A plan, a run or a merge knows nothing of HTML. Asked for some, it hands itself to the `notebook` room, which
lies above all that compute, and which is imported at that moment: nothing else depends on it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Showing:
    """What a notebook shows as a small table, and IPython in a terminal as a few lines of text."""

    def _repr_html_(self) -> str:
        """HTML for the output of a cell: escaped, readable in light and dark, nothing from the net."""
        return str(notebook_room("views").view_of(self).html())

    def __str__(self) -> str:
        """The same as lines of text, for `print`."""
        return str(notebook_room("views").view_of(self).text())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Both, or the text beside the HTML would be what `repr` gives, one long line."""
        return {"text/html": self._repr_html_(), "text/plain": str(self)}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The text once more: IPython has a way of its own with lists, which some of these are."""
        printer.text(str(self))


def notebook_room(file: str) -> Any:
    """Returns a module of the `notebook` room.

    Args:
        file: Its name, such as `views`.
    """
    return import_module(f"mamba_sft.notebook.{file}")
