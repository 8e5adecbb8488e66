"""Results of one model on one suite: a versioned JSON file that is whole at every moment.

It is written anew as each task ends, so that what took hours outlives whatever comes after; `--resume` goes
on from it, where it was made with the same settings and by the same model. Documents' scores are in it, so
that another model can be compared with it later.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mamba_sft.errors import UsageError
from mamba_sft.evaluation.normalisation import Column, Figure, Kind, average, figure
from mamba_sft.evaluation.scores import TaskScores
from mamba_sft.json_lines import parse_json
from mamba_sft.run import SUITES, TASKS, write_atomically
from mamba_sft.wording import count_text, first_line

logger = logging.getLogger(__name__)

FORMAT, VERSION = "mamba-sft evaluation", 1
_LONGEST = 60


@dataclass
class Results:
    """What is known of one model on one suite.

    Args:
        suite: The suite.
        model: Its `name`, whether it is the `tuned` one or the `base`, and its `fingerprint`.
        settings: All that the scores depend on besides the model, by name.
        made_with: What they do not depend on: versions, device, date.
        scored: The tasks that have ended.
        figures: Every column with its value; None where a task of it is missing.
        compared: How it differs from another model, as it is written.
    """

    suite: str
    model: dict[str, str]
    settings: dict[str, Any]
    made_with: dict[str, Any] = field(default_factory=dict)
    scored: dict[str, TaskScores] = field(default_factory=dict)
    figures: list[tuple[Column, Figure | None]] = field(default_factory=list)
    compared: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """Documents of each task, where only some were scored."""
        limit = self.settings.get("limit")
        return limit if isinstance(limit, int) else None

    @property
    def average(self) -> float | None:
        """The mean of the columns; None where one is missing."""
        return average(self.figures)

    @property
    def seconds(self) -> float:
        """How long the tasks took together."""
        return sum(one.seconds for one in self.scored.values())

    def fill(self, columns: Sequence[Column]) -> None:
        """Computes the columns of the table from the tasks that are there."""
        self.figures = [(column, figure(column, self.scored)) for column in columns]

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_atomically(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")

    def to_json(self, *, documents: bool = True) -> dict[str, Any]:
        """Returns the content of the file.

        Args:
            documents: Whether each document's scores are in it.
        """
        tasks = {name: one.to_json() for name, one in self.scored.items()}
        if not documents:
            tasks = {name: _summary(one) for name, one in tasks.items()}
        return {
            "format": FORMAT,
            "version": VERSION,
            "suite": self.suite,
            "model": self.model,
            "partial": self.limit is not None,
            "complete": bool(self.figures) and all(one is not None for _, one in self.figures),
            "columns": [_column_json(column, one) for column, one in self.figures],
            "average": self.average,
            "compared": self.compared,
            "seconds": round(self.seconds, 1),
            "settings": self.settings,
            "made_with": self.made_with,
            "tasks": tasks,
        }

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads a file that `write` wrote.

        Raises:
            UsageError: There is none, or it is something else.
        """
        if not path.is_file():
            raise UsageError(f"no results at `{path}`", hint="`mamba-sft eval` writes them, as JSON")
        try:
            found = parse_json(path.read_bytes().decode("utf-8"))
            if found["format"] != FORMAT or found["version"] != VERSION:
                raise ValueError(f"version {found['version']} of `{found['format']}`")
            scored = {str(name): TaskScores.from_json(name, one) for name, one in found["tasks"].items()}
            model = {str(name): str(value) for name, value in found["model"].items()}
            model["name"], model["fingerprint"], model["role"]  # they have to be there
            made_with, settings = dict(found["made_with"]), dict(found["settings"])
            figures = [_column_from_json(one) for one in found["columns"]]
            return cls(
                str(found["suite"]), model, settings, made_with, scored, figures, _checked(found["compared"])
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, OSError) as error:
            odd = isinstance(error, TypeError | OverflowError)
            said = "it is laid out otherwise" if odd else first_line(error)
            said = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else said
            raise UsageError(
                f"`{path}` does not hold results of `mamba-sft eval`: {said}",
                hint="give another file, or remove this one",
            ) from error


def _summary(task: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {
        name: {"value": one["value"], "stderr": one["stderr"]} for name, one in task["metrics"].items()
    }
    return {**task, "metrics": metrics} | {"documents": None, "prompts": None}


def _column_json(column: Column, one: Figure | None) -> dict[str, Any]:
    return {
        "title": column.title,
        "kind": column.kind,
        "metric": ", ".join(metric.removesuffix(",none") for metric in column.metrics),
        "value": None if one is None else one.value,
        "raw": None if one is None else one.raw,
        "stderr": None if one is None else one.stderr,
        "n": None if one is None else one.n,
        "shots": None if one is None else one.shots,
        "tasks": len(column.tasks),
        "averaged": column.averaged,
        "lower_is_better": column.falls,
    }


def _column_from_json(one: Mapping[str, Any]) -> tuple[Column, Figure | None]:
    """A column as far as it is to be shown: what it was computed from is not told."""
    kind = one["kind"]
    if kind not in get_args(Kind):
        raise ValueError(f"no kind of column is `{kind}`")
    column = Column(str(one["title"]), (), kind, bool(one["averaged"]), bool(one["lower_is_better"]))
    if one["value"] is None:
        return column, None
    error = None if one["stderr"] is None else float(one["stderr"])
    shots = None if one["shots"] is None else int(one["shots"])
    return column, Figure(float(one["value"]), float(one["raw"]), error, int(one["n"]), shots)


def _checked(compared: dict[str, Any] | None) -> dict[str, Any] | None:
    for one in compared["columns"] if compared is not None else ():
        shown = str(one["title"]), float(one.get("delta", 0.0)), float(one.get("margin") or 0.0)
        if not isinstance(compared["with"]["name"], str) or not all(shown[0]):  # type: ignore[index]
            raise ValueError("what it is compared with has no name")
    return compared


def finished(place: Path, problems: list[str] | None = None) -> list[list[Results]]:
    """Returns what was scored whole, a suite each: the model's results, and the base's where they are there.

    A file that is damaged, partial or incomplete is no result.

    Args:
        place: A run's `eval/`.
        problems: Where it is told that a file is damaged; None: a warning tells.
    """
    found: dict[str, list[Results]] = {}
    for path in sorted(place.glob("*.json")):
        if not is_result_name(path.name):
            continue
        try:
            one = Results.read(path)
        except UsageError as error:
            if problems is None:
                logger.warning("%s", error.message)
            else:
                problems.append(error.message)
            continue
        if one.limit is None and one.figures and all(figure is not None for _, figure in one.figures):
            found.setdefault(one.suite, []).append(one)
    both = {
        suite: sorted(each, key=lambda one: one.model["role"] != "tuned") for suite, each in found.items()
    }
    order = {suite: number for number, suite in enumerate(SUITES)}
    names = sorted(both, key=lambda suite: (order.get(suite, len(order)), suite))
    return [both[name] for name in names if both[name][0].model["role"] == "tuned"]


def is_result_name(name: str) -> bool:
    """Whether a file is called like results."""
    return name.startswith((*SUITES, TASKS))


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yields what differs between two mappings of settings: a name with both values, inner ones by path."""
    for name in sorted({*before, *now}):
        first, second = before.get(name), now.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from (f"{name}.{one}" for one in differing(first, second))
        elif first != second:
            yield f"{name}: {_short(first)} there, {_short(second)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def begin(path: Path, wanted: Results, *, resume: bool, overwrite: bool) -> Results:
    """Returns the results to add to: those in the file, where it may be gone on with, or `wanted`, empty.

    Args:
        path: The file.
        wanted: The suite, model and settings of now.
        resume: Whether to go on with the file.
        overwrite: Whether to replace it.

    Raises:
        UsageError: The file is there and may not be replaced, or is of other settings or another model.
    """
    if overwrite or not path.is_file():
        return wanted
    there = Results.read(path)
    differs = list(differing(there.settings, wanted.settings))
    if there.model["fingerprint"] != wanted.model["fingerprint"]:
        differs.insert(0, f"the model: it was {there.model['name']} with other weights or another template")
    if differs:
        raise UsageError(
            f"`{path}` has results that were made otherwise:\n" + "\n".join(f"  - {one}" for one in differs),
            hint="`--overwrite` replaces them, `--output DIR` writes elsewhere",
        )
    if not resume:
        tasks = count_text(len(there.scored), "task")
        raise UsageError(
            f"`{path}` has results of the same model and settings, {tasks}",
            hint="`--resume` goes on from there (and shows what is there), `--overwrite` measures again",
        )
    return there
