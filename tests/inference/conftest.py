"""A run as training leaves it, with a model that talks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_sft.inference.chat_model import ChatModel, load_chat_model
from mamba_sft.inference.generation import State
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import ChatSession
from mamba_sft.model.adapter import adapter_tensors, attach_adapter, save_adapter
from mamba_sft.model.chat_template import prepare_tokenizer
from mamba_sft.model.loading import apply_setup, load_model, load_tokenizer
from mamba_sft.recipe.fields import AdapterSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from tests.conftest import build_model, build_tokenizer

SHORT = Sampling(max_new_tokens=12)


def make_run(path: Path, base: Path, **chat: Any) -> Run:
    """A run as training leaves it, with an adapter that changes the answers."""
    run = Run(path)
    recipe = Recipe.from_text(
        json.dumps(
            {
                "output_dir": str(path),
                "model": {"base": str(base), "dtype": "float32"},
                "chat": chat,
                "data": {"sources": [{"path": "rows.jsonl"}]},
            }
        ),
        "test.yaml",
    )
    path.mkdir(parents=True)
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    model = load_model(recipe.model)
    setup = prepare_tokenizer(load_tokenizer(recipe.model), recipe.chat, {0, 11})
    apply_setup(model, setup)
    wrapped = attach_adapter(model, AdapterSection(r=4), trained_token_ids=setup.trained_token_ids)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in sorted(adapter_tensors(wrapped).items()):
        if ".lora_B." in name:
            tensor.data.normal_(0.0, 0.05, generator=generator)
    save_adapter(wrapped, run.adapter, section=recipe.model, setup=setup)
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes no special tokens: sessions then never have to read again."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[:12] = 0
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", base, system="be brief")


@pytest.fixture(scope="module")
def chat_model(run: Run) -> ChatModel:
    return load_chat_model(run)


def say(session: ChatSession, text: str) -> str:
    return "".join(session.send(text))


def state_of(session: ChatSession) -> State:
    return session._state
