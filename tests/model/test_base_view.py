"""The base under an adapter is a model of its own, and the tuned one does not notice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from mamba_sft.errors import AdapterError
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import adapter_tensors, attach_adapter
from mamba_sft.model.base_view import without_adapter
from mamba_sft.recipe.fields import AdapterSection
from tests.conftest import build_model

ROWS = [3, 7, 500]
TOKENS = torch.tensor([[5, 3, 9, 7, 500, 11, 3]])


def tuned(model: Any, **options: Any) -> Any:
    """The model with an adapter that changes everything it may change."""
    wrapped = attach_adapter(install(model), AdapterSection(r=4, **options), trained_token_ids=ROWS)
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter_tensors(wrapped).values():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    return wrapped.eval()


def rows_written(model: Any) -> Any:
    """As `load_adapter` leaves a model that is only to talk: trained rows lie in the matrices."""
    for module in model.modules():
        if hasattr(module, "token_adapter"):
            module.token_adapter.merge()
    return model


@pytest.mark.parametrize("written", [False, True], ids=["rows apart", "rows written"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@torch.no_grad()
def test_the_view_is_the_base_and_the_model_stays_tuned(
    options: dict[str, Any], tied: bool, written: bool
) -> None:
    model = build_model(tie_word_embeddings=tied)
    expected = install(copy.deepcopy(model))(TOKENS).logits
    model = tuned(model, **options)
    model = rows_written(model) if written else model
    after = model(TOKENS).logits
    assert (after - expected).abs().max() > 0.1

    base = without_adapter(model)
    torch.testing.assert_close(base(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(TOKENS).logits, after)
    assert base.config is model.get_base_model().config
    assert base.device == model.device


def test_the_weights_are_the_same_ones() -> None:
    model = rows_written(tuned(build_model()))
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    base = without_adapter(model)
    assert {parameter.data_ptr() for parameter in base.parameters()} <= shared
    assert not [name for name, _ in base.named_parameters() if "lora" in name or "token" in name]


@torch.no_grad()
def test_what_accelerate_has_put_on_the_layers_calls_the_view_s_own() -> None:
    model = build_model()
    expected = install(copy.deepcopy(model))(TOKENS).logits
    dispatch_model(install(model), {"": "cpu"}, force_hooks=True)
    model = tuned(model)
    base = without_adapter(model)
    torch.testing.assert_close(base(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_merged_adapter_leaves_no_base() -> None:
    model = tuned(build_model())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        without_adapter(model)
