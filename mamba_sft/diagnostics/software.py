"""What `doctor` finds in the software: versions, the disk, the hub. Nothing here imports torch."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mamba_sft.disk import check_writable
from mamba_sft.errors import UsageError
from mamba_sft.wording import size_text

Status = Literal["ok", "note", "problem"]

SHOWN = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "numba")
"""The requirements that have a line of their own; the others share one."""
COMPILED = ("mamba-ssm", "causal-conv1d")
BASE = "tiiuae/falcon-mamba-7b"
BASE_BYTES = 14.6e9
RUN_BYTES = 2e9
"""Room that a run should find: adapter, optimizer states of the checkpoints, samples, report."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        section: Heading it stands under.
        name: What was looked at.
        status: `ok`; `note`, something could be better; `problem`, training cannot work like this.
        text: What was found.
        fix: What to do about it; None where all is well.
    """

    section: str
    name: str
    status: Status
    text: str
    fix: str | None = None


def software_findings() -> Iterator[Finding]:
    """Yields the findings on Python and the packages: installed versions against the declared ranges."""
    try:
        ranges = [Requirement(line) for line in requires("mamba-sft") or []]
        python = SpecifierSet(metadata("mamba-sft")["Requires-Python"])
    except PackageNotFoundError:
        yield Finding(
            "versions",
            "mamba-sft",
            "note",
            "not installed: ranges unknown",
            "pip install -e . in the checkout",
        )
        return
    fix = f"use a Python {python}: `uv venv --python 3.11`, or your system's package"
    yield _in_range("python", platform.python_version(), python, fix)
    needed = {one.name: one for one in ranges if one.marker is None}
    for name in SHOWN:
        if name in needed:
            yield _package(needed.pop(name))
    others = [_package(one) for one in needed.values()]
    yield from (one for one in others if one.status != "ok")
    fine = sum(one.status == "ok" for one in others)
    yield Finding("versions", "others", "ok", f"{fine} of {len(others)} as needed")
    triton = _installed("triton")
    yield Finding("versions", "triton", "ok", triton or "none: it comes with torch's CUDA build")
    yield _compiled()


def _package(needed: Requirement) -> Finding:
    fix = f"pip install '{needed.name}{needed.specifier}'"
    try:
        return _in_range(needed.name, version(needed.name), needed.specifier, fix)
    except PackageNotFoundError:
        return Finding("versions", needed.name, "problem", f"missing, needs {needed.specifier}", fix)


def _in_range(name: str, found: str, wanted: SpecifierSet, fix: str) -> Finding:
    if wanted.contains(found, prereleases=True):
        return Finding("versions", name, "ok", f"{found} (needs {wanted})")
    return Finding("versions", name, "problem", f"{found} is outside {wanted}", fix)


def _compiled() -> Finding:
    here = [f"{name} {found}" for name in COMPILED if (found := _installed(name))]
    if here:
        return Finding("versions", "compiled", "ok", f"{' and '.join(here)}: not needed, never used")
    return Finding("versions", "compiled", "ok", f"no {' or '.join(COMPILED)}: not needed, never used")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def storage() -> Iterator[Finding]:
    """Yields the findings on disk space and the model hub. A token is looked for, never shown."""
    runs = Path("runs") if Path("runs").is_dir() else Path()
    yield _room("runs", runs.resolve(), RUN_BYTES, "a run", "choose another place with `output_dir=...`")

    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    cached = base_is_cached()
    needed = 0.0 if cached else BASE_BYTES
    yield _room("hub cache", cache, needed, BASE, "free some, or set HF_HOME to another disk")
    if cached:
        yield Finding("storage", "7B base", "ok", f"{BASE} is in the cache")
    elif cached is None:
        fix = f"hf download {BASE} --force-download"
        yield Finding("storage", "7B base", "note", f"{BASE} in the cache is damaged: see its index", fix)
    elif constants.HF_HUB_OFFLINE:
        fix = f"unset HF_HUB_OFFLINE, or `hf download {BASE}` where there is a network; quickstart needs none"
        yield Finding("storage", "7B base", "note", f"{BASE} is not in the cache, and the hub is off", fix)
    else:
        yield Finding("storage", "7B base", "ok", f"{BASE}: the first run downloads 13.6 GiB")
    token = "present" if get_token() else "none (public models need none)"
    yield Finding("storage", "hub token", "ok", token)


def _room(name: str, path: Path, needed: float, by: str, fix: str) -> Finding:
    try:
        if needed:
            check_writable(path, UsageError)
    except UsageError as error:
        return Finding("storage", name, "note" if name == "runs" else "problem", error.message, fix)
    there = path
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{size_text(free)} free in {path}"
    if free < 0.1e9 and needed:
        return Finding("storage", name, "problem", f"the disk of {path} is full", fix)
    if free < needed:
        return Finding("storage", name, "note", f"{text}; {by} needs {size_text(needed)}", fix)
    return Finding("storage", name, "ok", text)


def base_is_cached() -> bool | None:
    """Returns whether every weight file of the 7B base is in the hub's cache; None: its index is damaged."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(BASE, "model.safetensors.index.json")
    if not isinstance(index, str):
        return False
    try:
        shards = set(map(str, json.loads(Path(index).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return all(isinstance(try_to_load_from_cache(BASE, shard), str) for shard in shards)
