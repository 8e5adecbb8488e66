"""The two operations a Mamba-1 mixer needs beside matrix products: `causal_conv1d` and `selective_scan`.

Both take activations, channels last, and return gradients for every tensor that requires them. `backend`
picks who computes: `reference` (the definition, a Python loop), `cpu` (numba) or `triton`; `auto` picks the
fastest that works for the tensors at hand, and warns once, through `logging`, if that is the slow definition.

Read `README.md` (the mathematics, the layouts, the measured speed), `reference` (the definition), `autograd`
(what both fast backends share), `cpu` with `cpu_loops`, `cpu_rows` and `cpu_steps`, `triton_ops` with
`launching`, `triton_scan`, `triton_conv` and `triton_math`; then `falcon_mamba` (`install` puts the
operations into a model), `time_step` (`dt_proj` without its bias) with `twin` (a second module over the same
weights), `residual_norm` (what float16 cannot hold), `carry` (states handed on), `decoding` (one token at a
time) and `plain_ops` (the same for a compiler).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

__all__ = ["automatic", "backends", "causal_conv1d", "selective_scan", "why_unavailable"]

BACKENDS = {"reference": "reference", "cpu": "cpu", "triton": "triton_ops"}  # and the module that computes
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backends() -> list[str]:
    """Return the names of the backends that can run here, the definition first.

    Returns:
        Some of `reference`, `cpu` and `triton`; any of them is accepted as `backend=`.
    """
    return [name for name in BACKENDS if why_unavailable(name) is None]


@torch.compiler.disable  # a loop over time is not for tracing
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence over a batch of rows.

    Per channel d and state n, with `dt = softplus(dt + dt_bias)` where asked for:
    `h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * B[t] * u[t]`, `y[t] = (C[t] . h[t] + D * u[t]) * silu(z[t])`.

    Args:
        u: Input, (B, L, D) in float32, bfloat16, float16 or float64, not empty.
        dt: Step sizes, (B, L, D).
        A: Decay rates, (D, N); negative in a trained model.
        B: Input weights, (B, L, N).
        C: Output weights, (B, L, N).
        D: Skip weights, (D,), or None for no skip.
        z: Gate, (B, L, D), or None for no gate.
        dt_bias: Added to `dt` in float32 before the softplus, (D,).
        dt_softplus: Whether `dt` passes through a softplus.
        initial_state: State before the first position, (B, D, N); zeros if None.
        seq_idx: Integers, (B, L). The state restarts from zero wherever the value differs from the last one;
            `initial_state` therefore belongs to the first sequence of each row.
        return_final_state: Whether to return the state after the last position too.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        y, (B, L, D) in the dtype of `u`; with `return_final_state` the pair (y, final_state), the state being
        (B, D, N) in float32 (float64 for float64 inputs). Gradients flow through both.

    Raises:
        ValueError: A shape, dtype or backend name does not fit; the message names the value seen.
        RuntimeError: The backend asked for cannot run here; the message says why and what to do.
    """
    _check_scan(u, dt, A, B, C, D, z, dt_bias, initial_state)
    _check_seq_idx(seq_idx, u)
    y, final_state = _operation("selective_scan", backend, u)(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx
    )
    return (y, final_state) if return_final_state else y


@torch.compiler.disable  # a loop over time is not for tracing
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own short filter, looking only at the past.

    `y[t] = activation(bias + sum_k weight[k] * x[t - (W - 1) + k])`, sums in float32.

    Args:
        x: Input, (B, L, D) in float32, bfloat16, float16 or float64, not empty.
        weight: Filters, (D, W); the last tap meets the current position.
        bias: (D,), or None.
        activation: `silu` or None.
        initial_state: The W - 1 inputs before the first position, oldest first, (B, D, W - 1); zeros if None.
        seq_idx: Integers, (B, L). Taps do not reach across a place where the value changes.
        return_final_state: Whether to return the last W - 1 inputs too, zero where they belong to an earlier
            sequence than the last position.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        y, (B, L, D) in the dtype of `x`; with `return_final_state` the pair (y, final_state), the state being
        (B, D, W - 1) in the dtype of `x`. Gradients flow through both.

    Raises:
        ValueError: A shape, dtype or argument does not fit; the message names the value seen.
        RuntimeError: The backend asked for cannot run here; the message says why and what to do.
    """
    _check_conv(x, weight, bias, activation, initial_state)
    _check_seq_idx(seq_idx, x)
    y, final_state = _operation("causal_conv1d", backend, x)(
        x, weight, bias, activation, initial_state, seq_idx
    )
    return (y, final_state) if return_final_state else y


def _operation(name: str, backend: str, x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what computes an operation for `x`: the definition, or a backend's kernels under autograd."""
    module = _implementation(backend, x)
    if module.__name__.endswith(".reference"):
        return getattr(module, name)
    autograd = importlib.import_module(f"{__name__}.autograd")
    return functools.partial(getattr(autograd, name), module)


def _implementation(backend: str, x: Tensor) -> ModuleType:
    """Return the module that computes for `x`, or raise if the one asked for cannot."""
    if backend == "auto":
        backend = _automatic(x.device.type, x.dtype)
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, got {backend!r}")
    elif (reason := why_unavailable(backend)) is not None:
        raise RuntimeError(f"backend {backend!r} is unavailable: {reason}")
    device = _device_of(backend)
    if device is not None and (x.device.type != device or x.dtype not in FAST_DTYPES):
        raise ValueError(
            f"backend {backend!r} takes float32, bfloat16 or float16 on {device}, "
            f"got {x.dtype} on {x.device}; backend='reference' takes any"
        )
    return importlib.import_module(f"{__name__}.{BACKENDS[backend]}")


def automatic(device_type: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """Return the backend that `auto` takes, and if that is the slow definition for want of a better one, why.

    Args:
        device_type: `cpu`, `cuda` or any other of torch's.
        dtype: Of the activations.
    """
    if dtype not in FAST_DTYPES:
        return "reference", None
    fast = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    reason = f"no fast kernels for {device_type}" if fast is None else why_unavailable(fast)
    return ("reference", reason) if fast is None or reason else (fast, None)


@functools.cache
def _automatic(device_type: str, dtype: torch.dtype) -> str:
    """Pick the backend for `auto` and say so; cached, so each kind of tensor is spoken of once."""
    backend, reason = automatic(device_type, dtype)
    if reason is None:
        logger.debug("scan and convolution: backend %s for %s on %s", backend, dtype, device_type)
    else:
        logger.warning(
            "scan and convolution: backend reference, a slow Python loop, for %s on %s: %s",
            dtype,
            device_type,
            reason,
        )
    return backend


def _device_of(backend: str) -> str | None:
    """Return the type of device whose tensors a backend takes, or None if it takes any."""
    if backend == "triton":  # Triton's interpreter, which tests use, works on CPU tensors
        return "cpu" if importlib.import_module("triton").knobs.runtime.interpret else "cuda"
    return "cpu" if backend == "cpu" else None


@functools.cache
def why_unavailable(backend: str) -> str | None:
    """Return why a backend cannot run here and what to do about it, or None if it can.

    Args:
        backend: `reference`, `cpu` or `triton`.
    """
    if backend == "cpu":
        try:
            importlib.import_module(f"{__name__}.cpu")
        except ImportError as error:
            return f"{error}; install numba (pip install numba) or use backend='reference'"
        except RuntimeError as error:  # numba found no place for compiled code
            return (
                f"{error}; set NUMBA_CACHE_DIR to a directory that can be written, or use backend='reference'"
            )
    if backend == "triton":
        try:
            importlib.import_module(f"{__name__}.triton_ops")
        except ImportError as error:
            return f"{error}; install it (pip install triton) or use backend='reference'"
        if _device_of(backend) == "cuda" and not torch.cuda.is_available():
            return "no CUDA device; use backend='auto', 'cpu' or 'reference'"
    return None


def _check_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    batch, length, channels = _check_activations("u", u)
    if A.ndim != 2:
        raise ValueError(f"A must have shape (D, N), got {tuple(A.shape)}")
    states = A.shape[1]
    _check_tensor("dt", dt, (batch, length, channels), u)
    _check_tensor("A", A, (channels, states), u)
    _check_tensor("B", B, (batch, length, states), u)
    _check_tensor("C", C, (batch, length, states), u)
    _check_tensor("D", D, (channels,), u)
    _check_tensor("z", z, (batch, length, channels), u)
    _check_tensor("dt_bias", dt_bias, (channels,), u)
    _check_tensor("initial_state", initial_state, (batch, channels, states), u)


def _check_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> None:
    batch, _, channels = _check_activations("x", x)
    if weight.ndim != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight must have shape (D, W) with W >= 1, got {tuple(weight.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    _check_tensor("weight", weight, (channels, weight.shape[1]), x)
    _check_tensor("bias", bias, (channels,), x)
    _check_tensor("initial_state", initial_state, (batch, channels, weight.shape[1] - 1), x)


def _check_activations(name: str, x: Tensor) -> torch.Size:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (B, L, D) with no zero in it, got {tuple(x.shape)}")
    if x.dtype not in (*FAST_DTYPES, torch.float64):
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    return x.shape


def _check_tensor(name: str, value: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if value is None:
        return
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a real floating-point tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other operands, got {value.device}")


def _check_seq_idx(seq_idx: Tensor | None, x: Tensor) -> None:
    if seq_idx is None:
        return
    if tuple(seq_idx.shape) != tuple(x.shape[:2]):
        raise ValueError(f"seq_idx must have shape {tuple(x.shape[:2])}, got {tuple(seq_idx.shape)}")
    if seq_idx.is_floating_point() or seq_idx.is_complex():
        raise ValueError(f"seq_idx must hold integers, got {seq_idx.dtype}")
    if seq_idx.device != x.device:
        raise ValueError(f"seq_idx must be on {x.device} like the other operands, got {seq_idx.device}")
