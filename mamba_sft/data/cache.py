"""Prepared rows that are kept: found again by what decides them, made by one process, mapped by all.

An entry is a directory named by the digest of everything that its rows depend on, so it is never out of date:
other files, another tokenizer, template or recipe have another name. It appears by a rename when it is whole.
"""

from __future__ import annotations

import json
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

PLACE = "MAMBA_SFT_CACHE"
"""The environment variable that says where else than under `~/.cache/mamba-sft` things are kept."""
_FACTS = "facts.json"


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


def cache_root() -> Path:
    """Returns the directory that the entries are in."""
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba-sft"
    return Path(os.environ.get(PLACE) or general).expanduser() / "data"


def key_of(parts: Mapping[str, Any]) -> str:
    """Returns the name of the entry that depends on `parts`: 32 hex digits."""
    digest = new_digest()
    digest.update(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass"))
    name: str = digest.hexdigest()
    return name


def made_once(key: str, make: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Returns the directory of an entry; calls `make` if it is not there yet.

    Two processes that want the same entry at once wait for each other: one makes it, both read it.

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
            if not (entry / _FACTS).is_file():
                with atomic_directory(entry) as partial:
                    facts = make(partial)
                    write_atomically(partial / _FACTS, json.dumps(dict(facts)) + "\n")
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
    for facts in cache_root().glob(f"*/{_FACTS}"):
        content = json.loads(facts.read_text(encoding="utf-8"))
        nbytes = sum(file.stat().st_size for file in facts.parent.iterdir())
        found.append(Entry(facts.parent, nbytes=nbytes, used=facts.stat().st_mtime, **content))
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


def _lock(key: str) -> FileLock:
    """The lock of an entry. Its file stays: who waits on one that is gone no longer waits for the others."""
    return FileLock(cache_root() / f"{key}.lock")
