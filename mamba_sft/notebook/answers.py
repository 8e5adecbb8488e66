"""Answers that show themselves: to prompts, beside others to the same prompts, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba_sft.errors import UsageError
from mamba_sft.evaluation.prompts import Sample, is_right, read_samples
from mamba_sft.evaluation.run_figures import right_counts, sample_titles, samples_heading, wrong_first
from mamba_sft.inference.answer import Answer
from mamba_sft.notebook.markup import Block, Cell, Fold, Table, Text, View
from mamba_sft.run import Run
from mamba_sft.showing import Showing

_SHOWN = 8
"""Samples in sight; the others are behind a line that opens them."""


class Answers(Showing, list[Answer]):
    """Answers to prompts: a list of `Answer`, which shows both.

    Args:
        given: The answers.
        prompts: What was asked, in the same order.
        name: Who answered.
    """

    def __init__(self, given: Sequence[Answer], prompts: Sequence[str], name: str):
        super().__init__(given)
        self.prompts = list(prompts)
        self.name = name

    def beside(self, other: Answers) -> Beside:
        """Returns both answers to each prompt, side by side: `before.beside(after)`.

        Args:
            other: Answers to the same prompts, of another model.

        Raises:
            UsageError: It answers other prompts.
        """
        if other.prompts != self.prompts:
            raise UsageError(
                "these answers are to other prompts", hint="ask both models the same list of prompts"
            )
        return Beside(self, other)

    def view(self) -> View:
        """A row for each prompt."""
        rows = [(prompt, answer.text.strip()) for prompt, answer in zip(self.prompts, self, strict=True)]
        return View(f"answers of {self.name}", [Table(["prompt", "answer"], rows), *_cut_off(self)])


@dataclass(frozen=True)
class Beside(Showing):
    """Answers of two models to the same prompts."""

    left: Answers
    right: Answers

    def view(self) -> View:
        """A row for each prompt, a column for each model."""
        rows = [
            (prompt, one.text.strip(), other.text.strip())
            for prompt, one, other in zip(self.left.prompts, self.left, self.right, strict=True)
        ]
        table = Table(["prompt", self.left.name, self.right.name], rows)
        return View("answers side by side", [table, *_cut_off([*self.left, *self.right])])


def _cut_off(answers: Sequence[Answer]) -> list[Block]:
    cut = sum(answer.finish_reason == "length" for answer in answers)
    return [Text(f"{cut} of {len(answers)} were cut off at `max_new_tokens`")] if cut else []


class Samples(Showing, list[Sample]):
    """The sample prompts of a run with the answers before and after training: a list of `Sample`.

    Args:
        samples: As the run has them.
        titles: What gave the two answers.
    """

    def __init__(self, samples: Sequence[Sample], titles: tuple[str, str]):
        super().__init__(samples)
        self.titles = titles

    @property
    def heading(self) -> str:
        """How many of them are in sight."""
        return samples_heading(min(_SHOWN, len(self)), len(self))

    def view(self, *, whole: bool = True) -> View:
        """The wrong ones first, right and wrong marked where that is known.

        Args:
            whole: Whether those that are not in sight are behind a fold, or left out.
        """
        if not self:
            return View(
                "sample answers", [Text("none: the recipe has no `eval.prompts`, or training goes on")]
            )
        shown = wrong_first(self, self.titles)
        counts = right_counts(shown)
        blocks: list[Block] = [Text(counts)] if counts else []
        blocks += [self._table(0, _SHOWN)]
        if whole and len(self) > _SHOWN:
            blocks += [Fold(f"{self.heading}: all of them", [self._table(_SHOWN, len(self))])]
        return View("sample answers", blocks)

    def _table(self, first: int, last: int) -> Table:
        known = any(sample.prompt.answer is not None for sample in self)
        titles = ["prompt", *(["expected"] if known else []), *self.titles]
        rows: list[list[Any]] = []
        for shown in wrong_first(self, self.titles)[first:last]:
            expected = [shown.prompt.answer or ""] if known else []
            marked = [Cell(text.strip(), is_right(shown.prompt, text)) for _, text, _ in shown.answers]
            rows.append([shown.prompt.prompt, *expected, *marked])
        return Table(titles, rows)


def samples_of(run: Run) -> Samples:
    """Returns the sample answers of a run; none before it is finished."""
    return Samples(read_samples(run.samples_file), sample_titles(run.read_data()))
