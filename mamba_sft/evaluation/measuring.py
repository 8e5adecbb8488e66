"""The flow of `eval` after its checks: models are loaded, scored task by task, written, and compared."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mamba_sft import __version__
from mamba_sft.errors import MambaSFTError
from mamba_sft.evaluation.heldout import Heldout
from mamba_sft.evaluation.normalisation import Column
from mamba_sft.evaluation.paired import Difference, difference
from mamba_sft.evaluation.preflight import has_template
from mamba_sft.evaluation.results import Results, begin, differing
from mamba_sft.evaluation.scores import TaskScores
from mamba_sft.evaluation.settings import Settings, refuse_unknown
from mamba_sft.evaluation.suites import Problem, Progress, Suite
from mamba_sft.inference.fingerprints import fingerprint
from mamba_sft.inference.model_places import ModelPlace, find_place, no_adapter
from mamba_sft.inference.request import DTYPES, QUANTIZATIONS
from mamba_sft.run import Run, result_file, samples_file, write_atomically

if TYPE_CHECKING:
    from mamba_sft.inference.chat_model import ChatModel

Role = Literal["tuned", "base"]


@dataclass(frozen=True)
class Subject:
    """One of the models that are scored.

    Args:
        role: The one that is asked about, or what it is compared with.
        place: Where it is.
        under_adapter: It is the base below the adapter at `place`, with that one's tokenizer and template.
    """

    role: Role
    place: ModelPlace
    under_adapter: bool = False

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return self.place.section.base if self.under_adapter else self.place.name


@dataclass
class Work:
    """One suite on all models: what is to be done, and what comes of it.

    Args:
        suite: The suite, prepared.
        tasks: Its tasks.
        results: By role; those of a resumed file at the start.
        files: Where they are written, by role.
        differences: Each column with how the models differ in it; none without a second model.
        against: The results of that one.
    """

    suite: Suite
    tasks: list[str]
    results: dict[Role, Results]
    files: dict[Role, Path]
    differences: list[tuple[Column, Difference | None]] = field(default_factory=list)
    against: Results | None = None

    def todo(self, role: Role) -> list[str]:
        """Returns the tasks that one of the models has not been scored on yet."""
        return [task for task in self.tasks if task not in self.results[role].scored]


def subjects_of(place: ModelPlace, base: ModelPlace | None, *, base_below: bool) -> list[Subject]:
    """Returns the models to be scored, the base first.

    Args:
        place: The model that is asked about.
        base: Another to compare it with.
        base_below: Compare it with the base under its adapter.
    """
    tuned = Subject("tuned", place)
    if base_below:
        return [Subject("base", place, under_adapter=True), tuned]
    return [tuned] if base is None else [Subject("base", base), tuned]


def find_subjects(
    model: Run | str | Path,
    base: Run | str | Path | None = None,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
) -> tuple[list[Subject], list[Problem]]:
    """Returns the models to be scored, and what is wrong with those that are not to be found.

    Args:
        model: The one that is asked about.
        base: Another to compare it with; `auto`: the base that it was trained from.
        dtype: What to compute in; None: as it was trained.
        quantization: How to hold weights in memory: `none`, `nf4` or `int8`; None: as it was trained.

    Raises:
        UsageError: There is no such number format or quantization.
    """
    if dtype is not None:
        refuse_unknown("--dtype", dtype, sorted({*DTYPES} - {"auto"}))
    if quantization is not None:
        refuse_unknown("--quantization", quantization, QUANTIZATIONS)
    problems: list[Problem] = []
    held = {"dtype": dtype, "quantization": quantization}
    changes = {name: value for name, value in held.items() if value is not None}

    def found(where: Run | str | Path) -> ModelPlace | None:
        try:
            place = find_place(where)
        except MambaSFTError as error:
            problems.append(Problem(error.message, error.hint))
            return None
        return replace(place, section=place.section.model_copy(update=changes))

    place = found(model)
    if base is None or place is None:
        return ([] if place is None else subjects_of(place, None, base_below=False)), problems
    if base != "auto":
        return subjects_of(place, found(base), base_below=False), problems
    if place.adapter is not None:
        return subjects_of(place, None, base_below=True), problems
    if place.recipe is None:
        problems.append(Problem(no_adapter(place.name).message, "name the base: `--base MODEL`"))
        return subjects_of(place, None, base_below=False), problems
    return subjects_of(place, found(place.recipe.model.base), base_below=False), problems


def start(
    suite: Suite,
    tasks: list[str],
    subjects: Sequence[Subject],
    settings: Settings,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
) -> Work:
    """Returns what is to be done of a suite that was prepared; before weights are read into memory.

    Raises:
        UsageError: Results are there already that are not gone on with, or a model has other tokens than
            the rows of `heldout`.
    """
    work = Work(suite, tasks, {}, {})
    for subject in subjects:
        if isinstance(suite, Heldout):
            suite.refuse_other_tokens(subject.place)
        file = result_file(output, suite.name, limit=settings.limit, is_base=subject.role == "base")
        wanted = Results(
            suite.name,
            {
                "name": subject.name,
                "role": subject.role,
                "fingerprint": fingerprint(subject.place, adapted=not subject.under_adapter),
            },
            _settings_facts(suite, subject, settings),
            made_with=_made_with(),
        )
        work.results[subject.role] = begin(file, wanted, resume=resume, overwrite=overwrite)
        work.files[subject.role] = file
    return work


def start_all(
    suites: Sequence[Suite],
    subjects: Sequence[Subject],
    settings: Settings,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress = lambda stage, done, total: None,
) -> list[Work]:
    """Prepares suites and starts each of them: tasks are read, weights are not.

    Args:
        suites: What is to be run.
        subjects: The models, from `find_subjects`.
        settings: How.
        output: The directory of the results.
        resume: Go on with results that are there.
        overwrite: Replace them.
        progress: Told how many suites are prepared.
    """
    works = []
    for number, suite in enumerate(suites):
        progress("reading tasks", number, len(suites))
        tasks = suite.prepare(subjects[-1].place, settings)
        works.append(start(suite, tasks, subjects, settings, output, resume=resume, overwrite=overwrite))
    progress("reading tasks", len(suites), len(suites))
    return works


def measure(
    works: Sequence[Work],
    subjects: Sequence[Subject],
    settings: Settings,
    *,
    quantization: Any = None,
    progress: Progress,
) -> None:
    """Scores every model on every suite; each task is written as it ends.

    Args:
        works: From `start`.
        subjects: The models, from `subjects_of`.
        settings: How.
        quantization: How to hold weights in memory; None: as each was trained.
        progress: Told what goes on.
    """
    shared: ChatModel | None = None
    for subject in subjects:
        if any(work.todo(subject.role) for work in works):
            chat_model = shared or _load(subject, quantization)
            if subjects[0].under_adapter:  # base and tuned are one model in memory
                shared = chat_model
                chat_model = _side(shared, subject)
            for work in works:
                _measure_one(work, subject.role, chat_model, settings, progress)
            del chat_model  # else one model at a time
            gc.collect()
        for work in works:
            work.results[subject.role].fill(work.suite.columns())
            work.results[subject.role].write(work.files[subject.role])


def compare(work: Work, against: Results | None = None) -> None:
    """Finds how the tuned model differs from the base, or from another's results, and writes that too.

    Args:
        work: A suite that was measured.
        against: Results from a file.
    """
    tuned = work.results["tuned"]
    work.against = against if against is not None else work.results.get("base")
    if work.against is None:
        return
    before = work.against.scored
    work.differences = [(column, difference(column, before, tuned.scored)) for column in work.suite.columns()]
    tuned.compared = {
        "with": work.against.model,
        "settings_that_differ": list(differing(work.against.settings, tuned.settings)),
        "columns": [
            {"title": column.title} | ({} if one is None else vars(one)) for column, one in work.differences
        ],
    }
    tuned.write(work.files["tuned"])


def uses_template(suite: Suite, place: ModelPlace, settings: Settings) -> bool | None:
    """Whether a suite asks a model through its chat template; None where it settles that itself."""
    settle = getattr(suite, "uses_template", None)
    return None if settle is None else bool(settle(settings, has_template(place)))


def _settings_facts(suite: Suite, subject: Subject, settings: Settings) -> dict[str, Any]:
    section = subject.place.section
    held = {"dtype": section.dtype, "quantization": section.quantization}
    template = {"chat_template": uses_template(suite, subject.place, settings)}
    return template | held | settings.facts() | {"suite": suite.facts()}


def _made_with() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {
        "mamba_sft": __version__,
        "python": platform.python_version(),
        **packages,
        "begun": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _load(subject: Subject, quantization: Any) -> ChatModel:
    from mamba_sft.inference.chat_model import load_chat_model

    return load_chat_model(subject.place, quantization=quantization, needs_template=False)


def _side(both: ChatModel, subject: Subject) -> ChatModel:
    from mamba_sft.inference.chat_model import split_chat_model

    base, tuned = split_chat_model(both)
    return replace(base if subject.under_adapter else tuned, name=subject.name)


def _measure_one(
    work: Work, role: Role, chat_model: ChatModel, settings: Settings, progress: Progress
) -> None:
    results, file, tasks = work.results[role], work.files[role], work.todo(role)
    if not tasks:
        return
    results.made_with |= {"device": str(chat_model.model.device), "computed_in": str(chat_model.model.dtype)}
    for scores in _told_if_too_large(work.suite.measure(chat_model, tasks, settings, progress), settings):
        if settings.samples:
            rows = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in scores.samples]
            text = "".join(rows).encode(errors="backslashreplace").decode()
            write_atomically(samples_file(file, scores.task), text)
        results.scored[scores.task] = replace(scores, samples=())
        results.write(file)


def _told_if_too_large(measured: Iterator[TaskScores], settings: Settings) -> Iterator[TaskScores]:
    """What does not fit the memory of the GPU is the user's to mend; what was measured by then is written."""
    import torch

    try:
        yield from measured
    except torch.OutOfMemoryError as error:
        raise MambaSFTError(
            f"out of memory with `--batch-size {settings.batch_size}`; the tasks that ended are kept",
            hint="a smaller `--batch-size`, or `--quantization nf4`, and `--resume`",
        ) from error
