"""Names of lm-eval's tasks, and where its files have them, without reading all of these as it does.

lm-eval (0.4.13, read 2026-11-27) parses 14,000 files for its index, which takes ten seconds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TASK_NAME = re.compile(r"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([\w.+/-]+)""", re.MULTILINE)
"""How a file of a task says what it is called; some are written as JSON."""


def members(entry: Any) -> list[str]:
    """What a group or a tag of lm-eval's index consists of."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    parts = (entry.cfg or {}).get("task") or []
    return [
        each if isinstance(each, str) else str(each.get("group") or each.get("task"))
        for each in (parts if isinstance(parts, list) else [parts])
    ]


def likely_places(root: Path, asked: Sequence[str]) -> list[Path]:
    """The directories that tasks of these names are in as a rule: reading all takes ten seconds."""
    names = [path.name for path in root.iterdir() if path.is_dir()]
    found = []
    for wanted in asked:
        begin = [name for name in names if wanted == name or wanted.startswith(f"{name}_")]
        found += [root / max(begin, key=len)] if begin else []
    return list(dict.fromkeys(found))


def tasks_root() -> Path:
    """Where lm-eval has its tasks."""
    from lm_eval import tasks

    return Path(tasks.__file__).parent


def named_nowhere(names: Sequence[str], places: Sequence[Path]) -> tuple[list[str], set[str]]:
    """Which names stand in no file of tasks, and those that do; a second, where an index of all takes ten."""
    if not names:
        return [], set()
    known: set[str] = set()
    found: set[str] = set()
    for path in (path for place in places for path in place.rglob("*")):
        if path.suffix not in ("", ".yaml", ".yml") or not path.is_file():  # parts of a task have no ending
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        known.update(_TASK_NAME.findall(text))
        found.update(name for name in names if name in text)
    return [name for name in names if name not in found], known


def ends_as_file(name: str) -> bool:
    """Whether a name is meant as that of a file."""
    return name.endswith((".yaml", ".yml"))


def is_task_file(name: str) -> bool:
    """Whether a name is that of a file that is there."""
    return ends_as_file(name) and Path(name).is_file()


def similar(name: str, known: set[str]) -> str:
    """Returns what may have been meant by a name that is none, as a hint."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    if near:
        return f"did you mean {' or '.join(f'`{each}`' for each in near)}?"
    return "`lm-eval ls tasks` lists them; a YAML file is named with its path"
