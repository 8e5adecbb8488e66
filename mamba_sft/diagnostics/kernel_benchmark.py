"""`bench kernels`: the same measurements for a user as for this project's own tables."""

from __future__ import annotations

import datetime
import logging
import os
import platform
from typing import Any

import torch

from mamba_sft import kernels
from mamba_sft.diagnostics import bench_gpu, gpu_limits
from mamba_sft.errors import MambaSFTError, UsageError
from mamba_sft.planning.environment import describe_device, package_versions, processor_name

logger = logging.getLogger(__name__)

STOCK_LENGTH = {False: 1024, True: 64}
"""Tokens of the stock model's training step, by `quick`: at 1024 it takes minutes."""


def measure_kernels(
    device: str = "auto", *, quick: bool = False, stock_length: int | None = None
) -> dict[str, Any]:
    """Measures the scan, the convolution and what is built on them.

    Args:
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        quick: Fewer shapes and repeats, and no slow peer at full length.
        stock_length: On a CPU, tokens of the stock model's training step; 0 leaves it out; None: by `quick`.

    Returns:
        JSON-safe: `benchmark`, `machine`, `settings`, and `tables`, each a list of rows with the same keys.
        Keys end in their unit; `times_ours` is a time as a multiple of ours, `of_floor` the share of the
        hardware's limit that is reached.

    Raises:
        UsageError: There is no such device.
        MambaSFTError: There is a GPU but no kernels for it.
    """
    target = _device(device)
    if stock_length is None:
        stock_length = STOCK_LENGTH[quick]
    if target.type == "cuda":
        tables = _on_gpu(target, quick)
    else:
        from mamba_sft.diagnostics import bench_cpu

        tables = bench_cpu.measure(stock_length=stock_length, quick=quick)
    settings = {"device": str(target), "quick": quick}
    if target.type == "cpu":
        settings["stock_length"] = stock_length
    return {"benchmark": "kernels", "machine": machine(target), "settings": settings, "tables": tables}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"no device `{name}`", hint="there are `auto`, `cpu`, `cuda` and `cuda:N`")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"no device `{name}`: this machine shows {count} CUDA devices", hint="see `mamba-sft doctor`"
        )
    return device


def _on_gpu(device: torch.device, quick: bool) -> dict[str, list[dict[str, Any]]]:
    if "triton" not in kernels.backends():
        reason = kernels.why_unavailable("triton")
        raise MambaSFTError(
            f"no GPU kernels to measure: {reason}", hint="`--device cpu` measures those for the CPU"
        )
    with torch.cuda.device(device):
        dtype = torch.bfloat16 if describe_device()["bfloat16"] else torch.float16
        target = bench_gpu.Target(device, dtype, "triton", gpu_limits.GpuLimits.of(device))
        return bench_gpu.measure(target, bench_gpu.ROW_SHAPES[:1] if quick else bench_gpu.ROW_SHAPES)


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what a number must be quoted with: date, processor, clocks, versions."""
    packages = package_versions("mamba-ssm", "causal-conv1d", "mambapy")
    shown = ("torch", "transformers", "numba", "triton", "mamba-ssm", "causal-conv1d", "mambapy")
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count}
        facts |= {"cuda": torch.version.cuda} | gpu_limits.clocks(device)
    else:
        facts |= {"cpu": processor_name(), "threads": torch.get_num_threads()}
        if hasattr(os, "getloadavg"):
            facts["load"] = round(os.getloadavg()[0], 1)  # beside others, wall times say little
    facts["python"] = platform.python_version()
    return facts | {name: packages[name] for name in shown if packages[name]}
