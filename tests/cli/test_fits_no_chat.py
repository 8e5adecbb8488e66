"""Rows that no chat template touched: every verb that speaks of them says that chat will not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app

SAYS = "no row goes through the chat template"
SCORES = "these prompts went through the chat template, which no trained row did"


@pytest.fixture
def settings(recipe: Any, chats: Path, tmp_path: Path) -> Path:
    """The file of a recipe that trains pairs of texts for one step and asks a question."""
    chats.write_text(
        "".join(json.dumps({"prompt": f"hello {i}", "completion": "world"}) + "\n" for i in range(24))
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello", "answer": "world"}\n')
    made = recipe("train.max_steps=1", f"eval.prompts={prompts}", "eval.max_new_tokens=4")
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml())
    return path


def said(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_plain_rows(settings: Path) -> None:
    plain = "data.sources.0.format=plain_completion"
    shown = said("data", str(settings), plain)
    assert SAYS in shown
    assert "makes turns of prompts and completions" in shown  # the end of the sentence is not cut off
    assert SAYS in said("train", str(settings), plain, "--dry-run")
    trained = said("train", str(settings), plain)
    assert SAYS in trained
    assert SCORES in trained
    assert "exact match on 1 held-out prompts" in trained


def test_turns(settings: Path) -> None:
    assert SAYS not in said("data", str(settings))
    trained = said("train", str(settings))
    assert SAYS not in trained
    assert SCORES not in trained
