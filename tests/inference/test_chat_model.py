from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mamba_sft.errors import AdapterError, DataError, ModelError, UsageError
from mamba_sft.inference.answering import generate, open_session
from mamba_sft.inference.chat_model import load_chat_model, split_chat_model
from mamba_sft.inference.generation import State, prefill, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.kernels import cpu
from mamba_sft.model.chat_template import prepare_tokenizer, render
from mamba_sft.model.loading import apply_setup, load_model, load_tokenizer
from mamba_sft.model.warming_up import warm_up
from mamba_sft.recipe.fields import ChatSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from tests.conftest import build_model
from tests.inference.conftest import SHORT, make_run


def test_a_run_talks_with_its_adapter_and_splits_into_base_and_tuned(run, base, chat_model):
    prompt, _ = render(
        chat_model.tokenizer, [{"role": "user", "content": "hello"}], add_generation_prompt=True
    )

    def scores(model: Any) -> torch.Tensor:
        state = State()
        list(stream(model, prompt, state, sampling=Sampling(9), stop_ids=frozenset()))
        return state.logits

    section = Recipe.load(str(run.recipe)).model
    bare = load_model(section)
    apply_setup(bare, prepare_tokenizer(load_tokenizer(section), ChatSection(), {0, 11}))
    base_side, tuned_side = split_chat_model(chat_model)
    before, after = scores(bare), scores(tuned_side.model)
    assert (before - after).abs().max() > 0.1
    torch.testing.assert_close(scores(base_side.model), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores(tuned_side.model), after)  # its adapter was never off
    assert torch.equal(scores(chat_model.model), after)
    assert chat_model.system == "be brief"
    assert chat_model.stop_ids == {11, chat_model.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    torch.testing.assert_close(scores(load_chat_model(run.adapter).model), after, rtol=1e-5, atol=1e-5)
    state = State()
    prefill(chat_model.model, prompt, state)
    layers = state.cache.layers
    held = sum(x.nbytes for one in layers for x in (one.conv_states[0], one.recurrent_states[0]))
    assert chat_model.state_bytes == base_side.state_bytes == held


def test_a_model_directory_talks_by_its_own_template(tmp_path, run, chat_model):
    path = tmp_path / "instruct"
    model = build_model()
    model.generation_config.eos_token_id = (
        11  # as some published conversions say: the template's stop is missing
    )
    model.save_pretrained(path)
    chat_model.tokenizer.save_pretrained(path)
    found = load_chat_model(path)
    assert found.model.dtype == torch.float32  # as saved, not the recipe's default
    assert chat_model.tokenizer.convert_tokens_to_ids("<|im_end|>") in found.stop_ids
    with pytest.raises(UsageError, match="no adapter"):
        open_session(found, compare=True)
    with pytest.raises(UsageError, match="not a run"):
        load_chat_model(path, merged=True)


def test_a_merged_run(tmp_path, base):
    run = make_run(tmp_path / "run", base)
    with pytest.raises(UsageError, match="no merged checkpoint") as caught:
        load_chat_model(run, merged=True)
    assert f"mamba-sft merge {run.path}" in caught.value.hint
    build_model().save_pretrained(run.merged)
    load_chat_model(run).tokenizer.save_pretrained(run.merged)
    assert not hasattr(load_chat_model(str(run.path), merged=True).model, "peft_config")


def test_what_lies_in_a_run_has_its_system_message(tmp_path, base):
    run = make_run(tmp_path / "run", base, system="be brief")
    exported, elsewhere = run.export / "hf", tmp_path / "elsewhere"
    for path in (run.merged, run.model, exported, elsewhere):
        build_model().save_pretrained(path)
        load_chat_model(run.adapter).tokenizer.save_pretrained(path)
    found = [load_chat_model(path).system for path in (run.adapter, run.merged, run.model, exported)]
    assert found == ["be brief"] * 4
    assert load_chat_model(elsewhere).system is None


def test_loading_errors_say_what_to_do(tmp_path, base):
    with pytest.raises(ModelError, match="no model directory"):
        load_chat_model(tmp_path / "nowhere")
    unfinished = Run(tmp_path / "unfinished")
    made = make_run(tmp_path / "made", base)
    unfinished.path.mkdir()
    unfinished.recipe.write_bytes(made.recipe.read_bytes())
    with pytest.raises(UsageError, match="no adapter yet") as caught:
        load_chat_model(unfinished)
    assert "--resume" in caught.value.hint
    facts = made.adapter / "base.json"
    text = facts.read_text(encoding="utf-8")
    facts.write_text(text.replace('"fingerprint": "', '"fingerprint": "0'), encoding="utf-8")
    with pytest.raises(AdapterError, match="is not the base"):
        load_chat_model(made)
    facts.unlink()
    with pytest.raises(AdapterError, match="does not say which base"):
        load_chat_model(made)
    facts.write_text(text, encoding="utf-8")
    (made.adapter / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match="tokenizer"):
        load_chat_model(made)


def test_what_can_be_refused_is_refused_before_the_weights_are_read(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mamba_sft.inference.chat_model.load_model", lambda _: pytest.fail("the weights were read")
    )
    for call in (open_session, load_chat_model, lambda where: generate(where, "hello")):
        with pytest.raises(DataError, match="no chat template") as caught:
            call(base)
        assert "--raw" in caught.value.hint
    with pytest.raises(UsageError, match="no adapter to switch off"):
        open_session(base, compare=True)
    with pytest.raises(UsageError, match="no merged checkpoint"):
        open_session(run, merged=True)


def test_a_checkpoint_talks_before_its_run_has_finished(tmp_path, base):
    made = make_run(tmp_path / "run", base, system="be brief")
    finished = load_chat_model(made)
    checkpoint = made.checkpoints / "checkpoint-5"
    made.checkpoints.mkdir()
    made.adapter.rename(checkpoint)
    for name in ("base.json", "generation_config.json", "tokenizer.json"):
        (checkpoint / name).unlink()
    with pytest.raises(UsageError, match="no adapter yet") as caught:
        load_chat_model(made)
    assert "checkpoints" in caught.value.hint
    found = load_chat_model(checkpoint)
    assert (found.system, found.stop_ids) == ("be brief", finished.stop_ids)
    assert generate(found, "hello", sampling=SHORT) == generate(finished, "hello", sampling=SHORT)


def test_nothing_is_said_between_a_question_and_its_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_were_compiled", lambda: False)  # as on a new machine
    cpu._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        chat_model = load_chat_model(run)
        assert "compiling the CPU kernels, once" in caplog.text
        caplog.clear()
        answer = stream(chat_model.model, [5, 6, 7], State(), sampling=Sampling(4), stop_ids=frozenset())
        assert len(list(answer)) == 4
    assert not caplog.records
    drawn = torch.random.get_rng_state()
    warm_up(chat_model.model)
    assert torch.equal(torch.random.get_rng_state(), drawn)  # nobody's sampling is disturbed
