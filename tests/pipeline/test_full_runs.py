"""A run that trained all weights, at every verb that comes after: its `model/` is taken as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mamba_sft import Recipe, Run, export, generate, train
from mamba_sft.cli.app import app
from mamba_sft.errors import MambaSFTError, ModelError, UsageError
from mamba_sft.exporting.full_model import find_model
from mamba_sft.inference.chat_model import load_chat_model
from mamba_sft.inference.model_places import find_place
from mamba_sft.inference.sampling import Sampling
from tests.conftest import build_model, build_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("full")
    base = place / "base"
    build_model().save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"hello {i}"},
                {"role": "assistant", "content": "quick fox"},
            ]
        }
        for i in range(16)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train(
        Recipe.build(
            output_dir=str(place / "run"),
            model={"base": str(base), "dtype": "bfloat16"},
            chat={"system": "be brief"},
            data={"sources": [{"path": str(place / "chats.jsonl")}], "validation": 0, "max_length": 64},
            adapter="none",
            train={"max_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3},
        )
    )


def cli(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_it_is_found_and_talks(run: Run) -> None:
    place = find_place(run)
    assert place.adapter is None
    assert place.section.base == str(run.model)
    assert place.section.dtype == "bfloat16"
    chat = load_chat_model(run)
    assert chat.system == "be brief"
    assert chat.tokenizer.convert_tokens_to_ids("<|im_end|>") in chat.stop_ids
    (answer,) = generate(run, ["hello 3"], sampling=Sampling(max_new_tokens=4))
    assert answer.tokens <= 4
    done = cli("generate", str(run.path), "--prompt", "hello 3", "--max-new-tokens", "4")
    assert done.exit_code == 0, done.output


def test_its_resume_points_are_models_too(run: Run) -> None:
    chat = load_chat_model(run.checkpoints / "checkpoint-1")
    assert chat.system == "be brief"
    assert chat.model.dtype == torch.float32


def test_merge_says_that_there_is_nothing_to_merge(run: Run) -> None:
    done = cli("merge", str(run.path))
    assert isinstance(done.exception, UsageError)
    assert "nothing to merge" in done.exception.message
    assert "mamba-sft export" in (done.exception.hint or "")
    assert not run.merged.exists()
    with pytest.raises(UsageError, match="no merged checkpoint: it trained all weights"):
        find_place(run, merged=True)
    with pytest.raises(UsageError, match="no adapter to switch off"):
        find_place(run, needs_adapter=True)
    with pytest.raises(UsageError, match="has no adapter: it trained all weights"):
        export(run, adapter_only=True)


def test_a_checkpoint_for_the_hub_is_the_model_with_its_card(run: Run) -> None:
    (place,) = export(run, format="hf").others
    ids = torch.tensor([[5, 300, 17, 60]])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(where)(ids).logits for where in (place, run.model))
    assert torch.equal(ours, theirs)
    card = (place / "README.md").read_text()
    assert "with all of its weights fine-tuned (full fine-tuning)" in card
    assert "full-fine-tuning" in card.partition("---\n\n")[0]
    assert "lora" not in card.lower()
    assert not (place / "training.json").exists()


def test_gguf_files_are_made_of_it(run: Run) -> None:
    pytest.importorskip("gguf")
    done = export(run, quantization="F16")
    assert [file.method for file in done.files] == ["F16"]
    assert find_model(run).base == Recipe.load(run.recipe).model.base


def test_a_model_that_was_damaged_is_not_exported(run: Run, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    weights = copy / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="is damaged"):
        export(copy, quantization="F16")


def test_the_report_names_the_way_and_no_merge(run: Run) -> None:
    done = cli("report", str(run.path))
    assert done.exit_code == 0, done.output
    text = run.report_text.read_text()
    assert "all weights, without an adapter" in text
    assert "mamba-sft merge" not in text
    assert "--compare" not in text


def test_an_unfinished_run_has_no_model_yet(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(run.recipe.read_text())
    with pytest.raises(MambaSFTError, match="has no model yet: its training has not finished"):
        find_place(tmp_path)


def test_train_takes_the_word_and_says_what_is_next(run: Run, tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path / 'again'}", "adapter=none", "train.max_steps=1"]
    done = cli("train", str(run.recipe), *words)
    assert done.exit_code == 0, done.output
    assert "mamba-sft export" in done.output
    assert "mamba-sft merge" not in done.output
