"""Resume points on disk: complete or absent, and each of their files known by its size and hash.

One is written beside its place; its files reach the disk, then a manifest of them, and a rename gives it its
name. Whenever the process or the machine dies, what stands under that name is whole. A disk or a copy can
damage it later: the manifest tells, and training goes on from the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_sft.disk import error_number, is_file_name, sync_path
from mamba_sft.run import Run

MANIFEST = "manifest.json"
"""In a resume point: size and SHA-256 of each other file of it; written last."""
COUNTS = "counts.json"
"""In a resume point: what its run had come to so far."""
STATE = "trainer_state.json"
"""In a resume point: the trainer's own record, with every line that had been logged."""

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL, _OLD = ".partial", ".old"


Meet = Callable[[OSError | None], None]
"""Waits for the other processes, and raises in all of them what one of them was refused by a disk."""


def write_whole(final: Path, write: Callable[[Path], None], *, by_us: bool, meet: Meet) -> None:
    """Has all processes write into an empty directory, and gives it the name `final` when all have.

    On any exception `final` is as it was, and nothing half-written is left. What the disk refuses to one of
    them is raised in all of them: none goes on with a step that the others do not take.

    Args:
        final: The resume point; replaced if it is there.
        write: Writes this process's files into the directory; what needs the others was done before.
        by_us: Whether this process makes, seals and renames the directory; one of all does.
        meet: Called by all of them, after each part of it.

    Raises:
        OSError: Something cannot be written, here or by another process.
    """
    partial = final.with_name(final.name + _PARTIAL)

    def make() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        _seal(partial)
        _rename(partial, final)

    try:
        for part, alone in ((make, True), (lambda: write(partial), False), (finish, True)):
            meet(_refusal(part) if by_us or not alone else None)
    finally:
        if by_us:
            shutil.rmtree(partial, ignore_errors=True)


def _refusal(part: Callable[[], None]) -> OSError | None:
    """Does a part of the writing; returns what the disk has against it."""
    try:
        part()
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        if isinstance(error, OSError):
            return error
        return OSError(number, os.strerror(number))
    return None


def saved_points(run: Run) -> list[Path]:
    """Returns what stands under the name of a resume point, good or not, the newest first."""
    found = run.checkpoints.glob("checkpoint-*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_in_name, reverse=True)


def step_in_name(resume_point: Path) -> int:
    """Returns the step after which a resume point was saved."""
    return int(resume_point.name.rpartition("-")[2])


def find_good(run: Run) -> tuple[Path | None, list[str]]:
    """Returns the newest resume point that is what was written, and what is wrong with each newer one."""
    faults: list[str] = []
    for resume_point in saved_points(run):
        fault = fault_of(resume_point)
        if fault is None:
            return resume_point, faults
        faults.append(f"`{resume_point}` is damaged: {fault}")
    return None, faults


def fault_of(resume_point: Path) -> str | None:
    """Returns which file of a resume point is not what was written, and how; None if all are.

    One without a manifest was written by an earlier version, whose files are known to be complete (the
    trainer's record was written last) but not to be undamaged; `is_proven` tells them apart.
    """
    state = _read_json(resume_point / STATE)
    if not is_proven(resume_point):
        sound = isinstance(state, dict) and isinstance(state.get("global_step"), int)
        return None if sound else f"`{STATE}` {_missing_or(resume_point / STATE, 'is not JSON')}"
    manifest = _read_json(resume_point / MANIFEST)
    try:
        files: dict[str, dict[str, Any]] = manifest["files"]
        if not all(all(map(is_file_name, name.split("/"))) for name in files):  # of files somewhere else
            raise ValueError
        faults = [(name, _file_fault(resume_point / name, **entry)) for name, entry in files.items()]
        known = (resume_point / MANIFEST).read_text(encoding="utf-8") == _text(files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"`{MANIFEST}` {_missing_or(resume_point / MANIFEST, 'is not what was written')}"
    for name, fault in faults:
        if fault is not None:
            return f"`{name}` {fault}"
    return None if known else f"`{MANIFEST}` is not what was written"


def is_proven(resume_point: Path) -> bool:
    """Returns whether a resume point was written with a manifest, which versions before it did not."""
    return (resume_point / MANIFEST).exists() or (resume_point / COUNTS).exists()


def sweep(run: Run) -> None:
    """Removes what a process that died had not finished writing, or not finished removing."""
    for path in run.checkpoints.glob("checkpoint-*"):
        if path.name.endswith((_PARTIAL, _OLD)):
            shutil.rmtree(path, ignore_errors=True)


def rotate(run: Run, *, newest: Path, best: Path, limit: int) -> None:
    """Removes resume points until `limit` are left; the newest and the best always stay.

    Those of later steps than the newest go first: of damaged ones, or of work that was lost.
    """
    points = [path for path in saved_points(run) if path not in {newest, best}]
    kept = len({newest, best})
    for path in points:
        later = step_in_name(path) > step_in_name(newest)
        if later or kept >= limit:
            shutil.rmtree(path, ignore_errors=True)
        else:
            kept += 1


def _seal(directory: Path) -> None:
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync_path(path)
        files[path.relative_to(directory).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": _sha256(path),
        }
    (directory / MANIFEST).write_text(_text(files), encoding="utf-8")
    for path in (directory / MANIFEST, *(path for path in directory.rglob("*") if path.is_dir()), directory):
        sync_path(path)


def _text(files: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"files": files}, indent=1) + "\n"


def _rename(partial: Path, final: Path) -> None:
    old = final.with_name(final.name + _OLD)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _file_fault(path: Path, *, size: int, sha256: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes instead of {size:,}"
        return None if _sha256(path) == sha256 else "is not what was written: its hash is another"
    except OSError as error:
        return _missing_or(path, f"cannot be read: {error.strerror}")


def _missing_or(path: Path, fault: str) -> str:
    return fault if path.exists() else "is missing"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
