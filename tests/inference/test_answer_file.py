"""Answers are on the disk as they come, and what was answered stays, whatever ends the work."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import UsageError
from mamba_sft.inference.answer import Answer
from mamba_sft.inference.answer_file import AnswerFile
from mamba_sft.inference.answering import generate
from mamba_sft.inference.chat_model import ChatModel
from mamba_sft.inference.prompt_rows import PromptRow
from tests.inference.conftest import SHORT

PROMPTS = ["one", "two", "three"]


def begun(path: Path, times: int = 1) -> AnswerFile:
    return AnswerFile(path).start([PromptRow("here", prompt) for prompt in PROMPTS * times], {})


def answer(text: str) -> Answer:
    return Answer(text, "stop", 3)


def rows(path: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_each_answer_is_there_at_once_and_the_file_at_the_end(tmp_path: Path, order: tuple[int, ...]) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    with begun(path) as file:
        for given, number in enumerate(order, start=1):
            file.add(number, answer(PROMPTS[number]))
            assert rows(path.with_name("out.unfinished.jsonl")) == [PROMPTS[n] for n in order[:given]]
            assert not path.exists()
    assert rows(path) == PROMPTS
    assert [entry.name for entry in path.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_what_was_answered_stays_when_the_work_ends_early(
    tmp_path: Path, chat_model: ChatModel, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    caplog.set_level(logging.WARNING)
    path, given = tmp_path / "out.jsonl", []
    earlier = '{"prompt": "a", "answer": "b", "finish_reason": "stop"}\n'
    path.write_text(earlier)

    def stop(number: int, one: Answer) -> None:
        given.append(one.text)
        if len(given) == 2:
            raise kind

    for name in ("out.unfinished.jsonl", "out.unfinished2.jsonl"):
        given.clear()
        with pytest.raises(kind):
            generate(chat_model, PROMPTS, output=path, sampling=SHORT, batch_size=1, on_answer=stop)
        assert rows(tmp_path / name) == given
        assert f"2 of 3 answers are in `{tmp_path / name}`" in caplog.text
    assert path.read_text() == earlier


def test_nothing_is_left_where_nothing_was_answered(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), begun(tmp_path / "out.jsonl"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


LONG = "x" * 20_000


def fill(path: Path, order: Iterable[int]) -> None:
    with begun(path, 2) as file:
        for number in order:
            file.add(number, answer(LONG))


def test_a_full_disk_keeps_what_it_took_and_names_what_is_needed(
    small_disk: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = small_disk("size=64k") / "out.jsonl"
    with pytest.raises(UsageError) as found:
        fill(path, range(6))
    unfinished = path.with_name("out.unfinished.jsonl")
    assert rows(unfinished) == [LONG] * 3
    (rest,) = tmp_path.glob("answers-*.jsonl")
    assert rows(rest) == [LONG] * 3
    assert found.value.message.startswith(f"cannot write `{path}`: its disk is full (")
    assert found.value.message.endswith("; the other 3 answers take 58.8 KiB")
    assert found.value.hint == f"they are in `{rest}`, and 3 in `{unfinished}`"
    assert caplog.text.count("takes no more answers") == 1


def test_a_disk_that_has_room_again_gets_all(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=64k")
    (disk / "film").write_bytes(b"x" * 40_000)
    with begun(disk / "out.jsonl") as file:
        file.add(0, answer(LONG))
        file.add(1, answer(LONG))
        (disk / "film").unlink()
        file.add(2, answer("short"))
    assert rows(disk / "out.jsonl") == [LONG, LONG, "short"]


def test_no_room_to_put_them_in_order(small_disk: Callable[[str], Path]) -> None:
    path = small_disk("size=64k") / "out.jsonl"
    with pytest.raises(UsageError, match=r"it takes 39\.2 KiB") as found:
        fill(path, (1, 0))
    unfinished = path.with_name("out.unfinished.jsonl")
    assert found.value.hint == f"all answers are in `{unfinished}`, in the order they came"
    assert rows(unfinished) == [LONG, LONG]
    assert sorted(os.listdir(path.parent)) == [unfinished.name, f"{unfinished.name}.record"]
