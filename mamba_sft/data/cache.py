"""Prepared rows that are kept: found again by what decides them, made by one process, mapped by all.

An entry is a directory named by the digest of everything that its rows depend on, so it is never out of date:
other files, another tokenizer, template or recipe have another name. It appears by a rename when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mamba_sft.errors import DataError
from mamba_sft.model.checksums import new_digest
from mamba_sft.run import atomic_directory, final_name, write_atomically
from mamba_sft.run_reading import read_object

logger = logging.getLogger(__name__)

PLACE = "MAMBA_SFT_CACHE"
"""The environment variable that says where else than under `~/.cache/mamba-sft` things are kept."""
_FACTS = "facts.json"
_DIGESTED = 4 << 30
"""Bytes up to which a file is read to know that it is whole: a second or two, from memory or a fast disk."""


@dataclass(frozen=True)
class Entry:
    """Prepared rows on disk.

    Args:
        path: Their directory.
        sources: What they were read from, as the recipe names it.
        rows: Rows to train on.
        tokens: Tokens of an epoch.
        nbytes: What they take on disk.
        used: When they were used last, seconds since 1970.
    """

    path: Path
    sources: list[str]
    rows: int
    tokens: int
    nbytes: int
    used: float


def cache_home() -> Path:
    """Returns the directory of all that is kept from one command to the next."""
    if named := os.environ.get(PLACE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "mamba-sft"


def cache_root() -> Path:
    """Returns the directory that the entries are in."""
    return cache_home() / "data"


def key_of(parts: Mapping[str, Any]) -> str:
    """Returns the name of the entry that depends on `parts`: 32 hex digits."""
    digest = new_digest()
    digest.update(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass"))
    name: str = digest.hexdigest()
    return name


def made_once(key: str, make: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Returns the directory of an entry; calls `make` if it is not there yet.

    Two processes that want the same entry at once wait for each other: one makes it, both read it. An entry
    whose files are no longer what was written is made again: rows are made anew sooner than looked for.

    Args:
        key: From `key_of`.
        make: Fills the empty directory it is given, and returns `sources`, `rows` and `tokens` of it.

    Raises:
        DataError: The disk is full, or the directory cannot be written.
    """
    root = cache_root()
    entry = root / key
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(key):
            if entry.is_dir() and (fault := _fault_of(entry)):
                logger.warning("prepared rows in `%s` are damaged: %s; they are prepared again", entry, fault)
                shutil.rmtree(entry)
            if not entry.is_dir():
                with atomic_directory(entry) as partial:
                    facts = make(partial)
                    files = {file.name: _identity(file) for file in sorted(partial.iterdir())}
                    write_atomically(partial / _FACTS, json.dumps({**facts, "files": files}) + "\n")
            os.utime(entry / _FACTS)
    except OSError as error:
        raise DataError(
            f"cannot keep prepared rows in `{root}`: {error.strerror or error}",
            hint=f"free some space (`mamba-sft data --cached --clear`), or set {PLACE} to another directory",
        ) from error
    return entry


def entries() -> list[Entry]:
    """Returns what is kept, the last used first."""
    found = []
    for path in cache_root().glob(f"*/{_FACTS}"):
        facts = _facts(path.parent) or {"sources": ["damaged"], "rows": 0, "tokens": 0}
        nbytes = sum(file.stat().st_size for file in path.parent.iterdir())
        known = {name: facts[name] for name in ("sources", "rows", "tokens")}
        found.append(Entry(path.parent, nbytes=nbytes, used=path.stat().st_mtime, **known))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def clear() -> list[Entry]:
    """Removes all entries, and what a process left that was killed.

    Returns:
        The entries that are gone. One that is mapped by a running process stays readable there.
    """
    gone = entries()
    left = [entry.path for entry in gone] + list(cache_root().glob("*.partial"))
    for path in left:
        with _lock(final_name(path.name)):  # whoever is making it goes on; then it is an entry
            if path.exists():
                shutil.rmtree(path)
    return gone


def _facts(entry: Path) -> dict[str, Any] | None:
    """What was written down of an entry; None where that cannot be read."""
    facts = read_object(entry / _FACTS) or {}
    kinds = {"sources": list, "rows": int, "tokens": int, "files": dict}
    whole = all(isinstance(facts.get(name), kind) for name, kind in kinds.items())
    return facts if whole else None


def _fault_of(entry: Path) -> str | None:
    """What of an entry is not as it was written. Mapping a file that was cut ends the process."""
    facts = _facts(entry)
    if facts is None:
        return f"`{_FACTS}` cannot be read"
    for name, written in facts["files"].items():
        file = entry / str(name)
        if not file.is_file():
            return f"`{name}` is missing"
        if _identity(file) != written:
            return f"`{name}` is not what was written"
    return None


def _identity(file: Path) -> list[Any]:
    """Size and digest of a file; its size alone where reading it would take a start longer than seconds."""
    size = file.stat().st_size
    if size > _DIGESTED:
        return [size, None]
    with file.open("rb") as stream:
        return [size, hashlib.file_digest(stream, new_digest).hexdigest()]


def _lock(key: str) -> FileLock:
    """The lock of an entry. Its file stays: who waits on one that is gone no longer waits for the others."""
    return FileLock(cache_root() / f"{key}.lock")
