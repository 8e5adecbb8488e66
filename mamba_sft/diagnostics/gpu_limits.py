"""A GPU's clock and limits, and how to time work on it: the ground of `bench_gpu`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mamba_sft.planning.environment import nvidia_smi
from mamba_sft.planning.gpus import Counts

SECONDS_PER_CASE = 0.5
FLUSHED_BYTES = 256 << 20  # more than the L2 cache of any GPU


@dataclass(frozen=True)
class GpuLimits:
    """What bounds a kernel on a GPU.

    Args:
        name: As the driver gives it.
        capability: Compute capability, such as (9, 0).
        multiprocessors: How many SMs.
        clock_hz: The highest SM clock; what the GPU holds under load is often less.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_hz: float

    @classmethod
    def of(cls, device: torch.device) -> GpuLimits | None:
        """Reads a GPU's properties; None where nothing tells the clock, or on a CPU."""
        if device.type != "cuda":
            return None
        properties = torch.cuda.get_device_properties(device)
        kilohertz = float(getattr(properties, "clock_rate", 0)) or _highest_clock(device)
        if not kilohertz:
            return None
        capability = (properties.major, properties.minor)
        return cls(properties.name, capability, properties.multi_processor_count, kilohertz * 1e3)

    def floor_seconds(self, updates: int, *passes: Counts) -> float:
        """Returns the least seconds that `updates` state updates take in these passes, one after another.

        Of every pass, the pipe that takes longest binds:
        `updates * max(issued / 128, fp32 / lanes, mufu / 16) / (multiprocessors * clock)`, where `lanes` is
        the float32 results of an SM per clock: 64 for compute capability 7.x and 8.0, 128 for the others.
        It is what the instruction counts allow, not a law: a kernel with fewer instructions may beat it.
        """
        fp32_lanes = 64 if self.capability <= (8, 0) else 128
        clocks = sum(one.clocks(fp32_lanes) for one in passes)
        least: float = updates * clocks / (self.multiprocessors * self.clock_hz)
        return least


def time_of(step: Callable[[], object], device: torch.device, budget: float = SECONDS_PER_CASE) -> float:
    """Returns the median seconds of a step, with a cold L2 cache on a GPU.

    On a GPU the time is taken by events on the stream. Between two steps a buffer larger than the L2 cache is
    overwritten; while that runs, the next launches are queued, so that Python's time does not count.

    Args:
        step: What to time; it is called a few times before, to compile and to warm up.
        device: Where it runs.
        budget: About how many seconds to spend.
    """
    for _ in range(2):
        step()
    if device.type != "cuda":
        return statistics.median(_wall(step) for _ in range(3))
    torch.cuda.synchronize(device)
    once = max(_wall(step, device), 1e-6)
    repeats = min(max(int(budget / once), 5), 100)
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in events:
        flush.zero_()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    milliseconds: float = statistics.median(start.elapsed_time(end) for start, end in events)
    return milliseconds / 1e3


def _wall(step: Callable[[], object], device: torch.device | None = None) -> float:
    start = time.perf_counter()
    step()
    if device is not None:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Returns the most memory that a step holds on a GPU beyond what was there before it; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device) - before
    return peak


def clocks(device: torch.device) -> dict[str, str]:
    """Returns the clocks in MHz right now, their highest values, the power limit in watts and the driver."""
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version")
    return dict(zip(names, _asked(",".join(names), device), strict=False))


def _highest_clock(device: torch.device) -> float:
    """The highest SM clock in kHz, 0 if unknown."""
    found = _asked("clocks.max.sm", device)
    return float(found[0]) * 1e3 if found and found[0].isdigit() else 0.0


def _asked(query: str, device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    return nvidia_smi(query, f"GPU-{torch.cuda.get_device_properties(device).uuid}") or []
