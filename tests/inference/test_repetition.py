"""Circles are found early; what people repeat on purpose is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mamba_sft.inference.answer_text import TextStream
from mamba_sft.inference.chat_model import load_chat_model
from mamba_sft.inference.generation import State, stream
from mamba_sft.inference.repetition import ENOUGH, LONGEST_BLOCK, PATIENCE, TIMES, RepetitionWatch
from mamba_sft.inference.sampling import Sampling

TINY = Path(__file__).parents[2] / "data" / "tiny-base"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tiny base's own: words are mostly one or two tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def stopped_after(tokenizer: Any, text: str) -> int | None:
    """Tokens of `text` when the watch first says that it repeats itself, None if it never does."""
    watch, pieces = RepetitionWatch(), TextStream(tokenizer)
    for number, token in enumerate(tokenizer.encode(text, add_special_tokens=False), 1):
        if watch.repeats(token, pieces.push(token)):
            return number
    return None


def lines(count: int, text: str) -> str:
    return "".join(text.format(i) + "\n" for i in range(count))


VERSES = [
    "Down the lane the old horse came,\nnobody could tell its name,\n",
    "Up the hill the young goat ran,\ncatch it, catch it, if you can,\n",
    "By the pond the grey duck slept,\nover it the willow wept,\n",
    "In the barn the brown hen sat,\nlooking at the farmer's hat,\n",
    "Round the house the black dog crept,\nwhere the cat her kittens kept,\n",
]
REFRAIN = "and the wind blows high, high, high,\nand the wind blows low, low, low,\n\n"

PURPOSE = {
    "poem": "".join(verse + REFRAIN for verse in VERSES) + REFRAIN * 2,
    "chorus": "na na na na na na na na, hey hey hey, goodbye\n" * 2,
    "list": lines(60, "{0}. The entry called number {0} of the list"),
    "same entries": lines(6, "- to be done"),
    "counting": ", ".join(str(i) for i in range(1, 200)),
    "table": "| name | number |\n|------|--------|\n" + lines(40, "| row {0} | 0 |"),
    "line of dashes": "a heading\n" + "-" * 200 + "\ntext",
    "zeros": "[" + "[0, 0, 0, 0, 0],\n" * 5 + "]",
    "code": "def f(x):\n" + lines(30, "    if x == {0}:\n        return {0}\n"),
    "board": "```html\n<table>\n" + ("<tr><td></td><td></td><td></td></tr>\n" * 8) + "</table>\n```\n",
    "prose": Path(__file__).parents[2].joinpath("LICENSE").read_text(encoding="utf-8")[:6000],
    "song": ("".join(VERSES) + (REFRAIN * 2 + "so high, so low, the wind,\n" * 2) * 2),
    "template": lines(40, "Dear guest {0}, we are glad to have you with us.\nYours, the house\n"),
}


@pytest.mark.parametrize("name", PURPOSE)
def test_what_is_meant_is_not_stopped(tokenizer, name):
    assert len(tokenizer.encode(PURPOSE[name])) > 30
    assert stopped_after(tokenizer, PURPOSE[name]) is None


@pytest.mark.parametrize("name", PURPOSE)
def test_nor_in_the_real_tokenizer(falcon_tokenizer, name):
    assert stopped_after(falcon_tokenizer, PURPOSE[name]) is None


OWL, DAY, SOFT = "A young owl is called a owlet.\n\n", "The opposite of day is night.\n", "Soft and hard.\n"

CIRCLES = {
    "lines in any order": "Once more.\n" + (DAY + OWL + SOFT + OWL + SOFT + OWL + DAY + OWL + OWL) * 9,
    "word": "the " * 400,
    "sentence": "The opposite of day is night.\nA young owl is called a owlet.\n" * 40,
    "after a start": "The owl is a bird of the night. It hears well.\n" + "It is a bird. " * 100,
    "paragraph": ("".join(VERSES) + REFRAIN) * 12,
    "zeros without an end": "0, " * 600,
    "code without an end": "```python\n" + "    x = x + one\n" * 300,
    "after code": "```python\nx = 1\n```\n" + "Run the code. " * 60,
}


@pytest.mark.parametrize("name", CIRCLES)
def test_circles_are_stopped(tokenizer, name):
    after = stopped_after(tokenizer, CIRCLES[name])
    patient = "end" in name
    assert after is not None
    assert after >= (PATIENCE if patient else 1) * ENOUGH
    if name in {"word", "sentence", "after code"}:
        assert after <= ENOUGH + 40


def test_the_numbers_are_what_they_say():
    def needed(block: list[int], text: str) -> int:
        watch, taken = RepetitionWatch(), 0
        while not watch.repeats(block[taken % len(block)], text):
            taken += 1
        return taken + 1

    assert needed([7], "a") == ENOUGH
    assert needed(list(range(20)), "a") == ENOUGH
    assert needed(list(range(50)), "a") == TIMES * 50
    assert needed(list(range(LONGEST_BLOCK)), "a") == TIMES * LONGEST_BLOCK
    assert needed([7], "-") == PATIENCE * ENOUGH
    watch = RepetitionWatch()
    assert not any(watch.repeats(i % (LONGEST_BLOCK + 1), "a") for i in range(2000))


def test_the_tiny_base_goes_round_and_is_found_out():
    base = load_chat_model(TINY, needs_template=False, dtype="float32")  # else each processor says its own
    for prompt in ("What is the opposite of hot?", "hi"):
        watch, pieces = RepetitionWatch(), TextStream(base.tokenizer)
        ids = base.tokenizer.encode(prompt, add_special_tokens=False)
        found: list[bool] = []
        said = ""
        for token in stream(base.model, ids, State(), sampling=Sampling(512), stop_ids=base.stop_ids):
            piece = pieces.push(token)
            said += piece
            found.append(watch.repeats(token, piece))
        assert len(found) == 512  # it would have gone on
        assert found.index(True) < 150, said
