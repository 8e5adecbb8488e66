"""What a run ran on: versions, hardware, and the clock. Written to `environment.json`, shown by `doctor`."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "mamba-sft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "numba",
    "triton", "tokenizers", "safetensors",
)  # fmt: skip


def package_versions() -> dict[str, str | None]:
    """Returns the installed version of each library a run depends on, None where it is absent."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe_device() -> dict[str, Any]:
    """Returns the accelerator (or the processor) that a run will use, with its memory in bytes."""
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "type": "cuda",
            "name": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory,
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


def describe_environment() -> dict[str, Any]:
    """Returns versions, platform and device of this process as JSON-safe values."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": package_versions(),
        "device": describe_device(),
    }
