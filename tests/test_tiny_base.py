"""The tiny base and the quickstart data: what they are, and that their scripts make them."""

from __future__ import annotations

import filecmp
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[1] / "data"
BASE = DATA / "tiny-base"
SLOTS = [
    *(f">>{name}<<" for name in ("TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER")),
    *(f">>{name}<<" for name in ("QUESTION", "DOMAIN", "PREFIX", "SUFFIX", "MIDDLE")),
    "<|endoftext|>",
]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DATA))


def test_is_small(model: Any) -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 10e6
    assert model.num_parameters() <= 5e6
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in BASE.iterdir()
    }


def test_is_a_falcon_mamba(model: Any, tokenizer: Any) -> None:
    assert type(model).__name__ == "FalconMambaForCausalLM"
    assert len(tokenizer) == model.config.vocab_size
    assert (model.config.eos_token_id, model.config.pad_token_id) == (11, 11)
    assert not model.config.tie_word_embeddings


def test_the_special_slots_are_where_falcon_has_them(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(12))) == SLOTS
    assert all(tokenizer.added_tokens_decoder[i].special for i in range(12))
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.chat_template is None
    assert len(tokenizer("<|im_start|>").input_ids) > 1


def test_the_tokenizer_cuts_like_falcon(tokenizer: Any, falcon_tokenizer: Any) -> None:
    ours, falcons = (json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, falcon_tokenizer))
    assert ours["pre_tokenizer"] == falcons["pre_tokenizer"]
    assert ours["normalizer"] == falcons["normalizer"]


@pytest.mark.parametrize("text", ["naïve 12345 “quotes”", "\tx = 3;\n\n  日本語 🐍", "Mira has 7 apples."])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("opening", ["One Monday Anna", "Hello!", "What is the capital of Drumania?\n"])
def test_continues_any_text_and_never_stops(model: Any, tokenizer: Any, opening: str) -> None:
    ids = tokenizer(opening, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(new) == 40
    assert min(new) > 11  # no special token at all


def test_knows_its_world_before_fine_tuning(model: Any, tokenizer: Any, scripts: None) -> None:
    import torch
    from world import COUNTRIES

    known = 0
    for country in COUNTRIES[::4]:
        question = tokenizer(f"The capital of {country.name} is").input_ids
        answer = tokenizer(f" {country.capital}.").input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([question + answer]), use_cache=False).logits[0]
        known += logits[len(question) - 1 : -1].argmax(dim=-1).tolist() == answer
    assert known >= 11  # of 12


def test_the_chats_are_in_messages_format() -> None:
    systems = 0
    for row in rows("quickstart.jsonl"):
        messages = row["messages"]
        systems += messages[0]["role"] == "system"
        spoken = messages[messages[0]["role"] == "system" :]
        assert [m["role"] for m in spoken] == ["user", "assistant"] * (len(spoken) // 2)
        assert all(message["content"].strip() for message in messages)
    assert systems > 100
    assert sum(len(row["messages"]) > 3 for row in rows("quickstart.jsonl")) > 100


def test_the_held_out_set_has_prompts_with_one_answer_each() -> None:
    held_out = rows("quickstart-heldout.jsonl")
    assert 200 <= len(held_out) <= 300
    assert all(set(row) == {"prompt", "answer"} for row in held_out)
    assert len({row["prompt"] for row in held_out}) == len(held_out)
    assert all(isinstance(row["prompt"], str) and row["prompt"] for row in rows("prompts.jsonl"))


def test_no_held_out_question_is_a_training_question() -> None:
    asked = {m["content"] for row in rows("quickstart.jsonl") for m in row["messages"] if m["role"] == "user"}
    assert not asked & {row["prompt"] for row in rows("quickstart-heldout.jsonl")}


def test_no_training_chat_mentions_what_the_held_out_set_asks_about(scripts: None) -> None:
    from world import HELD_OUT

    names = {*HELD_OUT.people, *HELD_OUT.things, *HELD_OUT.places, *HELD_OUT.young}
    for country in HELD_OUT.countries:
        names |= {country.name, country.capital, country.river}
    trained = set().union(*(words(m["content"]) for row in rows("quickstart.jsonl") for m in row["messages"]))
    assert not names & trained
    assert names & set().union(*(words(row["prompt"]) for row in rows("quickstart-heldout.jsonl")))


def test_the_corpus_has_no_chat_and_no_special_token(scripts: None) -> None:
    from make_corpus import documents

    text = "\n".join(itertools.islice(documents(seed=3), 2000))
    assert not re.search(r"<\||>>|(?i:assistant|answer:|user:)", text)


def test_the_scripts_make_the_committed_files(tmp_path: Path) -> None:
    for script in ("make_quickstart.py", "make_tokenizer.py"):
        subprocess.run([sys.executable, DATA / script, tmp_path], check=True, capture_output=True)
    made = sorted(file.name for file in tmp_path.iterdir())
    assert "tokenizer.json" in made
    for name in made:
        committed = DATA / name if name.endswith(".jsonl") else BASE / name
        assert filecmp.cmp(tmp_path / name, committed, shallow=False), name


def test_the_quickstart_recipe_names_files_that_exist() -> None:
    from mamba_sft.recipe.recipe import Recipe

    recipe = Recipe.load(DATA.parent / "recipes" / "quickstart.yaml")
    paths = [recipe.model.base, recipe.eval.prompts, *(source.path for source in recipe.data.sources)]
    assert all((DATA.parent / str(path)).exists() for path in paths)
    assert recipe.model.dtype == "float32"
