"""What every suite has to be able to do, whether lm-eval runs it or it is our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mamba_sft.evaluation.normalisation import Column
from mamba_sft.evaluation.scores import TaskScores
from mamba_sft.evaluation.settings import Settings

if TYPE_CHECKING:
    from mamba_sft.inference.chat_model import ChatModel
    from mamba_sft.inference.model_places import ModelPlace

Progress = Callable[[str, int, int], None]
"""Told the name of what goes on, how much of it is done, and how much there is."""


class Problem(NamedTuple):
    """What stands in the way of an evaluation: a sentence, and what to do about it."""

    message: str
    hint: str | None = None


class Suite(Protocol):
    """What is asked of a model, and what becomes of its answers.

    `problems` is called first, before weights are read; then `prepare`, once; then `measure`, for every
    model that is compared, on the same documents.
    """

    @property
    def name(self) -> str:
        """What it is called on the command line; its results are in a file of this name."""

    @property
    def published(self) -> Mapping[str, Sequence[float]]:
        """Published rows to stand beside ours: one value a column, in their order, then the average."""

    def problems(self, place: ModelPlace, settings: Settings) -> list[Problem]:
        """Returns all that would keep it from being run; loads no weights, and no torch if it can."""

    def prepare(self, place: ModelPlace, settings: Settings) -> list[str]:
        """Reads the documents; returns the names of the tasks, in the order in which they are run."""

    def facts(self) -> dict[str, Any]:
        """Returns what its scores depend on besides the settings, JSON-safe: versions, shots, files."""

    def columns(self) -> Sequence[Column]:
        """Returns the columns of its table; after `prepare`."""

    def measure(
        self, chat_model: ChatModel, tasks: Sequence[str], settings: Settings, progress: Progress
    ) -> Iterator[TaskScores]:
        """Scores a model on tasks, one after the other; each is yielded as it ends, and then kept."""
