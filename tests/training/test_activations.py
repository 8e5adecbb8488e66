"""What is kept for the backward changes memory and time, and no gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.loading import load_model
from mamba_sft.recipe.fields import ModelSection
from mamba_sft.training.activations import Policy, keep_activations
from mamba_sft.training.figures import Figures
from mamba_sft.training.streaming import split
from tests.conftest import build_model
from tests.training.test_streaming import assert_same, batch, whole, with_adapter

POLICIES: list[Policy] = ["block", "mamba"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "variant", [{}, {"use_dora": True}, {"lora_dropout": 0.3}, {"target_modules": ["x_proj"]}]
)
def test_gradients_are_the_same(policy: Policy, variant: dict[str, Any]) -> None:
    """With dropout too: what is computed again draws the same numbers."""
    model = with_adapter(install(build_model()), **variant)
    torch.manual_seed(7)
    theirs = whole(model, batch())
    keep_activations(model, policy)
    torch.manual_seed(7)
    assert_same(whole(model, batch()), theirs, 1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases(tiny_base: Any, policy: Policy, quantization: Any) -> None:
    section = ModelSection(base=str(tiny_base), dtype="float32", quantization=quantization, kernels="cpu")
    model = with_adapter(load_model(section, device="cpu"))
    theirs = whole(model, batch())
    keep_activations(model, policy)
    assert_same(whole(model, batch()), theirs, 1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_graphs_at_once(policy: Policy) -> None:
    """Each forward keeps its own products."""
    model = with_adapter(install(build_model()))
    one, two = batch(), {**batch(), "input_ids": batch()["input_ids"].flip(0)}
    keep_activations(model, "none")
    expected = whole(model, one)[1], whole(model, two)[1]
    keep_activations(model, policy)
    model.zero_grad()
    losses = [Figures.of(model, split(inputs, None)[0]).loss / 50 for inputs in (one, two)]
    sum(losses).backward()
    for name, tensor in model.named_parameters():
        if tensor.grad is not None:
            torch.testing.assert_close(
                tensor.grad, expected[0][name] + expected[1][name], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("policy", POLICIES)
def test_the_graph_can_be_walked_twice(policy: Policy) -> None:
    model = with_adapter(install(build_model()))
    theirs = whole(model, batch())
    keep_activations(model, policy)
    model.zero_grad()
    loss = Figures.of(model, split(batch(), None)[0]).loss / 50
    loss.backward(retain_graph=True)
    loss.backward()
    doubled = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert_same((loss.item(), doubled), theirs, 1e-5)


def flops(model: Any, policy: Policy) -> int:
    keep_activations(model, policy)
    with FlopCounterMode(display=False) as counter:
        whole(model, batch())
    return counter.get_total_flops()


def test_the_large_products_are_not_done_again() -> None:
    """Of the arithmetic that `block` repeats, `mamba` repeats `dt_proj` and the adapter's products only."""
    model = with_adapter(install(build_model()))
    config, tokens = model.config, batch()["input_ids"].numel()
    mixer = model.get_base_model().backbone.layers[0].mixer
    base = {
        name: getattr(mixer, name).get_base_layer().weight.numel()
        for name in ("in_proj", "x_proj", "out_proj")
    }
    large = 2 * tokens * config.num_hidden_layers * sum(base.values())
    none, block, mamba = (flops(model, policy) for policy in ("none", "block", "mamba"))
    assert none < mamba < block
    assert block - mamba == large


def test_a_copied_model_computes_with_its_own_weights() -> None:
    model = install(build_model())
    keep_activations(model, "mamba")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone.layers[0].mixer.in_proj.weight.zero_()
    ids = batch()["input_ids"]
    assert not torch.allclose(model(ids).logits, twin(ids).logits)
    assert twin.backbone.layers[0].mixer.in_proj(torch.ones(1, 1, 64)).abs().max() == 0


def test_a_policy_can_be_changed() -> None:
    model = with_adapter(install(build_model()))
    counts = [flops(model, policy) for policy in ("mamba", "block", "none", "mamba")]
    assert counts[0] == counts[3] != counts[1]
    assert counts[2] < counts[0]
