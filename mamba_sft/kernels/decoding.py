"""Decoding on a CPU: the blocks' forward for one token on top of a cache, with as little Python as it takes.

It computes what the blocks compute. Projections are called as modules here too, so LoRA and quantized layers
take part; nothing is remembered between calls, so weights may change between them. What it leaves out is
what a single token does not need: gradients, checks of operands, threads, copies of states.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock

from mamba_sft.kernels import FAST_DTYPES, backends
from mamba_sft.kernels.residual_norm import norm_residual
from mamba_sft.kernels.time_step import innermost, project_dt

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def can_decode(
    blocks: Iterable[nn.Module], last_norm: nn.Module, hidden_states: Tensor, cache: Cache | None
) -> bool:
    """Whether `decode` can do what is asked of the blocks: one token, no gradients, all on the CPU."""
    return (
        cache is not None
        and not torch.compiler.is_compiling()
        and hidden_states.shape[1] == 1
        and hidden_states.device.type == "cpu"
        and not torch.is_grad_enabled()
        and _is_plain_norm(last_norm)
        and all(_can_step(block, hidden_states.shape[0], cache) for block in blocks)
        and _compiled_loops_work()
    )


@torch.compiler.disable  # the loops are given addresses: no tensor may be let go before they return
def decode(blocks: Iterable[nn.Module], last_norm: nn.Module, hidden_states: Tensor, cache: Cache) -> Tensor:
    """Take (B, 1, hidden_size) through blocks and `last_norm`; the states in `cache` move one position on.

    To be called where `can_decode` holds.
    """
    residual, mixed = hidden_states, torch.zeros_like(hidden_states)
    for block in blocks:
        residual = residual.float() if block.residual_in_fp32 else residual
        norm = block._modules["norm"]
        normed, residual = _add_and_norm(residual, mixed, norm, norm._parameters["weight"].dtype)
        mixed = _step(block._modules["mixer"], normed, cache)
    return _add_and_norm(residual, mixed, last_norm, residual.dtype)[0]


def _add_and_norm(
    residual: Tensor, mixed: Tensor, norm: nn.Module, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add what a block has mixed to the residual; return the RMS norm of that sum in `dtype`, and the sum."""
    from mamba_sft.kernels import cpu_steps

    weight = norm._parameters["weight"]
    if not (residual.dtype == mixed.dtype == weight.dtype == dtype == torch.float32):
        residual = residual + mixed
        return norm_residual(norm, residual, dtype), residual
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    residual, mixed, weight = _floats(residual), _floats(mixed), _floats(weight)
    cpu_steps.add_norm_step(
        residual.shape[0],
        residual.shape[2],
        residual.data_ptr(),
        mixed.data_ptr(),
        weight.data_ptr(),
        norm.variance_epsilon,
        total.data_ptr(),
        normed.data_ptr(),
    )
    return normed, total


def _can_step(block: Any, batch: int, cache: Cache) -> bool:
    """The conditions that are the layer's own."""
    mixer = block._modules["mixer"]
    modules, parameters = mixer._modules, mixer._parameters
    if mixer.activation != "silu" or mixer.backend not in ("auto", "cpu"):
        return False
    if _is_hooked(block) or _is_hooked(mixer) or not _is_plain_norm(block._modules["norm"]):
        return False
    layer = cache.layers[mixer.layer_idx]
    if not layer.has_previous_state[0]:
        return False
    inputs, state = layer.conv_states[0], layer.recurrent_states[0]
    channels = mixer.intermediate_size
    return (
        inputs.shape == (batch, channels, mixer.conv_kernel_size)
        and state.shape == (batch, channels, mixer.ssm_state_size)
        and state.dtype == torch.float32
        and _is_at_hand(parameters["A_log"])
        and _is_at_hand(parameters["D"])
        and _is_at_hand(modules["conv1d"]._parameters["weight"])
        and _is_at_hand(innermost(modules["dt_proj"])._parameters.get("bias"))
    )


def _is_at_hand(weight: Tensor | None) -> bool:
    """Whether there are values to read: offloaded weights are on no device, and come only when called for."""
    return weight is not None and weight.is_cpu and weight.dtype in FAST_DTYPES


def _is_plain_norm(norm: nn.Module) -> bool:
    return type(norm) is stock.FalconMambaRMSNorm and not _is_hooked(norm)


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _step(mixer: Any, normed: Tensor, cache: Cache) -> Tensor:
    """Mix (B, 1, hidden_size) and move this layer's states one position on."""
    from mamba_sft.kernels import cpu_steps

    modules, parameters, dtype = mixer._modules, mixer._parameters, normed.dtype
    batch, channels, states = normed.shape[0], mixer.intermediate_size, mixer.ssm_state_size
    layer, rank = cache.layers[mixer.layer_idx], mixer.time_step_rank
    convolution = modules["conv1d"]._parameters

    # Every operand of the loops has a name until they return: they are given addresses.
    xz = _floats(modules["in_proj"](normed))
    x = torch.empty(batch, 1, channels)
    past_inputs, bias = layer.conv_states[0], convolution["bias"]
    inputs, weight, bias = _floats(past_inputs), _floats(convolution["weight"]), _floats(bias)
    bias_at = 0 if bias is None else bias.data_ptr()
    operands = (xz.data_ptr(), inputs.data_ptr(), weight.data_ptr(), bias_at, x.data_ptr())
    cpu_steps.conv_step(batch, channels, mixer.conv_kernel_size, *operands)
    if inputs is not past_inputs:
        past_inputs.copy_(inputs)

    x = x.to(dtype)
    parts = _floats(modules["x_proj"](x))
    epsilons = [modules[name].eps for name in ("dt_layernorm", "b_layernorm", "c_layernorm")]
    cpu_steps.norm_step(batch, rank, states, parts.data_ptr(), *epsilons)
    parts = parts.to(dtype)
    dt, dt_bias = project_dt(modules["dt_proj"], parts[..., :rank])

    past_state, y = layer.recurrent_states[0], torch.empty(batch, 1, channels)
    state = _floats(past_state)
    operands = (x, dt, dt_bias, parameters["A_log"], parts, parameters["D"], xz, state, y)
    operands = [_floats(operand) for operand in operands]
    cpu_steps.scan_step(batch, channels, states, rank, *[operand.data_ptr() for operand in operands])
    if state is not past_state:
        past_state.copy_(state)
    return modules["out_proj"](y.to(dtype))


def _floats(x: Tensor | None) -> Tensor | None:
    """Return x itself if it is float32 and contiguous, else such a copy."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


@functools.cache
def _compiled_loops_work() -> bool:
    return "cpu" in backends()
