"""JSON files of a run, read back as something that a disk, a copy or a person may have changed.

They tell of a run and are no part of what was trained: a damaged one counts as none, and is told. What is
trained has hashes, and is refused where it is damaged.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mamba_sft.disk import is_file_name
from mamba_sft.json_lines import parse_json
from mamba_sft.wording import shown

logger = logging.getLogger(__name__)


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; nothing where there is no file, or a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes().decode("utf-8"))
        problem = None if isinstance(content, dict) else "it holds no JSON object"
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = str(error)
    if problem is None:
        return dict(content)
    logger.warning("`%s` is damaged and ignored: %s", path, problem)
    return {}


def read_quality(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what `quality.json` says of each exported file beside it, without what no export writes."""
    files = read_object(path).get("files", {})
    entries: dict[str, Any] = files if isinstance(files, dict) else {shown(str(files)): None}
    good = {name: entry for name, entry in entries.items() if is_file_name(name) and _is_measured(entry)}
    odd = [shown(name) for name in entries if name not in good]
    if odd:
        logger.warning("`%s` has what no export writes, which is left out: %s", path, ", ".join(odd[:5]))
    return good


def is_data_record(found: dict[str, Any]) -> bool:
    """Returns whether an object holds what is read of `data.json` again, each of its kind."""
    prompts = found.get("prompts") or {"digest": "", "rows": 0}
    return (
        _are(found.get("sources", []), {"path": str, "kept": int})
        and _are(found.get("changes", []), {"after_step": int, "what": list})
        and _are([prompts], {"digest": str, "rows": int})
        and isinstance(found.get("base", ""), str)
    )


def _are(entries: Any, kinds: dict[str, type]) -> bool:
    return isinstance(entries, list) and all(_has(entry, kinds) for entry in entries)


def _has(entry: Any, kinds: dict[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())


def _is_measured(entry: Any) -> bool:
    if not _has(entry, {"nbytes": int, "method": str}):
        return False
    measured = [entry[name] for name in ("kl", "top1") if name in entry]
    return len(measured) in (0, 2) and all(type(number) in (int, float) for number in measured)
