"""What a new run may take the place of: nothing, or with `--overwrite` an earlier run and that alone."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from mamba_sft.disk import PROBE
from mamba_sft.errors import RecipeError, TrainingError, UsageError
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run, final_name
from mamba_sft.run_contents import is_by_system, is_marked, listed, mark, remove, strangers
from mamba_sft.run_lock import hold_run

_OTHER = "choose another directory: `output_dir=runs/NAME`"


def refuse_both(*, resume: bool, overwrite: bool, finish: bool = False) -> None:
    """Refuses to go on with a run and to replace it, and to finish what is not gone on with.

    Raises:
        UsageError: Both are asked for, or `finish` without `resume`.
    """
    if finish and not resume:
        raise UsageError(
            "`--finish` goes with `--resume`: it ends a run that was stopped",
            hint="a new run ends where the recipe says: `train.max_steps`",
        )
    if resume and overwrite:
        raise UsageError(
            "`--resume` goes on with a run and `--overwrite` replaces it: both cannot be meant",
            hint="leave one out",
        )


def refuse_to_overwrite(run: Run, *, overwrite: bool) -> None:
    """Refuses to start in a directory where something would be lost; says what, and what to do.

    Args:
        run: Where a new run is about to start.
        overwrite: Whether an earlier run may go. Anything that is not a run is never touched.

    Raises:
        TrainingError: There is something.
    """
    if not run.path.is_dir():
        return
    if overwrite and run.path.is_symlink():
        raise TrainingError(
            f"`{run.path}` is a link to `{run.path.resolve()}`, and `--overwrite` follows none",
            hint=f"name the directory itself: `output_dir={quote(str(run.path.resolve()))}`",
        )
    held = sorted(name for name, _ in contents_of(run))
    if not held:
        return
    if not is_marked(run):
        raise TrainingError(f"`{run.path}` exists and is not a run: it holds {listed(held)}", hint=_OTHER)
    if overwrite:
        _refuse_strangers(run, strangers(run))
        return
    if run.result is not None:
        raise TrainingError(
            f"`{run.path}` holds a finished run", hint=f"start anew with `--overwrite`, or {_OTHER}"
        )
    raise TrainingError(
        f"`{run.path}` holds an unfinished run",
        hint=f"continue it with `--resume`, start anew with `--overwrite`, or {_OTHER}",
    )


def refuse_to_read_what_goes(recipe: Recipe) -> None:
    """Refuses a recipe that reads from the run it replaces: that would be gone before it is read.

    Raises:
        RecipeError: A field leads into `output_dir`.
    """
    run = Path(recipe.output_dir).resolve()
    for name, value in _read_fields(recipe):
        found = find_path(value)
        paths = [found] if found.exists() else map(Path, glob.glob(str(found), recursive=True))
        if any(path.resolve().is_relative_to(run) for path in paths):
            raise RecipeError(
                f"`{name}: {value}` is inside `output_dir: {recipe.output_dir}`, which `--overwrite` empties",
                hint="give the new run a directory of its own: `output_dir=runs/NAME`",
            )


def _read_fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model.base", recipe.model.base
    yield "chat.template", recipe.chat.template
    yield from ((f"data.sources.{n}.path", source.path) for n, source in enumerate(recipe.data.sources))
    if recipe.eval.prompts is not None:
        yield "eval.prompts", recipe.eval.prompts


def contents_of(run: Run) -> frozenset[tuple[str, int]]:
    """Returns what is in a run directory, by names and times, to tell later whether anything has happened.

    What a killed process left half-written does not count: it goes when the lock is taken. Nor does the file
    with which one sees for a moment whether it can write, nor what systems write by themselves.
    """
    if not run.path.is_dir():
        return frozenset()
    return frozenset(
        (path.name, path.lstat().st_mtime_ns)
        for path in list(run.path.iterdir())
        if not path.name.startswith((run.lock.name, PROBE))
        and final_name(path.name) == path.name
        and not (is_by_system(path.name) and path.is_file())
    )


@contextmanager
def sole_writer(run: Run, seen: frozenset[tuple[str, int]]) -> Iterator[None]:
    """Holds the lock of a run for training, if the directory is what it was when the training was prepared.

    Raises:
        LockedError: Another process is writing there, or no lock can be made.
        TrainingError: Another process has been there meanwhile.
    """
    with hold_run(run, "train"):
        if changed := contents_of(run) ^ seen:
            names = listed(sorted({name for name, _ in changed}))
            raise TrainingError(
                f"`{run.path}` has changed since this run was prepared: another process wrote {names}",
                hint="look at what it left, and start again",
            )
        yield


def start_anew(run: Run) -> None:
    """Makes the directory of a new run, empty but for its mark; an earlier run in it goes.

    Raises:
        TrainingError: Something lies there that no run wrote.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(run, strangers(run))
    mark(run)
    _refuse_strangers(run, remove(run))


def _refuse_strangers(run: Run, found: list[str]) -> None:
    if found:
        raise TrainingError(
            f"`{run.path}` holds what no run writes: {listed(found)}",
            hint=f"move that elsewhere first; or {_OTHER}",
        )
