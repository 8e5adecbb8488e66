from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mamba_sft.errors import DataError, UsageError
from mamba_sft.inference import unread
from mamba_sft.inference.answering import generate, open_session
from mamba_sft.inference.chat_model import split_chat_model
from mamba_sft.inference.generation import State, prefill, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import UNDO_DEPTH, ChatSession, CompareSession
from mamba_sft.inference.unread import continuation
from mamba_sft.model.chat_template import render
from tests.inference.conftest import SHORT, say, state_of


def test_five_turns_read_nothing_twice_and_equal_a_full_reading(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    fed: list[int] = []
    original = chat_model.model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        fed.append(kwargs["input_ids"].shape[1])
        return original(*args, **kwargs)

    chat_model.model.forward = count
    try:
        for turn in range(5):
            say(session, f"question number {turn}")
            state = state_of(session)
            assert sum(fed) == len(state.read) == session.last_turn.seen
            assert not session.last_turn.reread
    finally:
        del chat_model.model.forward
    again = State()
    prefill(chat_model.model, state.read, again)
    torch.testing.assert_close(state.logits, again.logits, rtol=1e-5, atol=1e-5)
    rendered, _ = render(chat_model.tokenizer, session.messages)
    text = chat_model.tokenizer.decode(rendered)
    assert text.startswith(chat_model.tokenizer.decode(state.read))
    next_prompt = [*session.messages, {"role": "user", "content": "more"}]
    rendered, _ = render(chat_model.tokenizer, next_prompt, add_generation_prompt=True)
    rest = continuation(chat_model.tokenizer, state.read, rendered)
    assert rest
    assert rendered[-len(rest) :] == rest
    assert chat_model.tokenizer.decode(state.read + rest) == chat_model.tokenizer.decode(rendered)


def test_each_turn_is_the_greedy_answer_to_the_whole_conversation(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    read: list[int] = []
    for text in ("hello", "and then", "really"):
        answer = say(session, text)
        rendered, _ = render(chat_model.tokenizer, session.messages[:-1], add_generation_prompt=True)
        prompt = read + continuation(chat_model.tokenizer, read, rendered)
        tokens = list(stream(chat_model.model, prompt, State(), sampling=SHORT, stop_ids=chat_model.stop_ids))
        assert chat_model.tokenizer.decode(tokens, skip_special_tokens=True) == answer
        read = prompt + tokens


def test_a_template_that_rewrites_history_is_read_again_and_said(chat_model, monkeypatch):
    template = (
        "{% for m in messages %}{% if not loop.last or m.role == 'user' %}<|im_start|>{{ m.role }} of "
        "{{ messages | length }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n"
    )
    monkeypatch.setattr(chat_model.tokenizer, "chat_template", template)
    session = ChatSession(chat_model, sampling=SHORT)
    say(session, "hello")
    assert not session.last_turn.reread
    answer = say(session, "again")
    assert session.last_turn.reread
    rendered, _ = render(chat_model.tokenizer, session.messages[:-1], add_generation_prompt=True)
    assert state_of(session).read[: len(rendered)] == rendered
    fresh = list(stream(chat_model.model, rendered, State(), sampling=SHORT, stop_ids=chat_model.stop_ids))
    assert answer == chat_model.tokenizer.decode(fresh, skip_special_tokens=True)


def test_undo_and_retry_come_back_to_the_same_place(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    say(session, "first")
    place = state_of(session).copy()
    answer = say(session, "second")
    messages = session.messages
    assert session.undo() == "second"
    assert state_of(session).read == place.read
    assert torch.equal(state_of(session).logits, place.logits)
    assert say(session, "second") == answer
    assert "".join(session.retry()) == answer  # greedy
    assert session.messages == messages
    session.undo()
    session.undo()
    assert session.messages == []
    with pytest.raises(UsageError, match="nothing to take back"):
        session.undo()
    with pytest.raises(UsageError, match="nothing to take back"):
        next(session.retry())


def test_retry_draws_anew_and_a_seed_repeats_the_session(chat_model):
    def talk() -> list[str]:
        session = ChatSession(chat_model, sampling=Sampling(12, temperature=2.0, seed=5))
        return [say(session, "hello"), "".join(session.retry()), "".join(session.retry())]

    first = talk()
    assert len(set(first)) == 3
    assert talk() == first


def test_undoing_further_than_states_are_kept_reads_again(chat_model):
    session = ChatSession(chat_model, sampling=Sampling(2))
    for turn in range(UNDO_DEPTH + 3):
        say(session, f"turn {turn}")
    assert len(session._before) == UNDO_DEPTH
    for _ in range(UNDO_DEPTH + 1):
        session.undo()
    say(session, "other")
    assert session.last_turn.reread
    assert [turn["content"] for turn in session.messages[1::2]] == ["turn 0", "turn 1", "other"]
    rendered, _ = render(chat_model.tokenizer, session.messages[:-1], add_generation_prompt=True)
    assert state_of(session).read[: len(rendered)] == rendered


def test_interrupting_keeps_what_was_written(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    answer = session.send("hello")
    got = next(answer) + next(answer)
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": got}
    assert session.last_turn.finish_reason == "interrupted"
    say(session, "go on")
    assert not session.last_turn.reread


def test_interrupting_inside_the_model_loses_no_turn(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=SHORT)
    say(session, "hello")
    before = list(state_of(session).read)
    mixer = chat_model.model.get_base_model().backbone.layers[1].mixer
    original, calls = mixer.forward, [0]

    def interrupt(after: int) -> Callable[..., Any]:
        calls[0] = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return forward

    monkeypatch.setattr(mixer, "forward", interrupt(0))
    with pytest.raises(KeyboardInterrupt):
        list(session.send("at once"))
    assert [turn["content"] for turn in session.messages if turn["role"] == "user"] == ["hello"]
    assert state_of(session).read == before
    monkeypatch.setattr(mixer, "forward", interrupt(4))
    with pytest.raises(KeyboardInterrupt):
        list(session.send("later"))
    monkeypatch.setattr(mixer, "forward", original)
    assert session.messages[-1]["role"] == "assistant"
    assert state_of(session).read == before  # the turn's start: only this turn is read again
    say(session, "go on")
    assert not session.last_turn.reread
    text = chat_model.tokenizer.decode(state_of(session).read)
    assert "later" in text
    assert "at once" not in text


def test_system_reset_and_save(chat_model, tmp_path):
    session = ChatSession(chat_model, sampling=SHORT)
    file = tmp_path / "new" / "chats.jsonl"
    with pytest.raises(UsageError, match="nothing to save"):
        session.save(file)
    say(session, "hello")
    assert session.messages[0] == {"role": "system", "content": "be brief"}  # the run's own
    session.system = "be long"
    say(session, "again")
    assert session.last_turn.reread
    assert "be long" in chat_model.tokenizer.decode(state_of(session).read)
    session.save(file)
    messages = session.messages
    session.reset()
    assert (session.messages, session.last_turn) == ([], None)
    say(session, "new 😀")
    session.save(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"messages": messages}, {"messages": session.messages}]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant", "user", "assistant"]
    with pytest.raises(UsageError, match="cannot save"):
        session.save(tmp_path)
    assert ChatSession(chat_model, system="other").system == "other"


def test_blank_messages_and_broken_bytes(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    with pytest.raises(UsageError, match="empty"):
        session.send(" \n")
    say(session, b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert session.messages[-2]["content"] == "caf\ufffd"


def test_two_sides_answer_as_they_would_alone(chat_model):
    compared = open_session(chat_model, compare=True, sampling=Sampling(21))
    assert isinstance(compared, CompareSession)
    for text in ("hello", "and now"):
        got = ["", ""]
        order = []
        for side, piece in compared.send(text):
            got[side] += piece
            order.append(side)
        assert order.index(1) < len(order) - 1 - order[::-1].index(0)  # interleaved
        for side, session in enumerate(compared.sides):
            assert session.messages[-1]["content"] == got[side]
            assert not session.last_turn.reread
    for side in split_chat_model(chat_model):
        alone = ChatSession(side, sampling=Sampling(21))
        texts = [say(alone, "hello"), say(alone, "and now")]
        twin = compared.sides[1] if side.name == "base" else compared.sides[0]
        assert [m["content"] for m in twin.messages if m["role"] == "assistant"] == texts
    assert compared.undo() == "and now"
    assert [len(side.messages) for side in compared.sides] == [3, 3]
    list(compared.retry())
    compared.reset()
    assert [side.messages for side in compared.sides] == [[], []]


def test_interrupting_a_comparison_keeps_the_sides_in_step(chat_model):
    compared = open_session(chat_model, compare=True, sampling=SHORT)
    answer = compared.send("hello")
    assert next(answer)[0] == 0
    answer.close()  # the second side has not begun
    assert [side.messages for side in compared.sides] == [[], []]
    assert [len(side.messages) for side in compared.sides] == [0, 0]
    list(compared.send("hello"))
    assert [len(side.messages) for side in compared.sides] == [3, 3]


class Fed:
    """Counts the tokens that the model is given."""

    def __init__(self, chat_model: Any, monkeypatch: pytest.MonkeyPatch):
        self.tokens = 0
        original = chat_model.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.tokens += kwargs["input_ids"].shape[1]
            return original(*args, **kwargs)

        monkeypatch.setattr(chat_model.model, "forward", forward)

    def by(self, act: Callable[[], Any]) -> int:
        """Tokens that something fed."""
        before = self.tokens
        act()
        return self.tokens - before


def test_a_turn_costs_the_same_after_thirty_turns(chat_model, monkeypatch):
    session, fed = ChatSession(chat_model, sampling=SHORT), Fed(chat_model, monkeypatch)
    encoded: list[int] = []
    encode = unread.encode_batch

    def counted(tokenizer: Any, texts: list[str]) -> Any:
        encoded[-1] += sum(map(len, texts))
        return encode(tokenizer, texts)

    monkeypatch.setattr(unread, "encode_batch", counted)
    costs = []
    for turn in range(30):
        encoded.append(0)
        costs.append(fed.by(lambda turn=turn: say(session, f"hello again {turn:02}")))
        assert costs[-1] == session.last_turn.read + session.last_turn.tokens
    assert max(costs[1:]) <= costs[1] + 1  # a number is one token or two
    assert max(encoded[1:]) <= max(encoded[1:4]) + 30  # nor is more tokenized: answers differ in length
    new, kept = session.last_turn.read, len(state_of(session).read)
    assert kept > 20 * new
    assert fed.by(lambda: "".join(session.retry())) <= costs[-1] + 1
    session.undo()
    assert fed.by(lambda: say(session, "hello again 99")) <= costs[-1] + 1
    assert not session.last_turn.reread


def test_after_another_system_message_the_conversation_is_read_once(chat_model, monkeypatch):
    session, fed = ChatSession(chat_model, sampling=SHORT), Fed(chat_model, monkeypatch)
    for turn in range(5):
        say(session, f"hello {turn}")
    session.system = "be long"
    assert fed.by(lambda: say(session, "one more")) == len(state_of(session).read)
    assert session.last_turn.reread
    new = fed.by(lambda: say(session, "one more"))
    assert not session.last_turn.reread
    assert new < 40
    for act in (lambda: "".join(session.retry()), session.undo, lambda: "".join(session.retry())):
        assert fed.by(act) <= new + 2  # it is not read again to take the first answer under it back, either
        assert not session.last_turn.reread
    rendered, _ = render(chat_model.tokenizer, session.messages[:-1], add_generation_prompt=True)
    assert state_of(session).read[: len(rendered)] == rendered


def test_a_system_message_is_read_once(chat_model, monkeypatch):
    system = "be brief and " * 100
    session, fed = ChatSession(chat_model, sampling=SHORT, system=system), Fed(chat_model, monkeypatch)
    first = fed.by(lambda: say(session, "hello"))
    answer = session.messages[-1]
    session.reset()
    assert fed.by(lambda: say(session, "hello")) < 40 < first
    assert session.messages[-1] == answer
    session.undo()
    assert fed.by(lambda: say(session, "hello")) < 40
    for turn in range(UNDO_DEPTH + 2):
        say(session, f"turn {turn}")
    while session.messages:
        session.undo()
    assert fed.by(lambda: say(session, "hello")) < 40  # further back than states of turns are kept
    assert session.messages[-1] == answer
    session.system = ""
    session.reset()
    say(session, "hello")
    session.system = system
    assert fed.by(lambda: say(session, "hello")) > 100
    session.reset()  # read once where it was set in the middle of a conversation, too
    assert fed.by(lambda: say(session, "hello")) < 40
    assert session.messages[-1] == answer


def test_a_conversation_that_the_template_refuses_leaves_no_trace(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=SHORT)
    say(session, "hello")
    before = session.messages
    template = chat_model.tokenizer.chat_template
    monkeypatch.setattr(chat_model.tokenizer, "chat_template", "{{ raise_exception('no more') }}")
    with pytest.raises(DataError, match="no more"):
        say(session, "again")
    monkeypatch.setattr(chat_model.tokenizer, "chat_template", template)
    assert session.messages == before
    say(session, "again")
    assert not session.last_turn.reread


def test_interrupting_the_reading_of_a_system_message(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(chat_model.model, "forward", lambda **inputs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            say(session, "hello")
    assert session.messages == []
    say(session, "hello")
    fresh = ChatSession(chat_model, sampling=SHORT)
    assert say(fresh, "hello") == session.messages[-1]["content"]


def test_loading_goes_on_where_saving_was(chat_model, tmp_path):
    file = tmp_path / "chats.jsonl"
    session = ChatSession(chat_model, sampling=SHORT, system="be odd")
    say(session, "hello")
    session.save(file)
    answer = say(session, "again")
    other = ChatSession(chat_model, sampling=SHORT)
    say(other, "something else")
    other.load(file)
    assert other.system == "be odd"
    assert say(other, "again") == answer
    assert other.last_turn.reread
    assert other.messages == session.messages


def test_one_answer_after_the_other(chat_model):
    compared = open_session(chat_model, compare=True, sampling=SHORT)
    texts = ["".join(answer) for _, answer in compared.in_turn("hello")]
    assert [side.messages[-1]["content"] for side in compared.sides] == texts
    assert [side.chat_model.name for side in compared.sides] == ["tuned", "base"]
    asked = []
    for number, answer in compared.in_turn("again"):
        asked.append(number)
        answer.close()  # before the first token
    assert asked == [0]
    assert [len(side.messages) for side in compared.sides] == [3, 3]


def test_a_stop_string_ends_the_answer_and_the_next_turn_reads_only_this_one(chat_model: Any) -> None:
    free = say(ChatSession(chat_model, sampling=Sampling(30)), "hello")
    stop = free[10:14]
    sampling = Sampling(30, stop_strings=stop)
    session = ChatSession(chat_model, sampling=sampling)
    assert say(session, "hello") == free[: free.index(stop)]
    assert session.last_turn is not None
    assert session.last_turn.finish_reason == "stop"
    assert session.messages[-1]["content"] == free[: free.index(stop)]
    second = say(session, "again")
    assert session.last_turn is not None
    assert not session.last_turn.reread
    asked = session.messages[:-1]
    assert generate(chat_model, asked, sampling=sampling)[0].text == second  # as if it had stopped by itself
