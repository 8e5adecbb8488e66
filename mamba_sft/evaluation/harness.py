"""Suites that lm-eval runs: its prompts, filters and metrics; our model and our sums.

lm-eval (0.4.13, read 2026-11-27) is asked for as little as can be: tasks by name, from the directories that
have them, each built once and seeded, and `evaluate` of one task at a time, so that a finished one can be
written. Its ways of loading a model, an adapter or four bits, its group `openllm`, overrides given as a
dictionary, and the figures it adds up for groups are not used: each is wrong or broken in some case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import DataError
from mamba_sft.evaluation.around_lm_eval import data_from, quiet
from mamba_sft.evaluation.leaderboards import TASK_FILES, Leaderboard, columns_of
from mamba_sft.evaluation.normalisation import Column, Pool
from mamba_sft.evaluation.scores import TaskScores, short_digest
from mamba_sft.evaluation.settings import Settings
from mamba_sft.evaluation.suites import Problem, Progress
from mamba_sft.evaluation.task_documents import (
    SEED,
    nothing_remembered,
    read_once,
    refused,
    seeded,
    settle,
)
from mamba_sft.evaluation.task_names import (
    ends_as_file,
    is_task_file,
    likely_places,
    members,
    named_nowhere,
    similar,
    tasks_root,
)
from mamba_sft.evaluation.task_problems import (
    data_problems,
    length_problems,
    read_task_file,
    sentence_problems,
)
from mamba_sft.evaluation.task_scores import samples_of, scores_of
from mamba_sft.wording import first_line

if TYPE_CHECKING:
    from mamba_sft.inference.chat_model import ChatModel
    from mamba_sft.inference.model_places import ModelPlace

_BOOTSTRAP = 1000
"""Draws for standard errors that have no formula. 0 would leave out those that have one."""


@dataclass(frozen=True)
class Asked:
    """One entry of `--tasks`: the name of a task, group or tag, or the path of a YAML file, and shots."""

    name: str
    shots: int | None = None

    @property
    def title(self) -> str:
        """What it is called in tables."""
        return Path(self.name).stem if is_task_file(self.name) else self.name


class Harness:
    """A suite of tasks of lm-eval.

    Args:
        name: What it is called, and its results.
        asked: What is asked for.
        board: The leaderboard, where it is one.
    """

    def __init__(self, name: str, asked: Sequence[Asked], board: Leaderboard | None = None):
        self.name = name
        self.asked = tuple(asked)
        self.board = board
        self._manager: Any = None
        self._manager_has_all = False
        self._tasks: dict[str, Any] = {}
        self._columns: list[Column] = []

    @property
    def published(self) -> Mapping[str, Sequence[float]]:
        """The rows of a leaderboard's card."""
        return self.board.published if self.board is not None else {}

    def uses_template(self, settings: Settings, has_template: bool) -> bool:
        """Whether prompts go through the chat template of a model that has one or not."""
        if settings.chat_template == "auto":
            return has_template and (self.board is None or self.board.template)
        return settings.chat_template == "on"

    def problems(self, place: ModelPlace | None, settings: Settings) -> list[Problem]:
        """Looks for tasks that are not there, data sets out of reach, answers longer than `max_length`."""
        found = list(self._name_problems(settings))
        if found:
            return found
        leaves = self._leaves(settings)
        return [
            *data_problems(leaves, settings),
            *length_problems(leaves, settings),
            *sentence_problems(leaves),
        ]

    def prepare(self, place: ModelPlace, settings: Settings) -> list[str]:
        """Builds every task with its documents, once, from one seed.

        Raises:
            DataError: Documents of a task cannot be read, or a task cannot be run here; all are told at once.
        """
        manager = self._index(settings)
        failures: list[str] = []
        groups: dict[str, list[str]] = {}
        with quiet(), data_from(settings.data_dir), nothing_remembered():
            for one in self.asked:
                try:
                    with seeded():
                        built = manager.load([one.name])["tasks"]
                    for task in built.values():
                        read_once(task)
                except Exception as error:  # tasks are code of many authors
                    failures.append(f"`{one.name}`: {type(error).__name__}: {first_line(error)}")
                    continue
                for name, task in built.items():
                    failures += refused(name, task)
                    settle(task, one.shots)
                    self._tasks[name] = task
                groups[one.title] = list(built)
        if failures:
            raise DataError(
                "tasks cannot be prepared:\n" + "\n".join(f"  - {text}" for text in failures),
                hint="the file of a task, or its data set, is not what lm-eval takes",
            )
        self._columns = (
            columns_of(self.board, settings.math_metric, list(self._tasks))
            if self.board is not None
            else [column for name, leaves in groups.items() for column in self._columns_of(name, leaves)]
        )
        return list(self._tasks)

    def facts(self) -> dict[str, Any]:
        """Returns the shots and the version of each task, lm-eval's version, digests of the user's files."""
        shots = {name: task.config.num_fewshot for name, task in self._tasks.items()}
        versions = {name: str(task.VERSION) for name, task in self._tasks.items()}
        found = {"lm_eval": version("lm-eval"), "seed": SEED, "shots": shots, "task_versions": versions}
        asked = {one.title: Path(one.name) for one in self.asked if is_task_file(one.name)}
        files = {title: short_digest(file.read_bytes()) for title, file in asked.items()}
        return found | ({"files": files} if files else {})

    def columns(self) -> Sequence[Column]:
        """Returns a leaderboard's columns, or one for each metric of what `--tasks` asks for."""
        return self._columns

    def measure(
        self, chat_model: ChatModel, tasks: Sequence[str], settings: Settings, progress: Progress
    ) -> Iterator[TaskScores]:
        """Scores a model on prepared tasks, one after the other."""
        from lm_eval.evaluator import evaluate

        template = self.uses_template(settings, bool(chat_model.tokenizer.chat_template))
        counter = _Counter(progress)
        with quiet():
            model = make_model(chat_model, settings, counter.count)
        for name in tasks:
            begun = time.monotonic()
            counter.begin(name, self._tasks[name])
            with quiet(), seeded():
                found = evaluate(
                    model,
                    {"tasks": {name: self._tasks[name]}, "groups": {}, "group_map": {}},
                    limit=settings.limit,
                    bootstrap_iters=_BOOTSTRAP,
                    apply_chat_template=template,
                    fewshot_as_multiturn=template,
                )
            scores = scores_of(name, self._tasks[name], found, time.monotonic() - begun)
            yield (
                replace(scores, samples=samples_of(found["samples"][name])) if settings.samples else scores
            )

    def _index(self, settings: Settings) -> Any:
        """lm-eval's index of tasks, as much of it as what is asked for needs."""
        self._likely_index(settings)
        if self.board is None and not self._manager_has_all and not self._is_complete():
            from lm_eval import tasks

            with quiet():
                self._manager = tasks.TaskManager(include_path=_own_places(settings))  # ten seconds
            self._manager_has_all = True
        return self._manager

    def _likely_index(self, settings: Settings) -> Any:
        """The index of the directories that have the tasks by their names; it may lack some."""
        if self._manager is None:
            from lm_eval import tasks

            root = tasks_root()
            if self.board is not None:
                places = [*(root / name for name in self.board.directories), TASK_FILES]
            else:
                places = [*likely_places(root, [one.name for one in self.asked]), *_own_places(settings)]
            with quiet():
                self._manager = tasks.TaskManager(include_path=places, include_defaults=False)
        return self._manager

    def _is_complete(self) -> bool:
        """Whether all that is asked for is in the index, with all of its parts.

        Of a tag one cannot tell: any directory may have more tasks with it.
        """
        index = self._manager.task_index

        def there(name: str) -> bool:
            entry = index.get(name)
            if entry is None or entry.kind.name == "TAG":
                return False
            return entry.kind.name != "GROUP" or all(map(there, members(entry)))

        return all(is_task_file(one.name) or there(one.name) for one in self.asked)

    def _name_problems(self, settings: Settings) -> Iterator[Problem]:
        absent = [one.name for one in self.asked if ends_as_file(one.name) and not is_task_file(one.name)]
        if absent:  # before lm-eval looks for names, which takes seconds
            for name in absent:
                yield Problem(f"no file `{name}`", "tasks are their names in lm-eval, or YAML files")
            return
        likely = self._likely_index(settings).task_index
        missing = [one.name for one in self.asked if one.name not in likely and not is_task_file(one.name)]
        unknown, known = named_nowhere(missing, [tasks_root(), *_own_places(settings)])
        if not unknown:
            known = set(self._index(settings).all_tasks)
            unknown = [name for name in missing if name not in known]
        for name in unknown:
            yield Problem(f"no task `{name}`", similar(name, known))

    def _leaves(self, settings: Settings) -> dict[str, Mapping[str, Any]]:
        """The configurations of all tasks asked for, from their files alone."""
        index = self._index(settings).task_index
        found: dict[str, Mapping[str, Any]] = {}

        def walk(name: str) -> None:
            entry = index.get(name)
            if entry is None:
                return
            if entry.kind.name not in ("TAG", "GROUP"):
                found[name] = entry.cfg or {}
                return
            for child in members(entry):
                walk(child)

        for one in self.asked:
            if one.name in index:
                walk(one.name)
            else:
                found[one.name] = read_task_file(one.name)
        return found

    def _columns_of(self, name: str, leaves: Sequence[str]) -> Iterator[Column]:
        """A column for each metric that all tasks of a group have, over all their documents.

        What is no mean over documents, such as a perplexity or an F1, has a column for each task.
        """
        shared: list[str] | None = None
        for leaf in leaves:
            task = self._tasks[leaf]
            metrics = [f"{metric},{key}" for key in _filters(task) for metric in task.aggregation()]
            shared = metrics if shared is None else [one for one in shared if one in metrics]
        for metric in shared or ():
            bare = metric.partition(",")[0]
            better = self._tasks[leaves[0]].higher_is_better().get(bare, True)
            means = all(_is_mean(self._tasks[leaf].aggregation()[bare]) for leaf in leaves)
            for title, tasks in [(name, tuple(leaves))] if means else [(leaf, (leaf,)) for leaf in leaves]:
                yield Column(
                    f"{title} {metric.removesuffix(',none')}",
                    (Pool(tasks, metric),),
                    kind="number",
                    averaged=False,
                    falls=better is False,
                )


def make_model(chat_model: ChatModel, settings: Settings, on_request: Callable[[], None]) -> Any:
    """Returns a loaded model as lm-eval asks it.

    Args:
        chat_model: The model.
        settings: How long a text may be, and how many are read at a time.
        on_request: Called as each request is answered.
    """
    from mamba_sft.evaluation.harness_model import HarnessModel

    return HarnessModel(
        chat_model,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        on_request=on_request,
    )


class _Counter:
    """Counts the requests of a task that have been answered.

    Args:
        progress: Told of each.
    """

    def __init__(self, progress: Progress):
        self.progress = progress
        self.name, self.task, self.done = "", None, 0

    def begin(self, name: str, task: Any) -> None:
        """A task begins."""
        self.name, self.task, self.done = name, task, 0
        self.progress(name, 0, 1)

    def count(self) -> None:
        """A request is answered; by then all of the task's are known."""
        self.done += 1
        total = len(self.task.instances) if self.task is not None else 1
        self.progress(self.name, min(self.done, total), total)


def _is_mean(aggregation: Any) -> bool:
    """Whether a task's score is the mean of its documents', so that documents of several can be pooled."""
    return getattr(aggregation, "__name__", "") in ("mean", "nanmean")


def _filters(task: Any) -> list[str]:
    return [one.name for one in getattr(task, "_filters", ())] or ["none"]


def _own_places(settings: Settings) -> list[Path]:
    return [settings.include_path] if settings.include_path is not None else []
