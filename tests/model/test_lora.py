"""The fused LoRA layer equals PEFT's, and stands aside for everything but the plain case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear

from mamba_sft.model.lora import FusedLinear, fuse_lora


def layer(fused: bool, **config: Any) -> Any:
    """A layer with LoRA whose B is not zero."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10))
    options = {"r": 3, "lora_alpha": 12, "target_modules": ["0"], "init_lora_weights": False} | config
    wrapped = get_peft_model(model, LoraConfig(**options)).base_model.model[0]
    if fused:
        fuse_lora(wrapped)
        assert type(wrapped) is FusedLinear
    return wrapped


def outcome(module: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y, "x": x.grad} | gradients


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every use of the fused product."""
    calls: list[int] = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: calls.append(1) or addmm(*args, **kwargs))
    return calls


def test_the_plain_case_is_fused_and_equal(products: list[int]) -> None:
    for shape in ((6,), (4, 6), (2, 3, 6)):
        x = torch.randn(shape)
        expected, found = outcome(layer(False), x), outcome(layer(True), x)
        assert found.keys() == expected.keys() == {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    assert len(products) == 3


@pytest.mark.parametrize(
    "config",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}],
    ids=["dropout", "DoRA", "bias"],
)
def test_options_are_left_to_peft(config: dict[str, Any], products: list[int]) -> None:
    x = torch.randn(4, 6)
    expected, found = outcome(layer(False, **config), x), outcome(layer(True, **config), x)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not products


@pytest.mark.parametrize("state", ["merged", "disabled", "bfloat16", "hooked"])
def test_other_states_are_left_to_peft(state: str, products: list[int]) -> None:
    x, modules = torch.randn(4, 6), [layer(False), layer(True)]
    for module in modules:
        if state == "merged":
            module.merge()
        elif state == "disabled":
            module.enable_adapters(False)
        elif state == "bfloat16":
            module.bfloat16()
        else:
            module.lora_B["default"].register_forward_hook(lambda m, inputs, output: output * 0)
    x = x.bfloat16() if state == "bfloat16" else x
    assert torch.equal(modules[1](x), modules[0](x))
    assert not products


def test_other_modules_stay_what_they_are() -> None:
    linear = torch.nn.Linear(2, 2)
    fuse_lora(linear)
    assert type(linear) is torch.nn.Linear
    assert issubclass(FusedLinear, Linear)
