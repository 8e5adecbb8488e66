"""What `doctor` finds in the machine: the device, the number format, the kernels, 4-bit weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from mamba_sft import kernels
from mamba_sft.diagnostics.software import Finding
from mamba_sft.planning.environment import nvidia_smi
from mamba_sft.wording import size_text

OPERATIONS = {"scan": "selective_scan", "convolution": "causal_conv1d"}
ELSEWHERE = {
    "reference": "the definition, a slow Python loop for float64 and for checking",
    "cpu": "for tensors on the CPU",
    "triton": "for tensors on a GPU",
}
TOLERANCE = 1e-5
"""Relative RMS difference from the definition in float32 that counts as the same."""
NO_CARD = "none"

PROBE = """
import sys
from mamba_sft.errors import ModelError
from mamba_sft.model.quantization import check_nf4
try:
    check_nf4()
except ModelError as error:
    sys.exit(error.message)
"""
"""Runs in a process of its own: beside the other checks, and a library that crashes takes nothing with it."""


def device(facts: dict[str, Any]) -> Iterator[Finding]:
    """Yields the findings on the device of a run.

    Args:
        facts: From `environment.describe_device`.
    """
    if facts["type"] == "cuda":
        yield from _gpu(facts)
    else:
        yield from _processor(facts)
    dtype, why = advised_dtype(facts)
    yield Finding("device", "number format", "ok", f"{str(dtype).removeprefix('torch.')}: {why}")


def _gpu(facts: dict[str, Any]) -> Iterator[Finding]:
    capability = facts["compute_capability"]
    text = f"{facts['name']}, compute capability {capability}"
    text += f" (1 of {facts['count']})" if facts["count"] > 1 else ""
    if _runs_on(capability, torch.cuda.get_arch_list()):
        yield Finding("device", "GPU", "ok", text)
    else:
        fix = "install a build of torch for this GPU: https://pytorch.org/get-started"
        built = ", ".join(torch.cuda.get_arch_list())
        yield Finding("device", "GPU", "problem", f"{text}; this torch is built for {built}", fix)
    free, total = torch.cuda.mem_get_info()
    memory = f"{size_text(free)} of {size_text(total)} free"
    busy = free < 0.8 * total
    used_by = "see `nvidia-smi` for what holds the rest" if busy else None
    yield Finding("device", "GPU memory", "note" if busy else "ok", memory, used_by)
    driver = (nvidia_smi("driver_version") or ["unknown"])[0]
    yield Finding("device", "CUDA", "ok", f"{torch.version.cuda} in torch, driver {driver}")


def _runs_on(capability: str, built: list[str]) -> bool:
    """Whether a build runs on a GPU: code of the same major and no newer minor number, or older PTX."""
    major, minor = map(int, capability.split("."))
    for name in built:
        kind, _, digits = name.partition("_")
        number = int("".join(c for c in digits if c.isdigit()))
        same_major = number // 10 == major and number % 10 <= minor
        if same_major or (kind == "compute" and number <= 10 * major + minor):
            return True
    return False


def _processor(facts: dict[str, Any]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    level = torch.backends.cpu.get_cpu_capability()
    yield Finding("device", "CPU", "ok", f"{facts['name']}, {cores} cores, {level}")
    threads = torch.get_num_threads()
    if threads < min(cores, psutil.cpu_count(logical=False) or cores):
        fix = f"unset OMP_NUM_THREADS, or set it to {cores}"
        yield Finding("device", "threads", "note", f"{threads}: not every core is used", fix)
    memory = psutil.virtual_memory()
    text = f"{size_text(memory.available)} of {size_text(memory.total)} free"
    yield Finding("device", "memory", "ok", text)
    unused = _unused_card()
    yield unused
    if unused.text == NO_CARD:
        yield _build()


def _build() -> Finding:
    """Which build of torch a machine without a card has: each works, one is far larger."""
    if torch.version.cuda is None:
        return Finding("device", "build of torch", "ok", "without CUDA: the right one here")
    text = f"for CUDA {torch.version.cuda}: works here, and takes some 5 GB that the one without does not"
    return Finding("device", "build of torch", "ok", text)


def _unused_card() -> Finding:
    gpu = nvidia_smi("name,driver_version")
    if gpu is None:
        fix = (
            "the 7B base wants an NVIDIA GPU of 16 GB or more; the CPU is for the tiny base and for checking"
        )
        return Finding("device", "GPU", "note", NO_CARD, fix)
    name, driver = gpu
    if torch.version.cuda is None:
        fix = "install torch's CUDA build: pip install --force-reinstall torch"
        return Finding("device", "GPU", "note", f"{name} is here, but this torch is built without CUDA", fix)
    fix = f"torch is built for CUDA {torch.version.cuda}: update the driver, or see CUDA_VISIBLE_DEVICES"
    return Finding("device", "GPU", "note", f"{name} (driver {driver}) is here, but torch cannot use it", fix)


def advised_dtype(facts: dict[str, Any]) -> tuple[torch.dtype, str]:
    """Returns the number format to train in on a device, and why."""
    if facts["type"] == "cpu":
        return torch.float32, "the fastest on most CPUs"
    if facts["bfloat16"]:
        return torch.bfloat16, "this GPU computes in it"
    return torch.float16, "this GPU has no bfloat16; states and sums stay in float32"


def compute(facts: dict[str, Any]) -> Iterator[Finding]:
    """Yields the findings on the kernels: what `auto` picks for each operation and why not another."""
    dtype, _ = advised_dtype(facts)
    picked, _ = kernels.automatic(facts["type"], dtype)
    reasons = {name: kernels.why_unavailable(name) for name in kernels.BACKENDS}
    cold = picked == "cpu" and not compiled_loops()
    for name, operation in OPERATIONS.items():
        yield _operation(name, operation, picked, cold, facts["type"])
    for name, reason in reasons.items():
        if name != picked:
            yield Finding("kernels", name, "ok", f"not used: {reason or ELSEWHERE[name]}")
    if picked == "cpu":
        yield _cache(cold)
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    if policy.upper() == "PASSIVE" or facts["type"] == "cuda":
        yield Finding("kernels", "OMP_WAIT_POLICY", "ok", policy)
    else:
        fix = "set it to PASSIVE: threads that spin while they wait keep the kernels off the cores"
        yield Finding("kernels", "OMP_WAIT_POLICY", "note", policy, fix)


def _operation(name: str, operation: str, picked: str, cold: bool, device_type: str) -> Finding:
    if picked == "reference":
        best = "triton" if device_type == "cuda" else "cpu"
        reason = kernels.why_unavailable(best) or f"`{best}` can run but is not chosen"
        return Finding("kernels", name, "note", "reference, a slow Python loop", f"{best}: {reason}")
    if cold:
        return Finding("kernels", name, "ok", f"{picked}; the first call compiles it, some 20 s")
    try:
        difference = disagreement(operation, picked, device_type)
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fix = "train with `model.kernels=reference`, which is slow, and report this"
        return Finding("kernels", name, "problem", f"{picked} fails: {lines[-1]}", fix)
    text = f"{picked}; ran here, off the definition by {difference:.0e}"
    if difference <= TOLERANCE:
        return Finding("kernels", name, "ok", text)
    fix = "train with `model.kernels=reference`, which is slow, and report this"
    return Finding("kernels", name, "problem", text, fix)


def disagreement(operation: str, backend: str, device_type: str) -> float:
    """Runs an operation forward and backward on a small row, and the definition.

    Returns:
        The larger relative RMS difference of output and input gradient, in float32.
    """
    length, channels, states = 70, 64, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device_type)

    x = normal(1, length, channels)
    rest = {"weight": normal(channels, 4)}
    if operation == "selective_scan":
        rates = -torch.arange(1.0, states + 1, device=device_type).repeat(channels, 1)
        rest = {"dt": normal(1, length, channels) - 2, "A": rates}
        rest |= {"B": normal(1, length, states), "C": normal(1, length, states)}
    options: dict[str, Any] = {"dt_softplus": True} if operation == "selective_scan" else {}
    pairs = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        y = getattr(kernels, operation)(leaf, **rest, **options, backend=name)
        pairs.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    apart = [
        (ours - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        for ours, exact in zip(*pairs, strict=True)
    ]
    return float(torch.stack(apart).max().nan_to_num(torch.inf))


def compiled_loops() -> bool:
    """Returns whether numba's cache holds every loop that the `cpu` backend calls, as it is now."""
    from mamba_sft.kernels import cpu_loops

    source = Path(cpu_loops.__file__)
    for loop in _entry_loops():
        code = loop.py_func.__code__
        pattern = f"{source.stem}.{loop.py_func.__qualname__}-{code.co_firstlineno}.py*.nbi"
        found = list(Path(loop.stats.cache_path).glob(pattern))
        if not any(index.stat().st_mtime >= source.stat().st_mtime for index in found):
            return False
    return True


def _entry_loops() -> list[Any]:
    """The loops that are called from Python: those that run tasks `first` to `last`."""
    from mamba_sft.kernels import cpu_loops

    compiled = [loop for loop in vars(cpu_loops).values() if hasattr(loop, "py_func")]
    return [loop for loop in compiled if loop.py_func.__code__.co_varnames[:2] == ("first", "last")]


def _cache(cold: bool) -> Finding:
    path = Path(_entry_loops()[0].stats.cache_path)
    there = path
    while not there.exists():
        there = there.parent
    text = f"{'not compiled yet' if cold else 'compiled'}, in {path}"
    if cold and not os.access(there, os.W_OK):
        fix = "set NUMBA_CACHE_DIR to a directory that can be written, or every run compiles for some 20 s"
        return Finding("kernels", "numba cache", "note", f"{text}, which cannot be written", fix)
    return Finding("kernels", "numba cache", "ok", text)


def start_nf4_probe() -> subprocess.Popen[str]:
    """Starts a 4-bit layer of the smallest real shape, evaluated and trained through, in another process."""
    words = [sys.executable, "-c", PROBE]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def nf4(probe: subprocess.Popen[str], device_type: str) -> Finding:
    """Waits for the process of `start_nf4_probe` and says whether 4-bit bases can be used here."""
    try:
        _, errors = probe.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        errors = "no answer in 60 s"
    if probe.returncode == 0:
        return Finding("kernels", "4-bit weights", "ok", f"nf4 works on the {device_type} (bitsandbytes)")
    reason = (errors.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
    fix = "pip install --upgrade bitsandbytes; recipes with `quantization: none` work without"
    return Finding("kernels", "4-bit weights", "note", f"bitsandbytes fails: {reason}", fix)
