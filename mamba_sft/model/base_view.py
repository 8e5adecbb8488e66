"""The base under an adapter as a model of its own, over the same weights.

PEFT (0.21.2, read 2026-11-27) switches an adapter off by a flag in every layer, which all threads and all
callers of the model see.
Here the base is a second tree of module objects instead: where the tuned model has an adapter's layer, this
one has the layer under it. Both can be called at any time, in any order, by any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from mamba_sft.errors import AdapterError
from mamba_sft.kernels.twin import make_twin


def without_adapter(model: PeftModel) -> Any:
    """Returns the model under the adapter, as it was before training; `model` is not changed.

    Args:
        model: From `load_adapter` or `attach_adapter`; its weights are shared and have to stay.

    Raises:
        AdapterError: The adapter has been merged into the weights, so the base is no longer there.
    """
    return _without(model.get_base_model(), {})


def _without(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """A twin of the tree below `module`; what occurs twice in it is one object in the twin too."""
    if id(module) not in seen:
        seen[id(module)] = _replaced(module, seen)
    return seen[id(module)]


def _replaced(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if isinstance(module, TrainableTokensWrapper):
        tokens = module.token_adapter
        base = _without(tokens.get_base_layer(), seen)
        return OriginalRows(base, tokens) if tokens.merged else base
    if isinstance(module, BaseTunerLayer):
        if module.merged:
            raise AdapterError(
                "the adapter is merged into the weights, so the base is no longer there",
                hint="load the model again without merging",
            )
        return _without(module.get_base_layer(), seen)
    twin = make_twin(module)
    for name, child in module.named_children():
        twin._modules[name] = _without(child, seen)
    return twin


class OriginalRows(nn.Module):
    """Embeddings or `lm_head` as they were before some rows were trained and written into the weight.

    Args:
        layer: The embeddings, or a linear layer with one row for each token.
        tokens: PEFT's layer of trained rows, which has kept the original ones.
    """

    def __init__(self, layer: nn.Module, tokens: Any):
        super().__init__()
        self.layer = layer
        (adapter,) = tokens.merged_adapters
        rows = tokens.trainable_tokens_original[adapter].to(layer.weight)  # (K, hidden_size)
        ids = torch.tensor(tokens.token_indices[adapter], device=rows.device)  # (K,)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("ids", ids, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The original matrix, a new one at every call: (vocabulary, hidden_size)."""
        return self.layer.weight.index_copy(0, self.ids, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """Maps token ids (B, L) to embeddings, or activations (B, L, hidden_size) to scores."""
        result: Tensor = self.layer(x)
        if isinstance(self.layer, nn.Embedding):
            hits = x[..., None] == self.ids  # (B, L, K)
            originals = self.rows[hits.int().argmax(-1)]
            return torch.where(hits.any(-1, keepdim=True), originals, result)
        return result.index_copy(-1, self.ids, nn.functional.linear(x, self.rows))
