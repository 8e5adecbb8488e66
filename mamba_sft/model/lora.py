"""LoRA's forward with its scale and its sum inside the second matrix product.

PEFT computes `base + B(A(x)) * scaling`, which writes and reads the whole output twice more than it has to,
and again in the backward. On a CPU in float32 one `addmm` does the same; everything else stays PEFT's.
`benchmarks/LOG.md` has what it brings.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def fuse_lora(module: nn.Module) -> None:
    """Makes a LoRA layer use the fused forward where that applies; leaves any other module as it is."""
    if type(module) is Linear:
        module.__class__ = FusedLinear


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA around an ordinary linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps (..., in) to (..., out), as PEFT's layer does."""
        if args or kwargs or not self._is_ordinary(x):
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        base, low = self.base_layer(x), self.lora_A[adapter](x)
        rows, low = base.reshape(-1, base.shape[-1]), low.reshape(-1, low.shape[-1])
        weight = self.lora_B[adapter].weight
        return torch.addmm(rows, low, weight.t(), alpha=self.scaling[adapter]).view(base.shape)

    def _is_ordinary(self, x: Tensor) -> bool:
        """Whether nothing is asked for but one plain adapter, in float32 on the CPU."""
        if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (adapter,) = self.active_adapters
        if adapter not in self.lora_A or adapter in self.lora_variant:
            return False
        dropout, up = self.lora_dropout[adapter], self.lora_B[adapter]
        return (
            (isinstance(dropout, nn.Identity) or not self.training)
            and type(up) is nn.Linear
            and up.bias is None
            and not (up._forward_hooks or up._forward_pre_hooks)
            and up.weight.is_cpu
            and self.lora_A[adapter].weight.dtype == up.weight.dtype == torch.float32
            and self.get_base_layer().weight.dtype == torch.float32
        )
