"""LoRA on a Mamba mixer: what it computes, that all of it learns, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mamba_sft.errors import AdapterError
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import (
    adapter_tensors,
    attach_adapter,
    dead_adapters,
    keep_float32,
    load_adapter,
    save_adapter,
)
from mamba_sft.model.checkpoint import base_fingerprint
from mamba_sft.model.checksums import file_checksum, tensor_checksums
from mamba_sft.model.loading import apply_setup, load_model
from mamba_sft.recipe.fields import AdapterSection, ModelSection
from mamba_sft.run import ADAPTER_WEIGHTS, BASE_FACTS
from tests.conftest import build_model, build_tokenizer

ALL = ["in_proj", "x_proj", "dt_proj", "out_proj"]
IDS = torch.arange(12, 44).view(2, 16).clone()
IDS[:, 3], IDS[:, 9] = 9, 10  # the tokens whose rows are trained occur
ROWS = [9, 10]


def section(**values: Any) -> AdapterSection:
    return AdapterSection(**({"target_modules": ALL, "r": 4, "lora_alpha": 8} | values))


def move_off_zero(model: Any) -> None:
    """Gives every adapter tensor values a trained one could have: a fresh LoRA is the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_tensors(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def step(model: Any, rate: float = 1e-3) -> list[str]:
    """One optimizer step on IDS; returns the adapter tensors that got no gradient."""
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    dead = dead_adapters(model)
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate).step()
    model.zero_grad()
    return dead


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("rslora", [False, True])
def test_base_with_adapter_equals_stock_with_the_sum_of_weights(tiny_model: Any, rslora: bool) -> None:
    model = attach_adapter(install(tiny_model), section(use_rslora=rslora), trained_token_ids=ROWS)
    move_off_zero(model)
    stock, plain = build_model(), build_model()
    scale = 8 / 4**0.5 if rslora else 8 / 4
    tensors = adapter_tensors(model)
    with torch.no_grad():
        for name, weight in stock.named_parameters():
            path = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{path}.lora_A.default.weight" in tensors:
                down, up = (tensors[f"{path}.lora_{side}.default.weight"] for side in "AB")
                weight.add_(scale * up @ down)
            elif f"{path}.token_adapter.trainable_tokens_delta.default" in tensors:
                weight[ROWS] = tensors[f"{path}.token_adapter.trainable_tokens_delta.default"]
        ours, theirs = model(input_ids=IDS).logits, stock(input_ids=IDS).logits
        base = plain(input_ids=IDS).logits
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, base) > 0.05
    with torch.no_grad(), model.disable_adapter():
        assert relative(model(input_ids=IDS).logits, base) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ("none", "float32"),
        ("none", "bfloat16"),
        ("none", "float16"),
        ("nf4", "bfloat16"),
        ("int8", "float16"),
    ],
)
def test_every_adapter_tensor_learns(
    tmp_path: Path, quantization: str, dtype: str, tied: bool, dora: bool
) -> None:
    build_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = load_model(ModelSection(base=str(tmp_path), dtype=dtype, quantization=quantization))
    model = attach_adapter(model, section(use_dora=dora), trained_token_ids=ROWS)
    tensors = adapter_tensors(model)
    assert len(tensors) == 2 * len(ALL) * (3 if dora else 2) + (1 if tied else 2)
    assert {p.dtype for p in tensors.values()} == {torch.float32}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(tensors)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    assert step(model) == []  # B = 0, so that no signal reaches A, is no reason to stop
    assert step(model) == []
    still = [name for name, tensor in tensors.items() if torch.equal(before[name], tensor)]
    assert still == []


def test_tied_rows_get_gradient_from_both_uses() -> None:
    def gradient(use: str) -> torch.Tensor:
        model = attach_adapter(
            install(build_model(tie_word_embeddings=True)), section(), trained_token_ids=ROWS
        )
        (rows,) = [p for name, p in adapter_tensors(model).items() if "trainable_tokens" in name]
        base = model.get_base_model()
        hidden = base.backbone(IDS).last_hidden_state
        if use == "input":
            logits = hidden @ base.lm_head.weight.detach().T
        else:
            logits = base.lm_head(hidden if use == "both" else hidden.detach())
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        return rows.grad

    both, as_input, as_output = gradient("both"), gradient("input"), gradient("output")
    assert as_input.norm() > 0
    assert as_output.norm() > 0
    assert relative(as_input + as_output, both) < 1e-5


def test_a_dead_tensor_is_named(tiny_model: Any) -> None:
    model = attach_adapter(install(tiny_model), section())
    mixer = model.get_base_model().backbone.layers[1].mixer
    around = mixer.out_proj
    mixer.out_proj = around.base_layer  # what a kernel that reads the raw weight does
    model.add_module("bypassed", around)
    assert step(model) == [
        "bypassed.lora_A.default.weight",
        "bypassed.lora_B.default.weight",
    ]


def test_no_step_size_is_no_reason_to_stop(tiny_model: Any) -> None:
    model = attach_adapter(install(tiny_model), section())
    assert step(model, rate=0.0) == []  # warm-up starts at zero
    assert step(model) == []


def test_rows_that_do_not_occur_are_not_dead(tiny_model: Any) -> None:
    model = attach_adapter(install(tiny_model), section(), trained_token_ids=[5])
    assert step(model) == []


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_again(tiny_base: Path, tmp_path: Path, dtype: str, trainable: bool) -> None:
    where = ModelSection(base=str(tiny_base), dtype=dtype)
    setup = SimpleNamespace(
        tokenizer=build_tokenizer(), resize_to=None, trained_token_ids=ROWS, stop_token_ids=[10, 11]
    )
    base = load_model(where)
    apply_setup(base, setup)
    model = attach_adapter(base, section(use_dora=True), trained_token_ids=ROWS)
    move_off_zero(model)
    save_adapter(model, tmp_path / "adapter", section=where, setup=setup)
    saved = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}
    expected = model.eval()(input_ids=IDS).logits

    base = load_model(where)
    apply_setup(base, setup)
    loaded = load_adapter(base, tmp_path / "adapter", trainable=trainable)
    assert loaded.training == trainable
    for name, tensor in adapter_tensors(loaded).items():
        assert torch.equal(tensor, saved[name]), name
        assert tensor.dtype == torch.float32
        assert tensor.requires_grad == trainable
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, expected)
    with loaded.disable_adapter():
        again = load_model(where)
        apply_setup(again, setup)
        assert torch.equal(loaded(input_ids=IDS).logits, again(input_ids=IDS).logits)
    assert torch.equal(loaded(input_ids=IDS).logits, expected)


def test_what_is_saved(tiny_base: Path, tmp_path: Path) -> None:
    where = ModelSection(base=str(tiny_base), dtype="float32")
    setup = SimpleNamespace(
        tokenizer=build_tokenizer(), resize_to=520, trained_token_ids=[512], stop_token_ids=[512, 11]
    )
    base = load_model(where)
    apply_setup(base, setup)
    model = attach_adapter(base, section(), trained_token_ids=[512])
    save_adapter(model, tmp_path, section=where, setup=setup)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert {
        ADAPTER_WEIGHTS,
        BASE_FACTS,
        "README.md",
        "adapter_config.json",
        "tokenizer.json",
        "generation_config.json",
    } <= names
    weights = load_file(tmp_path / ADAPTER_WEIGHTS)
    assert all(tensor.shape[0] < 512 for tensor in weights.values())  # rows, never a whole vocabulary
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert json.loads((tmp_path / BASE_FACTS).read_text()) == {
        "base": str(tiny_base),
        "revision": None,
        "fingerprint": base_fingerprint(tiny_base),
        "checksums": tensor_checksums(tiny_base),
        "adapter_checksum": file_checksum(tmp_path / ADAPTER_WEIGHTS),
        "quantization": "none",
        "dtype": "float32",
        "resize_to": 520,
        "trained_token_ids": [512],
    }
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [512, 11]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(ALL)
    assert (tmp_path / ADAPTER_WEIGHTS).stat().st_mode == (tmp_path / "tokenizer.json").stat().st_mode


def test_the_tokenizer_loads_in_older_transformers_too(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    where = ModelSection(base=str(tiny_base), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base, local_files_only=True)  # leaves flags of the loading
    setup = SimpleNamespace(tokenizer=tokenizer, resize_to=None, trained_token_ids=ROWS, stop_token_ids=[11])
    model = attach_adapter(load_model(where), section(), trained_token_ids=ROWS)
    save_adapter(model, tmp_path, section=where, setup=setup)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # what transformers 4 knows
    assert not {"is_local", "local_files_only"} & set(config)
    text = "the quick brown fox"
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == tokenizer.encode(text)


def test_the_trainer_saves_rows_not_matrices(tiny_base: Path, tmp_path: Path) -> None:
    base = load_model(ModelSection(base=str(tiny_base), dtype="float32"))
    base.resize_token_embeddings(520, mean_resizing=False)
    model = attach_adapter(base, section(), trained_token_ids=[512])
    model.save_pretrained(tmp_path)
    assert all(tensor.shape[0] < 512 for tensor in load_file(tmp_path / ADAPTER_WEIGHTS).values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_rows_under_the_chunked_loss(tied: bool, dtype: torch.dtype) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = install(build_model(tie_word_embeddings=tied).to(dtype))
    model = attach_adapter(model, section(), trained_token_ids=ROWS)
    move_off_zero(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    plain = model(input_ids=IDS, labels=IDS).loss
    plain.backward()
    expected = {name: tensor.grad.clone() for name, tensor in adapter_tensors(model).items()}
    model.zero_grad()
    add_fused_lm_head(model.get_base_model())
    fused = model(input_ids=IDS, labels=IDS, fused_lm_head=True).loss
    fused.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert abs((fused - plain).item()) < tolerance
    for name, tensor in adapter_tensors(model).items():
        assert relative(tensor.grad, expected[name]) < tolerance, name


def test_trainable_tensors_go_back_to_float32(tiny_model: Any) -> None:
    model = attach_adapter(install(tiny_model), section(), trained_token_ids=ROWS)
    for tensor in adapter_tensors(model).values():
        tensor.data = tensor.data.bfloat16()  # what SFTTrainer does on a quantized base
    keep_float32(model)
    assert {tensor.dtype for tensor in adapter_tensors(model).values()} == {torch.float32}


def test_stock_models_keep_the_refusal(tiny_model: Any) -> None:
    config = LoraConfig(target_modules=["out_proj"])
    with pytest.raises(AdapterError, match="does not carry mamba-sft's mixer") as caught:
        attach_adapter(tiny_model, section())
    assert "install(model)" in (caught.value.hint or "")
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(tiny_model, config)
    get_peft_model(install(build_model()), config)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(install(build_model()), LoraConfig(target_modules=["conv1d"]))
    mixed = install(build_model())
    mixed.backbone.layers[1].mixer = build_model().backbone.layers[1].mixer
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(mixed, config)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["conv1d"], "convolution"),
        (["in_proj", "lm_head"], "never be trained"),
        (["A_log"], "parameter of the recurrence"),
        (["q_proj", "v_proj"], "`v_proj` matches no projection"),
        (["layers.7.mixer.in_proj"], "matches no projection"),
        ([], "empty"),
    ],
)
def test_targets_that_are_refused(tiny_model: Any, targets: list[str], message: str) -> None:
    values = AdapterSection.model_construct(**(section().model_dump() | {"target_modules": targets}))
    with pytest.raises(AdapterError, match=message) as caught:
        attach_adapter(install(tiny_model), values)
    assert "`in_proj` (2 of them)" in (caught.value.hint or "")


def test_a_row_outside_the_vocabulary(tiny_model: Any) -> None:
    with pytest.raises(AdapterError, match=r"\[512\]"):
        attach_adapter(install(tiny_model), section(), trained_token_ids=[9, 512])


@pytest.fixture
def saved(tiny_base: Path, tmp_path: Path) -> Path:
    where = ModelSection(base=str(tiny_base), dtype="float32")
    setup = SimpleNamespace(
        tokenizer=build_tokenizer(), resize_to=None, trained_token_ids=ROWS, stop_token_ids=[10, 11]
    )
    model = attach_adapter(load_model(where), section(), trained_token_ids=ROWS)
    save_adapter(model, tmp_path / "adapter", section=where, setup=setup)
    return tmp_path / "adapter"


def test_broken_adapters(saved: Path) -> None:
    weights = saved / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cannot read the adapter"):
        load_adapter(install(build_model()), saved)
    weights.unlink()
    with pytest.raises(AdapterError, match=f"no `{ADAPTER_WEIGHTS}`"):
        load_adapter(install(build_model()), saved)
    with pytest.raises(AdapterError, match=r"no `adapter_config\.json`"):
        load_adapter(install(build_model()), saved / "nowhere")


@pytest.mark.parametrize("config", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_adapters_of_another_base(saved: Path, config: dict[str, int]) -> None:
    with pytest.raises(AdapterError, match="does not fit this model"):
        load_adapter(install(build_model(**config)), saved)


def test_an_adapter_with_a_tensor_missing(saved: Path) -> None:
    weights = load_file(saved / ADAPTER_WEIGHTS)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, saved / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match="1 tensors are in one but not in the other"):
        load_adapter(install(build_model()), saved)
