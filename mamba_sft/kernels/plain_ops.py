"""A block's forward for one token on top of a cache, in plain operations that `torch.compile` can fuse.

It computes what the block computes. The operations of this package are opaque to a compiler, one for each
part of a layer; of what stands here it makes a few kernels. All layers are alike, so one compilation serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mamba_sft.kernels.residual_norm import norm_residual
from mamba_sft.kernels.time_step import project_dt


def can_step(block: Any) -> bool:
    """Whether `plain_step` computes what the block does."""
    return bool(block.mixer.activation == "silu")


def plain_step(block: Any, hidden_states: Tensor, conv_state: Tensor, scan_state: Tensor) -> Tensor:
    """Take (B, 1, hidden_size) through a block; its states move one position on, in place.

    Args:
        block: A block with our mixer.
        hidden_states: (B, 1, hidden_size).
        conv_state: The last inputs, oldest first, (B, D, W).
        scan_state: (B, D, N) in float32.
    """
    mixer = block.mixer
    residual = hidden_states.float() if block.residual_in_fp32 else hidden_states
    normed = norm_residual(block.norm, residual, block.norm.weight.dtype)
    dtype = normed.dtype
    x, z = mixer.in_proj(normed).chunk(2, dim=-1)
    window = torch.cat([conv_state[..., 1:], x.transpose(1, 2)], dim=-1)
    conv_state.copy_(window)
    x = (window.float() * mixer.conv1d.weight.squeeze(1).float()).sum(-1)
    if mixer.conv1d.bias is not None:
        x = x + mixer.conv1d.bias.float()
    x = nn.functional.silu(x).to(dtype)[:, None]

    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, B, C = mixer.x_proj(x).split(sizes, dim=-1)
    dt, dt_bias = project_dt(mixer.dt_proj, mixer.dt_layernorm(dt))
    B, C = mixer.b_layernorm(B).float(), mixer.c_layernorm(C).float()
    dt = dt[:, 0].float() if dt_bias is None else dt[:, 0].float() + dt_bias.float()
    dt, u = nn.functional.softplus(dt)[..., None], x[:, 0].float()
    state = torch.exp(dt * -torch.exp(mixer.A_log.float())) * scan_state + dt * B * u[..., None]
    scan_state.copy_(state)
    y = (state * C).sum(-1) + mixer.D.float() * u
    y = y * nn.functional.silu(z[:, 0].float())
    return residual + mixer.out_proj(y.to(dtype)[:, None])
