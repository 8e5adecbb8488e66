"""A report as a notebook shows it: the page in a frame of its own, which neither touches the notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mamba_sft.evaluation.comparison import asked_place, report_errors_explained, write_comparison
from mamba_sft.evaluation.report import write_report
from mamba_sft.run import Run
from mamba_sft.wording import path_text

_HEIGHT = 640


@dataclass(frozen=True)
class Page:
    """A page that was written, and shows itself.

    Args:
        path: Where it is.
        problems: What could not be read of the runs.
    """

    path: Path
    problems: Sequence[str] = ()

    def __repr__(self) -> str:
        return f"report: {path_text(self.path)}"

    def _repr_html_(self) -> str:
        """The page in a frame without scripts, forms or a way out; its styles stay inside."""
        page = escape(self.path.read_text(encoding="utf-8"))
        style = f"width:100%;height:{_HEIGHT}px;border:1px solid rgba(128,128,128,.35);border-radius:8px"
        return f'<iframe sandbox="" title="report" style="{style}" srcdoc="{page}"></iframe>'


def written_report(runs: Sequence[Run], output: Path | None) -> Page:
    """Writes the report of a run, or the page that compares several.

    Args:
        runs: One or more.
        output: Where a comparison goes; None: beside the first run.

    Raises:
        UsageError: The same run twice, or a place that holds something else.
        MambaSFTError: It cannot be written.
    """
    place = asked_place(runs, output, "output")
    with report_errors_explained(place, "output"):
        if len(runs) > 1:
            return Page(place, write_comparison(runs, place))
        return Page(runs[0].report, write_report(runs[0]))
