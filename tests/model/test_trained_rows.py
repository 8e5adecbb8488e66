from __future__ import annotations

from typing import Any

import pytest
import torch

from mamba_sft.model.adapter import attach_adapter
from mamba_sft.model.trained_rows import TrainedRows
from mamba_sft.recipe.fields import AdapterSection
from tests.conftest import build_model


@pytest.mark.parametrize("tied", [False, True])
def test_the_matrices_are_pefts_to_the_last_bit_and_the_numbers_are_uploaded_once(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mamba_sft.kernels.falcon_mamba import install

    model: Any = attach_adapter(
        install(build_model(tie_word_embeddings=tied)), AdapterSection(), trained_token_ids=[3, 4]
    )
    layers = [module for module in model.modules() if isinstance(module, TrainedRows)]
    assert layers
    made: list[Any] = []
    build = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made.append(a) or build(*a, **k))
    for layer in layers:
        for parameter in layer.trainable_tokens_delta.values():
            parameter.data.normal_()
        theirs = super(TrainedRows, layer).get_merged_weights(layer.active_adapters)
        made.clear()
        ours = [layer.get_merged_weights(layer.active_adapters) for _ in range(3)]
        assert all(torch.equal(one, theirs) for one in ours)
        assert not torch.equal(theirs, layer.base_layer.weight)
        assert len(made) == 1
