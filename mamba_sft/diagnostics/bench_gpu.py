"""The kernels on a GPU, at Falcon-Mamba-7B's shapes: against mamba_ssm, causal_conv1d and the GPU's limits.

Every case has two rows, `forward` and `both` (forward and backward): milliseconds, the share of the floor
(`gpu_limits`), bandwidth, memory. Gradients are those of LoRA training: for activations, not for the frozen
A, D, dt_bias and filters (the compiled peers compute those too; they know no other way).
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mamba_sft.diagnostics.gpu_limits import GpuLimits, peak_bytes, time_of
from mamba_sft.kernels import causal_conv1d, selective_scan
from mamba_sft.planning.gpus import SCAN_BACKWARD, SCAN_FORWARD
from mamba_sft.wording import MIB

logger = logging.getLogger(__name__)

Measurement = dict[str, Any]
Function = Callable[..., Tensor]

SSM = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "selective_scan_cuda")
CONV = ("causal_conv1d", "causal_conv1d_fn", "causal_conv1d_cuda")
WIDTH = 4
"""Taps of the convolution."""
CHECKED = 256
"""Positions of a row on which the outputs of peers are compared."""


@dataclass(frozen=True)
class RowShape:
    """Sizes of one case: B rows of L positions, D channels, N states."""

    B: int
    L: int
    D: int = 8192
    N: int = 16


ROW_SHAPES = tuple(RowShape(batch, length) for length in (2048, 8192, 32768) for batch in (1, 4))


@dataclass(frozen=True)
class Target:
    """Where and in what to measure.

    Args:
        device: Of the operands.
        dtype: Of the activations.
        backend: Of our operations.
        gpu: Its limits; None where there is no floor to compare with.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str
    gpu: GpuLimits | None = None


@dataclass(frozen=True)
class Case:
    """One implementation at one shape.

    Args:
        name: Whose.
        function: Takes the inputs, returns the output.
        inputs: The tensors that get gradients.
        gradient: Of the output.
        moved: Bytes that the forward, and forward with backward, must read and write at least,
            if known.
        floors: Seconds that the GPU's pipes need for the same two, if known.
    """

    name: str
    function: Function
    inputs: tuple[Tensor, ...]
    gradient: Tensor
    moved: tuple[int | None, int | None] = (None, None)
    floors: tuple[float | None, float | None] = (None, None)

    def forward(self) -> None:
        """Runs as in inference."""
        with torch.no_grad():
            self.function(*self.inputs)

    def step(self) -> None:
        """Runs forward and backward."""
        torch.autograd.grad(self.function(*self.inputs), self.inputs, self.gradient)


def measure(target: Target, shapes: Sequence[RowShape] = ROW_SHAPES) -> dict[str, list[Measurement]]:
    """Returns the tables of scan, convolution and mixer; a case that does not fit is a row that says so."""
    return {
        f"{title}, backend {target.backend}, {str(target.dtype).removeprefix('torch.')}": [
            row for shape in shapes for row in _rows(make, shape, target)
        ]
        for title, make in (("scan", scan_cases), ("convolution", conv_cases), ("mixer layer", mixer_cases))
    }


def _rows(
    make: Callable[[RowShape, Target], Iterator[Case]], shape: RowShape, target: Target
) -> Iterator[Measurement]:
    """Measures the cases of a shape; the first is ours, and the others are given as multiples of it."""
    ours: dict[str, float] = {}
    where = {"B": shape.B, "L": shape.L}
    name = "operands"
    try:
        for case in make(shape, target):
            name = case.name
            rows = _measured(case, target.device)
            del case  # and with it the operands, before the next ones are made
            for row in rows:
                times = row["ms"] / ours.setdefault(row["pass"], row["ms"])
                yield {"of": name} | where | row | {"times_ours": times}
            logger.info("%s, B %d, L %d: %.3g ms forward and backward", name, shape.B, shape.L, row["ms"])
    except torch.OutOfMemoryError:
        logger.info("%s, B %d, L %d: out of memory", name, shape.B, shape.L)
        yield {"of": name} | where | {"pass": "no memory"}
    gc.collect()  # the next shape starts from an empty GPU
    if target.device.type == "cuda":
        torch.cuda.empty_cache()


def _measured(case: Case, device: torch.device) -> list[Measurement]:
    rows = []
    passes = (("forward", case.forward), ("both", case.step))
    for (name, step), moved, floor in zip(passes, case.moved, case.floors, strict=True):
        seconds, peak = time_of(step, device), peak_bytes(step, device)
        rows.append(
            {
                "pass": name,
                "ms": seconds * 1e3,
                "of_floor": None if floor is None else floor / seconds,
                "GB_per_s": None if moved is None else moved / seconds / 1e9,
                "peak_MiB": None if peak is None else peak / MIB,
            }
        )
    return rows


def scan_cases(shape: RowShape, target: Target) -> Iterator[Case]:
    """Yields our scan and, where it is built, mamba_ssm's, each with operands in the layout it likes best."""
    torch.manual_seed(0)
    B, L, D, N = shape.B, shape.L, shape.D, shape.N
    options = {"device": target.device, "dtype": target.dtype}
    u, dt, z, gradient = (torch.randn(B, L, D, **options) for _ in range(4))
    b, c = (torch.randn(B, L, N, **options) for _ in range(2))
    A = -torch.arange(1.0, N + 1, device=target.device).repeat(D, 1)
    skip, bias = torch.ones(D, device=target.device), torch.full((D,), -4.0, device=target.device)
    rows, narrow = u.numel() * u.element_size(), b.numel() * b.element_size()
    # forward: u, dt, z in, y out, B and C in; backward: those and dy in, du, ddt, dz, dB, dC out
    moved = 4 * rows + 2 * narrow, 4 * rows + 2 * narrow + 7 * rows + 4 * narrow
    floors: tuple[float | None, float | None] = (None, None)
    if target.gpu is not None:
        updates = B * L * D * N
        forward = target.gpu.floor_seconds(updates, SCAN_FORWARD)
        floors = forward, target.gpu.floor_seconds(updates, SCAN_FORWARD, SCAN_FORWARD, SCAN_BACKWARD)

    def ours(u: Tensor, dt: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        return cast(
            Tensor,
            selective_scan(u, dt, A, b, c, skip, z, dt_bias=bias, dt_softplus=True, backend=target.backend),
        )

    yield Case("mamba-sft", ours, _leaves(u, dt, b, c, z), gradient, moved, floors)
    scan = peer(*SSM)
    if scan is None:
        return

    def theirs(u: Tensor, dt: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        y: Tensor = scan(u, dt, A, b, c, D=skip, z=z, delta_bias=bias, delta_softplus=True)
        return y

    inputs = tuple(x.transpose(1, 2).contiguous() for x in (u, dt, b, c, z))
    check("mamba_ssm", theirs(*inputs).transpose(1, 2), ours(u, dt, b, c, z))
    del u, dt, b, c, z
    gradient = gradient.transpose(1, 2).contiguous()
    yield Case("mamba_ssm", theirs, _leaves(*inputs), gradient, moved, floors)


def conv_cases(shape: RowShape, target: Target) -> Iterator[Case]:
    """Yields our convolution and, where it is built, causal_conv1d's in both layouts it takes."""
    torch.manual_seed(0)
    options = {"device": target.device, "dtype": target.dtype}
    x, gradient = (torch.randn(shape.B, shape.L, shape.D, **options) for _ in range(2))
    weight, bias = torch.randn(shape.D, WIDTH, **options), torch.randn(shape.D, **options)
    rows = x.numel() * x.element_size()
    moved = 2 * rows, 5 * rows  # x in, y out; then x and dy in, dx out

    def ours(x: Tensor) -> Tensor:
        return cast(Tensor, causal_conv1d(x, weight, bias, backend=target.backend))

    yield Case("mamba-sft", ours, _leaves(x), gradient, moved)
    convolve = peer(*CONV)
    if convolve is None:
        return

    def theirs(x: Tensor) -> Tensor:
        y: Tensor = convolve(x, weight, bias, activation="silu")
        return y

    check("causal_conv1d", theirs(x.transpose(1, 2)).transpose(1, 2), ours(x))
    for layout in ("B,L,D", "B,D,L"):
        turned = [t.transpose(1, 2) for t in (x, gradient)]
        if layout == "B,D,L":
            turned = [t.contiguous() for t in turned]
        yield Case(f"causal_conv1d ({layout})", theirs, _leaves(turned[0]), turned[1], moved)


def mixer_cases(shape: RowShape, target: Target) -> Iterator[Case]:
    """Yields one mixer of the 7B shape with frozen weights, and its four projections alone."""
    from transformers import FalconMambaConfig, FalconMambaModel

    from mamba_sft.kernels.falcon_mamba import install

    hidden = shape.D // 2
    config = FalconMambaConfig(
        vocab_size=8, hidden_size=hidden, num_hidden_layers=1, state_size=shape.N, conv_kernel=WIDTH
    )
    torch.manual_seed(0)
    with target.device:
        model = FalconMambaModel(config)
    mixer = install(model.to(target.dtype).requires_grad_(False), target.backend).layers[0].mixer
    x, gradient = (
        torch.randn(shape.B, shape.L, hidden, device=target.device, dtype=target.dtype) for _ in range(2)
    )
    yield Case("mamba-sft", mixer, _leaves(x), gradient)

    def projections(x: Tensor) -> Tensor:
        inner, _ = mixer.in_proj(x).chunk(2, dim=-1)
        steps = mixer.x_proj(inner)[..., : mixer.time_step_rank]
        out: Tensor = mixer.out_proj(mixer.dt_proj(steps) + inner)
        return out

    yield Case("its projections alone", projections, _leaves(x), gradient)


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)


@functools.cache
def peer(module: str, function: str, extension: str) -> Function | None:
    """Returns a function of a compiled library; None, saying why, if it cannot be imported."""
    try:
        importlib.import_module(extension)
        found: Function = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, OSError) as error:
        logger.info("%s is not measured: %s", module, error)
        return None
    return found


def check(name: str, theirs: Tensor, ours: Tensor) -> None:
    """Says how far a peer's output is from ours: only the same function can be raced."""
    with torch.no_grad():
        theirs, ours = theirs[:, :CHECKED], ours[:, :CHECKED]
        apart = (theirs.float() - ours.float()).square().mean().sqrt() / ours.float().square().mean().sqrt()
    logger.info("%s and ours differ by %.1e (relative RMS)", name, apart)
