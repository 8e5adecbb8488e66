"""All weights trained: which gradients they get, which of them decay, and the checkpoint they become."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba_sft.data.packing import Collator
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model import full_weights
from mamba_sft.model.checksums import tensor_checksums
from mamba_sft.model.full_weights import dead_weights, is_undecayed, save_model, train_all_weights
from mamba_sft.model.loading import apply_setup, load_model, load_setup
from mamba_sft.recipe.fields import ChatSection, ModelSection
from mamba_sft.training.activations import keep_activations
from mamba_sft.training.figures import Figures
from mamba_sft.training.fused_head import add_fused_head
from mamba_sft.training.streaming import backpropagate, split, sweep
from tests.conftest import build_model

LENGTHS = (37, 59)


def tokens() -> list[list[int]]:
    torch.manual_seed(0)
    return [torch.randint(0, 512, (length,)).tolist() for length in LENGTHS]


def stock_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Float64 autograd through the forward of transformers, each sequence by itself."""
    model = copy.deepcopy(model).double().train()
    for ids in tokens():
        row = torch.tensor([ids])
        logits = model(input_ids=row, use_cache=False).logits.double()
        cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def our_gradients(
    model: Any, *, backend: str = "cpu", policy: str = "none", stream: int | None = None, mixed: bool = False
) -> dict[str, torch.Tensor]:
    """One packed row through the mixer, the loss and the steps that training takes."""
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles here, and takes no tensors of the CPU")
    model = train_all_weights(install(copy.deepcopy(model), backend)).train()
    add_fused_head(model)
    keep_activations(model, policy)  # type: ignore[arg-type]
    ids = [token for one in tokens() for token in one]
    batch = Collator(pad_token_id=0)([{"input_ids": ids, "labels": ids, "seq_lengths": list(LENGTHS)}])
    cast = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    chunks = split(batch, stream)

    def run(chunk: Any, carry: Any, close: Any) -> None:
        with cast:
            loss = Figures.of(model, chunk, carry=carry).loss
        close(loss).backward()

    if stream is None:
        with cast:
            loss = Figures.of(model, chunks[0]).loss
        loss.backward()
    else:
        with cast:
            boundaries = sweep(model.backbone, chunks)
        backpropagate(chunks, boundaries, run)
    assert dead_weights(model) == []
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("way", "tolerance"),
    [
        ({}, 2e-5),
        ({"backend": "reference"}, 2e-5),
        pytest.param({"backend": "triton"}, 2e-5, marks=pytest.mark.slow),
        pytest.param({"backend": "triton", "mixed": True, "policy": "block"}, 5e-2, marks=pytest.mark.slow),
        ({"policy": "block"}, 2e-5),
        ({"stream": 16}, 2e-5),
        ({"stream": 16, "policy": "block"}, 2e-5),
        ({"mixed": True}, 5e-2),
        ({"mixed": True, "policy": "block", "stream": 16}, 5e-2),
    ],
    ids=str,
)
def test_every_weight_gets_the_gradient_of_transformers(
    way: dict[str, Any], tolerance: float, tied: bool
) -> None:
    model = build_model(residual_in_fp32=False, tie_word_embeddings=tied)
    expected, found = stock_gradients(model), our_gradients(model, **way)
    assert expected.keys() == found.keys()
    first = {name.removeprefix("backbone.layers.0.") for name in found}
    assert {"mixer.A_log", "mixer.D", "mixer.dt_proj.bias", "mixer.conv1d.weight", "mixer.conv1d.bias",
            "norm.weight", "backbone.norm_f.weight", "backbone.embeddings.weight"} <= first  # fmt: skip
    for name, gradient in expected.items():
        error = (found[name].double() - gradient).norm() / gradient.norm()
        assert error < tolerance, (name, float(error))


def test_a_weight_that_nothing_flows_through_is_found() -> None:
    model = train_all_weights(install(build_model()))
    model.backbone.layers[1].mixer.D.requires_grad_(False)
    model(input_ids=torch.tensor([tokens()[0]])).logits.sum().backward()
    assert dead_weights(model) == []
    model.backbone.layers[1].mixer.D.requires_grad_(True)
    model.backbone.layers[0].mixer.A_log.grad.zero_()
    assert dead_weights(model) == ["backbone.layers.0.mixer.A_log", "backbone.layers.1.mixer.D"]


def test_decay_is_mambas() -> None:
    decayed = {
        name.rpartition("layers.")[2].partition(".")[2]
        for name, _ in build_model().named_parameters()
        if ".layers." in name and not is_undecayed(name)
    }
    assert decayed == {
        f"mixer.{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")
    }
    assert not is_undecayed("backbone.embeddings.weight")
    assert not is_undecayed("lm_head.weight")
    assert is_undecayed("backbone.norm_f.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("special_tokens", ["auto", "add"])
def test_what_is_saved_loads_in_plain_transformers(
    tmp_path: Path, tiny_base: Path, dtype: str, tied: bool, special_tokens: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    build_model(tie_word_embeddings=tied).save_pretrained(tiny_base)
    section = ModelSection.model_validate({"base": str(tiny_base), "dtype": dtype})
    setup = load_setup(section, ChatSection.model_validate({"special_tokens": special_tokens}))
    model = load_model(full_weights.in_float32(section))
    apply_setup(model, setup)
    with torch.no_grad():
        for parameter in train_all_weights(model).parameters():
            parameter.mul_(1.001)
    monkeypatch.setattr(full_weights, "SHARD_BYTES", 100_000)  # several files
    save_model(model, tmp_path / "model", section=section, setup=setup)
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    kept = getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {kept}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(kept)), name
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == setup.tokenizer.chat_template
    ids = torch.tensor([tokens()[0]])
    ours = install(copy.deepcopy(loaded), "reference")
    expected, found = loaded(ids).logits, ours(ids).logits
    assert (found - expected).norm() < (1e-5 if dtype == "float32" else 2e-2) * expected.norm()
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert facts["base"] == str(tiny_base)
    assert facts["checksums"] == tensor_checksums(tmp_path / "model")
    assert model.dtype == torch.float32
