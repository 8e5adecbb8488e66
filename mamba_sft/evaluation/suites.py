"""The suites that a model can be scored on, and what every suite has to be able to do.

The leaderboards are run by lm-eval (`harness`, which alone knows it) and differ in tasks and columns only;
`heldout` and `instructions` are our own. A suite is found by its name in `find_suite`, and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mamba_sft.errors import UsageError
from mamba_sft.evaluation.leaderboards import LEADERBOARDS
from mamba_sft.evaluation.normalisation import Column
from mamba_sft.evaluation.scores import TaskScores
from mamba_sft.evaluation.settings import Settings
from mamba_sft.run import SUITES, TASKS

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


def find_suite(name: str) -> Suite:
    """Returns the suite of a name; it is not prepared yet.

    Raises:
        UsageError: There is none.
    """
    if name in LEADERBOARDS:
        from mamba_sft.evaluation.harness import Asked, Harness

        board = LEADERBOARDS[name]
        return Harness(name, [Asked(each) for each in board.loads], board)
    if name == "heldout":
        from mamba_sft.evaluation.heldout import Heldout

        return Heldout()
    if name == "instructions":
        from mamba_sft.evaluation.instructions import Instructions

        return Instructions()
    near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.5)
    raise UsageError(
        f"no suite `{name}`; there are {', '.join(f'`{each}`' for each in SUITES)}",
        hint=f"did you mean `{near[0]}`?" if near else "single tasks of lm-eval are named with `--tasks`",
    )


def find_tasks(text: str) -> Suite:
    """Returns a suite of tasks that are named one by one: `arc_easy,gsm8k:8,mine.yaml`.

    Raises:
        UsageError: None is named, or shots are no number.
    """
    from mamba_sft.evaluation.harness import Asked, Harness

    asked = []
    for word in filter(None, (each.strip() for each in text.split(","))):
        name, colon, shots = word.rpartition(":")
        if colon and not shots.isdecimal():
            raise UsageError(f"`{word}`: `{shots}` is no number of shots", hint="for example `gsm8k:8`")
        asked.append(Asked(name, int(shots)) if colon else Asked(word))
    if not asked:
        raise UsageError("`--tasks` names no task", hint="for example `--tasks arc_easy,gsm8k:8`")
    if len({one.name for one in asked}) < len(asked):
        raise UsageError("`--tasks` names a task twice", hint="a task is scored with one number of shots")
    words = [one.name if one.shots is None else f"{one.name}-{one.shots}" for one in asked]
    return Harness(TASKS + re.sub(r"[^A-Za-z0-9._+-]+", "-", "+".join(words))[:80], asked)
