"""Trained rows of the vocabulary, as PEFT has them, but for one thing: their numbers stay on the device.

PEFT (0.21.2, read 2026-11-27) uploads the list of trained rows at every use of the matrix, at least twice in
a micro-batch, and each time the host waits until the device has done all that was asked of it before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer


class TrainedRows(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's layer around an embedding or a head; see the module."""

    def get_merged_weights(self, active_adapters: Iterable[str]) -> torch.Tensor:
        """Returns the matrix (V, hidden_size) with the trained rows in their places."""
        weight: torch.Tensor = self.base_layer.weight
        for adapter in active_adapters:
            rows = self.trainable_tokens_delta[adapter].to(weight)
            weight = weight.index_copy(dim=0, index=self._numbers(adapter, weight.device), source=rows)
        return weight

    def _numbers(self, adapter: str, device: torch.device) -> torch.Tensor:
        """The numbers of an adapter's rows, (K,) int64, uploaded at the first use."""
        kept: dict[Any, torch.Tensor] = self.__dict__.setdefault("_uploaded", {})
        key = adapter, device, tuple(self.token_indices[adapter])
        if key not in kept:
            kept[key] = torch.tensor(self.token_indices[adapter], device=device)
        return kept[key]


def keep_rows_on_device(model: torch.nn.Module) -> None:
    """Makes the trained rows of a model that PEFT has wrapped ours, in place."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TrainedRows
