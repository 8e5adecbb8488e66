"""The step of one token for a compiler is the model's; where no compiler makes it, one message says so."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from mamba_sft.inference.generation import State, answers, stream
from mamba_sft.inference.next_token import NextToken, forward
from mamba_sft.inference.sampling import Sampling
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model import compiling
from mamba_sft.model.adapter import adapter_tensors, attach_adapter
from mamba_sft.model.compiling import CompiledStep, compile_step, compiled_step
from mamba_sft.recipe.fields import AdapterSection
from tests.conftest import build_model

NEVER: frozenset[int] = frozenset()


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that hands back what it is given."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


KINDS = [{}, {"use_conv_bias": False}, {"use_bias": True}, {"residual_in_fp32": False}, "adapter"]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    if request.param != "adapter":
        return install(build_model(**request.param))
    wrapped = attach_adapter(install(build_model()), AdapterSection(r=4, use_dora=True))
    for name, tensor in adapter_tensors(wrapped).items():
        if ".lora_B." in name:
            tensor.data.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(3))
    return wrapped.eval()


@pytest.mark.usefixtures("as_it_is")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_step_is_the_models(model: Any, rows: int, dtype: torch.dtype) -> None:
    model.to(dtype)
    ids = torch.randint(12, 512, (rows, 9), generator=torch.Generator().manual_seed(0))
    _, cache = forward(model, ids[:, :5], None)
    beside, step = copy.deepcopy(cache), CompiledStep(model)
    for at in range(5, 9):
        own, cache = forward(model, ids[:, at : at + 1], cache)
        found = step(ids[:, at : at + 1], beside)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
        torch.testing.assert_close(found, own, **close)


@pytest.mark.usefixtures("as_it_is")
def test_answers_of_a_compiled_step_are_the_models(tiny_tokenizer: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    model = install(build_model())
    prompts = [[40, 41], [60, 61, 62, 63], [300]]
    ask = {"sampling": Sampling(20), "stop_ids": {11, 100}}
    expected = answers(model, tiny_tokenizer, prompts, **ask)
    alone = list(stream(model, prompts[0], State(), **ask))
    assert compiled_step(model) is None
    compile_step(model)
    assert compiled_step(model) is not None
    assert NextToken(model, None)._compiled is compiled_step(model)
    assert answers(model, tiny_tokenizer, prompts, **ask) == expected
    assert list(stream(model, prompts[0], State(), **ask)) == alone
    assert caplog.messages[-1].startswith("compiled in ")


def broken(function: Any) -> Any:
    def fail(*args: Any) -> None:
        raise RuntimeError("CppCompileError: no compiler\nmany\nmore lines")

    return fail


def wrong(function: Any) -> Any:
    return lambda *args: function(*args) * 1.5


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(broken, "CppCompileError: no compiler"), (wrong, "it does not give what the model gives")],
)
def test_where_compiling_fails_the_models_own_step_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: Any, compiler: Any, reason: str
) -> None:
    model = install(build_model())
    monkeypatch.setattr(torch, "compile", compiler)
    compile_step(model)
    assert caplog.messages == [
        f"torch.compile does not make the step of one token, so it is as without: {reason}"
    ]
    assert compiled_step(model) is None
    assert len(list(stream(model, [40], State(), sampling=Sampling(3), stop_ids=NEVER))) == 3


def test_another_activation_is_not_compiled(caplog: Any) -> None:
    model = install(build_model(hidden_act="relu"))
    compile_step(model)
    assert "the model's activation is `relu`, not `silu`" in caplog.text
    assert compiled_step(model) is None


@pytest.mark.slow
def test_torch_compiles_the_step() -> None:
    model = install(build_model())
    compile_step(model)
    step = compiling.compiled_step(model)
    assert step is not None
    _, cache = forward(model, torch.tensor([[40, 41]]), None)
    beside = copy.deepcopy(cache)
    own, _ = forward(model, torch.tensor([[42]]), cache)
    torch.testing.assert_close(step(torch.tensor([[42]]), beside), own, rtol=1e-4, atol=1e-4)
