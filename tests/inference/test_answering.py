from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mamba_sft.errors import AdapterError, DataError, MambaSFTError, ModelError, UsageError
from mamba_sft.inference.answering import (
    ChatSession,
    CompareSession,
    chat_loop,
    generate,
    load_talker,
    open_session,
)
from mamba_sft.inference.chat_model import Talker, split_talker
from mamba_sft.inference.generation import State, prefill, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import UNDO_DEPTH, continuation
from mamba_sft.model.adapter import adapter_tensors, attach_adapter, save_adapter
from mamba_sft.model.chat_template import prepare_tokenizer, render
from mamba_sft.model.loading import apply_setup, load_model, load_tokenizer
from mamba_sft.recipe.fields import AdapterSection, ChatSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.terminal import _Columns
from tests.conftest import build_model, build_tokenizer

SHORT = Sampling(max_new_tokens=12)


def make_run(path: Path, base: Path, **chat: Any) -> Run:
    """A run as training leaves it, with an adapter that changes the answers."""
    run = Run(path)
    recipe = Recipe.from_text(
        json.dumps(
            {
                "output_dir": str(path),
                "model": {"base": str(base), "dtype": "float32"},
                "chat": chat,
                "data": {"sources": [{"path": "rows.jsonl"}]},
            }
        ),
        "test.yaml",
    )
    path.mkdir(parents=True)
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    model = load_model(recipe.model)
    setup = prepare_tokenizer(load_tokenizer(recipe.model), recipe.chat, {0, 11})
    apply_setup(model, setup)
    wrapped = attach_adapter(model, AdapterSection(r=4), trained_token_ids=setup.trained_token_ids)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in sorted(adapter_tensors(wrapped).items()):
        if ".lora_B." in name:
            tensor.data.normal_(0.0, 0.05, generator=generator)
    save_adapter(wrapped, run.adapter, section=recipe.model, setup=setup)
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes no special tokens: sessions then never have to read again."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[:12] = 0
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", base, system="be brief")


@pytest.fixture(scope="module")
def talker(run: Run) -> Talker:
    return load_talker(run)


def say(session: ChatSession, text: str) -> str:
    return "".join(session.send(text))


def state_of(session: ChatSession) -> State:
    return session._state


# --- sessions


def test_five_turns_read_nothing_twice_and_equal_a_full_reading(talker):
    session = ChatSession(talker, sampling=SHORT)
    fed: list[int] = []
    original = talker.model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        fed.append(kwargs["input_ids"].shape[1])
        return original(*args, **kwargs)

    talker.model.forward = count
    try:
        for turn in range(5):
            say(session, f"question number {turn}")
            state = state_of(session)
            assert sum(fed) == len(state.read) == session.last_turn.seen
            assert not session.last_turn.reread
    finally:
        del talker.model.forward
    again = State()
    prefill(talker.model, state.read, again)
    torch.testing.assert_close(state.logits, again.logits, rtol=1e-5, atol=1e-5)
    rendered, _ = render(talker.tokenizer, session.messages)
    text = talker.tokenizer.decode(rendered)
    assert text.startswith(talker.tokenizer.decode(state.read))
    next_prompt = [*session.messages, {"role": "user", "content": "more"}]
    rendered, _ = render(talker.tokenizer, next_prompt, add_generation_prompt=True)
    rest = continuation(talker.tokenizer, state.read, rendered)
    assert rest
    assert rendered[-len(rest) :] == rest
    assert talker.tokenizer.decode(state.read + rest) == talker.tokenizer.decode(rendered)


def test_each_turn_is_the_greedy_answer_to_the_whole_conversation(talker):
    session = ChatSession(talker, sampling=SHORT)
    read: list[int] = []
    for text in ("hello", "and then", "really"):
        answer = say(session, text)
        rendered, _ = render(talker.tokenizer, session.messages[:-1], add_generation_prompt=True)
        prompt = read + continuation(talker.tokenizer, read, rendered)
        tokens = list(stream(talker.model, prompt, State(), sampling=SHORT, stop_ids=talker.stop_ids))
        assert talker.tokenizer.decode(tokens, skip_special_tokens=True) == answer
        read = prompt + tokens


def test_a_template_that_rewrites_history_is_read_again_and_said(talker, monkeypatch):
    template = (
        "{% for m in messages %}{% if not loop.last or m.role == 'user' %}<|im_start|>{{ m.role }} of "
        "{{ messages | length }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n"
    )
    monkeypatch.setattr(talker.tokenizer, "chat_template", template)
    session = ChatSession(talker, sampling=SHORT)
    say(session, "hello")
    assert not session.last_turn.reread
    answer = say(session, "again")
    assert session.last_turn.reread
    rendered, _ = render(talker.tokenizer, session.messages[:-1], add_generation_prompt=True)
    assert state_of(session).read[: len(rendered)] == rendered
    fresh = list(stream(talker.model, rendered, State(), sampling=SHORT, stop_ids=talker.stop_ids))
    assert answer == talker.tokenizer.decode(fresh, skip_special_tokens=True)


def test_undo_and_retry_come_back_to_the_same_place(talker):
    session = ChatSession(talker, sampling=SHORT)
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


def test_retry_draws_anew_and_a_seed_repeats_the_session(talker):
    def talk() -> list[str]:
        session = ChatSession(talker, sampling=Sampling(12, temperature=2.0, seed=5))
        return [say(session, "hello"), "".join(session.retry()), "".join(session.retry())]

    first = talk()
    assert len(set(first)) == 3
    assert talk() == first


def test_undoing_further_than_states_are_kept_reads_again(talker):
    session = ChatSession(talker, sampling=Sampling(2))
    for turn in range(UNDO_DEPTH + 3):
        say(session, f"turn {turn}")
    assert len(session._before) == UNDO_DEPTH
    for _ in range(UNDO_DEPTH + 1):
        session.undo()
    say(session, "other")
    assert session.last_turn.reread
    assert [turn["content"] for turn in session.messages[1::2]] == ["turn 0", "turn 1", "other"]
    rendered, _ = render(talker.tokenizer, session.messages[:-1], add_generation_prompt=True)
    assert state_of(session).read[: len(rendered)] == rendered


def test_interrupting_keeps_what_was_written(talker):
    session = ChatSession(talker, sampling=SHORT)
    answer = session.send("hello")
    got = next(answer) + next(answer)
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": got}
    assert session.last_turn.finish_reason == "interrupted"
    say(session, "go on")
    assert not session.last_turn.reread


def test_interrupting_inside_the_model_loses_no_turn(talker, monkeypatch):
    session = ChatSession(talker, sampling=SHORT)
    say(session, "hello")
    before = list(state_of(session).read)
    mixer = talker.model.get_base_model().backbone.layers[1].mixer
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
    text = talker.tokenizer.decode(state_of(session).read)
    assert "later" in text
    assert "at once" not in text


def test_system_reset_and_save(talker, tmp_path):
    session = ChatSession(talker, sampling=SHORT)
    file = tmp_path / "new" / "chats.jsonl"
    with pytest.raises(UsageError, match="nothing to save"):
        session.save(file)
    say(session, "hello")
    assert session.messages[0] == {"role": "system", "content": "be brief"}  # the run's own
    session.system = "be long"
    say(session, "again")
    assert session.last_turn.reread
    assert "be long" in talker.tokenizer.decode(state_of(session).read)
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
    assert ChatSession(talker, system="other").system == "other"


def test_blank_messages_and_broken_bytes(talker):
    session = ChatSession(talker, sampling=SHORT)
    with pytest.raises(UsageError, match="empty"):
        session.send(" \n")
    say(session, b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert session.messages[-2]["content"] == "caf\ufffd"


# --- loading


def test_a_run_talks_with_its_adapter_and_splits_into_base_and_tuned(run, base, talker):
    prompt, _ = render(talker.tokenizer, [{"role": "user", "content": "hello"}], add_generation_prompt=True)

    def scores(model: Any) -> torch.Tensor:
        state = State()
        list(stream(model, prompt, state, sampling=Sampling(9), stop_ids=frozenset()))
        return state.logits

    section = Recipe.load(str(run.recipe)).model
    bare = load_model(section)
    apply_setup(bare, prepare_tokenizer(load_tokenizer(section), ChatSection(), {0, 11}))
    base_side, tuned_side = split_talker(talker)
    before, after = scores(bare), scores(tuned_side.model)
    assert (before - after).abs().max() > 0.1
    torch.testing.assert_close(scores(base_side.model), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores(tuned_side.model), after)  # the adapter is back on
    with base_side.held():
        torch.testing.assert_close(scores(base_side.model), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores(talker.model), after)
    assert talker.system == "be brief"
    assert talker.stop_ids == {11, talker.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    torch.testing.assert_close(scores(load_talker(run.adapter).model), after, rtol=1e-5, atol=1e-5)
    state = State()
    prefill(talker.model, prompt, state)
    layers = state.cache.layers
    held = sum(x.nbytes for one in layers for x in (one.conv_states[0], one.recurrent_states[0]))
    assert talker.state_bytes == base_side.state_bytes == held


def test_a_model_directory_talks_by_its_own_template(tmp_path, run, talker):
    path = tmp_path / "instruct"
    model = build_model()
    model.generation_config.eos_token_id = (
        11  # as some published conversions say: the template's stop is missing
    )
    model.save_pretrained(path)
    talker.tokenizer.save_pretrained(path)
    found = load_talker(path)
    assert found.model.dtype == torch.float32  # as saved, not the recipe's default
    assert talker.tokenizer.convert_tokens_to_ids("<|im_end|>") in found.stop_ids
    with pytest.raises(UsageError, match="no adapter"):
        open_session(found, compare=True)
    with pytest.raises(UsageError, match="not a run"):
        load_talker(path, merged=True)


def test_a_merged_run(tmp_path, base):
    run = make_run(tmp_path / "run", base)
    with pytest.raises(UsageError, match="no merged checkpoint") as caught:
        load_talker(run, merged=True)
    assert f"mamba-sft merge {run.path}" in caught.value.hint
    build_model().save_pretrained(run.merged)
    load_talker(run).tokenizer.save_pretrained(run.merged)
    assert not hasattr(load_talker(str(run.path), merged=True).model, "peft_config")


def test_loading_errors_say_what_to_do(tmp_path, base):
    with pytest.raises(ModelError, match="no model directory"):
        load_talker(tmp_path / "nowhere")
    unfinished = Run(tmp_path / "unfinished")
    made = make_run(tmp_path / "made", base)
    unfinished.path.mkdir()
    unfinished.recipe.write_bytes(made.recipe.read_bytes())
    with pytest.raises(UsageError, match="no adapter yet") as caught:
        load_talker(unfinished)
    assert "--resume" in caught.value.hint
    facts = made.adapter / "base.json"
    text = facts.read_text(encoding="utf-8")
    facts.write_text(text.replace('"fingerprint": "', '"fingerprint": "0'), encoding="utf-8")
    with pytest.raises(AdapterError, match="is not the base"):
        load_talker(made)
    facts.unlink()
    with pytest.raises(AdapterError, match="does not say which base"):
        load_talker(made)
    facts.write_text(text, encoding="utf-8")
    (made.adapter / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match="tokenizer"):
        load_talker(made)


def test_what_can_be_refused_is_refused_before_the_weights_are_read(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mamba_sft.inference.chat_model.load_model", lambda _: pytest.fail("the weights were read")
    )
    for call in (open_session, load_talker, lambda where: generate(where, "hello")):
        with pytest.raises(DataError, match="no chat template") as caught:
            call(base)
        assert "--raw" in caught.value.hint
    with pytest.raises(UsageError, match="no adapter to switch off"):
        open_session(base, compare=True)
    with pytest.raises(UsageError, match="no merged checkpoint"):
        open_session(run, merged=True)


def test_a_checkpoint_talks_before_its_run_has_finished(tmp_path, base):
    made = make_run(tmp_path / "run", base, system="be brief")
    finished = load_talker(made)
    checkpoint = made.checkpoints / "checkpoint-5"
    made.checkpoints.mkdir()
    made.adapter.rename(checkpoint)
    for name in ("base.json", "generation_config.json", "tokenizer.json"):
        (checkpoint / name).unlink()
    with pytest.raises(UsageError, match="no adapter yet") as caught:
        load_talker(made)
    assert "checkpoints" in caught.value.hint
    found = load_talker(checkpoint)
    assert (found.system, found.stop_ids) == ("be brief", finished.stop_ids)
    assert generate(found, "hello", sampling=SHORT) == generate(finished, "hello", sampling=SHORT)


# --- comparison


def test_two_sides_answer_as_they_would_alone(talker):
    compared = open_session(talker, compare=True, sampling=Sampling(21))
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
    for side in split_talker(talker):
        alone = ChatSession(side, sampling=Sampling(21))
        texts = [say(alone, "hello"), say(alone, "and now")]
        twin = compared.sides[0] if side.name == "base" else compared.sides[1]
        assert [m["content"] for m in twin.messages if m["role"] == "assistant"] == texts
    assert compared.undo() == "and now"
    assert [len(side.messages) for side in compared.sides] == [3, 3]
    list(compared.retry())
    compared.reset()
    assert [side.messages for side in compared.sides] == [[], []]


def test_interrupting_a_comparison_keeps_the_sides_in_step(talker):
    compared = open_session(talker, compare=True, sampling=SHORT)
    answer = compared.send("hello")
    assert next(answer)[0] == 0
    answer.close()  # the second side has not begun
    assert [side.messages for side in compared.sides] == [[], []]
    assert [len(side.messages) for side in compared.sides] == [0, 0]
    list(compared.send("hello"))
    assert [len(side.messages) for side in compared.sides] == [3, 3]


# --- the terminal


def lines_of(*lines: str | BaseException) -> Callable[[str], str]:
    left: Iterator[str | BaseException] = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def chat(session: Any, *lines: str | BaseException, terminal: bool = True) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=100, height=30, color_system=None, legacy_windows=False
    )
    chat_loop(session, console, lines_of(*lines))
    return out.getvalue()


def test_a_pipe_gets_answers_only(talker):
    session = ChatSession(talker, sampling=SHORT)
    out = chat(session, "hello", "", "/system short", "more", terminal=False)
    answers = [turn["content"] for turn in session.messages if turn["role"] == "assistant"]
    assert out == "".join(answer + "\n" for answer in answers)
    assert len(answers) == 2
    with pytest.raises(UsageError, match="no command `/nope`"):
        chat(session, "/nope", terminal=False)


def test_a_terminal_shows_speed_size_and_errors(talker, tmp_path):
    session = ChatSession(talker, sampling=SHORT)
    file = tmp_path / "s.jsonl"
    out = chat(
        session, "hello", "/retry", "/undo", "/undo", "/nope", "/help", "/system", "/system be odd", "/save",
        "hi", f"/save {file}", "/reset", "/quit", "never read",
    )  # fmt: skip
    assert "no context limit" in out
    assert "12 tokens" in out
    assert "tokens/s" in out
    assert "tokens seen" in out
    assert "cut off" in out
    assert "took back: hello" in out
    assert "there is nothing to take back" in out
    assert "no command `/nope`" in out
    assert "Ctrl-C ends an answer" in out
    assert "system message: be brief" in out
    assert "system message: be odd" in out
    assert "`/save` needs a file" in out
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][0]["content"] == "be odd"
    assert session.messages == []


def test_several_lines_in_quotation_marks_are_one_message(talker):
    session = ChatSession(talker, sampling=SHORT)
    chat(session, '"""', "one", "", "/two", '"""')
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["one\n\n/two"]
    chat(session, "/etc/hosts is a file")
    assert session.messages[-2]["content"] == "/etc/hosts is a file"


def test_ctrl_c_ends_the_answer_then_the_chat(talker, monkeypatch):
    session = ChatSession(talker, sampling=Sampling(50))
    original = talker.model.forward
    calls = [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(talker.model, "forward", interrupted)
    ctrl_c = KeyboardInterrupt()
    out = chat(session, "hello", "again", ctrl_c, "", ctrl_c, "then", ctrl_c, ctrl_c, "never read")
    assert "interrupted" in out
    assert "50 tokens" in out
    users = [turn["content"] for turn in session.messages if turn["role"] == "user"]
    assert users == ["hello", "again", "then"]
    assert out.count("once more leaves") == 3
    calls[0] = 0
    chat(session, "/reset", "hello", KeyboardInterrupt(), "never read")  # the second in a row
    assert len(session.messages) == 3


def test_what_a_model_writes_cannot_steer_the_terminal(talker, monkeypatch):
    session = ChatSession(talker, sampling=SHORT)
    monkeypatch.setattr(
        session, "_answer", lambda text: (piece for piece in ("\x1b[2Jred", "\a [b]x[/b]\r\n"))
    )
    out = chat(session, "hello")
    assert "\x1b[2J" not in out
    assert "\a" not in out
    assert "[2Jred [b]x[/b]\n" in out


def test_two_columns_side_by_side(talker):
    compared = open_session(talker, compare=True, sampling=SHORT)
    out = chat(compared, "hello", "/quit")
    assert any("base" in line and "tuned" in line for line in out.splitlines())
    assert out.count("12 tokens") == 2
    piped = chat(compared, "more", terminal=False)
    assert piped.startswith("base: ")
    assert "\ntuned: " in piped


def test_columns_show_the_end_of_texts_longer_than_the_screen():
    columns = _Columns(["base", "tuned"], tail=True)
    columns.texts = ["\n".join(f"left {i}" for i in range(100)), "right [bold]\x1b[2J"]
    console = Console(file=io.StringIO(), width=80, height=20, color_system=None)
    console.print(columns)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(out.splitlines()) <= 20
    assert "left 99" in out
    assert "left 50" not in out
    assert "right [bold][2J" in out
    columns.tail = False
    console.print(columns)
    assert "left 50" in console.file.getvalue()  # type: ignore[attr-defined]


# --- generate


def test_generate_answers_texts_chats_and_files_alike(talker, run, tmp_path):
    texts = ["hello", "what is 7", "the lazy dog 😀"]
    expected = [say(ChatSession(talker, sampling=SHORT), text) for text in texts]
    given = generate(talker, texts, sampling=SHORT)
    assert [one.text for one in given] == expected
    assert generate(talker, texts[0], sampling=SHORT) == given[:1]
    assert generate(talker, [{"role": "user", "content": texts[1]}], sampling=SHORT) == given[1:2]
    chats = [[{"role": "user", "content": text}] for text in texts]
    assert generate(talker, chats, sampling=SHORT, batch_size=2) == given
    source, output = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": texts[0], "id": 1}, {"prompt": texts[1]}, {"messages": chats[2]}]
    source.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    seen: list[int] = []
    assert (
        generate(run, source, output=output, sampling=SHORT, on_answer=lambda i, _: seen.append(i)) == given
    )
    assert sorted(seen) == [0, 1, 2]
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in written] == expected
    assert written[0] == {"prompt": "hello", "answer": expected[0], "finish_reason": "length", "tokens": 12}
    assert written[2]["messages"] == chats[2]
    assert list(output.parent.iterdir()) == [output]
    other = generate(talker, texts[0], sampling=SHORT, system="quite another")
    assert other[0].text != expected[0]


def test_generate_raw_continues_a_base(base):
    talker = load_talker(base, needs_template=False)
    with pytest.raises(DataError, match="no chat template"):
        generate(talker, "hello")
    (answer,) = generate(talker, "hello world", raw=True, sampling=SHORT)
    ids = talker.tokenizer("hello world")["input_ids"]
    expected = list(stream(talker.model, ids, State(), sampling=SHORT, stop_ids=talker.stop_ids))
    assert answer.text == talker.tokenizer.decode(expected)
    with pytest.raises(UsageError, match="prompt 1: `raw` continues plain text"):
        generate(talker, [[{"role": "user", "content": "x"}]], raw=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b'"text"', "a line needs either `prompt` or `messages`"),
        (b'{"text": "x"}', "a line needs either `prompt` or `messages`"),
        (b'{"prompt": "x", "messages": []}', "a line needs either `prompt` or `messages`"),
        (b'{"prompt": 3}', "`prompt` is not a string"),
        (b'{"prompt": "  "}', "the prompt is empty"),
        (b'{"messages": "x"}', "`messages` is not a list"),
        (b'{"messages": []}', "there are no messages"),
        (b'{"messages": [{"role": "user"}]}', "a message needs `role` and `content`"),
        (b'{"messages": ["x"]}', "a message needs `role` and `content`"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "the last message is the assistant's own"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        generate(tmp_path / "no-such-model", path, output=tmp_path / "out.jsonl")
    assert caught.value.message.startswith(f"{path}:3: {message}")
    assert not (tmp_path / "out.jsonl").exists()


def test_generate_refuses_early(tmp_path):
    nowhere = tmp_path / "no-such-model"
    cases: list[tuple[Any, dict[str, Any], type[MambaSFTError], str]] = [
        ("  ", {}, UsageError, "prompt 1: the prompt is empty"),
        (["x", ""], {}, UsageError, "prompt 2: the prompt is empty"),
        ([], {}, UsageError, "no prompts"),
        (tmp_path / "none.jsonl", {}, DataError, "cannot read the prompts"),
        ("x", {"output": tmp_path}, UsageError, "is a directory"),
        ("x", {}, ModelError, "no model directory"),
    ]
    for prompts, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            generate(nowhere, prompts, **options)
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompts"):
        generate(nowhere, tmp_path / "empty.jsonl")
