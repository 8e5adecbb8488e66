from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mamba_sft.errors import UsageError
from mamba_sft.inference.answer_text import TextStream
from mamba_sft.inference.generation import (
    PREFILL_CHUNK,
    State,
    answers,
    finish_reason,
    prefill,
    stop_token_ids,
    stream,
)
from mamba_sft.inference.sampling import Sampling, choose
from mamba_sft.kernels.falcon_mamba import install

PROMPTS = ["hello world", "the quick brown fox jumps over the lazy dog 12", "a", "what number is 7 and 21"]
NEVER: frozenset[int] = frozenset()


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stock_greedy(model: Any, ids: list[int], tokens: int, stop: int | None = None) -> list[int]:
    model.generation_config.eos_token_id = stop
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), pad_token_id=0,
        max_new_tokens=tokens, do_sample=False,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_token_for_token_what_stock_transformers_generates(tiny_model, tiny_tokenizer, prompt):
    ids = encode(tiny_tokenizer, prompt)
    expected = stock_greedy(tiny_model, ids, 40)
    install(tiny_model)
    assert list(stream(tiny_model, ids, State(), sampling=Sampling(40), stop_ids=NEVER)) == expected


def test_a_batch_answers_as_stock_does_one_at_a_time(tiny_model, tiny_tokenizer):
    ids = [encode(tiny_tokenizer, prompt) for prompt in PROMPTS]
    alone = [stock_greedy(tiny_model, one, 30) for one in ids]
    stop = alone[1][7]
    expected = [one[: one.index(stop)] if stop in one else one for one in alone]
    install(tiny_model)
    seen: dict[int, Any] = {}
    for size in (1, 3, 8):
        seen.clear()
        given = answers(
            tiny_model, tiny_tokenizer, ids, sampling=Sampling(30), stop_ids={stop}, batch_size=size,
            on_answer=seen.__setitem__,
        )  # fmt: skip
        assert [one.text for one in given] == [
            tiny_tokenizer.decode(e, skip_special_tokens=True) for e in expected
        ]
        assert [one.tokens for one in given] == [len(one) for one in expected]
        assert [one.finish_reason for one in given] == [
            "length" if len(one) == 30 else "stop" for one in expected
        ]
        assert [seen[number] for number in range(len(ids))] == given
    assert any(one.finish_reason == "stop" for one in given)
    assert any(one.finish_reason == "length" for one in given)


def test_the_answer_ends_before_any_stop_id(tiny_model, tiny_tokenizer):
    ids = encode(tiny_tokenizer, PROMPTS[0])
    free = stock_greedy(tiny_model, ids, 20)
    install(tiny_model)
    for stops in ({free[5]}, {free[9], free[5]}, {free[0]}):
        state = State()
        got = list(stream(tiny_model, ids, state, sampling=Sampling(20), stop_ids=stops))
        first = min(free.index(stop) for stop in stops)
        assert got == free[:first]
        assert state.read == ids + got


def test_going_on_from_a_state_equals_reading_everything_again(tiny_model, tiny_tokenizer):
    install(tiny_model)
    state, everything = State(), []
    for turn in range(5):
        new = encode(tiny_tokenizer, PROMPTS[turn % len(PROMPTS)])
        everything += new
        again = State()
        answer_again = list(stream(tiny_model, everything, again, sampling=Sampling(12), stop_ids=NEVER))
        answer = list(stream(tiny_model, new, state, sampling=Sampling(12), stop_ids=NEVER))
        everything += answer
        assert answer == answer_again
        assert state.read == everything
        torch.testing.assert_close(state.logits, again.logits, rtol=1e-5, atol=1e-5)


def test_a_copy_goes_its_own_way(tiny_model, tiny_tokenizer):
    install(tiny_model)
    state = State()
    prefill(tiny_model, encode(tiny_tokenizer, PROMPTS[0]), state)
    kept = state.copy()
    first = list(stream(tiny_model, [40, 41], state, sampling=Sampling(10), stop_ids=NEVER))
    again = list(stream(tiny_model, [40, 41], kept.copy(), sampling=Sampling(10), stop_ids=NEVER))
    assert again == first
    restored = list(stream(tiny_model, [40, 41], kept, sampling=Sampling(10), stop_ids=NEVER))
    assert restored == first
    assert torch.equal(state.logits, kept.logits)


def test_the_state_does_not_grow(tiny_model):
    install(tiny_model)
    state = State()
    prefill(tiny_model, [40], state)

    def size() -> int:
        layers = state.cache.layers
        return sum(x.numel() for one in layers for x in (one.conv_states[0], one.recurrent_states[0]))

    before = size()
    for _ in stream(tiny_model, [41] * 50, state, sampling=Sampling(50), stop_ids=NEVER):
        pass
    assert size() == before


def test_a_long_prompt_is_read_in_chunks(tiny_model, monkeypatch):
    install(tiny_model)
    ids = torch.randint(12, 512, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids, ids[:33], ids[:7]]
    whole = State()
    prefill(tiny_model, ids, whole)
    expected = answers(tiny_model, _Numbers(), prompts, sampling=Sampling(5), stop_ids=NEVER)
    monkeypatch.setattr("mamba_sft.inference.generation.PREFILL_CHUNK", 16)
    chunked = State()
    prefill(tiny_model, ids, chunked)
    assert PREFILL_CHUNK > 16
    torch.testing.assert_close(chunked.logits, whole.logits, rtol=1e-5, atol=1e-5)
    assert answers(tiny_model, _Numbers(), prompts, sampling=Sampling(5), stop_ids=NEVER) == expected


class _Numbers:
    """Decodes ids to their numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def test_an_exception_while_reading_leaves_no_half_read_state(tiny_model, monkeypatch):
    install(tiny_model)
    state = State()
    prefill(tiny_model, [40, 41], state)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model.backbone.layers[1], "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prefill(tiny_model, [42], state)
    assert state == State()


def test_a_dropped_iterator_has_read_what_it_yielded(tiny_model):
    install(tiny_model)
    state = State()
    tokens = stream(tiny_model, [40, 41], state, sampling=Sampling(10), stop_ids=NEVER)
    got = [next(tokens), next(tokens)]
    tokens.close()
    assert state.read == [40, 41, *got]


def test_generating_leaves_training_mode_as_it_was(tiny_model):
    install(tiny_model).train()
    next(stream(tiny_model, [40], State(), sampling=Sampling(1), stop_ids=NEVER))
    answers(tiny_model, _Numbers(), [[40]], sampling=Sampling(1), stop_ids=NEVER)
    assert tiny_model.training
    assert all(module.training for module in tiny_model.modules())


def test_sampling_is_repeatable_and_does_not_depend_on_the_batch(tiny_model):
    install(tiny_model)
    sampling = Sampling(15, temperature=1.5, top_k=100, top_p=0.95, seed=7)
    prompts = [[40, 41], [42], [43, 44, 45], [42]]
    together = answers(tiny_model, _Numbers(), prompts, sampling=sampling, stop_ids={11})
    alone = answers(tiny_model, _Numbers(), prompts, sampling=sampling, stop_ids={11}, batch_size=1)
    assert together == alone
    assert together[1] != together[3]  # the same prompt twice is answered twice

    def one(seed: int | None) -> list[int]:
        sampling = Sampling(15, temperature=1.5, seed=seed)
        return list(stream(tiny_model, [40], State(), sampling=sampling, stop_ids=NEVER))

    before = torch.get_rng_state()
    assert one(1) == one(1) != one(2)
    assert one(None) != one(None)
    assert torch.equal(torch.get_rng_state(), before)  # a generator of its own


def draws(logits: list[float], count: int = 4000, **sampling: Any) -> Counter[int]:
    rows = torch.tensor([logits]).expand(count, -1)
    generator = torch.Generator().manual_seed(0)
    return Counter(choose(rows, Sampling(**sampling), [generator] * count).tolist())


def test_the_filters_keep_what_they_say():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert set(draws(logits, temperature=1)) == {0, 1, 2, 3}
    assert set(draws(logits, temperature=1, top_k=2)) == {0, 1}
    assert set(draws(logits, temperature=1, top_p=0.65)) == {0, 1}
    assert set(draws(logits, temperature=1, top_p=0.75)) == {0, 1, 2}
    assert set(draws(logits, temperature=1, top_p=1e-6)) == {0}
    assert set(draws(logits, temperature=1, top_k=3, top_p=0.5)) == {0, 1}
    assert set(draws(logits, temperature=0, top_k=3)) == {0}
    counts = draws(logits, temperature=1)
    for token, share in enumerate([0.4, 0.3, 0.2, 0.1]):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)
    cold = draws(logits, temperature=0.5)  # shares go as the squares
    assert cold[0] / cold[2] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_values_out_of_range_are_named(values):
    with pytest.raises(UsageError, match=f"`{next(iter(values))}` must be .*{next(iter(values.values()))}"):
        Sampling(**values)


def test_an_empty_prompt_is_refused(tiny_model, tiny_tokenizer):
    install(tiny_model)
    with pytest.raises(UsageError, match="empty"):
        next(stream(tiny_model, [], State(), sampling=Sampling(), stop_ids=NEVER))
    with pytest.raises(UsageError, match="empty"):
        answers(tiny_model, tiny_tokenizer, [[40], []], sampling=Sampling(), stop_ids=NEVER)


def test_finish_reason_and_stop_ids(tiny_model, tiny_tokenizer):
    assert finish_reason(4, Sampling(4)) == "length"
    assert finish_reason(3, Sampling(4)) == "stop"
    for configured, expected in ((None, {11}), (7, {7, 11}), ([7, 9], {7, 9, 11})):
        tiny_model.generation_config.eos_token_id = configured
        assert stop_token_ids(tiny_model, tiny_tokenizer) == expected


TEXTS = [
    "plain words 123",
    "naïve café",
    "😀",
    "a😀b👩‍👩‍👧‍👦c",
    "日本語と中文",
    "\n\n  spaces \t",
    "\ufffd real \ufffd",
    "é" * 20,
]


def byte_fallback_tokenizer() -> Any:
    """A tokenizer as sentencepiece makes them: words, and a token for each byte of everything else."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeé123"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(params=["byte-level", "byte fallback", "Falcon"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The kinds of tokenizers there are."""
    if request.param == "byte fallback":
        return byte_fallback_tokenizer()
    return request.getfixturevalue("tiny_tokenizer" if request.param == "byte-level" else "falcon_tokenizer")


@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_in_whole_characters(tokenizer, text):
    ids = encode(tokenizer, text)
    texts = TextStream(tokenizer)
    pieces = [texts.push(token) for token in ids]
    pieces.append(texts.flush())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""
    if text == "😀":
        assert len(ids) > 1
        assert pieces[:-2] == [""] * (len(ids) - 1)


@pytest.mark.parametrize("name", ["tiny_tokenizer", "falcon_tokenizer"])
def test_text_of_any_bytes_equals_decoding_them_at_once(name, request):
    tokenizer = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        ids = torch.randint(0, len(tokenizer), (25,), generator=generator).tolist()
        texts = TextStream(tokenizer)
        joined = "".join([*(texts.push(token) for token in ids), texts.flush()])
        assert joined == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_byte_that_undoes_a_shown_character_does_not_end_the_answer():
    """With byte fallback a stray byte makes the whole run of bytes before it unreadable, shown or not."""
    tokenizer = byte_fallback_tokenizer()
    texts = TextStream(tokenizer)
    tokens = ["<0xE2>", "<0x82>", "<0xAC>", "<0x80>", "a", "b"]
    pieces = [texts.push(token) for token in tokenizer.convert_tokens_to_ids(tokens)]
    assert pieces == ["", "", "€", "", "\ufffda", "b"]


def test_special_tokens_give_no_text(tokenizer):
    texts = TextStream(tokenizer)
    end = tokenizer.eos_token_id
    ids = [end, *encode(tokenizer, "a"), end, *encode(tokenizer, " b"), end]
    assert "".join(texts.push(token) for token in ids) + texts.flush() == "a b"


def test_a_cut_character_is_shown_when_the_answer_ends(tokenizer):
    texts = TextStream(tokenizer)
    ids = encode(tokenizer, "a😀")[:-1]
    shown = "".join(texts.push(token) for token in ids)
    assert shown == "a"
    assert shown + texts.flush() == tokenizer.decode(ids)
    assert texts.flush() == ""
    assert "".join(map(texts.push, encode(tokenizer, "b"))) == "b"  # nothing of the cut one is left


def test_left_padding_changes_no_answer():
    """Eight prompts of 1 to 900 tokens together, on the tiny base: token for token what each gets alone."""
    from pathlib import Path

    from mamba_sft.model.loading import load_model, load_tokenizer
    from mamba_sft.recipe.fields import ModelSection

    section = ModelSection(base=str(Path(__file__).parents[2] / "data" / "tiny-base"), dtype="float32")
    model, tokenizer = load_model(section), load_tokenizer(section)
    lengths = (1, 2, 5, 17, 60, 200, 450, 900)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(12, 1500, (length,), generator=generator).tolist() for length in lengths]
    ask: dict[str, Any] = {"sampling": Sampling(40), "stop_ids": {11}}
    alone = [list(stream(model, prompt, State(), **ask)) for prompt in prompts]
    together = answers(model, tokenizer, prompts, batch_size=8, **ask)
    assert [one.text for one in together] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in alone
    ]
    assert [one.tokens for one in together] == [len(ids) for ids in alone]
    assert len({one.text for one in together}) == 8
