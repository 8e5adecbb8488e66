"""Tensors of which every process holds a part: what they are as a whole, and the part of a whole tensor.

Both are asked for by all processes together, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Returns whether a forward of the model takes all processes, each of which holds a part of it."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor; one that is not sharded is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(
    tensors: Mapping[str, Tensor], *, keep: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns tensors put together, by name, in host memory; one at a time is whole on the GPUs.

    Args:
        tensors: Each sharded, or of the same values in every process.
        keep: Whether this process wants them; else it only helps, and gets nothing.
        dtype: What they are rounded to; None: as they are.
    """
    kept = {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if keep:
            kept[name] = together.to(dtype or together.dtype).cpu()
    return kept


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """Returns this process's part of a tensor that every process has, if `like` is sharded.

    Args:
        tensor: The same in every process.
        like: What it is to stand beside.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    here = tensor.to(like.device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def held_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes of the parameters that this process holds while nothing is computed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.nbytes for part in parts)
