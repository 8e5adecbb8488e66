"""A stop string ends an answer, and nothing of it is ever given out."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mamba_sft.inference.answer_text import AnswerText
from mamba_sft.inference.generation import State, answers, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.kernels.falcon_mamba import install

NEVER: frozenset[int] = frozenset()


def write(tokenizer: Any, text: str, stops: tuple[str, ...]) -> tuple[list[str], AnswerText]:
    """The pieces that are given out while a text is written token by token, and at its end."""
    answer, pieces = AnswerText(tokenizer, stops), []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(answer.add(token))
        if answer.stopped:
            break
    pieces.append(answer.close())
    return pieces, answer


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("hello world and so on", ("world",), "hello "),
        ("hello wor", ("world",), "hello wor"),
        ("hello wor wor world", ("world",), "hello wor wor "),
        ("one\n\nUser: two", ("\n\nUser:", "two"), "one"),
        ("aab aaab", ("aaab",), "aab "),
        ("naïve 😀 stop", ("😀",), "naïve "),
        ("naïve 😀", ("ï",), "na"),
        ("word", ("word",), ""),
        ("nothing here", ("absent", "else"), "nothing here"),
    ],
)
def test_the_answer_ends_before_the_first_stop_string(tiny_tokenizer, text, stops, shown):
    pieces, answer = write(tiny_tokenizer, text, stops)
    assert "".join(pieces) == answer.text == shown
    assert answer.stopped == (shown != text)


def test_no_piece_of_a_stop_string_is_ever_shown(tiny_tokenizer):
    """Whatever is given out at any time is the beginning of the right answer."""
    chance = random.Random(0)
    for _ in range(200):
        stops = tuple("".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(2))
        text = "".join(chance.choices("ab", k=chance.randint(1, 30)))
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        first = min(ends, default=None)  # the one that is whole first
        cut = [text[:first].find(stop) for stop in stops if stop in text[:first]]
        right = text if first is None else text[: min(cut)]
        pieces, answer = write(tiny_tokenizer, text, stops)
        so_far = ""
        for piece in pieces:
            so_far += piece
            assert text.startswith(so_far)
        if len(tiny_tokenizer(text).input_ids) == len(text):  # one letter a token
            assert so_far == right
        assert not any(stop in so_far for stop in stops)
        assert answer.stopped == (first is not None)


def test_answers_of_a_batch_stop_at_a_string_over_token_borders(tiny_model, tiny_tokenizer):
    install(tiny_model)
    prompts = [[40, 41], [60, 61, 62], [300]]
    free = answers(tiny_model, tiny_tokenizer, prompts, sampling=Sampling(30), stop_ids=NEVER)
    text = free[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    assert len(stop) == 4
    assert len(tiny_tokenizer(stop).input_ids) > 1
    for size in (1, 3):
        found = answers(
            tiny_model, tiny_tokenizer, prompts, sampling=Sampling(30, stop_strings=stop), stop_ids=NEVER,
            batch_size=size,
        )  # fmt: skip
        assert found[0].text == text[: text.index(stop)]
        assert found[0].finish_reason == "stop"
        assert 0 < found[0].tokens < 30
        for one, other in zip(found[1:], free[1:], strict=True):
            assert one.text == other.text.partition(stop)[0]


def test_the_penalty_of_a_batch_is_that_of_each_row(tiny_model, tiny_tokenizer):
    install(tiny_model)
    prompts = [[40, 41], [60, 61, 62, 63, 64], [300]]
    sampling = Sampling(25, repetition_penalty=1.4)
    together = answers(tiny_model, tiny_tokenizer, prompts, sampling=sampling, stop_ids={11, 100})
    for prompt, one in zip(prompts, together, strict=True):
        ids = list(stream(tiny_model, prompt, State(), sampling=sampling, stop_ids={11, 100}))
        assert one.text == tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert one.tokens == len(ids)


def test_the_penalty_makes_what_transformers_generates(tiny_model, tiny_tokenizer):
    import torch

    ids = [40, 41, 42]
    expected = tiny_model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 3, dtype=torch.long), pad_token_id=0,
        eos_token_id=None, max_new_tokens=40, do_sample=False, repetition_penalty=1.3,
    )[0, 3:].tolist()  # fmt: skip
    install(tiny_model)
    sampling = Sampling(40, repetition_penalty=1.3)
    assert list(stream(tiny_model, ids, State(), sampling=sampling, stop_ids=NEVER)) == expected
