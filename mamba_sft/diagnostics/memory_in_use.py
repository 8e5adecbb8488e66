"""The memory in use at this moment: of the GPU where there is one, and of this process."""

from __future__ import annotations

from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from mamba_sft.planning.environment import describe_device
from mamba_sft.processes import peak_rss
from mamba_sft.showing import Showing


@dataclass(frozen=True)
class MemoryNow(Showing):
    """Memory in bytes.

    Args:
        device: The GPU's name, or the processor's.
        gpu_total: The GPU's memory; None without one, and so the next three.
        gpu_used: What all programs hold of it.
        gpu_tensors: What tensors of this process hold.
        gpu_peak: The most that they held at once so far.
        host_total: The machine's memory.
        host_available: What of it a program could still take.
        process: What this process holds.
        process_peak: The most that it held so far.
    """

    device: str
    gpu_total: int | None
    gpu_used: int | None
    gpu_tensors: int | None
    gpu_peak: int | None
    host_total: int
    host_available: int
    process: int
    process_peak: int


def memory_now() -> MemoryNow:
    """Returns what is in use now."""
    import torch

    total = used = tensors = peak = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used, tensors, peak = total - free, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    host = psutil.virtual_memory()
    return MemoryNow(
        device=describe_device()["name"],
        gpu_total=total,
        gpu_used=used,
        gpu_tensors=tensors,
        gpu_peak=peak,
        host_total=host.total,
        host_available=host.available,
        process=psutil.Process().memory_info().rss,
        process_peak=peak_rss(),
    )
