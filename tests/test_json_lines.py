from __future__ import annotations

import gzip
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_sft.errors import DataError, ModelError
from mamba_sft.evaluation.prompts import load_prompts
from mamba_sft.inference.answering import generate
from mamba_sft.json_lines import read_json_lines


def rows(tmp_path: Path, content: bytes) -> list[tuple[str, object, str | None]]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return [(row.where.removeprefix(f"{tmp_path}/"), row.value, row.problem) for row in read_json_lines(path)]


def test_a_mark_blank_lines_and_line_separators(tmp_path: Path) -> None:
    content = '\ufeff{"a": 1}\r\n\n  \n{"a": "one\u2028line\u0085"}\n[2]'.encode()
    assert rows(tmp_path, content) == [
        ("rows.jsonl:1", {"a": 1}, None),
        ("rows.jsonl:4", {"a": "one\u2028line\u0085"}, None),
        ("rows.jsonl:5", [2], None),
    ]


def test_what_is_wrong_has_its_line_and_column(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    found = rows(tmp_path, b'{"a": }\n{"a": "\xff"}\n' + deep + b"\n" + b"9" * 5000 + b"\n")
    problems = [problem for _, _, problem in found]
    assert problems[0] == "not JSON: Expecting value, column 7"
    assert problems[1] == "not UTF-8: byte 0xff at 8"
    assert all(str(problem).startswith("not readable as JSON") for problem in problems[2:])


def test_prompts_and_questions_are_read_by_the_same_reader(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\n'.encode())
    assert [prompt.prompt for prompt in load_prompts(path)] == ["a\u2028b"]
    path.write_bytes(b'{"prompt": "fine"}\n{"prompt": }\n')
    for read in (load_prompts, lambda path: generate(tmp_path / "no-model", path)):
        with pytest.raises(DataError, match=r"prompts.jsonl:2: not JSON: Expecting value, column 12"):
            read(path)


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhat is\u2028a haiku?\r\n\n  Name [one].\n".encode())
    assert [prompt.prompt for prompt in load_prompts(path)] == ["What is\u2028a haiku?", "  Name [one]."]
    with pytest.raises(ModelError, match="no model directory"):  # the prompts are read by then
        generate(tmp_path / "no-model", path)
    path.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"prompts\.txt:2: not UTF-8: byte 0xe9 at 4"):
        load_prompts(path)


@pytest.mark.parametrize("content", [b'[{"prompt": "a"}]', b'[\n  {\n "prompt": "a"\n}\n]\n'])
def test_an_array_of_prompts_comes_with_the_command(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'it\'s a "list".json'
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    python, *line = shlex.split(str(caught.value.hint))
    assert python == "python"
    subprocess.run([sys.executable, *line], check=True, cwd=tmp_path)
    assert [prompt.prompt for prompt in load_prompts(path.with_suffix(".jsonl"))] == ["a"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my v1.5 prompts.txt", b'{"prompt": "hello"}\n'),
        ("prompts.txt.gz", gzip.compress(b'{"prompt": "hello"}\n')),
        ("prompts.jsonl.gz", gzip.compress(b"hello\n")),
        ("it's prompts.jsonl", b"hello\n"),
    ],
)
def test_a_wrong_ending_comes_with_the_command(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    subprocess.run(str(caught.value.hint), shell=True, check=True)
    (renamed,) = tmp_path.iterdir()
    assert [prompt.prompt for prompt in load_prompts(renamed)] == ["hello"]
    assert renamed.name.startswith(name.partition(".txt")[0].partition(".jsonl")[0])


def test_a_packed_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000))
    assert len(load_prompts(path)) == 1000
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read the sample prompts .*prompts\.jsonl\.gz"):
        load_prompts(path)
