"""Inputs like a trained model's, and how far two results are apart."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mamba_sft.kernels import backends

SCAN_OPTIONS = ("D", "z", "dt_bias", "initial_state")
COMPILED_BACKENDS = {"cpu": "cpu"} | ({"triton": "cuda"} if torch.cuda.is_available() else {})
"""The backends that are not the definition, each with the device of its tensors."""
COMPILED_BACKENDS = {name: device for name, device in COMPILED_BACKENDS.items() if name in backends()}

HAS_TRITON = importlib.util.find_spec("triton") is not None
FAST = [
    "cpu",
    *(["triton"] if HAS_TRITON else []),
]  # without a GPU the latter is interpreted, on the CPU, slowly
TOLERANCE = {"reference": 1e-6, "cpu": 1e-6, "triton": 1e-5 if torch.cuda.is_available() else 1e-6}

# Steps between two saved states; few in the interpreter (see conftest.py), so that short rows have several
# chunks.
STATE_STRIDE = {"reference": 64, "cpu": 64, "triton": 64 if torch.cuda.is_available() else 8}


def device_for(backend: str) -> str:
    """Where a backend takes its tensors."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def placed(operands: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The operands where a backend takes them."""
    return {name: x.to(device_for(backend)) for name, x in operands.items()}


def relative_rms(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected value; not-a-number stays one."""
    value, expected = value.detach().double(), expected.detach().double()
    scale = expected.square().mean().sqrt()
    return float((value - expected).square().mean().sqrt() / scale.clamp(min=1e-30))


def scan_inputs(batch: int, length: int, channels: int, states: int, seed: int = 0) -> dict[str, Tensor]:
    """All operands of `selective_scan`, in float32; step sizes and decays as after Mamba's initialisation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    steps = torch.exp(torch.rand(channels, generator=generator) * 4.6 - 6.9)  # 0.001 to 0.1
    return {
        "u": normal(batch, length, channels),
        "dt": 0.5 * normal(batch, length, channels),
        "A": -torch.arange(1, states + 1) * (1 + 0.1 * normal(channels, states).clamp(-2, 2)),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
        "initial_state": normal(batch, channels, states),
    }


def conv_inputs(batch: int, length: int, channels: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """All operands of `causal_conv1d`, in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, channels, width - 1),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def sequences(batch: int, length: int, seed: int = 0) -> Tensor:
    """(B, L) sequence numbers: some of length one, some long, and numbers that come back."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < 0.2
    starts[:, length // 2 :] &= torch.rand(batch, length - length // 2, generator=generator) < 0.1
    return starts.cumsum(1) % 3


def results(operation, operands: dict[str, Tensor], dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Outputs and all gradients, computed from copies in `dtype`, for fixed gradients of the outputs."""
    device = device_for(options.get("backend", "auto"))
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in operands.items()}
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    outputs = operation(**leaves, **options, return_final_state=True)
    generator = torch.Generator().manual_seed(7)
    gradients = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    by_name = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), gradients), strict=True))
    values = {"y": outputs[0], "final_state": outputs[1]} | {f"d{name}": g for name, g in by_name.items()}
    return {name: x.cpu() for name, x in values.items()}


def worst(values: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error and whose it is; empty tensors have none.

    An error of a tensor that is small beside the others, such as a sum whose terms cancel, is held against a
    tenth of the largest of them: its terms are of that size.
    """
    sizes = {name: float(x.double().square().mean().sqrt()) for name, x in expected.items() if x.numel()}
    floor = 0.1 * max((size for size in sizes.values() if size < float("inf")), default=0.0)
    errors = [
        (relative_rms(values[name], expected[name]) * (size / max(size, floor) if size > 0 else 1.0), name)
        for name, size in sizes.items()
    ]
    broken = [pair for pair in errors if pair[0] != pair[0]]
    return broken[0] if broken else max(errors)
