"""The loss as a drawing that a notebook shows, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mamba_sft.disk import check_writable
from mamba_sft.errors import UsageError
from mamba_sft.evaluation.run_facts import read_facts
from mamba_sft.evaluation.run_figures import loss_curves
from mamba_sft.evaluation.svg_plot import Curve, svg_text
from mamba_sft.notebook.markup import Markup, Text, View
from mamba_sft.run import Run, write_atomically
from mamba_sft.showing import Showing


@dataclass(frozen=True)
class LossPlot(Showing):
    """Curves of a run over its steps.

    Args:
        title: What they are.
        curves: What is drawn.
    """

    title: str
    curves: Sequence[Curve]

    @property
    def svg(self) -> str:
        """The drawing, which is a picture of its own: black on white outside of a notebook."""
        return svg_text(self.curves, title=self.title, width=760, height=260, legend=True)

    def save(self, path: str | Path) -> None:
        """Writes the drawing into an SVG file.

        Raises:
            UsageError: It cannot be written there.
        """
        place = Path(path)
        if place.is_dir():
            raise UsageError(f"`{place}` is a directory", hint=f"for example `{place / 'loss.svg'}`")
        check_writable(place.parent, UsageError, hint="choose another place")
        write_atomically(place, self.svg + "\n")

    def view(self) -> View:
        """The drawing under its title."""
        if not self.curves:
            return View(self.title, [Text("nothing was logged yet")])
        return View(self.title, [loss_drawing(self.curves, self.title)])


def loss_plot(run: Run) -> LossPlot:
    """Returns the curves of training and validation loss, as far as the run has come."""
    return LossPlot(f"loss of {run.path.name}, nats per token", loss_curves(read_facts(run)))


def loss_drawing(curves: Sequence[Curve], title: str, height: int = 260) -> Markup:
    """Returns curves as a piece of a view.

    Args:
        curves: What is drawn; nothing where there are none.
        title: For readers who cannot see it.
        height: Of its own coordinates.
    """
    if not curves:
        return Markup("", "")
    return Markup(
        svg_text(curves, title=title, width=760, height=height, legend=True), f"  (a drawing: {title})"
    )
