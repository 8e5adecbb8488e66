"""The project's Triton programs on the simulated card: the host's kernels in their place, or the interpreter.

Triton compiles for a card; here there is none to run what it makes. What is under test is everything around
the programs, so the host's own kernels compute on the card's memory, after the operands have been looked at.
One small step runs the real programs in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import os
from typing import Any

from tests.simulated_cuda.device import Device

_SEQUENCES = {"scan_forward": 10, "scan_backward": 10, "conv_forward": 5, "conv_backward": 5}
"""Each program, and which operand says where sequences begin."""


def stand_in(device: Device) -> None:
    """Puts the host's kernels in the place of the Triton programs, unless the interpreter is on."""
    import trl.kernels.chunked_logprob as trl_head

    import mamba_sft.kernels.cpu as host
    import mamba_sft.kernels.triton_ops as programs

    trl_head._MM_OUT_DTYPE = False  # asks cuBLAS for float32 out of 16 bits, which the host has no name for
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    trl_head._use_triton = lambda device: False
    for name in _SEQUENCES:
        setattr(programs, name, _on_host(name, getattr(host, name), device))


def _on_host(name: str, compute: Any, device: Device) -> Any:
    def run(*operands: Any, **options: Any) -> Any:
        for number, operand in enumerate(operands):
            for tensor in operand if isinstance(operand, tuple) else (operand,):
                assert not hasattr(tensor, "is_cuda") or tensor.is_cuda, f"{name}: operand {number} is on cpu"
        with device.quiet():
            given = [_moved(operand, "cpu") for operand in operands]
            place = _SEQUENCES[name]
            given[place] = _starts(name, given[place], given)
            return _moved(compute(*given, **options), "cuda")

    return run


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
