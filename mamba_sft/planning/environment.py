"""What a run ran on: versions, hardware, and the clock. Written to `environment.json`, shown by `doctor`."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mamba_sft.credentials import masked
from mamba_sft.processes import LAUNCHED

PACKAGES = (
    "mamba-sft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "numba",
    "triton", "tokenizers", "safetensors",
)  # fmt: skip


def package_versions(*more: str) -> dict[str, str | None]:
    """Returns the installed versions of what a run depends on and of `more`, None where one is absent."""
    found: dict[str, str | None] = {}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe_device() -> dict[str, Any]:
    """Returns the accelerator (or the processor) that a run will use, with its memory in bytes."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "type": "cuda",
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": getattr(gpu, "L2_cache_size", 0),
            "count": torch.cuda.device_count(),
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "type": "cpu",
        "name": processor_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE") if pages else None,
    }


def processor_name() -> str:
    """Returns the processor's model name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def nvidia_smi(query: str, device: str | None = None) -> list[str] | None:
    """Returns what `nvidia-smi` answers to a query, or None where there is none or it fails.

    Args:
        query: Comma-separated fields of `--query-gpu`, such as `name,driver_version`.
        device: UUID or index; None: the first GPU.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    words += [] if device is None else [f"--id={device}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.strip().splitlines()[:1]
    return [field.strip() for field in first[0].split(",")] if first else None


def describe_call() -> dict[str, str | None]:
    """Returns the date, and the command that started this process or all of its kind; None: not ours."""
    program, *words = sys.argv or [""]
    ours = Path(program).stem == "mamba-sft" or Path(program).parts[-2:] == ("mamba_sft", "__main__.py")
    command = os.environ.get(LAUNCHED) or (shlex.join(["mamba-sft", *words]) if ours else None)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command and masked(command),
    }


def describe_processes() -> dict[str, Any]:
    """Returns how many processes work together, on how many machines, and how they share the work.

    As torchrun and accelerate say it in the environment.
    """
    processes, here = (_number(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return {
        "processes": processes,
        "nodes": max(1, processes // here),
        "parallel": "ddp" if processes > 1 else None,
    }


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return max(1, int(text)) if text.isdecimal() else 1


def describe_environment() -> dict[str, Any]:
    """Returns versions, platform, device and number of processes as JSON-safe values."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "device": describe_device(),
        **describe_processes(),
    }
