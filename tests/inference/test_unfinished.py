"""What was answered before something ended the work is kept, and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import UsageError
from mamba_sft.inference.answer import Answer
from mamba_sft.inference.answer_file import AnswerFile
from mamba_sft.inference.answering import generate
from mamba_sft.inference.chat_model import ChatModel
from mamba_sft.inference.model_places import find_place
from mamba_sft.inference.prompt_rows import PromptRow, read_prompts
from mamba_sft.inference.request import Running
from mamba_sft.inference.unfinished import asked_of, identity_of
from mamba_sft.run import Run
from tests.inference.conftest import SHORT, make_run

SAMPLED = replace(SHORT, temperature=1.0, seed=5)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Texts of different lengths, so that they are not answered in their order; one is there twice."""
    path = tmp_path / "in.jsonl"
    texts = ["the quick brown fox jumps", "a", "hello world 12", "a", "what number is 7 and 21", "b c"]
    rows = [{"prompt": text, "id": number} for number, text in enumerate(texts)]
    del rows[1]["id"], rows[3]["id"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stopped(chat_model: ChatModel, prompts: Path, output: Path, after: int) -> None:
    """Answers until so many answers are there."""
    given = 0

    def stop(number: int, answer: Answer) -> None:
        nonlocal given
        given += 1
        if given == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(chat_model, prompts, output=output, sampling=SAMPLED, batch_size=2, on_answer=stop)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_going_on_gives_the_file_that_would_have_been(
    chat_model: ChatModel, prompts: Path, tmp_path: Path, after: int
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = generate(chat_model, prompts, output=whole, sampling=SAMPLED)
    stopped(chat_model, prompts, output, after)
    seen: list[int] = []
    found = generate(
        chat_model, prompts, output=AnswerFile(output, resume=True), sampling=SAMPLED, batch_size=5,
        on_answer=lambda number, answer: seen.append(number),
    )  # fmt: skip
    assert found == expected
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(seen) == list(range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_what_is_there_is_not_answered_again(
    chat_model: ChatModel, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(chat_model, prompts, tmp_path / "out.jsonl", 4)
    asked: list[Any] = []
    from mamba_sft.inference import answering

    real = answering.answers
    monkeypatch.setattr(
        answering, "answers", lambda *args, only, **more: asked.extend(only) or real(*args, only=only, **more)
    )
    generate(chat_model, prompts, output=AnswerFile(tmp_path / "out.jsonl", resume=True), sampling=SAMPLED)
    assert len(asked) == 2


def test_half_a_row_and_a_row_without_a_number_are_answered_again(
    chat_model: ChatModel, prompts: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate(chat_model, prompts, output=whole, sampling=SAMPLED)
    stopped(chat_model, prompts, output, 4)
    unfinished = tmp_path / "out.unfinished.jsonl"
    record = tmp_path / "out.unfinished.jsonl.record"
    record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:-1]))
    unfinished.write_bytes(unfinished.read_bytes() + b'{"prompt": "half')
    generate(chat_model, prompts, output=AnswerFile(output, resume=True), sampling=SAMPLED)
    assert output.read_bytes() == whole.read_bytes()


def test_a_second_interruption_is_gone_on_with_too(
    chat_model: ChatModel, prompts: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate(chat_model, prompts, output=whole, sampling=SAMPLED)
    stopped(chat_model, prompts, output, 2)

    def stop(number: int, answer: Answer) -> None:
        if (tmp_path / "out.unfinished.jsonl").read_bytes().count(b"\n") == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(
            chat_model, prompts, output=AnswerFile(output, resume=True), sampling=SAMPLED, batch_size=1,
            on_answer=stop,
        )  # fmt: skip
    generate(chat_model, prompts, output=AnswerFile(output, resume=True), sampling=SAMPLED)
    assert output.read_bytes() == whole.read_bytes()


def change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_another_question_is_refused_with_what_differs(
    chat_model: ChatModel, prompts: Path, tmp_path: Path, base: Path
) -> None:
    output = tmp_path / "out.jsonl"
    stopped(chat_model, prompts, output, 6 - 1)
    unfinished = tmp_path / "out.unfinished.jsonl"
    before = unfinished.read_bytes()

    def refused(match: str, **how: Any) -> None:
        ask = {"sampling": SAMPLED} | how
        with pytest.raises(UsageError, match=match) as caught:
            generate(chat_model, prompts, output=AnswerFile(output, resume=True), **ask)
        assert "leave `--resume` out" in str(caught.value.hint)
        assert unfinished.read_bytes() == before

    refused(r"begun with `temperature` 1.0 \(now 0.3\)", sampling=replace(SAMPLED, temperature=0.3))
    refused(r"`stop_strings` \[\] \(now \['x'\]\)", sampling=replace(SAMPLED, stop_strings="x"))
    refused(r"`system` None \(now be kind\)", system="be kind")
    change(prompts, "hello world 12", "hello world 13")
    refused(r"in.jsonl:3 is not the prompt")
    change(prompts, "hello world 13", "hello world 12")
    change(prompts, '"id": 2', '"id": 22')
    refused(r"in.jsonl:3 is not the prompt")
    change(prompts, '"id": 22', '"id": 2')
    whole = prompts.read_text()
    prompts.write_text(whole.splitlines(keepends=True)[0])
    refused(r"answers prompt \d, and there are 1")
    prompts.write_text(whole + '{"prompt": "one more"}\n')
    found = generate(chat_model, prompts, output=AnswerFile(output, resume=True), sampling=SAMPLED)
    assert len(found) == 7  # prompts behind the old ones change no answer


def test_a_model_that_was_trained_again_is_another(tmp_path: Path, base: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = make_run(tmp_path / "run", base)
    place = find_place(run)
    first = identity_of(place, Running())
    assert identity_of(find_place(run), Running()) == first
    assert identity_of(place, Running(dtype="bfloat16"))["dtype"] == "bfloat16"
    (file,) = run.adapter.glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file)
    trained_again = identity_of(place, Running())
    assert trained_again["fingerprint"] != first["fingerprint"]
    template = run.adapter / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert identity_of(place, Running())["fingerprint"] != trained_again["fingerprint"]


def test_where_nothing_is_unfinished(chat_model: ChatModel, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    found = generate(chat_model, prompts, output=AnswerFile(output, resume=True), sampling=SHORT)
    assert len(found) == 6
    with pytest.raises(UsageError, match="nothing of it is unfinished"):
        generate(chat_model, prompts, output=AnswerFile(output, resume=True), sampling=SHORT)


@pytest.mark.parametrize("text", [b"", b"nonsense\n1\n", b'{"model": "x"}\nnonsense\n', b"[1]\n0\n"])
def test_a_damaged_record_is_one_message(run: Run, tmp_path: Path, text: bytes) -> None:
    rows = [PromptRow("here", "hello")]
    (tmp_path / "out.unfinished.jsonl").write_bytes(b'{"prompt": "hello", "answer": "x"}\n')
    (tmp_path / "out.unfinished.jsonl.record").write_bytes(text)
    asked = asked_of({"model": "x"}, SHORT, None, raw=False)
    with pytest.raises(UsageError, match="unfinished"):
        AnswerFile(tmp_path / "out.jsonl", resume=True).start(rows, asked)


def test_fields_of_a_line_go_with_its_answer(chat_model: ChatModel, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "hello", "id": "x1", "expected": [1, {"a": None}], "answer": "m", "tokens": 3},
        {"prompt": "hello", "system": "quite another"},
        {"prompt": "hello"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = generate(chat_model, source, output=output, sampling=SHORT)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows[0] == {
        "prompt": "hello", "id": "x1", "expected": [1, {"a": None}], "input_answer": "m", "input_tokens": 3,
        "answer": found[0].text, "finish_reason": "length", "tokens": 12,
    }  # fmt: skip
    assert list(rows[0])[:2] == ["prompt", "id"]
    assert found[1].text == generate(chat_model, "hello", system="quite another", sampling=SHORT)[0].text
    assert found[1].text != found[2].text
    source.write_text('{"prompt": "hello", "system": 7}\n')
    with pytest.raises(Exception, match=r"in.jsonl:1: `system` is not a string"):
        read_prompts(source)
