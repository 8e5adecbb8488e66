"""Files that a glob names, found without walking a whole disk.

Python's own glob comes back to the same directories for each `**` of a pattern and cannot be stopped:
`/**/**/x` keeps it busy for days. Here a directory is entered once for what is left of the pattern, and
entries are counted.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from mamba_sft.errors import UsageError
from mamba_sft.wording import shown

State = tuple[Path, tuple[str, ...]]
"""A directory, and what of a pattern is still to be found below it."""
MOST_ENTRIES = 500_000
"""Names that are looked at for one pattern: seconds on a local disk."""


def matching(pattern: Path, most: int = MOST_ENTRIES) -> Iterator[Path]:
    """Yields the files and directories that a pattern names, in no order; `**` crosses directories.

    Names that begin with a dot are named by patterns that begin with one, as everywhere.

    Raises:
        UsageError: It takes more than `most` names to find out.
    """
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    waiting: list[State] = [(Path(pattern.anchor), parts)]
    seen: set[State] = set()
    looked_at = 0
    while waiting:
        here, parts = state = waiting.pop()
        while parts and not glob.has_magic(parts[0]):
            here, parts = here / parts[0], parts[1:]
        if not parts and here.parts and os.path.lexists(here):
            yield here
        if not parts or state in seen:
            continue
        seen.add(state)
        if parts[0] == "**":
            waiting.append((here, parts[1:]))
        for entry in _entries(here):
            looked_at += 1
            if looked_at > most:
                raise UsageError(
                    f"the glob `{shown(str(pattern))}` has more than {most:,} files to look through",
                    hint="begin it with the directory that the files are in",
                )
            waiting += _behind(here, entry, parts)


def _behind(here: Path, entry: os.DirEntry[str], parts: tuple[str, ...]) -> Iterator[State]:
    """What is to be looked for behind an entry of `here`, if it fits the first of `parts`."""
    first, rest = parts[0], parts[1:]
    crosses = first == "**"
    if entry.name.startswith(".") and not first.startswith("."):
        return
    if not (crosses or fnmatch.fnmatchcase(entry.name, first)):
        return
    if crosses and _is_directory(entry):
        yield here / entry.name, parts
    elif not rest or (not crosses and _is_directory(entry)):
        yield here / entry.name, rest


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except OSError:  # what cannot be listed has nothing for us, as for any glob
        return


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
