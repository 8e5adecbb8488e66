"""Learning rate and batch in a recipe: lengths in steps, shares and tokens, a ramp, and what clashes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mamba_sft import Recipe
from mamba_sft.errors import RecipeError
from mamba_sft.recipe.recipe import recipe_schema
from mamba_sft.recipe.spans import FORM, MOST_TOKENS, TokenCount, token_count, tokens_text

TEXT = "output_dir: x\nmodel: {base: b}\ndata: {sources: [{path: p}]}\n"
RAMP = "batch_ramp={from: 8, to: 128, tokens: 20M tokens}"


def load(*words: str) -> Recipe:
    return Recipe.from_text(TEXT, overrides=[f"train.{word}" for word in words])


def told(*words: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(*words)
    return [line.split("`: ", 1)[1] for line in caught.value.message.splitlines()]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1 tokens", 1), ("500k tokens", 500_000), ("20M tokens", 20_000_000), ("1.5M tokens", 1_500_000),
     ("50B tokens", 50_000_000_000), ("0.25k tokens", 250), ("123456789 tokens", 123_456_789)],
)  # fmt: skip
def test_tokens_are_written_one_way(text: str, count: int) -> None:
    assert token_count(text) == count
    recipe = load(f"warmup_steps={text}", f"stable_steps={text}", f"decay_steps={text}")
    assert recipe.train.warmup_steps == recipe.train.stable_steps == recipe.train.decay_steps == text
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.build(**recipe.model_dump()) == recipe


@given(st.integers(1, MOST_TOKENS))
def test_the_text_of_a_count_is_that_count(count: int) -> None:
    text = tokens_text(count)
    assert re.fullmatch(FORM, text)
    assert token_count(text) == count
    assert TypeAdapter(TokenCount).validate_python(text) == count


@pytest.mark.parametrize("field", ["warmup_steps", "stable_steps", "decay_steps"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("20M", "must be a number, or of tokens: write `20M tokens`, got the text `20M`"),
        ("20 m tokens", "must be a number, or of tokens: write `20M tokens`, got the text `20 m tokens`"),
        ("50GT", "must be a number, or of tokens: write `50B tokens`, got the text `50GT`"),
        ("20,500,000 tokens", "must be a number, or of tokens: write `20.5M tokens`, got the text `20,500,0"),
        ("5 million", "must be a number, or of tokens: write `5M tokens`, got the text `5 million`"),
        ("all", "must be a number, or of tokens: tokens are written `20M tokens`, got the text `all`"),
        ("0 tokens", "must be a whole number of tokens, from 1 to 1,000,000,000,000,000, got the text `0 t"),
        ("1.0001k tokens", "must be a whole number of tokens, from 1 to 1,000,000,000,000,000, got the te"),
        ("'0.1'", "must be a number, got the text `0.1`; write 0.1 without quotes"),
        ("1.5", "must be a whole number from 1 up, or a share below 1, got 1.5"),
        ("-1", "must be at least 0, got -1"),
        ("[1]", "must be a number, got a list"),
    ],
)
def test_a_length_that_is_none_says_what_to_write(field: str, value: str, words: str) -> None:
    (found,) = told(f"{field}={value}")
    assert found.startswith(f"`train.{field}` {words}")


def test_a_ramp_goes_through_yaml() -> None:
    recipe = load(RAMP, "batch_scaling=true")
    assert recipe.train.batch_ramp is not None
    ramp = recipe.train.batch_ramp
    assert (ramp.from_, ramp.to, ramp.tokens) == (8, 128, 20_000_000)
    assert "  batch_ramp:\n    from: 8\n    to: 128\n    tokens: 20000000\n" in recipe.to_yaml()
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    changed = load(RAMP, "batch_ramp.from=16", "batch_ramp.tokens=7").train.batch_ramp
    assert changed is not None
    assert (changed.from_, changed.tokens) == (16, 7)


def test_a_ramp_that_is_none_says_what_is_missing() -> None:
    assert told("batch_ramp={from: a, too: 16}") == [
        "`train.batch_ramp.from` must be a whole number, got the text `a`",
        "`train.batch_ramp.to` is missing",
        "`train.batch_ramp.tokens` is missing",
        "unknown field `train.batch_ramp.too`; did you mean `to`?",
    ]
    assert told("batch_ramp={from: 0, to: 4, tokens: 20m}") == [
        "`train.batch_ramp.from` must be at least 1, got 0",
        "`train.batch_ramp.tokens` must be a number, or of tokens: write `20M tokens`, got the text `20m`",
    ]
    assert told("batch_ramp={form: 1, to: 4, tokens: 9}")[-1].endswith("did you mean `from`?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["lr_scheduler_type=cosine", "decay=linear"],
            "`train.decay` is a part of `wsd`, and `train.lr_scheduler_type` is `cosine`; leave it out, or "
            "set `train.lr_scheduler_type: wsd`",
        ),
        (
            ["lr_scheduler_type=linear", "decay_steps=20k tokens"],
            "`train.decay_steps` is a part of `wsd`, and `train.lr_scheduler_type` is `linear`; leave it "
            "out, or set `train.lr_scheduler_type: wsd`",
        ),
        (
            ["lr_scheduler_type=constant", "min_lr_ratio=0.1"],
            "`train.min_lr_ratio` is where the learning rate ends, and `train.lr_scheduler_type: constant` "
            "does not fall; leave it out",
        ),
        (
            ["decay=exponential", "min_lr_ratio=0"],
            "`train.min_lr_ratio` must be above 0 when `train.decay` is `exponential`, which never comes to "
            "0; leave it out for 1/256",
        ),
        (
            ["decay_steps=0"],
            "`train.decay_steps` must be above 0; for a rate that does not fall set "
            "`train.lr_scheduler_type: constant`",
        ),
        (
            ["stable_steps=0.9", "decay_steps=0.2"],
            "`train.decay_steps` must leave room: `warmup_steps: 0.03`, `stable_steps: 0.9` and "
            "`decay_steps: 0.2` come to 1.13 of the run; shorten one",
        ),
        (
            ["max_steps=10", "warmup_steps=3", "decay_steps=8"],
            "`train.decay_steps` must leave room: `warmup_steps: 3` and `decay_steps: 8` come to 1.1 of "
            "the run; shorten one",
        ),
        (
            ["max_steps=10", "warmup_steps=3", "stable_steps=8"],
            "`train.stable_steps` must leave room: `warmup_steps: 3` and `stable_steps: 8` come to 1.1 of "
            "the run; shorten one",
        ),
        (
            ["stable_steps=0.7", "decay_steps=0.2"],
            "`train.decay_steps` must end with the run: `warmup_steps: 0.03`, `stable_steps: 0.7` and "
            "`decay_steps: 0.2` come to 0.93 of it; leave `stable_steps` out, and it is what is left",
        ),
        (
            ["batch_scaling=true"],
            "`train.batch_scaling` scales the learning rate with a batch that grows, and there is no "
            "`train.batch_ramp`; add one, or leave it out",
        ),
        (
            ["batch_ramp={from: 9, to: 8, tokens: 1}"],
            "`train.batch_ramp.from` must be at most `to` (8), got 9: a batch grows",
        ),
        (
            [RAMP, "gradient_accumulation_steps=4"],
            "`train.gradient_accumulation_steps` does not go with `train.batch_ramp`, which says how many "
            "rows a step has; leave it out",
        ),
    ],
)
def test_what_clashes_is_refused_with_the_reason(words: list[str], message: str) -> None:
    assert message in told(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["decay=exponential", "min_lr_ratio=0.01", "decay_steps=0.1"],
        ["warmup_steps=0.1", "stable_steps=0.7", "decay_steps=0.2"],
        ["max_steps=10", "warmup_steps=1", "stable_steps=0.7", "decay_steps=2"],
        ["warmup_steps=500", "stable_steps=900", "decay_steps=0.2"],
        ["warmup_steps=20k tokens", "stable_steps=0.99", "decay_steps=3M tokens"],
        ["lr_scheduler_type=cosine", "min_lr_ratio=0.1"],
        ["lr_scheduler_type=linear", "min_lr_ratio=0"],
        ["max_steps=10", "warmup_steps=50"],
        ["batch_ramp={from: 8, to: 8, tokens: 1}"],
    ],
)
def test_what_goes_together_is_taken(words: list[str]) -> None:
    recipe = load(*words)
    assert Recipe.from_text(recipe.to_yaml()) == recipe


def test_the_schema_knows_both_forms() -> None:
    fields = recipe_schema()["$defs"]["TrainSection"]["properties"]
    number, text = fields["warmup_steps"]["anyOf"]
    assert (number["minimum"], text["type"]) == (0, "string")
    assert re.fullmatch(text["pattern"], "20M tokens")
    assert not re.fullmatch(text["pattern"], "20M")
    assert "from" in recipe_schema()["$defs"]["RampSection"]["properties"]
