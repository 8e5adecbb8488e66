"""Continued pre-training: texts, and chats between them, with an adapter and with all weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_sft import Recipe
from mamba_sft.data.rows import IGNORED
from mamba_sft.training.fine_tuning import train
from mamba_sft.training.preparation import prepare

MIX = ("data.mixture={}", "data.validation=6", "eval.eval_steps=4", "train.save_steps=4", "train.max_steps=8",
       "data.too_long=split")  # fmt: skip


@pytest.fixture
def mixed(recipe: Any, chats: Path, tmp_path: Path) -> Any:
    """Makes a recipe of texts, long ones among them, and chats: three tokens in four of the texts."""
    place = tmp_path / "texts"
    place.mkdir()
    for number in range(12):
        words = f"the quick brown fox {number} jumps over the lazy dog and " * (1 + 5 * (number % 3))
        (place / f"{number}.txt").write_text(words)
    sources = (
        f"data.sources=[{{id: texts, path: '{place}/*.txt', format: text, sample_by: document, weight: 3}}, "
        f"{{id: chats, path: {chats}, weight: 1}}]"
    )
    return lambda *words, name="run": recipe(sources, *MIX, *words, name=name)


def test_a_mixture_trains_texts_whole_and_chats_on_answers(mixed: Any) -> None:
    made = mixed()
    assert made.data.assistant_only_loss
    preparation = prepare(made)
    read, trained = Counter[str](), Counter[str]()
    for row in preparation.data.train_rows:
        source = np.repeat(np.atleast_1d(row["source"]), row["seq_lengths"])
        labels = np.asarray(row["labels"])
        for number, name in enumerate(("texts", "chats")):
            read[name] += int((source == number).sum())
            trained[name] += int((labels[source == number] != IGNORED).sum())
    assert read["texts"] / sum(read.values()) == pytest.approx(0.75, abs=0.05)
    assert trained["texts"] > 0.95 * read["texts"]
    assert 0.2 * read["chats"] < trained["chats"] < 0.8 * read["chats"]


@pytest.mark.parametrize("way", [(), ("adapter=none", "train.learning_rate=1.0e-3")], ids=["lora", "full"])
def test_both_are_learned(mixed: Any, way: tuple[str, ...]) -> None:
    run = train(mixed(*way))
    assert run.result is not None
    lines = run.read_metrics()
    for name in ("eval_loss/texts", "eval_loss/chats"):
        first, *_, last = [line[name] for line in lines if name in line]
        assert last < first, name
    assert json.loads(run.data.read_text())["mixture"]


def test_the_recipe_is_of_texts_with_chats_between_them() -> None:
    recipe = Recipe.load("continue-pretraining")
    text, chat = recipe.data.sources
    assert (text.format, text.sample_by, chat.format) == ("text", "document", "messages")
    assert recipe.data.too_long == "split"
    assert recipe.data.mixture is not None
    assert recipe.data.assistant_only_loss
    assert recipe.adapter is not None
    assert Recipe.load("continue-pretraining", ["adapter=none"]).adapter is None


@pytest.mark.parametrize("way", [(), ("adapter=none", "train.learning_rate=2e-5")], ids=["lora", "full"])
def test_the_recipe_runs_on_the_tiny_base(tmp_path: Path, chats: Path, way: tuple[str, ...]) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Page {number}.\n\n" + "A line of a page. " * 40)
    recipe = Recipe.load(
        "continue-pretraining",
        [
            f"output_dir={tmp_path / 'run'}", "model.base=data/tiny-base", "model.dtype=float32",
            f"data.sources.0.path={tmp_path}/texts/*.txt", f"data.sources.1={{id: chats, path: {chats}}}",
            "data.max_length=128", "train.max_steps=2", "train.gradient_accumulation_steps=2", *way,
        ],
    )  # fmt: skip
    run = train(recipe)
    assert run.result == run.path / recipe.trains
