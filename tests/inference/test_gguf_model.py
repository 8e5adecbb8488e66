"""A GGUF file answers as the model that it was made from, in a process of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mamba_sft.errors import DataError, ModelError, UsageError
from mamba_sft.exporting.export_run import export
from mamba_sft.exporting.request import GGUFOptions
from mamba_sft.inference.answering import generate, open_session
from mamba_sft.inference.chat_model import ChatModel, load_chat_model
from mamba_sft.inference.generation import State, answers, prefill, stream
from mamba_sft.inference.model_places import find_place
from mamba_sft.inference.request import Running
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import ChatSession
from mamba_sft.merging.merge_run import merge
from mamba_sft.run import Run
from tests.inference.conftest import make_run, say

TINY_BASE = Path(__file__).parents[2] / "data" / "tiny-base"
NEVER: frozenset[int] = frozenset()
TEXTS = ["What is the opposite of hot?", "hello", "1 22 333 naïve 😀", "The capital of"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("gguf") / "tiny", TINY_BASE, system="be brief")
    merge(run)
    for kind in ("f32", "f16", "Q8_0"):
        export(run, quantization=kind, options=GGUFOptions(verify=False))
    return run


def file_of(run: Run, kind: str) -> Path:
    (found,) = run.export.glob(f"*{kind}*.gguf")
    return found


@pytest.fixture(scope="module")
def merged(run: Run) -> ChatModel:
    return load_chat_model(run, merged=True, dtype="float32")  # in bfloat16 scores are off by a hundredth


@pytest.fixture(scope="module")
def talking(run: Run) -> Iterator[ChatModel]:
    chat_model = load_chat_model(file_of(run, "F32"))
    yield chat_model
    chat_model.model.process.close()


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_greedy_answers_are_those_of_the_model(run: Run, merged: ChatModel, kind: str) -> None:
    chat_model = load_chat_model(file_of(run, kind))
    for raw in (False, True):
        expected = generate(merged, TEXTS, sampling=Sampling(40), raw=raw)
        assert generate(chat_model, TEXTS, sampling=Sampling(40), raw=raw) == expected
    assert len({one.text for one in expected}) == len(TEXTS)


def test_the_tokenizer_and_what_ends_an_answer_are_the_models(merged: ChatModel, talking: ChatModel) -> None:
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n", "  two  spaces\t\n"]:
        ours, theirs = (one.tokenizer(text, add_special_tokens=False).input_ids for one in (talking, merged))
        assert ours == theirs
        assert talking.tokenizer.decode(ours) == merged.tokenizer.decode(theirs)
    assert talking.stop_ids >= {talking.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert talking.system == merged.system == "be brief"
    assert talking.state_bytes == 4 * 4 * 384 * (3 + 16)


def test_a_conversation_goes_on_and_is_taken_back(merged: ChatModel, talking: ChatModel) -> None:
    sides = [ChatSession(one, sampling=Sampling(12)) for one in (merged, talking)]
    assert len({tuple(say(side, text) for text in TEXTS[:3]) for side in sides}) == 1
    assert len({side.undo() for side in sides}) == 1
    assert len({say(side, "another") for side in sides}) == 1
    assert len({"".join(side.retry()) for side in sides}) == 1
    assert sides[0].messages == sides[1].messages
    assert sides[1].last_turn is not None
    assert not sides[1].last_turn.reread


def test_states_go_their_own_ways_and_are_let_go(talking: ChatModel) -> None:
    model, first = talking.model, State()
    prefill(model, list(range(40, 90)), first)
    second = first.copy()
    prefill(model, [100, 101], second)
    prefill(model, [200, 201], first)
    for state, tail in ((first, [200, 201]), (second, [100, 101])):
        alone = State()
        prefill(model, [*range(40, 90), *tail], alone)
        torch.testing.assert_close(state.logits, alone.logits, rtol=1e-4, atol=1e-4)
    numbers = {first.cache.number, second.cache.number}
    first.clear()
    second.clear()
    assert numbers <= set(model.process._forgotten)
    prefill(model, [40], State())
    assert not numbers & set(model.process._forgotten)


def test_a_prompt_is_longer_than_any_context(merged: ChatModel, talking: ChatModel) -> None:
    ids = torch.randint(12, 1500, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    ask = {"sampling": Sampling(10), "stop_ids": NEVER}
    assert list(stream(talking.model, ids, State(), **ask)) == list(stream(merged.model, ids, State(), **ask))


def test_beginnings_are_read_once_here_too(merged: ChatModel, talking: ChatModel) -> None:
    prompts = [[*range(40, 140), 200 + n] for n in range(4)]
    found, expected = (
        answers(one.model, one.tokenizer, prompts, sampling=Sampling(6), stop_ids=NEVER, batch_size=1)
        for one in (talking, merged)
    )
    assert found == expected
    assert [one.shared_tokens for one in found].count(100) == 3


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches this process, which a shell may have started in the background, where it does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_question_leaves_the_next_one_whole(
    talking: ChatModel, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    expected = generate(talking, TEXTS[:1], sampling=Sampling(8))
    exchange, asked = talking.model.process._exchange, 0

    def interrupted(*what: object) -> object:
        nonlocal asked
        asked += 1
        if asked == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return exchange(*what)

    monkeypatch.setattr(talking.model.process, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(talking, TEXTS[:1], sampling=Sampling(200))
    monkeypatch.undo()
    assert generate(talking, TEXTS[:1], sampling=Sampling(8)) == expected


def test_a_process_that_is_gone_is_one_message(run: Run) -> None:
    chat_model = load_chat_model(file_of(run, "Q8_0"))
    chat_model.model.process._process.kill()
    with pytest.raises(ModelError, match=r"cannot use .*Q8_0\.gguf`: it was killed, as the system does"):
        generate(chat_model, "hello")


@pytest.mark.parametrize("share", [0.02, 0.7])
def test_a_damaged_file_is_one_message(run: Run, tmp_path: Path, share: float) -> None:
    whole = file_of(run, "F16").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load_chat_model(path)


def test_other_files_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        find_place(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UsageError, match="is no GGUF file: it begins with b'hell'"):
        find_place(tmp_path / "text.gguf")
    with pytest.raises(UsageError, match="nothing to merge"):
        find_place(file_of(run, "F16"), merged=True)


def test_a_file_without_a_template_continues_text(tmp_path: Path) -> None:
    export(TINY_BASE, quantization="f16", output=tmp_path, options=GGUFOptions(verify=False))
    (path,) = tmp_path.glob("*.gguf")
    with pytest.raises(DataError, match="no chat template"):
        generate(path, "hello")
    base = load_chat_model(TINY_BASE, dtype="float32", needs_template=False)
    ask = {"raw": True, "sampling": Sampling(20)}
    assert generate(load_chat_model(path, needs_template=False), TEXTS, **ask) == generate(base, TEXTS, **ask)


@pytest.mark.parametrize(
    ("how", "compare", "message"),
    [
        ({"compile": True}, False, "compiled already"),
        ({"dtype": "float16"}, False, "stored as they are computed with"),
        ({"quantization": "nf4"}, False, "stored as they are computed with"),
        ({"device": "cuda"}, False, "on the CPU here"),
        ({}, True, "no adapter"),
    ],
)
def test_what_a_file_cannot_do_is_refused_with_the_reason(
    run: Run, how: dict[str, object], compare: bool, message: str
) -> None:
    place = find_place(file_of(run, "F16"))
    with pytest.raises(UsageError, match=message):
        Running(**how).check(place, compare=compare)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        open_session(load_chat_model(place, needs_adapter=compare, **how), compare=compare)  # type: ignore[arg-type]
