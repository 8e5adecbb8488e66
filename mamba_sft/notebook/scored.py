"""What an evaluation came to, as the tables that `mamba-sft eval` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mamba_sft.evaluation import table as tables
from mamba_sft.evaluation.measuring import Work
from mamba_sft.evaluation.results import Results
from mamba_sft.notebook.markup import Block, Table, Text, View
from mamba_sft.showing import Showing
from mamba_sft.wording import path_text


class Scored(Showing):
    """Suites that were measured.

    Args:
        works: Each suite with its results.
    """

    def __init__(self, works: Sequence[Work]):
        self.works = list(works)

    @property
    def results(self) -> dict[str, Results]:
        """By suite, what the model came to."""
        return {work.suite.name: work.results["tuned"] for work in self.works}

    @property
    def base_results(self) -> dict[str, Results]:
        """By suite, what the model it was compared with came to."""
        return {work.suite.name: work.results["base"] for work in self.works if "base" in work.results}

    def view(self) -> View:
        """The tables of each suite, and what a reader has to know of them."""
        return View("evaluation", [block for work in self.works for block in _blocks(work)])


def _blocks(work: Work) -> Iterator[Block]:
    rows = list(work.results.values())
    yield Text(tables.settings_text(work.results["tuned"]))
    yield Table(*tables.scores_table(rows, work.suite.published))
    if work.against is not None:
        names = work.against.model["name"], work.results["tuned"].model["name"]
        yield Table(*tables.differences_table(*names, work.differences))
    for note in tables.notes(rows, work.differences):
        yield Text(note)
    yield Text("results: " + ", ".join(path_text(file) for file in work.files.values()))
