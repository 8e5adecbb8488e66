"""Merging: the sums, the files, the checks, and everything that can go wrong on the way."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mamba_sft import merge_check, merging, shards
from mamba_sft.adapter import attach_adapter, load_adapter, save_adapter
from mamba_sft.chat import prepare_tokenizer
from mamba_sft.errors import MambaSFTError, MergeError, ModelError, UsageError
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.merging import DequantizedTensors, merge, quantizes
from mamba_sft.model import apply_setup, load_model
from mamba_sft.recipe import AdapterSection, ChatSection, ModelSection
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
    setup = prepare_tokenizer(AutoTokenizer.from_pretrained(base), ChatSection(**(chat or {})), {0, 11})
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
    assert report.changed == len([n for n in report_names(made) if changed(made, n)])


def report_names(made: Made) -> set[str]:
    return set(weights(made.base))


def changed(made: Made, name: str) -> bool:
    return not torch.equal(weights(made.base)[name], weights(made.run.merged)[name])
