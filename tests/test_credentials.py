"""Secrets reach no artifact: no recipe, no command that is kept, no file of a run, log or message."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mamba_sft import Recipe
from mamba_sft.cli.app import app
from mamba_sft.cli.printable import PrintableFormatter
from mamba_sft.credentials import has_credentials, masked, without_secrets
from mamba_sft.errors import RecipeError
from mamba_sft.planning.environment import describe_call
from mamba_sft.recipe.builtin import find_recipe
from mamba_sft.run import write_atomically

TOKEN = "hf_" + "aB3" * 12
VALUE = "a-value-with-no-look-of-its-own"


@pytest.mark.parametrize("text", [
    TOKEN, f"x={TOKEN},y", "https://me:word@host/rows.jsonl", "https://tokenonly@host/x", "AKIA" + "Q" * 16,
    "ghp_" + "a1" * 15, "sk-" + "a1" * 15, "https://b.s3.amazonaws.com/x?a=1&X-Amz-Signature=0f0f0f",
])  # fmt: skip
def test_what_looks_like_one(text: str) -> None:
    assert has_credentials(text)
    assert "***" in masked(text)


@pytest.mark.parametrize("text", [
    "hf_model", "runs/ask-me", "data/sk-learn.jsonl", "tiiuae/falcon-mamba-7b", "me@example.org",
    "https://host/a@b/c", "https://host/x?page=2", "s3://bucket/rows.jsonl", "token", "<|im_start|>",
    "data/task-0123456789012345678901234567890.jsonl",
])  # fmt: skip
def test_what_does_not(text: str) -> None:
    assert masked(text) == text


def test_the_environment_s_secrets_are_known_by_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    monkeypatch.setenv("SOME_PATH", "an-ordinary-value")
    monkeypatch.setenv("SHORT_TOKEN", "word")
    assert without_secrets(f"a {VALUE} b an-ordinary-value word") == "a *** b an-ordinary-value word"


def test_of_a_secret_that_begins_with_another_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", VALUE)
    monkeypatch.setenv("B_TOKEN", f"{VALUE}-and-more")
    assert without_secrets(f"{VALUE}-and-more {VALUE}") == "*** ***"


@pytest.mark.parametrize("field", [
    "data.sources.0.path=https://me:{}@host/x.jsonl", "output_dir=runs/{}", "chat.system={}", "model.base={}",
    "eval.prompts={}", "{}=1", "train.trainer_arguments.hub_token={}", "model.revision={}",
])  # fmt: skip
def test_a_recipe_takes_none_and_does_not_repeat_it(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    for secret in (TOKEN, VALUE):
        with pytest.raises(RecipeError) as caught:
            Recipe.load(find_recipe("quickstart"), overrides=[field.format(secret)])
        assert secret not in str(caught.value) + (caught.value.hint or "")


def test_the_command_that_is_kept_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mamba-sft", "train", "r.yaml", f"x=https://me:{TOKEN}@host/"])
    assert describe_call()["command"] == "mamba-sft train r.yaml x=https://***@host/"


def test_files_log_and_messages_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    write_atomically(tmp_path / "environment.json", f'{{"a": "{VALUE}"}}')
    assert (tmp_path / "environment.json").read_text() == '{"a": "***"}'
    record = logging.LogRecord("x", logging.INFO, "x", 1, "refused: %s", (VALUE,), None)
    assert PrintableFormatter().format(record) == "refused: ***"
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / VALUE)])
    assert VALUE not in shown.output


def test_text_of_rows_stays_what_it_is(tmp_path: Path) -> None:
    write_atomically(tmp_path / "samples.jsonl", TOKEN)
    assert (tmp_path / "samples.jsonl").read_text() == TOKEN
