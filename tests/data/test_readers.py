"""Every kind of file that people have is read, or refused with what mends it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.data.sources import identity, read_source
from mamba_sft.errors import DataError
from mamba_sft.json_lines import Row
from mamba_sft.recipe.fields import SourceSection

ROWS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Path | str, **fields: Any) -> list[Row]:
    return list(read_source(SourceSection(path=str(path), **fields)))


def values(path: Path | str, **fields: Any) -> list[Any]:
    rows = read(path, **fields)
    assert not [row.problem for row in rows if row.problem]
    return [row.value for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(PACK.get(path.suffix.lower(), bytes)(data))
    return path


def zstd(data: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", LINES),
        ("A.JSONL.GZ", LINES),
        ("b.jsonl.gz", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl.bz2", LINES),
        ("a.jsonl.xz", LINES),
        ("a.jsonl.zst", LINES),
        ("a.json.zst", json.dumps(ROWS)),
        ("a.csv.xz", "text\none\ntwo\nthree\n"),
        ("a.ndjson", LINES),
        ("a.ndjson.gz", LINES),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        ("wrapped-pretty.json", json.dumps({"train": ROWS, "license": "x"}, indent=4)),
        ("several.json", "".join(json.dumps([row]) + "\n" for row in ROWS)),
        ("several-close.json", json.dumps(ROWS[:2]) + json.dumps(ROWS[2:])),
        ("objects.json", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),
        ("objects.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),
        ("objects-with-commas.json", ",\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("comma-at-the-end.json", "[" + "".join(json.dumps(row) + ",\n" for row in ROWS) + "]"),
        ("a.csv.gz", "text\none\ntwo\nthree\n"),
        ("a.tsv", "text\none\ntwo\nthree\n"),
        ("a.txt", "one\n\n\ntwo\r\n \nthree"),
        ("a.txt.gz", "\n\none\n\ntwo\n\nthree\n\n"),
    ],
)
def test_the_same_rows_out_of_every_kind(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = write(tmp_path / name, content)
    assert values(path) == ROWS
    assert identity(SourceSection(path=str(path))).keys() == {str(path)}


def test_a_tsv_has_columns_between_tabs_and_quotes_like_a_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'prompt\tresponse\n"a ""b""\tc"\td, e\n')
    assert values(path) == [{"prompt": 'a "b"\tc', "response": "d, e"}]


def test_one_object_over_many_lines_is_one_row(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert values(write(tmp_path / "a.json", json.dumps(chat, indent=2))) == [chat]
    assert values(write(tmp_path / "b.json", json.dumps(chat))) == [chat]  # its turns are no rows
    row = {"prompt": "q", "response": "a", "tools": [{"name": "look"}]}
    assert values(write(tmp_path / "c.json", json.dumps(row))) == [row]  # nor are its tools


def test_what_a_wrapper_says_of_its_rows_is_not_dropped(tmp_path: Path) -> None:
    """A system text beside the list means something: it is no mere wrapping, and no format has it."""
    whole = {"system": "be brief", "data": ROWS}
    assert values(write(tmp_path / "a.json", json.dumps(whole))) == [whole]


def test_paragraphs_know_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "first\nline\n\nsecond\n")
    assert [(row.where, row.value["text"]) for row in read(path)] == [
        (f"{path}:1", "first\nline"),
        (f"{path}:4", "second"),
    ]


def test_what_stands_behind_an_array_is_not_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(ROWS) + '\n{"text": "lost"}')
    with pytest.raises(DataError, match=r"a\.json:2: something stands behind the array: '\{.text.: .lost"):
        read(path)


def test_a_broken_first_line_is_one_bad_row_not_a_broken_file(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.jsonl", '{"text": oops}\n' + LINES))
    assert [bool(row.problem) for row in rows] == [True, False, False, False]


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.csv", "prompt;response\na;b\n", "separated by semicolons", 'sep=";"'),
        ("a.csv", "prompt\tresponse\na\tb\n", "separated by tabs", 'to_json("a.jsonl"'),
        ("a.json", '{"text": {"0": "one", "1": "two"}}', "holds columns, not rows", "orient='records'"),
        ("a.json", '[{"text": "caf\xe9"}]'.encode("latin-1"), "not UTF-8", "iconv -f LATIN1 -t UTF-8"),
        ("a.jsonl.gz", None, "cannot read", None),
        ("a.jsonl.bz2", None, "cannot read", None),
        ("a.jsonl.xz", None, "cannot read", None),
        ("a.jsonl.zst", None, "cannot read", None),
        ("a.zip", "x", "cannot read", "unzip"),
        ("a.csv", "prompt|response\na|b\n", "separated by bars", 'sep="|"'),
        ("a.json", '{"0": {"text": "one"}, "1": {"text": "two"}}', "orient='index'", 'orient="index")'),
        ("a.json", '{"columns": ["text"], "data": [["one"]]}', "orient='split'", 'orient="split")'),
        ("a.json", json.dumps({"train": ROWS, "dev": ROWS}), "several lists of rows: `train`", '["train"]'),
        ("a.json", '{"a": 1,\n "b": [1,\n 2}\n', r"a\.json:3: not JSON: `,` is missing before '}", None),
        ("a.jsonl", LINES.encode("utf-16"), "is UTF-16", "iconv -f UTF-16 -t"),
        ("a.jsonl", LINES.encode("utf-16-le"), "is UTF-16", "iconv -f UTF-16LE -t"),
        ("a.csv", "text\none\n".encode("utf-16-be"), "is UTF-16", "iconv -f UTF-16BE -t"),
        ("a.docx", "x", "cannot read", ".jsonl, .ndjson"),
    ],
)
def test_what_is_refused_comes_with_what_mends_it(
    tmp_path: Path, name: str, content: str | bytes | None, message: str, hint: str | None
) -> None:
    path = tmp_path / name
    if content is None:
        path.write_bytes(b"this is not packed")
    else:
        write(path, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "content", "written"),
    [
        ("it's a $table.csv", "prompt\tresponse\none\ttwo\n", "it's a $table.jsonl"),
        ('two "columns".json', '{"text": {"0": "one", "1": "two"}}', 'two "columns".jsonl'),
        ("it's lists.json", json.dumps({"it's": ROWS, "dev": ROWS}), "it's lists-1.json"),
        ("in latin.json", '[{"text": "caf\xe9"}]'.encode("latin-1"), "utf8-in latin.json"),
        ("two bytes.jsonl", LINES.encode("utf-16"), "converted.jsonl"),
    ],
)
def test_a_shell_takes_the_command_whatever_a_file_is_called(
    tmp_path: Path, name: str, content: str | bytes, written: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content))
    command = str(caught.value.hint)
    command = command[command.index("iconv" if "iconv" in command else "python -c") :]
    shell = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(shell, shell=True, check=True, cwd=tmp_path)
    assert all(row.problem is None for row in read(tmp_path / written))


def test_objects_in_one_line_have_places_of_their_own(tmp_path: Path) -> None:
    places = [row.where for row in read(write(tmp_path / "a.json", '{"n": 1} {"n": 2}\n\n{"n": 3}'))]
    assert places == [f"{tmp_path}/a.json:1", f"{tmp_path}/a.json:1, entry 2", f"{tmp_path}/a.json:3"]


def test_latin_1_in_a_row_comes_with_the_command(tmp_path: Path) -> None:
    for name, content in (("a.csv", "text\ncaf\xe9\n"), ("a.txt", "caf\xe9")):
        (row,) = read(write(tmp_path / name, content.encode("latin-1")))
        assert "not UTF-8" in str(row.problem)
        assert f"iconv -f LATIN1 -t UTF-8 {tmp_path / name}" in str(row.problem)


@pytest.mark.parametrize("packed", PACK)
def test_a_packed_file_that_ends_early_is_one_clear_message(tmp_path: Path, packed: str) -> None:
    path = write(tmp_path / f"a.jsonl{packed}", LINES * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl"):
        read(path)


def test_a_text_file_by_lines_paragraphs_or_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\n\nthree\n")
    assert [(row.where[-2:], row.value["text"]) for row in read(path, sample_by="line")] == [
        (":1", "one"),
        (":2", "two"),
        (":4", "three"),
    ]
    assert values(path, sample_by="document") == [{"text": "one\ntwo\n\nthree"}]
    assert values(path) == [{"text": "one\ntwo"}, {"text": "three"}]
    with pytest.raises(DataError, match="holds no rows"):
        read(write(tmp_path / "b.txt", " \n\n"), sample_by="document")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, "`split: test` means nothing"),
        ({"name": "en", "stream": True}, "`name: en` and `stream: true` means nothing"),
        ({"sample_by": "line"}, "`sample_by: line` is for txt files"),
    ],
)
def test_a_field_that_a_file_cannot_honour_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.jsonl", LINES), **fields)


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "chats"),
    [
        ("lines.jsonl", json.dumps(TURNS) + "\n" + json.dumps(TURNS) + "\n", 2),
        ("nested.json", json.dumps([TURNS, TURNS]), 2),
        ("one.json", json.dumps(TURNS, indent=2), 1),
        ("several.json", json.dumps(TURNS, indent=2) + json.dumps(TURNS), 2),
    ],
)
def test_a_list_of_turns_without_a_name_is_a_chat(
    tmp_path: Path, name: str, content: str, chats: int
) -> None:
    assert values(write(tmp_path / name, content)) == [{"messages": TURNS}] * chats


def test_rows_that_only_look_like_turns_stay_rows(tmp_path: Path) -> None:
    rows = [{"role": "engineer", "text": "one"}, {"role": "owner", "text": "two"}]
    assert values(write(tmp_path / "a.json", json.dumps(rows))) == rows


def test_entries_of_one_line_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(ROWS))
    assert [row.where for row in read(path)] == [f"{path}:1", f"{path}:1, entry 2", f"{path}:1, entry 3"]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows.select([0]), "test": rows.select([1, 2])}).save_to_disk(
        str(tmp_path / "splits")
    )
    assert values(tmp_path / "one") == ROWS
    assert values(tmp_path / "splits") == ROWS[:1]
    assert values(tmp_path / "splits", split="test") == ROWS[1:]
    with pytest.raises(DataError, match="has no split `dev`") as caught:
        read(tmp_path / "splits", split="dev")
    assert "train, test" in str(caught.value.hint)


def test_a_parquet_row_that_python_cannot_hold_is_bad_alone(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    dates = pa.array([0, 2**60, 1], pa.int64()).cast(pa.timestamp("ms"), safe=False)
    pq.write_table(pa.table({"text": ["one", "two", "three"], "when": dates}), path)
    rows = read(path)
    assert [row.where for row in rows] == [f"{path}: row {number}" for number in (1, 2, 3)]
    assert [bool(row.problem) for row in rows] == [False, True, False]
    assert rows[2].value["text"] == "three"


def test_a_directory_of_several_kinds_says_which(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "README.md", "about")
    assert values(tmp_path) == ROWS
    write(tmp_path / "b.csv", "text\none\n")
    with pytest.raises(DataError, match=r"several kinds: 1 \.csv, 1 \.jsonl") as caught:
        read(tmp_path)
    assert f"`{tmp_path}/**/*.csv`" in str(caught.value.hint)
