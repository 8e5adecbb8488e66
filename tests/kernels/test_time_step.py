"""`dt_proj` without its bias, whatever it is wrapped in, and unseen by other threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model

from mamba_sft.kernels.time_step import innermost, project_dt
from mamba_sft.kernels.twin import make_twin

RANK, CHANNELS = 4, 6


class Mixer(torch.nn.Module):
    """As much of a mixer as PEFT needs."""

    def __init__(self) -> None:
        super().__init__()
        self.dt_proj = torch.nn.Linear(RANK, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dt_proj(x)


def wrapped(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["dt_proj"], init_lora_weights=False, **options)
    return get_peft_model(Mixer(), config).base_model.model.dt_proj


@pytest.fixture(params=["bare", "LoRA", "DoRA", "biased LoRA", "dropout", "accelerate"])
def dt_proj(request: pytest.FixtureRequest) -> torch.nn.Module:
    options = {
        "LoRA": {},
        "DoRA": {"use_dora": True},
        "biased LoRA": {"lora_bias": True},
        "dropout": {"lora_dropout": 0.5},
    }
    if request.param in options:
        return wrapped(**options[request.param])
    torch.manual_seed(0)
    linear = torch.nn.Linear(RANK, CHANNELS)
    if request.param == "accelerate":
        add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))
    return linear


def test_product_and_bias_are_what_the_module_computes(dt_proj: torch.nn.Module) -> None:
    x = torch.randn(2, 3, RANK)
    torch.manual_seed(1)
    expected = dt_proj(x)
    torch.manual_seed(1)
    product, bias = project_dt(dt_proj, x)
    assert bias is innermost(dt_proj).bias
    torch.testing.assert_close(product + bias, expected)
    assert (product - expected).abs().max() > 0.01


def test_gradients_are_the_module_s(dt_proj: torch.nn.Module) -> None:
    def gradients(call: object) -> dict[str, torch.Tensor]:
        dt_proj.zero_grad()
        torch.manual_seed(1)
        call(torch.randn(2, 3, RANK)).square().sum().backward()
        return {name: p.grad.clone() for name, p in dt_proj.named_parameters() if p.grad is not None}

    expected = gradients(dt_proj)
    for name, gradient in gradients(lambda x: sum(project_dt(dt_proj, x))).items():
        torch.testing.assert_close(gradient, expected.pop(name))
    assert not expected


def test_hooks_still_run_and_nothing_is_left_behind(dt_proj: torch.nn.Module) -> None:
    heard: list[int] = []
    innermost(dt_proj).register_forward_hook(lambda *_: heard.append(1))
    before = {name: id(module) for name, module in dt_proj.named_modules()}
    parameters = {name: id(parameter) for name, parameter in dt_proj.named_parameters()}
    project_dt(dt_proj, torch.randn(1, 1, RANK))
    assert heard == [1]
    assert before == {name: id(module) for name, module in dt_proj.named_modules()}
    assert parameters == {name: id(parameter) for name, parameter in dt_proj.named_parameters()}


def test_no_bias_and_a_bias_that_is_not_at_hand() -> None:
    x = torch.randn(1, 2, RANK)
    plain = torch.nn.Linear(RANK, CHANNELS, bias=False)
    product, bias = project_dt(plain, x)
    assert bias is None
    assert torch.equal(product, plain(x))

    linear = torch.nn.Linear(RANK, CHANNELS)
    expected = linear(x)
    offloaded = copy.deepcopy(linear)
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=dict(linear.state_dict()))
    add_hook_to_module(offloaded, hook)
    assert offloaded.bias.is_meta
    product, bias = project_dt(offloaded, x)
    assert bias is None
    assert torch.equal(product, expected)


def test_threads_see_the_bias_all_the_time() -> None:
    """One thread projects all the time; in another the module always answers as it does by itself."""
    linear = torch.nn.Linear(RANK, CHANNELS)
    x = torch.randn(1, 1, RANK)
    expected, bare = linear(x), x @ linear.weight.T
    with ThreadPoolExecutor(2) as pool:
        projected = pool.submit(lambda: [project_dt(linear, x)[0] for _ in range(2000)])
        called = pool.submit(lambda: [linear(x) for _ in range(2000)])
    assert all(torch.equal(product, expected) for product in called.result())
    for product in projected.result():
        torch.testing.assert_close(product, bare)


def test_a_twin_shares_tensors_and_differs_where_it_is_changed() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    twin = make_twin(module)
    assert twin[0] is module[0]
    twin._modules["0"] = torch.nn.Identity()
    assert isinstance(module[0], torch.nn.Linear)
    other = make_twin(module[0])
    other._parameters["bias"] = None
    assert other.weight is module[0].weight
    assert module[0].bias is not None
