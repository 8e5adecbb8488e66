"""The text that exported files are measured on, and the one an importance matrix is made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_sft.data.preparing import read_corpus
from mamba_sft.errors import MambaSFTError
from mamba_sft.evaluation.prompts import read_samples
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.model.chat_template import render
from mamba_sft.recipe.recipe import Recipe

WINDOW = 256
"""Tokens a window: llama.cpp's default context has room for 512."""
_PASSAGE = Path(__file__).with_name("passage.txt")
_QUESTION = "Name three things that float on water, and say why they do."


@dataclass(frozen=True)
class Text:
    """Token ids in windows, and where they came from.

    Args:
        windows: Each at most `WINDOW` tokens, a text of its own.
        origin: For reports.
    """

    windows: list[list[int]]
    origin: str


def heldout_text(model: FullModel, tokens: int) -> Text:
    """Returns the run's validation rows, or a passage that comes with mamba-sft where there are none."""
    return _text(model, "validation", tokens)


def calibration_text(model: FullModel, tokens: int) -> Text:
    """Returns the run's training rows, never its validation rows; without a run, the passage."""
    return _text(model, "training", tokens)


def prompt_of(model: FullModel) -> tuple[str, list[int]]:
    """Returns a question and the tokens that ask it: the run's first sample prompt, or a plain one."""
    question = _QUESTION
    if model.run is not None and (samples := read_samples(model.run.samples_file)):
        question = samples[0].prompt.prompt
    if model.tokenizer.chat_template is None:
        return question, model.tokenizer(question, add_special_tokens=False).input_ids[:WINDOW]
    messages = [{"role": "user", "content": question}]
    return question, render(model.tokenizer, messages, add_generation_prompt=True)[0][:WINDOW]


def _text(model: FullModel, part: str, tokens: int) -> Text:
    rows = _rows(model, part)
    if rows is not None and len(rows):
        windows = list(_windows((row["input_ids"] for row in rows), tokens))
        return Text(windows, f"{part} rows of `{_recipe(model)}`")
    return Text(list(_windows([_passage(model)], tokens)), "a passage that comes with mamba-sft")


def _rows(model: FullModel, part: str) -> Any:
    """The run's rows as training read them, or None where they cannot be read any more."""
    if model.run is None:
        return None
    try:
        _, data = read_corpus(Recipe.load(str(model.run.recipe)))
    except MambaSFTError:
        return None
    return data.validation if part == "validation" else data.train


def _recipe(model: FullModel) -> str:
    return str(model.run.recipe) if model.run else ""


def _passage(model: FullModel) -> list[int]:
    return list(model.tokenizer(_PASSAGE.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)


def _windows(rows: Iterator[Sequence[int]] | list[list[int]], tokens: int) -> Iterator[list[int]]:
    left = tokens
    for row in rows:
        for start in range(0, len(row), WINDOW):
            window = list(row[start : start + min(WINDOW, left)])
            if len(window) > 1:  # one token alone predicts nothing that a text would show
                yield window
                left -= len(window)
            if left <= 1:
                return
