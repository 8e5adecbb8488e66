"""The project's Triton programs on the simulated card: the host's kernels in their place, or the interpreter.

Triton compiles for a card; here there is none to run what it makes. What is under test is everything around
the programs: their operands are looked at, their functions run and allocate what they do, with launches that
do nothing, and then the host's own kernels compute the results. One small step runs the real programs in
Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import os
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from tests.simulated_cuda.device import Device

_SEQUENCES = {"scan_forward": 10, "scan_backward": 10, "conv_forward": 5, "conv_backward": 5}
"""Each program, and which operand says where sequences begin."""


def stand_in(device: Device) -> None:
    """Puts the host's kernels in the place of the Triton programs, unless the interpreter is on."""
    import trl.kernels.chunked_logprob as trl_head

    import mamba_sft.kernels.cpu as host
    import mamba_sft.kernels.triton_ops as programs

    _stand_in_for_bitsandbytes(device)
    trl_head._MM_OUT_DTYPE = False  # asks cuBLAS for float32 out of 16 bits, which the host has no name for
    if os.environ.get("TRITON_INTERPRET") == "1":
        from mamba_sft import kernels

        kernels._device_of = {"triton": "cuda", "cpu": "cpu"}.get
        return
    for kernel, tile in (("_forward_kernel", "_forward_tile"), ("_backward_kernel", "_backward_tile")):
        setattr(trl_head, kernel, _Launch(getattr(trl_head, tile), device))
    for room in (programs.triton_scan, programs.triton_conv):
        for name, program in list(vars(room).items()):
            if hasattr(program, "__getitem__") and hasattr(program, "run"):
                setattr(room, name, _NoLaunch())
    programs._may_search = lambda u: False  # type: ignore[assignment]  # there is no launch to time
    for name in _SEQUENCES:
        allocate, compute = getattr(programs, name), getattr(host, name)
        setattr(programs, name, _on_host(name, allocate, compute, device))


class _Launch:
    """A Triton program whose launch runs `compute` on the host and fills the card's tensors, as it would."""

    def __init__(self, compute: Any, device: Device):
        self._compute, self._device = compute, device

    def __getitem__(self, grid: Any) -> Any:
        return self._run

    def _run(self, *operands: Any, **options: Any) -> None:
        with self._device.quiet():
            given = [_moved(operand, "cpu") for operand in operands]
            self._compute(*given, **options)
            for operand, other in zip(operands, given, strict=True):
                if hasattr(operand, "is_cuda"):
                    operand.copy_(other)


class _NoLaunch:
    """A Triton program that is launched and does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *operands, **options: None


_KERNELS = ("quantize_4bit", "dequantize_4bit", "gemv_4bit", "quantize_blockwise", "dequantize_blockwise",
            "int8_linear_matmul", "int8_mm_dequant", "optimizer_update_8bit_blockwise",
            "optimizer_update_32bit")  # fmt: skip
"""What bitsandbytes has CUDA kernels for, which allocate nothing but their results."""


def _stand_in_for_bitsandbytes(device: Device) -> None:
    """Lets its CPU kernels compute: for other devices it has many torch operations, compiled first."""
    import torch
    from bitsandbytes._ops import register_kernel

    for name in _KERNELS:
        register_kernel(f"bitsandbytes::{name}", "cuda")(
            _beside(getattr(torch.ops.bitsandbytes, name).default, device)
        )


def _beside(compute: Any, device: Device) -> Any:
    def run(*operands: Any) -> Any:
        with device.quiet():
            given = [_moved(operand, "cpu") for operand in operands]
            results = _moved(compute(*given), "cuda")
            for operand, argument, other in zip(operands, compute._schema.arguments, given, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and operand is not None:
                    operand.copy_(other)
        return results

    return run


def _on_host(name: str, allocate: Any, compute: Any, device: Device) -> Any:
    def run(*operands: Any, **options: Any) -> Any:
        if device.capture is not None:
            capture, device.capture = device.capture, None
            with _disable_current_modes():
                made = capture.write_down(run, operands, options)
            device.capture = capture
            return made
        for number, operand in enumerate(operands):
            for tensor in operand if isinstance(operand, tuple) else (operand,):
                assert not hasattr(tensor, "is_cuda") or tensor.is_cuda, f"{name}: operand {number} is on cpu"
        made = allocate(*operands, **options)
        with device.quiet():
            given = [_moved(operand, "cpu") for operand in operands]
            place = _SEQUENCES[name]
            given[place] = _starts(name, given[place], given)
            computed = compute(*given, **options)
            if not isinstance(made, tuple):
                return _filled(made, computed)
            return tuple(_filled(one, other) for one, other in zip(made, computed, strict=True))

    return run


def _filled(made: Any, computed: Any) -> Any:
    """What the program would have filled, filled; what only its own backward reads is the host's."""
    if made is None or computed is None or made.shape != computed.shape:
        return _moved(computed, "cuda")
    return made.copy_(computed)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(entry, device) for entry in value)
    return value.to(device) if hasattr(value, "is_cuda") else value


def _starts(name: str, given: Any, operands: list[Any]) -> Any:
    """Where sequences begin, in the form that the host's kernels take."""
    import numpy as np
    import torch

    rows, length = operands[0].shape[:2]
    if name.startswith("scan"):
        if given[0] is None:
            return np.zeros((rows, length), np.uint8)
        return (given[1] == torch.arange(length)).to(torch.uint8).contiguous().numpy()
    far = 1 - operands[1].shape[1]
    if given is None:
        return np.full((rows, length), far)
    return torch.where(given < 0, far, given.long()).numpy()
