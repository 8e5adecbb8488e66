"""The norm of the residual, which float32 holds and float16 may not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def norm_residual(norm: nn.Module, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply an RMS norm to the residual and return it in `dtype`.

    The residual is rounded to `dtype` before it is normed, as `transformers` does it, except to float16: a
    channel beyond 65,504, which large models have, would be infinite. There it is normed in float32 and
    rounded after.

    Args:
        norm: The block's, or the last one.
        residual: (B, L, hidden_size), float32 where the configuration has `residual_in_fp32`.
        dtype: Of what is returned.
    """
    if dtype is torch.float16:
        return norm(residual.float()).to(dtype)
    return norm(residual.to(dtype))
