"""lm-eval gets from our model what it gets from its own, for fewer tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mamba_sft.evaluation.harness_model import HarnessModel
from mamba_sft.inference.chat_model import ChatModel
from mamba_sft.inference.generation import stop_token_ids
from mamba_sft.kernels.falcon_mamba import install
from tests.conftest import build_model, build_tokenizer
from tests.evaluation import fixture_data

MAX_LENGTH = 96
SHOTS = "question one answer brown fox. question two answer lazy dog. " * 2
CHOICES = [" (A)", " (B)", " dog", " the quick brown fox", "x"]


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Counts the tokens that a model is given, padding included."""
    found = [0]

    def count(_module: Any, inputs: Any, _output: Any) -> None:
        found[0] += inputs[0].numel()

    handle = model.get_input_embeddings().register_forward_hook(count)
    try:
        yield found
    finally:
        handle.remove()


@pytest.fixture(scope="module", params=["tiny", "falcon"])
def chat_model(request: pytest.FixtureRequest) -> ChatModel:
    if request.param == "tiny":
        model, tokenizer = build_model(), build_tokenizer()
    else:
        tokenizer = copy.deepcopy(request.getfixturevalue("falcon_tokenizer"))
        model = build_model(vocab_size=65024, hidden_size=32)
    return ChatModel("test", install(model), tokenizer, stop_token_ids(model, tokenizer))


def stock(chat_model: ChatModel, batch_size: int = 4) -> Any:
    return HFLM(
        pretrained=chat_model.model,
        tokenizer=copy.deepcopy(chat_model.tokenizer),
        backend="causal",
        max_length=MAX_LENGTH,
        batch_size=batch_size,
    )


def ours(chat_model: ChatModel, batch_size: int = 4, **options: Any) -> HarnessModel:
    return HarnessModel(chat_model, max_length=MAX_LENGTH, batch_size=batch_size, **options)


def asked(kind: Any, *arguments: Any) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=number, metadata=("task", number, 1))
        for number, given in enumerate(arguments)
    ]


def choices() -> list[Any]:
    documents = [SHOTS + f"question number {number} answer" for number in (1, 22, 333)]
    pairs = [(document, choice) for document in documents for choice in CHOICES]
    pairs += [
        ("", " (A)"), ("", "hello"),  # nothing in front
        ("hello world  ", "fox"), ("hello\n\n", "fox"),  # blanks that go to the continuation
        ("jumps over", " the"), ("jumps over", " the"),  # twice
        (SHOTS * 9 + "the end", " (C)"), (SHOTS * 9 + "the end", " (D)"),  # too long
        ("naïve café 数", " 数 é"), (SHOTS, SHOTS[:40]),
    ]  # fmt: skip
    return asked("loglikelihood", *pairs)


def test_log_likelihoods_are_those_of_stock(chat_model: ChatModel) -> None:
    requests = choices()
    with counted(chat_model.model) as theirs:
        expected = stock(chat_model).loglikelihood(requests, disable_tqdm=True)
    with counted(chat_model.model) as own:
        found = ours(chat_model).loglikelihood(requests, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert own[0] < theirs[0]


def test_four_times_fewer_tokens_are_read_of_bbh(
    chat_model: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leaderboard's own task: 3 examples, then a document with six choices."""
    import datasets
    from lm_eval import tasks
    from lm_eval.evaluator import evaluate

    fixture_data.write_bbh(tmp_path, count=3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    place = Path(tasks.__file__).parent / "leaderboard" / "bbh_mc"
    name = "leaderboard_bbh_date_understanding"
    task = tasks.TaskManager(include_path=[place], include_defaults=False).load([name])["tasks"][name]
    said, read = [], []
    long = {"max_length": 2048, "batch_size": 4}
    for model in (
        HFLM(pretrained=chat_model.model, tokenizer=chat_model.tokenizer, backend="causal", **long),
        HarnessModel(chat_model, **long),
    ):
        with counted(chat_model.model) as tokens:
            found = evaluate(
                model, {"tasks": {name: task}, "groups": {}, "group_map": {}}, bootstrap_iters=10
            )
        said.append([answer for sample in found["samples"][name] for answer in sample["filtered_resps"]])
        read.append(tokens[0])
    assert len(said[0]) == 18
    assert [one for one, _ in said[1]] == pytest.approx([one for one, _ in said[0]], abs=1e-4)
    assert [greedy for _, greedy in said[1]] == [greedy for _, greedy in said[0]]
    assert read[1] * 4 <= read[0]


def test_a_batch_of_eight_is_one_by_one(chat_model: ChatModel) -> None:
    requests = choices()
    one, eight = (ours(chat_model, size).loglikelihood(requests, disable_tqdm=True) for size in (1, 8))
    assert [value for value, _ in one] == pytest.approx([value for value, _ in eight], abs=1e-4)
    assert [greedy for _, greedy in one] == [greedy for _, greedy in eight]


def test_whole_texts_are_those_of_stock(chat_model: ChatModel) -> None:
    requests = asked("loglikelihood_rolling", *((text,) for text in ("hello world", SHOTS * 4, "a")))
    expected = stock(chat_model).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours(chat_model).loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(
        expected, abs=2e-4
    )


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_are_those_of_stock(chat_model: ChatModel, batch_size: int) -> None:
    probe = asked("generate_until", ("hello world", {"until": [], "max_gen_toks": 12}))
    answer = stock(chat_model).generate_until(probe, disable_tqdm=True)[0]
    inner = answer[len(answer) // 2 :][:2]  # what the answer has in the middle
    assert inner
    settings = [
        {"until": [], "max_gen_toks": 12, "do_sample": False},
        {"until": [inner], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
        {"until": inner, "max_gen_toks": 20},
    ]
    texts = ["hello world", SHOTS, SHOTS * 9, "question two"]
    requests = asked("generate_until", *((text, one) for one in settings for text in texts))
    expected = stock(chat_model).generate_until(requests, disable_tqdm=True)
    assert ours(chat_model, batch_size).generate_until(requests, disable_tqdm=True) == expected
    assert expected[0] != expected[4]  # the stop string has cut it


def test_nothing_is_read_behind_a_stop_string(chat_model: ChatModel) -> None:
    whole = asked("generate_until", ("hello world", {"until": [], "max_gen_toks": 30}))
    with counted(chat_model.model) as all_of_it:
        answer = ours(chat_model).generate_until(whole, disable_tqdm=True)[0]
    stops = {"until": [answer[:2]], "max_gen_toks": 30}
    with counted(chat_model.model) as some:
        cut = ours(chat_model).generate_until(asked("generate_until", ("hello world", stops)))
    assert cut == [""]
    assert some[0] < all_of_it[0] - 20


def test_settings_that_are_not_ours_are_left_to_stock(chat_model: ChatModel) -> None:
    given = {"until": [], "max_gen_toks": 8, "repetition_penalty": 1.7}
    requests = asked("generate_until", ("hello world hello", given))
    expected = stock(chat_model).generate_until(requests, disable_tqdm=True)
    assert ours(chat_model).generate_until(requests, disable_tqdm=True) == expected


def test_every_request_is_counted_once(chat_model: ChatModel) -> None:
    done: list[int] = []
    model = ours(chat_model, on_request=lambda: done.append(1))
    model.loglikelihood(choices(), disable_tqdm=True)
    assert len(done) == len(choices())
    model.generate_until(asked("generate_until", ("a", {"max_gen_toks": 2}), ("b", {"max_gen_toks": 3})))
    assert len(done) == len(choices()) + 2


def test_the_tokenizer_is_left_as_it_was(chat_model: ChatModel) -> None:
    assert ours(chat_model).tokenizer is not chat_model.tokenizer
