"""What the verbs wrote into a run directory, told from everything else, and the removal of that alone.

A directory is a run because `train` marked it, not because of what lies in it. A file that no verb writes, a
link, or a directory of another name is somebody's work: it is named, and nothing is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import nullcontext, suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from mamba_sft.disk import PROBE, is_file_name
from mamba_sft.errors import UsageError
from mamba_sft.run import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FACTS,
    HUB_CHECKPOINT,
    MERGE_REPORT,
    MODEL_CARD,
    MODEL_FACTS,
    Run,
    final_name,
    write_atomically,
)

MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FACTS,
    MERGE_REPORT, MODEL_FACTS, MODEL_CARD, "loss.svg", "loss.png",
)  # fmt: skip
"""What a checkpoint or an adapter consists of, with what our verbs put beside it."""
RESUME_FILES = ("*.json", "*.pt", "*.pth", "*.bin", "*.safetensors")
"""What else the trainer keeps in order to go on."""
_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini", ".nfs*")
_BY_NOTEBOOKS = (".ipynb_checkpoints", "*-checkpoint*")
"""What systems, and the editors of notebooks, write by themselves into any directory that is looked at."""
_WRITER = "mamba-sft train"
_SHOWN = 5


class Entry(NamedTuple):
    """Something in a directory: where, whether it is a directory, and whether a verb wrote it."""

    path: Path
    is_directory: bool
    ours: bool


def mark(run: Run) -> None:
    """Makes a directory known as a run; `train` does so before it writes anything else."""
    write_atomically(run.mark, json.dumps({"written_by": _WRITER}) + "\n")


def is_marked(run: Run) -> bool:
    """Whether `train` wrote this directory: it has the mark, or what a run from before there was one has."""
    if _read_json(run.mark).get("written_by") == _WRITER:
        return True
    packages = _read_json(run.environment).get("packages")
    known = isinstance(packages, dict) and {"mamba-sft", "torch"} <= packages.keys()
    return known and run.recipe.is_file()


def strangers(run: Run) -> list[str]:
    """Returns what is in a run directory and was written by no verb, by its path from there."""
    return [_below(run.path, entry) for entry in _entries(run) if not entry.ours]


def refuse_strangers(output: Path, also: Collection[str]) -> None:
    """Refuses to replace a checkpoint's directory that holds what belongs to none, or that is a link.

    Args:
        output: An earlier merge or export.
        also: Names of files that were copied there from beside the model.

    Raises:
        UsageError: There is such a thing.
    """
    if output.is_symlink():
        raise UsageError(
            f"`{output}` is a link to `{output.resolve()}`, which is not followed",
            hint="name the directory itself with `--output`",
        )
    known = [(name,) for name in (*MODEL_FILES, *also)]
    entries = _walk(output, (), known) if output.is_dir() else ()
    found = [_below(output, entry) for entry in entries if not entry.ours]
    if found:
        raise UsageError(
            f"`{output}` would be replaced, and holds what no model consists of: {listed(found)}",
            hint="move that elsewhere first, or give another directory with `--output`",
        )


def listed(names: list[str]) -> str:
    """Returns names as messages list them: the first few, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:_SHOWN]) + more


def remove(run: Run) -> list[str]:
    """Removes what the verbs wrote, one by one; the mark stays, so that a removal that is cut off can go on.

    Returns:
        What is left in the way: strangers, and what came while this was at work.
    """
    for entry in list(_entries(run)):
        if entry.is_directory:
            try:
                entry.path.rmdir()
            except OSError:  # something is in it that was not there before, or that is not ours
                continue
        elif entry.ours and entry.path != run.mark:
            with suppress(OSError) if is_by_system(entry.path.name) else nullcontext():
                entry.path.unlink(missing_ok=True)  # `.nfs...` is there as long as somebody has it open
    return strangers(run)


def _entries(run: Run) -> Iterator[Entry]:
    """What is in a run directory, the contents of a directory before itself; the run's lock is not told."""
    for entry in _walk(run.path, (), _written(run)):
        if not entry.path.name.startswith(run.lock.name):
            yield entry


def _written(run: Run) -> list[tuple[str, ...]]:
    """The names that the verbs write below a run directory, by their parts, as patterns."""
    points = run.checkpoints / "checkpoint-*"
    models = (run.adapter, run.model, run.merged, run.export / HUB_CHECKPOINT)
    paths = [
        run.mark, run.recipe, run.environment, run.data, run.metrics, run.samples, run.step_samples,
        run.answers_before, run.spikes, run.rejected, run.report, run.report_text, run.nan_batch("*"),
        run.path / f"{PROBE}*", run.checkpoints / MODEL_CARD,
        run.checkpoints / "runs" / "*" / "events.*", run.quality, run.export / "Modelfile",
        run.export / "Modelfile.*",
    ]  # fmt: skip
    exported = _read_json(run.quality).get("files")  # other GGUF files in there may be anybody's
    names = [name for name in exported if is_file_name(name)] if isinstance(exported, dict) else []
    paths += [run.export / escape(name) for name in names if name.endswith(".gguf")]
    paths += [place / name for place in (*models, points) for name in MODEL_FILES]
    paths += [points / name for name in RESUME_FILES]
    return [path.relative_to(run.path).parts for path in paths if path.is_relative_to(run.path)]


def _walk(place: Path, above: tuple[str, ...], known: Collection[tuple[str, ...]]) -> Iterator[Entry]:
    """Never follows a link: each is a stranger, and so is a directory that no known name leads through."""
    for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
        name = (*above, final_name(entry.name))  # what a killed process left half-written counts as the whole
        path = Path(entry.path)
        leads = entry.name == _BY_NOTEBOOKS[0] or any(_leads(name, one) for one in known)
        if entry.is_dir(follow_symlinks=False) and leads:
            yield from _walk(path, name, known)
            yield Entry(path, is_directory=True, ours=True)
        else:
            is_known = _is_by_nobody(name) or any(_is_one(name, one) for one in known)
            ours = entry.is_file(follow_symlinks=False) and is_known
            yield Entry(path, is_directory=False, ours=ours)


def is_by_system(name: str) -> bool:
    """Returns whether a file of this name is one that a system writes by itself."""
    return any(fnmatchcase(name, pattern) for pattern in _BY_SYSTEMS)


def _is_by_nobody(name: tuple[str, ...]) -> bool:
    return is_by_system(name[-1]) or _is_one(name[-2:], _BY_NOTEBOOKS)


def _is_one(name: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _leads(name: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(name) < len(pattern) and all(map(fnmatchcase, name, pattern))


def _below(place: Path, entry: Entry) -> str:
    directory = entry.path.is_dir() and not entry.path.is_symlink()
    return entry.path.relative_to(place).as_posix() + ("/" if directory else "")


def _read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds, if it is a file of its own and one of fields; nothing else."""
    try:
        if path.is_symlink() or not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
