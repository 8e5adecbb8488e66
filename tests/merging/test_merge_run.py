"""Merging: the sums, the files, the checks, and everything that can go wrong on the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba_sft.errors import AdapterError, MambaSFTError, MergeError, ModelError, UsageError
from mamba_sft.inference.scoring import heldout_loss
from mamba_sft.merging import merge_run, preparing
from mamba_sft.merging.merge_run import DequantizedTensors, merge
from mamba_sft.merging.saved_adapter import SavedAdapter
from mamba_sft.model import tensor_files
from mamba_sft.model.adapter import attach_adapter, save_adapter
from mamba_sft.model.chat_template import prepare_tokenizer
from mamba_sft.model.checkpoint import base_fingerprint, read_tensors
from mamba_sft.model.checksums import file_checksum, tensor_checksums
from mamba_sft.model.loading import apply_setup, load_model
from mamba_sft.recipe.fields import AdapterSection, ChatSection, ModelSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from tests.conftest import build_model, build_tokenizer

PROMPT = torch.tensor([[14, 300, 41, 7, 88, 123, 250, 9, 10, 33]])


@dataclass
class Made:
    """A run directory, the base it was made from, and the model it ended with."""

    run: Run
    base: Path
    section: ModelSection
    model: Any

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(PROMPT).logits.float()


def make_run(
    tmp_path: Path,
    *,
    config: dict[str, Any] | None = None,
    base_dtype: torch.dtype = torch.float32,
    chat: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    validation: bool = False,
    **adapter: Any,
) -> Made:
    """What training leaves behind, with random numbers where training would have moved the adapter."""
    base = tmp_path / "base"
    build_model(**(config or {})).to(base_dtype).save_pretrained(base, max_shard_size="100KB")
    build_tokenizer().save_pretrained(base)
    (base / "LICENSE.txt").write_text("licence of the base", encoding="utf-8")
    section = ModelSection(**{"base": str(base), "dtype": "float32", "kernels": "reference"} | (model or {}))
    trained = load_model(section, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = trained.config.vocab_size
    setup = prepare_tokenizer(tokenizer, ChatSection(**(chat or {})), {0, 11}, embedding_rows=rows)
    apply_setup(trained, setup)
    trained = attach_adapter(
        trained,
        AdapterSection(**{"r": 4, "lora_alpha": 8} | adapter),
        trained_token_ids=setup.trained_token_ids,
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1)
            elif "trainable_tokens_delta" in name:
                parameter.normal_()
            elif "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.25))
    run = Run(tmp_path / "run")
    save_adapter(trained, run.adapter, section=section, setup=setup)
    write_recipe(run, tmp_path, section, adapter, validation)
    return Made(run, base, section, trained.eval())


def write_recipe(
    run: Run, tmp_path: Path, section: ModelSection, adapter: dict[str, Any], validation: bool
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"hello {i}"},
                {"role": "assistant", "content": f"world {i}"},
            ]
        }
        for i in range(12)
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "output_dir": str(run.path),
        "model": section.model_dump(),
        "data": {"sources": [{"path": str(data)}], "validation": 4 if validation else 0, "max_length": 64},
    }
    run.recipe.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def merged_logits(path: Path) -> torch.Tensor:
    """Logits of stock transformers on the merged files, which must fit without a word."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()
    }


ALL = ["in_proj", "x_proj", "dt_proj", "out_proj"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "all targets": {"target_modules": ALL},
    "dora on all": {"target_modules": ALL, "use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_base_and_adapter(tmp_path: Path, kind: str) -> None:
    made = make_run(tmp_path, **KINDS[kind])
    report = merge(made.run)
    assert relative(merged_logits(made.run.merged), made.logits()) < 2e-6
    assert relative(merged_logits(made.base), made.logits()) > 0.05, "the adapter must do something"
    assert report.check.difference < 2e-6
    assert report.check.rows > 100
    before, after = weights(made.base), weights(made.run.merged)
    assert report.changed == sum(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_float32_equals_pefts_merge(tmp_path: Path, kind: str) -> None:
    made = make_run(tmp_path, target_modules=["in_proj", "x_proj"], **KINDS[kind])
    merge(made.run)
    stock = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(stock, made.run.adapter).merge_and_unload().state_dict()
    found = weights(made.run.merged)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_bfloat16_rounds_once_and_is_no_further_off_than_peft(tmp_path: Path, kind: str) -> None:
    made = make_run(tmp_path, base_dtype=torch.bfloat16, target_modules=["in_proj", "x_proj"], **KINDS[kind])
    merge(made.run, output=tmp_path / "exact", dtype="float32")
    merge(made.run)
    stock = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.bfloat16)
    pefts = PeftModel.from_pretrained(stock, made.run.adapter).merge_and_unload().state_dict()
    exact, found = weights(tmp_path / "exact"), weights(made.run.merged)
    ours = theirs = 0.0
    for name, value in found.items():
        assert torch.equal(value, exact[name].bfloat16()), name
        ours += (value.float() - exact[name]).square().sum().item()
        theirs += (pefts[name].float() - exact[name]).square().sum().item()
    assert 0 < ours <= theirs


def test_pefts_other_settings_merge_as_in_peft(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        target_modules=r".*\.(in_proj|dt_proj)",
        rank_pattern={"dt_proj": 2},
        alpha_pattern={r"layers\.1\.mixer\.in_proj": 64},
        bias="all",
    )
    model = get_peft_model(stock, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(made.run.adapter)
    edit_facts(made, adapter_checksum=None)  # as the error tells whoever changes an adapter
    report = merge(made.run)
    wanted = model.merge_and_unload().state_dict()
    for name, value in weights(made.run.merged).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)
    assert report.changed == 2 * 4  # of each layer: two projections and the biases of conv1d and dt_proj


def test_loras_own_bias_merges(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    model = get_peft_model(stock, LoraConfig(r=4, target_modules=["dt_proj"], lora_bias=True, lora_alpha=12))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(made.run.adapter)
    edit_facts(made, adapter_checksum=None)  # as the error tells whoever changes an adapter
    merge(made.run)
    wanted = model.merge_and_unload().state_dict()
    for name, value in weights(made.run.merged).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("special_tokens", ["auto", "add"])
def test_trained_rows_and_grown_vocabularies(tmp_path: Path, tied: bool, special_tokens: str) -> None:
    rows = len(build_tokenizer())  # none to spare: added tokens need new ones
    config = {"tie_word_embeddings": tied, "vocab_size": rows}
    made = make_run(tmp_path, config=config, chat={"special_tokens": special_tokens})
    report = merge(made.run)
    assert relative(merged_logits(made.run.merged), made.logits()) < 2e-6
    merged = weights(made.run.merged)
    assert ("lm_head.weight" in merged) is not tied
    assert len(merged["backbone.embeddings.weight"]) == rows + 2 * (special_tokens == "add")
    facts = json.loads((made.run.adapter / "base.json").read_text())
    saved = load_file(made.run.adapter / "adapter_model.safetensors")
    rows = saved["base_model.model.backbone.embeddings.token_adapter.trainable_tokens_delta"]
    assert torch.equal(merged["backbone.embeddings.weight"][facts["trained_token_ids"]], rows)
    assert report.check.difference < 2e-6


def test_a_tied_matrix_stored_twice_stays_one(tmp_path: Path) -> None:
    made = make_run(tmp_path, config={"tie_word_embeddings": True})
    for path in made.base.glob("*.safetensors"):
        tensors = load_file(path)
        if "backbone.embeddings.weight" in tensors:
            tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
            save_file(tensors, path, metadata={"format": "pt"})
            index = json.loads((made.base / "model.safetensors.index.json").read_text())
            index["weight_map"]["lm_head.weight"] = path.name
            (made.base / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_facts(made, fingerprint=base_fingerprint(made.base), checksums=tensor_checksums(made.base))
    merge(made.run)
    merged = weights(made.run.merged)
    assert torch.equal(merged["lm_head.weight"], merged["backbone.embeddings.weight"])
    assert relative(merged_logits(made.run.merged), made.logits()) < 2e-6


@pytest.mark.parametrize("metadata", [None, [], "total"])
def test_an_index_that_says_nothing_of_itself_gets_its_size(tmp_path: Path, metadata: Any) -> None:
    made = make_run(tmp_path)
    place = made.base / "model.safetensors.index.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"metadata": metadata}))
    report = merge(made.run)
    written = json.loads((made.run.merged / place.name).read_text())
    assert written["metadata"] == {"total_size": report.nbytes}


def test_files_are_the_bases_with_our_template_and_stop_ids(tmp_path: Path) -> None:
    made = make_run(tmp_path, base_dtype=torch.bfloat16)
    (made.base / "README.md").write_text("card of the base", encoding="utf-8")
    merge(made.run)
    out, index = made.run.merged, "model.safetensors.index.json"
    shards_of = [sorted(path.name for path in where.glob("*.safetensors")) for where in (made.base, out)]
    assert shards_of[0] == shards_of[1]
    assert len(shards_of[0]) > 2
    assert json.loads((made.base / index).read_text()) == json.loads((out / index).read_text())
    assert (out / "LICENSE.txt").read_text() == "licence of the base"
    assert not (out / "README.md").exists()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    config = json.loads((out / "config.json").read_text())
    assert stops[0] == tokenizer.eos_token_id
    assert config["eos_token_id"] == stops
    kept = json.loads((made.base / "config.json").read_text())
    same = kept.keys() - {"eos_token_id", "pad_token_id", "bos_token_id"}
    assert {key: config[key] for key in same} == {key: kept[key] for key in same}
    before, after = weights(made.base), weights(out)
    assert {name: value.dtype for name, value in before.items()} == {n: v.dtype for n, v in after.items()}
    name = "backbone.layers.0.mixer.A_log"
    assert torch.equal(before[name], after[name])


def test_a_base_in_one_file_merges_into_one_file(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    for path in made.base.glob("model*"):
        path.unlink()
    build_model().save_pretrained(made.base)
    merge(made.run)
    assert sorted(path.name for path in made.run.merged.glob("model*")) == ["model.safetensors"]
    assert relative(merged_logits(made.run.merged), made.logits()) < 2e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_every_tensors_and_the_configs(tmp_path: Path, dtype: str) -> None:
    made = make_run(tmp_path, base_dtype=torch.bfloat16 if dtype == "float32" else torch.float32)
    report = merge(made.run, dtype=dtype)
    assert {value.dtype for value in weights(made.run.merged).values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(made.run.merged).dtype == getattr(torch, dtype)
    bounds = {"float32": (0, 2e-6), "bfloat16": (1e-4, 2e-2), "float16": (1e-5, 2e-3)}
    assert bounds[dtype][0] <= report.check.difference < bounds[dtype][1]
    assert relative(merged_logits(made.run.merged), made.logits()) < bounds[dtype][1]


def test_values_beyond_float16_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_run(tmp_path)
    edit_base(made, "backbone.embeddings.weight", lambda value: value[400, :3].fill_(1e5))
    with caplog.at_level(logging.WARNING):
        report = merge(made.run, dtype="float16")
    assert report.overflowed == 3
    assert "3 values" in caplog.text


def test_an_overflow_that_reaches_the_logits_is_an_error(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    edit_base(made, "backbone.norm_f.weight", lambda value: value[:1].fill_(1e6))
    with pytest.raises(MergeError, match="not finite"):
        merge(made.run, dtype="float16")
    assert not made.run.merged.exists()


def edit_base(made: Made, name: str, change: Any) -> None:
    """Changes a tensor of the base, and lets the run know the new base as its own."""
    for path in made.base.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, path, metadata={"format": "pt"})
    edit_facts(made, fingerprint=base_fingerprint(made.base), checksums=tensor_checksums(made.base))


def edit_base_dtype(made: Made, name: str, dtype: torch.dtype) -> None:
    for path in made.base.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata={"format": "pt"})
    edit_facts(made, fingerprint=base_fingerprint(made.base), checksums=tensor_checksums(made.base))


def edit_facts(made: Made, **changes: Any) -> None:
    path = made.run.adapter / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def edit_adapter(made: Made, change: Any) -> None:
    path = made.run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_facts(made, adapter_checksum=file_checksum(path))


def edit_adapter_config(made: Made, **changes: Any) -> None:
    path = made.run.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "rank"), [("nf4", 32), ("nf4", 8), ("int8", 8)])
def test_dequantized_weights_are_the_trained_ones(
    tmp_path: Path, quantization: str, rank: int, dtype: str
) -> None:
    """At rank 8, `x_proj` has 40 rows, which 4 bits do not take: it is neither rounded nor restored."""
    made = make_run(
        tmp_path,
        config={"hidden_size": 128, "time_step_rank": rank},
        model={"quantization": quantization, "dtype": dtype},
    )
    model = made.model.get_base_model()
    source = DequantizedTensors(read_tensors(made.base), quantization, getattr(torch, dtype))
    layers = {
        name.replace(".base_layer", ".weight"): module
        for name, module in model.named_modules()
        if type(module).__module__.startswith("bitsandbytes.")
    }
    assert len(layers) == (4 if (quantization, rank) == ("nf4", 8) else 6)
    for name in source.entries.keys() - layers.keys():
        assert torch.equal(source.whole(name), tensor_files.StoredTensors(source.entries).whole(name)), name
    for name, layer in layers.items():
        assert torch.equal(source.whole(name), dequantize_module_weight(layer).float()), name


@pytest.mark.parametrize(
    ("quantization", "base_dtype", "bound"),
    # int8 also rounds activations when it runs, so no merged model gives its very logits
    [("nf4", torch.float32, 1e-5), ("nf4", torch.bfloat16, 2e-2), ("int8", torch.float32, 2e-2)],
)
def test_a_quantized_run_merges_either_way_and_reports_both_losses(
    tmp_path: Path, quantization: str, base_dtype: torch.dtype, bound: float
) -> None:
    made = make_run(tmp_path, base_dtype=base_dtype, model={"quantization": quantization}, validation=True)
    onto_base = merge(made.run)
    dequantized = merge(made.run, output=tmp_path / "dequantized", onto="dequantized")
    assert dequantized.check.difference < (2e-6 if base_dtype == torch.float32 else 1e-2)
    far, near = (
        relative(merged_logits(path), made.logits()) for path in (made.run.merged, tmp_path / "dequantized")
    )
    assert near < bound
    assert far > near
    assert onto_base.losses.keys() == dequantized.losses.keys() == {"base", "dequantized"}
    for kind, loss in onto_base.losses.items():
        assert dequantized.losses[kind] == pytest.approx(loss, rel=1e-5), kind
    assert onto_base.losses["base"] != pytest.approx(onto_base.losses["dequantized"], rel=1e-6)
    rows, collator = merge_run._validation(Recipe.load(str(made.run.recipe)))
    trained = heldout_loss(made.model, rows, collator, 1)
    assert onto_base.losses["dequantized"] == pytest.approx(trained, rel=bound)


def test_losses_that_cannot_be_measured_are_explained(tmp_path: Path) -> None:
    made = make_run(tmp_path, model={"quantization": "nf4"}, validation=True)
    (tmp_path / "chats.jsonl").unlink()
    report = merge(made.run)
    assert report.losses == {}
    assert "chats.jsonl" in str(report.losses_note)


def test_dequantized_needs_a_quantized_run(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    with pytest.raises(UsageError, match="not quantized"):
        merge(made.run, onto="dequantized")
    with pytest.raises(UsageError, match="nothing"):
        merge(made.run, onto="nothing")
    with pytest.raises(UsageError, match="int4"):
        merge(made.run, dtype="int4")


def test_report_and_progress(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    calls: list[tuple[str, int, int]] = []
    report = merge(made.run, progress=lambda *call: calls.append(call))
    stored = json.loads((made.run.merged / "merge.json").read_text())
    assert stored["check"]["difference"] == report.check.difference
    assert stored["path"] == str(made.run.merged)
    total = sum(value.nbytes for value in weights(made.run.merged).values())
    assert report.nbytes == total
    assert [done for stage, done, _ in calls if stage == "merging"][-1] == total
    assert [call for call in calls if call[0] == "checking"] == [("checking", 1, 2), ("checking", 2, 2)]
    assert report.peak_rss > 1 << 20


def wrong_config(made: Made) -> None:
    path = made.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-3}))


def wrong_weights(made: Made) -> None:
    fingerprint = json.loads((made.run.adapter / "base.json").read_text())["fingerprint"]
    edit_base(made, "backbone.layers.1.mixer.in_proj.weight", lambda value: value.mul_(1.001))
    edit_facts(made, fingerprint=fingerprint)


def missing_shard(made: Made) -> None:
    sorted(made.base.glob("*.safetensors"))[1].unlink()


def truncated_shard(made: Made) -> None:
    path = sorted(made.base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def missing_base(made: Made) -> None:
    shutil.rmtree(made.base)


def missing_adapter(made: Made) -> None:
    (made.run.adapter / "adapter_model.safetensors").unlink()


def missing_facts(made: Made) -> None:
    (made.run.adapter / "base.json").unlink()


def truncated_adapter(made: Made) -> None:
    path = made.run.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flipped_adapter(made: Made) -> None:
    path = made.run.adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1  # in the last bits of a number's fraction: nothing else would notice
    path.write_bytes(data)


LAYER = "base_model.model.backbone.layers.0.mixer"
FAULTS: dict[str, tuple[Any, type[MambaSFTError], str]] = {
    "config of another base": (wrong_config, MergeError, "not the base"),
    "weights of another base": (wrong_weights, MergeError, "not the base"),
    "missing shard": (missing_shard, ModelError, "lacks 1 of"),
    "truncated shard": (truncated_shard, ModelError, "truncated"),
    "missing base": (missing_base, ModelError, "no model directory"),
    "missing adapter": (missing_adapter, MergeError, "no adapter"),
    "missing base.json": (missing_facts, AdapterError, "which base"),
    "truncated adapter": (truncated_adapter, MergeError, "truncated"),
    "flipped bit in the adapter": (flipped_adapter, MergeError, "not the file that training wrote"),
    "another rank": (lambda made: edit_adapter_config(made, r=8), MergeError, "not of rank 8"),
    "another shape": (
        lambda made: edit_adapter(
            made, lambda t: t.update({f"{LAYER}.in_proj.lora_A.weight": torch.ones(4, 32)})
        ),
        MergeError,
        "in_proj. is .256, 64. in the base",
    ),
    "half a pair": (
        lambda made: edit_adapter(made, lambda t: t.pop(f"{LAYER}.x_proj.lora_B.weight")),
        MergeError,
        "not of rank 4",
    ),
    "a layer without its adapter": (
        lambda made: edit_adapter(made, lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n]),
        MergeError,
        "target but has no LoRA",
    ),
    "a layer too many": (
        lambda made: edit_adapter(
            made, lambda t: t.update({n.replace(".0.", ".7."): v.clone() for n, v in t.items() if ".0." in n})
        ),
        MergeError,
        "no weight in the base",
    ),
    "NaN": (
        lambda made: edit_adapter(made, lambda t: t[f"{LAYER}.x_proj.lora_B.weight"][0].fill_(float("nan"))),
        MergeError,
        "NaN",
    ),
    "a module trained in full": (
        lambda made: edit_adapter(
            made, lambda t: t.update({f"{LAYER}.conv1d.weight": torch.ones(128, 1, 4)})
        ),
        MergeError,
        "conv1d.weight",
    ),
    "a dtype that is not computed in": (
        lambda made: edit_base_dtype(made, "backbone.norm_f.weight", torch.float64),
        MergeError,
        "stored as F64",
    ),
    "modules_to_save": (
        lambda made: edit_adapter_config(made, modules_to_save=["norm_f"]),
        MergeError,
        "norm_f",
    ),
    "another method": (lambda made: edit_adapter_config(made, peft_type="LOHA"), MergeError, "LOHA"),
    "no magnitudes": (lambda made: edit_adapter_config(made, use_dora=True), MergeError, "magnitude"),
    "other rows": (
        lambda made: edit_adapter_config(made, trainable_token_indices={"embeddings": [1]}),
        MergeError,
        "trained rows",
    ),
    "rows that do not exist": (
        lambda made: edit_adapter_config(made, trainable_token_indices=[600, 601]),
        MergeError,
        "do not fit",
    ),
    "rows that nobody trained": (
        lambda made: edit_facts(made, resize_to=520),
        MergeError,
        "neither in the base",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_merged_is_an_error_and_leaves_nothing(tmp_path: Path, fault: str) -> None:
    made = make_run(tmp_path)
    cause, kind, message = FAULTS[fault]
    cause(made)
    with pytest.raises(kind, match=message):
        merge(made.run)
    assert not list(made.run.path.glob("merged*"))


def test_a_foreign_directory_is_not_replaced(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(UsageError, match="not an earlier merge"):
        merge(made.run, output=foreign)
    for source in (made.base, made.run.adapter, made.run.path):
        (source / "merge.json").write_text("{}")  # even a merged base is not what its own merge may replace
        with pytest.raises(UsageError, match="directory of its own"):
            merge(made.run, output=source)
    with pytest.raises(UsageError, match="is a file"):
        merge(made.run, output=foreign / "cat.jpg")
    assert (foreign / "cat.jpg").read_bytes() == b"meow"


def test_an_earlier_merge_is_replaced_only_when_the_new_one_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path)
    merge(made.run, dtype="bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(merge_run, "_check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(made.run)
    assert {value.dtype for value in weights(made.run.merged).values()} == {torch.bfloat16}
    merge(made.run)
    assert {value.dtype for value in weights(made.run.merged).values()} == {torch.float32}
    assert [path.name for path in made.run.path.glob("merged*")] == ["merged"]


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_writing_leaves_nothing(tmp_path: Path) -> None:
    made = make_run(tmp_path)

    def stop(stage: str, done: int, total: int) -> None:
        assert list(made.run.path.glob("merged.*.partial/*"))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(made.run, progress=stop)
    assert not list(made.run.path.glob("merged*"))


def test_a_disk_too_small_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=70 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    merge(made.run, output=tmp_path / "fits")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    with pytest.raises(MergeError, match=r"takes 64\.5 MiB"):
        merge(made.run)
    assert not list(made.run.path.glob("merged*"))


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "is full: "), (errno.EDQUOT, "quota .* used up; ")]
)
def test_a_disk_that_fills_up_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    made = make_run(tmp_path)

    sync = os.fsync

    def full(descriptor: int) -> None:
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, "no room")
        sync(descriptor)

    for check in ("require_space", "check_writable"):
        monkeypatch.setattr(preparing, check, lambda *_: None)
    monkeypatch.setattr(tensor_files.os, "fsync", full)
    with pytest.raises(MergeError, match=words + "the merged model takes"):
        merge(made.run)
    assert not list(made.run.path.glob("merged*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr(preparing, "require_space", lambda *_: None)
        with pytest.raises(MergeError, match="is full"):
            merge(made.run, output=disk / "merged")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_flipped_bit_on_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path)
    write = merge_run.write_companions

    def corrupt(plan: Any, directory: Path) -> None:
        write(plan, directory)
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            for name, value in tensors.items():
                if name.endswith("1.mixer.out_proj.weight"):
                    value.add_(value.abs().mean() * 1e-3)
            save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(merge_run, "write_companions", corrupt)
    with pytest.raises(ModelError, match=r"out_proj\.weight` in .* is damaged"):
        merge(made.run)
    assert not list(made.run.path.glob("merged*"))


def test_sums_that_went_wrong_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path)
    rounded = merge_run.MergedTensors._rounded

    def wrong(self: Any, rows: torch.Tensor, layout: Any) -> torch.Tensor:
        factor = 1.001 if layout.name.endswith("1.mixer.out_proj.weight") else 1.0
        return rounded(self, rows * factor, layout)

    monkeypatch.setattr(merge_run.MergedTensors, "_rounded", wrong)
    with pytest.raises(MergeError, match=r"out_proj\.weight` in the merged files is not base"):
        merge(made.run)
    assert not list(made.run.path.glob("merged*"))


def test_an_adapter_read_wrongly_is_found_by_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path)
    read = SavedAdapter.low_rank

    def misread(adapter: SavedAdapter, module: str) -> Any:
        return replace(read(adapter, module), scale=1.4)

    monkeypatch.setattr(SavedAdapter, "low_rank", misread)
    with pytest.raises(MergeError, match="logits differ from base"):
        merge(made.run)
    assert not list(made.run.path.glob("merged*"))


def test_blocks_of_rows_meet_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path, use_dora=True, target_modules=ALL)
    merge(made.run, output=tmp_path / "whole")
    monkeypatch.setattr(tensor_files, "_BLOCK_ELEMENTS", 1)
    assert list(tensor_files.row_blocks((130, 8))) == [(0, 64), (64, 128), (128, 130)]
    assert list(tensor_files.row_blocks(())) == [(0, 1)]
    merge(made.run, output=tmp_path / "pieces")
    whole, pieces = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-6, atol=1e-7)


def test_memory_stays_below_the_largest_tensor(tmp_path: Path) -> None:
    # nearly all of it in two matrices of 67 MB, or 134 MB in float32
    made = make_run(tmp_path, base_dtype=torch.bfloat16, config={"hidden_size": 512, "vocab_size": 65_536})
    measure = (
        "import sys, bitsandbytes, transformers.models.falcon_mamba, peft.mapping\n"
        "from mamba_sft.merging.merge_run import merge\nfrom mamba_sft.processes import peak_rss\n"
        "before = peak_rss(); print(merge(sys.argv[1]).peak_rss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", measure, str(made.run.path)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout.split()[-1]) < 100 << 20
