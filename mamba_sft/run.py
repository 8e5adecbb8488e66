"""The layout of a run directory. No other module knows these file names.

A run is the only contract between verbs: `train` writes it, `merge`, `export`, `chat` and `eval` read it
and add to it. Every artifact appears by an atomic rename, so a file under its final name is complete.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.credentials import without_secrets
from mamba_sft.disk import sync, sync_path, sync_tree
from mamba_sft.errors import UsageError
from mamba_sft.json_lines import read_json_lines
from mamba_sft.processes import NAME, Process
from mamba_sft.run_reading import is_data_record, read_object
from mamba_sft.showing import Showing, notebook_room

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)

RUNS_ROOT = Path("runs")
SUITES = ("leaderboard-v2", "leaderboard-v1", "heldout", "instructions")
"""What a model can be scored on by name, and what their results are called."""
TASKS = "tasks-"
"""How the results of tasks are called that were named one by one."""
EVALUATIONS = Path("evaluations")
"""Where the results go of models that belong to no run."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names for the two files of an adapter."""
BASE_FACTS = "base.json"
"""Beside an adapter: which base it belongs to, and what was done to that base."""
MERGE_REPORT = "merge.json"
"""In a merged checkpoint: what was merged, and what its check found."""
MODEL_FACTS = "training.json"
"""In a model that was trained whole: what it began as, and digests of its tensors."""
HUB_CHECKPOINT, MODEL_CARD = "hf", "README.md"
"""The exported checkpoint inside `export/`, and its model card."""
COMPARISON = "comparison.html"
"""Beside the runs that it compares."""
QUALITY = "quality.json"
"""Beside exported GGUF files: what was measured of each."""

_HALF = re.compile(rf"\.({NAME})\.(partial|old)$")


@dataclass(frozen=True)
class Run(Showing):
    """A run directory, by its parts.

    Example: `Run.open("runs/quickstart").metrics`, or `Run.newest()` as the last line of a cell.

    Args:
        path: The directory, e.g. `runs/quickstart`; a text becomes a `Path`.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def resume_command(self) -> str:
        """The command that goes on with it, as a shell takes it."""
        return f"mamba-sft train {shlex.quote(str(self.recipe))} --resume"

    @property
    def mark(self) -> Path:
        """What `train` makes a directory known by as a run."""
        return self.path / "run.json"

    @property
    def lock(self) -> Path:
        """Who is writing into the directory, while somebody does."""
        return self.path / "lock.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe, as YAML."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware and seeds of the run, as JSON."""
        return self.path / "environment.json"

    @property
    def adapter(self) -> Path:
        """The final PEFT adapter with its tokenizer and chat template."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The final model of a run without an adapter, whole, as `transformers` loads it."""
        return self.path / "model"

    @property
    def result(self) -> Path | None:
        """What training ended with: the adapter, or the model where all weights were trained; None before."""
        return next((path for path in (self.adapter, self.model) if path.is_dir()), None)

    @property
    def checkpoints(self) -> Path:
        """The trainer's checkpoints, one directory per saved step."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def metrics(self) -> DataFrame:
        """What was logged, as a table of pandas: a row for each step, a column for each figure.

        Example: `run.metrics["loss"].min()`, or `run.metrics.to_csv("metrics.csv")`.
        """
        import pandas

        rows: dict[int, dict[str, Any]] = {}
        for line in self.read_metrics():
            if isinstance(line.get("step"), int):
                rows.setdefault(line["step"], {}).update(line)
        table = pandas.DataFrame(list(rows.values()), columns=None if rows else ["step"])
        return table.set_index("step")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the logged lines of the run, in order; none before the first step."""
        if not self.metrics_file.exists():
            return []
        lines = list(read_json_lines(self.metrics_file))
        good = [line.value for line in lines if line.problem is None and isinstance(line.value, dict)]
        if len(good) < len(lines):
            logger.warning("%d damaged lines of `%s` are left out", len(lines) - len(good), self.metrics_file)
        return good

    @property
    def data(self) -> Path:
        """What the rows were, as `mamba-sft data` shows it, and digests of them, as JSON."""
        return self.path / "data.json"

    def read_data(self) -> dict[str, Any]:
        """Returns what was kept of the data; nothing in a run from before that, or if it is damaged."""
        found = read_object(self.data)
        if is_data_record(found):
            return found
        logger.warning("`%s` is not what a run writes and is ignored", self.data)
        return {}

    @property
    def samples_file(self) -> Path:
        """Answers to the sample prompts, before and after training, one JSON object per prompt."""
        return self.path / "samples.jsonl"

    def samples(self) -> Any:
        """Returns the sample prompts with the answers before and after training, a list that shows itself.

        Example: `run.samples()[0].after`.
        """
        return notebook_room("answers").samples_of(self)

    def plot(self) -> Any:
        """Returns the curves of training and validation loss, which a notebook draws.

        Example: `run.plot()` as the last line of a cell, or `run.plot().save("loss.svg")`.
        """
        return notebook_room("plots").loss_plot(self)

    @property
    def answers_before(self) -> Path:
        """Answers to the sample prompts before training, kept until the run is finished, as JSON."""
        return self.path / "answers-before.json"

    @property
    def step_samples(self) -> Path:
        """Answers to a few of the sample prompts while training went on, one JSON object per answer."""
        return self.path / "step-samples.jsonl"

    @property
    def spikes(self) -> Path:
        """Steps whose loss or gradient was far outside of its course, with the rows they were made of."""
        return self.path / "spikes.jsonl"

    @property
    def rejected(self) -> Path:
        """Rows that `data.on_bad_row: skip` dropped, with the reason and where they came from."""
        return self.path / "rejected.jsonl"

    @property
    def report(self) -> Path:
        """The run report, one self-contained HTML page."""
        return self.path / "report.html"

    def nan_batch(self, step: int | str) -> Path:
        """The batch that gave a loss or a gradient that is not a number."""
        return self.path / f"nan-batch-step-{step}.json"

    @property
    def report_text(self) -> Path:
        """The run report as Markdown."""
        return self.path / "report.md"

    @property
    def merged(self) -> Path:
        """The merged checkpoint, as `transformers` loads it."""
        return self.path / "merged"

    @property
    def export(self) -> Path:
        """Exported files (GGUF, Ollama, model card)."""
        return self.path / "export"

    @property
    def quality(self) -> Path:
        """What was measured of each exported GGUF file, as JSON."""
        return self.export / QUALITY

    @property
    def eval(self) -> Path:
        """Evaluation results: a file for each suite, as JSON, and what was asked and answered beside it."""
        return self.path / "eval"

    @classmethod
    def open(cls, where: Run | str | Path) -> Run:
        """Returns the run at `where`.

        Example: `Run.open("runs/quickstart").samples()`.

        Raises:
            UsageError: `where` is not a run directory, or nothing that could name one.
        """
        if not isinstance(where, Run | str | Path):
            raise UsageError(
                f"a run is a `Run` or the path of one, and this is a `{type(where).__name__}`",
                hint="`train` returns the run; `Run.newest()` is the one that was trained last",
            )
        run = where if isinstance(where, Run) else cls(Path(where))
        refuse_gguf(run.path)
        if run.path.is_file():
            raise UsageError(
                f"`{run.path}` is a file; a run is a directory",
                hint="give the directory that `mamba-sft train` wrote, the recipe's `output_dir`",
            )
        if not run.path.is_dir():
            names = [one.path.name for one in cls.all_under(run.path.parent)]
            close = get_close_matches(run.path.name, names, n=1)
            hint = (
                f"did you mean `{run.path.with_name(close[0])}`?"
                if close
                else "`mamba-sft train RECIPE` makes one"
            )
            raise UsageError(f"no run at `{run.path}`", hint=hint)
        if not run.recipe.is_file():
            raise UsageError(
                f"`{run.path}` is not a run directory: it has no `{run.recipe.name}`",
                hint="give the directory that `mamba-sft train` wrote",
            )
        return run

    @classmethod
    def all_under(cls, root: str | Path = RUNS_ROOT) -> list[Run]:
        """Returns the runs under `root`, the most recently trained first, by the age of their recipes."""
        recipes = Path(root).glob(f"*/{cls(Path(root)).recipe.name}")
        found = sorted(recipes, key=lambda path: path.stat().st_mtime, reverse=True)
        return [cls(recipe.parent) for recipe in found]

    @classmethod
    def newest(cls, root: str | Path = RUNS_ROOT) -> Run:
        """Returns the most recently trained run under `root`, by the age of its recipe.

        Example: `run = Run.newest()` after a restart of the notebook.

        Raises:
            UsageError: There is none.
        """
        runs = cls.all_under(root)
        if not runs:
            raise UsageError(
                f"no run under `{root}/`", hint="`mamba-sft train quickstart` makes one in minutes"
            )
        return runs[0]


def evaluation_place(where: Run | str | Path) -> Path:
    """Returns where results go of what is at `where`: into the run that it is or lies in, or else apart.

    Args:
        where: A run, a directory with a model or an adapter, or a hub id.
    """
    path = where.path if isinstance(where, Run) else Path(where).expanduser()
    if Run(path).recipe.is_file():
        return Run(path).eval
    if path.is_dir():
        above = next((one for one in path.resolve().parents[:2] if Run(one).recipe.is_file()), None)
        if above is not None:  # a merged checkpoint, an exported one, a checkpoint of the training
            return Run(above).eval / path.name
        return EVALUATIONS / path.resolve().name
    return EVALUATIONS / str(where).replace("/", "--")


def result_file(place: Path, suite: str, *, limit: int | None = None, is_base: bool = False) -> Path:
    """Returns the file of a suite's results.

    Args:
        place: The directory.
        suite: The suite.
        limit: Documents of each task, where that was limited: partial results never take a whole one's place.
        is_base: Whether they are the base's, which lie beside those of the tuned model.
    """
    parts = [suite, *([f"limit-{limit}"] if limit is not None else []), *(["base"] if is_base else [])]
    return place / f"{'.'.join(parts)}.json"


def samples_file(results: Path, task: str) -> Path:
    """Returns the file, beside a suite's results, of what was asked and answered in one of its tasks."""
    return results.with_suffix(".samples") / f"{task.replace('/', '--')}.jsonl"


def refuse_gguf(path: Path) -> None:
    """Refuses a GGUF file where a run or a model is needed, and says what reads it.

    Raises:
        UsageError: The path is called like one.
    """
    if path.suffix.lower() != ".gguf":
        return
    origin = Run(path.parent.parent)
    ours = origin.export.name == path.parent.name and origin.recipe.is_file()
    source = f"`{origin.path}`" if ours else "the run or checkpoint that it was made from"
    raise UsageError(
        f"`{path}` is a GGUF file, for llama.cpp; here a run is needed, or a checkpoint in safetensors",
        hint=f"give {source}; `mamba-sft chat {shlex.quote(str(path))}` talks to the file",
    )


def check_output(output: Path, sources: Iterable[Path | None], doing: str) -> None:
    """Refuses a place that is a file, or that holds what would be read.

    Args:
        output: Where the result is to go.
        sources: Directories that are read; None where there is none.
        doing: What is done with them, for the message: `merged`, `exported`.

    Raises:
        UsageError: `output` is a file or one of the sources.
    """
    if os.path.exists(output) and not os.path.isdir(output):  # which, unlike a `Path`, take any name
        raise UsageError(f"`{output}` is a file", hint="give a directory with `--output`")
    place = os.path.realpath(output)
    if any(source is not None and os.path.realpath(source) == place for source in sources):
        raise UsageError(f"`{output}` is what would be {doing}; the result needs a directory of its own")


def final_name(name: str) -> str:
    """Returns the name that a file or directory will have once it is whole; any other name as it is."""
    return _HALF.sub("", name)


def own_partial(path: Path) -> Path:
    """Returns the name under which this process writes what is to be `path`; no other process has it."""
    return path.with_name(f"{path.name}.{Process.own().name}.partial")


def remove_leftovers(place: Path, name: str | None = None, *, locked: bool) -> None:
    """Removes what processes that were killed left half-written in a directory.

    Args:
        place: The directory.
        name: Of which file or directory; None: of any.
        locked: Whether the caller holds the lock of the place. If so, what is left by a process of which
            nothing can be seen from here goes too; otherwise only what is left by one that has ended.
    """
    for half, final, process in _halves(place):
        if (name is not None and final.name != name) or (half.suffix == ".old" and not final.exists()):
            continue
        runs = process.runs
        if runs is False or (locked and (runs is None or process == Process.own())):
            if half.is_dir() and not half.is_symlink():
                shutil.rmtree(half, ignore_errors=True)
            else:
                half.unlink(missing_ok=True)


def _halves(place: Path) -> Iterator[tuple[Path, Path, Process]]:
    """What is half-written in a directory, what it was to be, and by which process."""
    for entry in list(os.scandir(place)) if place.is_dir() else []:
        found = _HALF.search(entry.name)
        process = Process.from_name(found[1]) if found else None
        if process is not None:
            yield Path(entry.path), place / final_name(entry.name), process


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yields an empty directory under a name of this process's own, and renames it to `final` at the end.

    By then all that is in it is on the disk; what was large and is there already is not waited for again.
    A previous `final` is replaced only at that moment; on any exception the new directory is removed and
    `final` is as it was. Where a process was killed between the two renames, `final` is put back first. The
    caller holds the lock of the place.
    """
    for half, whole, _ in _halves(final.parent):
        if whole == final and half.suffix == ".old" and not final.exists():
            half.rename(final)
    remove_leftovers(final.parent, final.name, locked=True)
    partial = own_partial(final)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)  # else a power cut may leave the new name with nothing behind it
        _replace_directory(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_directory(partial: Path, final: Path) -> None:
    old = partial.with_suffix(".old")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync_path(final.parent)  # before the old one goes
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path` through a file of this process's own and a rename.

    Tokens and passwords of the environment do not come into it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name, locked=False)
    partial = own_partial(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(without_secrets(text))
            file.flush()
            sync(file.fileno())  # else a power cut may leave the new name with nothing behind it
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
