"""Base models: what is loaded, in which precision, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mamba_sft.errors import ModelError
from mamba_sft.kernels.falcon_mamba import FalconMambaMixer
from mamba_sft.model.chat_template import encode_batch
from mamba_sft.model.loading import (
    apply_setup,
    load_model,
    load_tokenizer,
    recommend_sampling,
    resolve_dtype,
)
from mamba_sft.recipe.fields import ChatSection, ModelSection
from tests.conftest import build_model, build_tokenizer

IDS = torch.arange(12, 44).view(2, 16)


def where(base: Path | str, **values: Any) -> ModelSection:
    return ModelSection(**({"base": str(base), "dtype": "float32"} | values))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Precision


def whole_blocks(directory: Path) -> Any:
    """Saves a model all of whose projections 4 bits take, as those of the 7B: `x_proj` has 64 rows."""
    model = build_model(time_step_rank=32)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        ({}, 1e-5),
        ({"dtype": "bfloat16"}, 0.05),
        ({"dtype": "float16"}, 0.01),
        ({"quantization": "nf4"}, 0.5),
        ({"quantization": "nf4", "dtype": "bfloat16"}, 0.5),
        ({"quantization": "int8"}, 0.1),
        ({"quantization": "int8", "dtype": "bfloat16"}, 0.1),
    ],
)
def test_precisions(tmp_path: Path, values: dict[str, str], bound: float) -> None:
    stock = whole_blocks(tmp_path)
    model = load_model(where(tmp_path, **values))
    assert not model.training
    assert all(isinstance(block.mixer, FalconMambaMixer) for block in model.backbone.layers)
    assert relative(logits(model), logits(stock)) < bound
    mixer = model.backbone.layers[0].mixer
    quantized = {"none": model.dtype, "nf4": torch.uint8, "int8": torch.int8}[
        values.get("quantization", "none")
    ]
    assert {p.weight.dtype for p in (mixer.in_proj, mixer.x_proj, mixer.out_proj)} == {quantized}
    asked = getattr(torch, values.get("dtype", "float32"))
    plain = [mixer.dt_proj.weight, mixer.A_log, mixer.D, model.lm_head.weight, model.backbone.norm_f.weight]
    assert {tensor.dtype for tensor in plain} == {asked}


def test_nf4_equals_its_own_dequantized_weights(tmp_path: Path) -> None:
    """The mixer calls the quantized modules: only weights that merging can restore are at work."""
    from bitsandbytes.functional import dequantize_4bit

    whole_blocks(tmp_path)
    model, plain = load_model(where(tmp_path, quantization="nf4")), load_model(where(tmp_path))
    with torch.no_grad():
        for ours, theirs in zip(model.backbone.layers, plain.backbone.layers, strict=True):
            for name in ("in_proj", "x_proj", "out_proj"):
                weight = getattr(ours.mixer, name).weight
                assert weight.quant_state.nested  # double quantization
                getattr(theirs.mixer, name).weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    assert relative(logits(model), logits(plain)) < 1e-4


def test_tied_and_sharded(tmp_path: Path) -> None:
    build_model(tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(where(tmp_path))
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert relative(logits(model), logits(build_model(tie_word_embeddings=True))) < 1e-5


@pytest.mark.parametrize(
    ("asked", "native", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float16),
        ("bfloat16", False, torch.float16),
        ("bfloat16", True, torch.bfloat16),
        ("float32", False, torch.float32),
    ],
)
def test_dtype_on_cards(
    monkeypatch: pytest.MonkeyPatch, asked: str, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert resolve_dtype(where("x", dtype=asked)) == expected


def test_dtype_on_a_cpu() -> None:
    assert resolve_dtype(where("x", dtype="auto"), "cpu") == torch.float32
    assert resolve_dtype(where("x", dtype="bfloat16"), "cpu") == torch.bfloat16


# What is refused


def test_hub_download(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, tuple(allow_patterns)))
        return str(tiny_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_tokenizer(where("someone/model", revision="abc"))
    assert not any("safetensors" in pattern for call in calls for pattern in call[2])
    model = load_model(where("someone/model", revision="abc"))
    assert {call[:2] for call in calls} == {("someone/model", "abc")}
    assert not any(pattern in ("*.bin", "*.py", "*") for call in calls for pattern in call[2])
    assert model.name_or_path == "someone/model"  # an adapter names its base by what others can find

    (tiny_base / "config.json").write_text('{"model_type": "llama"}')
    calls.clear()
    with pytest.raises(ModelError, match="`llama` model"):
        load_model(where("someone/model"))
    assert not any("*.safetensors" in call[2] for call in calls)  # refused before 14 GB are fetched


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_config_of_another_size(tiny_base: Path) -> None:
    edit_config(tiny_base, hidden_size=32)
    with pytest.raises(ModelError, match="do not have the shapes"):
        load_model(where(tiny_base))


def test_config_with_more_layers(tiny_base: Path) -> None:
    edit_config(tiny_base, num_hidden_layers=3)
    with pytest.raises(ModelError, match="lacks 10 tensors of the model"):
        load_model(where(tiny_base))


def test_devices(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="shows 0 CUDA devices"):
        load_model(where(tiny_base), device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="`cuda:5` was asked for"):
        load_model(where(tiny_base), device="cuda:5")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()],
)
def test_out_of_memory(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from transformers import FalconMambaForCausalLM

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(FalconMambaForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="not enough memory on cpu") as caught:
        load_model(where(tiny_base))
    assert "nf4" in (caught.value.hint or "")


def test_bugs_keep_their_traceback(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import FalconMambaForCausalLM

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(FalconMambaForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="something else"):
        load_model(where(tiny_base))


def test_tokenizers(tiny_base: Path) -> None:
    assert load_tokenizer(where(tiny_base)).decode([9]) == ">>SUFFIX<<"
    (tiny_base / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(where(tiny_base))
    (tiny_base / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no `tokenizer\.json`"):
        load_tokenizer(where(tiny_base))


# Agreement with the tokenizer


def setup(**values: Any) -> Any:
    defaults = {
        "tokenizer": build_tokenizer(),
        "trained_token_ids": [9, 10],
        "resize_to": None,
        "stop_token_ids": [10, 11],
    }
    return SimpleNamespace(**(defaults | values))


@pytest.mark.parametrize("tied", [False, True])
def test_slots_start_where_they_can_learn(tied: bool) -> None:
    model, stock = build_model(tie_word_embeddings=tied), build_model(tie_word_embeddings=tied)
    apply_setup(model, setup())
    inputs, outputs = model.backbone.embeddings.weight, model.lm_head.weight
    before, old_outputs = stock.backbone.embeddings.weight, stock.lm_head.weight
    assert torch.allclose(inputs[9], before.mean(0), atol=1e-6)
    assert torch.allclose(outputs[9], old_outputs.mean(0), atol=1e-6)
    assert torch.equal(outputs[10], old_outputs[11])  # stopping starts as likely as the end of a document
    if not tied:
        assert torch.allclose(inputs[10], before.mean(0), atol=1e-6)
    others = [token for token in range(512) if token not in (9, 10)]
    assert torch.equal(inputs[others], before[others])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [10, 11]
    assert model.generation_config.pad_token_id == model.config.pad_token_id == 11


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_resizing_is_deterministic(tmp_path: Path, quantization: str, tied: bool) -> None:
    build_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    grown = []
    for seed in (0, 1):
        model = load_model(where(tmp_path, quantization=quantization))
        before = logits(model)
        torch.manual_seed(seed)
        apply_setup(model, setup(trained_token_ids=[512, 513], resize_to=514, stop_token_ids=[513, 11]))
        assert model.config.vocab_size == 514
        assert model.backbone.embeddings.weight.shape == model.lm_head.weight.shape == (514, 64)
        assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
        assert torch.allclose(logits(model)[..., :512], before, rtol=0, atol=1e-5)
        assert torch.equal(model.lm_head.weight[513], model.lm_head.weight[11])
        grown.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*grown)


def test_a_vocabulary_cannot_shrink(tiny_model: Any) -> None:
    with pytest.raises(ModelError, match="cannot shrink from 512 to 500"):
        apply_setup(tiny_model, setup(resize_to=500))


def test_the_end_of_text_row_is_never_overwritten(tiny_model: Any) -> None:
    before = tiny_model.lm_head.weight[11].clone()
    apply_setup(tiny_model, setup(trained_token_ids=[10, 11]))
    assert torch.equal(tiny_model.lm_head.weight[11], before)


@pytest.mark.parametrize(
    ("section", "written"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
        ({"temperature": 0.0, "top_p": 0.9}, {"do_sample": False}),
    ],
)
def test_the_recipes_sampling_travels_with_the_checkpoint(
    tiny_model: Any, tmp_path: Path, section: dict[str, float], written: dict[str, Any]
) -> None:
    recommend_sampling(tiny_model, ChatSection(**section))
    tiny_model.generation_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    names = ("do_sample", "temperature", "top_p")
    assert {name: saved[name] for name in names if saved.get(name) is not None} == written


def test_a_tokenizer_that_truncates_or_pads_by_itself_does_not(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                          "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    texts = ["the quick brown fox", "fox"]
    own, plain = (encode_batch(load_tokenizer(where(path)), texts) for path in (base, tiny_base))
    assert own == plain
    assert own == load_tokenizer(where(tiny_base))(texts, add_special_tokens=False).input_ids
