from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.data.sources import check_source, identity, is_hub_dataset, read_source
from mamba_sft.errors import DataError
from mamba_sft.json_lines import Row
from mamba_sft.recipe.fields import SourceSection
from mamba_sft.recipe.recipe import Recipe


def read(path: Path | str, **fields: Any) -> list[Row]:
    return list(read_source(SourceSection(path=str(path), **fields)))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_lines_know_their_line_and_skip_empty_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\r\n\n   \n{"text": "two\\u2028"}')
    rows = read(path)
    assert [(row.where, row.value) for row in rows] == [
        (f"{path}:1", {"text": "one"}),
        (f"{path}:4", {"text": "two\u2028"}),
    ]


def test_a_byte_order_mark_is_not_content(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": 1}'), ("b.json", '[{"text": 1}]'), ("c.csv", "text\n1")):
        path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
        assert [str(row.value["text"]) for row in read(path)] == ["1"]


def test_unreadable_lines_are_rows_with_a_problem(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", b'{"text": "ok"}\n{"text": oops}\n{"text": "\xff"}\n[1]\n"x"\n{"text": "ok"}'
    )
    problems = {row.where.rsplit(":")[-1]: row.problem for row in read(path)}
    assert [problems["1"], problems["6"]] == [None, None]
    assert problems["2"] == "not JSON: Expecting value, column 10"
    assert problems["3"] == "not UTF-8: byte 0xff at 11"
    assert problems["4"] == "not an object but a list"
    assert problems["5"] == "not an object but a text"


def test_a_line_cut_short_is_said_to_end_where_it_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "ok"}\n{"text": ["a"\r\n{"text": "ok"}\n')
    problems = [row.problem for row in read(path)]
    assert problems == [None, "not JSON: Expecting ',' delimiter, column 14", None]


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000], ids=["nested too deep", "too many digits"])
def test_json_that_python_refuses_is_a_bad_row_too(tmp_path: Path, value: str) -> None:
    rows = read(write(tmp_path / "a.jsonl", f'{{"text": {value}}}\n{{"text": "fine"}}'))
    assert "JSON" in str(rows[0].problem)
    assert rows[1].problem is None
    with pytest.raises(DataError, match=r"b\.json:1: not (readable as )?JSON"):
        read(write(tmp_path / "b.json", f'[{{"text": {value}}}]'))


def test_a_json_array_gives_each_row_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n[\n{"text": "a"},\n\n  {"text":\n "b"}, {"text": "c"}\n]\n')
    assert [(row.where, row.value["text"]) for row in read(path)] == [
        (f"{path}:3", "a"),
        (f"{path}:5", "b"),
        (f"{path}:6", "c"),
    ]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n')
    assert [row.value["text"] for row in read(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"text": 1},\n{"text" 2}]', ":3: not JSON: Expecting ':' delimiter"),
        (b'[\n{"text": 1}', ":2: not JSON"),
        (b'[\n{"text": "\xff"}]', ":2: not UTF-8: byte 0xff"),
        (b"[]", "holds no rows"),
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        ('{"text": 1}'.encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_damaged_json_file_is_an_error_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(write(tmp_path / "a.json", content))
    assert message in error.value.message
    assert "a.json" in error.value.message


def test_csv_counts_lines_across_quoted_newlines(tmp_path: Path) -> None:
    long = "x" * 200_000  # longer than the csv module's own limit
    path = write(tmp_path / "a.csv", f'prompt,completion\n"two\nlines",b\nc,{long}\nonly one\n"\xff",d\n')
    rows = read(path)
    assert [row.where.rsplit(":")[-1] for row in rows] == ["2", "4", "5", "6"]
    assert rows[0].value == {"prompt": "two\nlines", "completion": "b"}
    assert rows[1].value["completion"] == long
    assert rows[2].problem == "1 fields where the header has 2"
    assert rows[3].problem is None


def test_csv_rows_that_are_not_utf8_are_bad_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text\nfine\nb\xe4d\nfine\n")
    first, second, third = (row.problem for row in read(path))
    assert (first, third) == (None, None)
    assert str(second).startswith("not UTF-8; if it is latin-1")


def test_a_csv_header_must_name_its_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1: the header names a column twice"):
        read(write(tmp_path / "a.csv", "text,text\n1,2\n"))


def test_parquet_rows_are_numbered_and_have_no_filled_in_nulls(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}], "tools": None},
        {"messages": [{"role": "user", "content": "b", "name": "n"}], "tools": "[]"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found[0].where == f"{tmp_path / 'a.parquet'}: row 1"
    assert found[0].value == {"messages": [{"role": "user", "content": "a"}]}
    assert found[1].value == rows[1]


def test_unreadable_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable parquet file"):
        read(write(tmp_path / "a.parquet", "PAR1 nothing"))


def test_globs_are_sorted_and_the_limit_spans_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", "".join(f'{{"text": "{name}{i}"}}\n' for i in range(2)))
    monkeypatch.chdir(tmp_path)
    assert [row.value["text"] for row in read("*.jsonl", limit=3)] == ["a0", "a1", "b0"]
    assert [row.file for row in read("[ab].jsonl")] == ["a.jsonl", "a.jsonl", "b.jsonl", "b.jsonl"]


def test_what_a_file_cannot_honour_is_told_with_an_override_that_a_shell_takes(tmp_path: Path) -> None:
    path = write(tmp_path / "it's mine.jsonl", '{"text": "a"}\n')
    with pytest.raises(DataError, match="means nothing") as caught:
        read(path, split="test")
    (change,) = shlex.split((caught.value.hint or "").partition("write `")[2].rstrip("`"))
    base = "model: {base: b}\noutput_dir: o\ndata: {sources: [{path: x/y}]}\n"
    assert Recipe.from_text(base, overrides=[change]).data.sources[0].path == str(path)


def test_a_name_that_is_not_utf8_is_told_and_its_hint_renames_it(tmp_path: Path) -> None:
    strange = os.fsdecode(os.fsencode(tmp_path / "it's ") + b"\xff.jsonl")
    Path(strange).write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"`.*it's \\udcff\.jsonl` is not UTF-8") as caught:
        read(tmp_path / "*.jsonl")
    command = (caught.value.hint or "").partition("`")[2].rstrip("`")
    subprocess.run(["bash", "-c", command], check=True)
    assert [row.where for row in read(tmp_path / "*.jsonl")] == [f"{tmp_path / 'renamed.jsonl'}:1"]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a[1].jsonl", '{"text": "x"}'))) == 1


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("*.jsonl.no", "no file matches", "globs start from the working directory"),
        ("chat.jsonl", "no file `chat.jsonl`", "did you mean `chats.jsonl`?"),
        ("wholly-else.jsonl", "no file", "has chats.jsonl"),
        ("nowhere/a.jsonl", "there is no directory `nowhere`", None),
        ("notes.docx", "cannot read `notes.docx`", "data files end in .jsonl"),
    ],
)
def test_missing_files_get_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str, hint: str | None
) -> None:
    write(tmp_path / "chats.jsonl", '{"text": "x"}')
    write(tmp_path / "notes.docx", "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read(path)
    assert message in error.value.message
    assert (hint is None and error.value.hint is None) or str(hint) in str(error.value.hint)


def test_a_local_dataset_directory_goes_through_the_hub_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for split, count in (("train", 3), ("test", 2)):
        lines = [json.dumps({"messages": chat, "n": i if i else None}) + "\n" for i in range(count)]
        write(folder / f"{split}-00000.jsonl", "".join(lines))
    rows = read(tmp_path / "set", split="test")
    assert [row.where for row in rows] == [f"{tmp_path / 'set'} (test): row {i}" for i in (1, 2)]
    assert [row.value for row in rows] == [{"messages": chat}, {"messages": chat, "n": 1}]
    with pytest.raises(DataError, match="cannot load the dataset"):
        read(tmp_path / "set", split="dev")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gsm8k", True), ("owner/set", True), ("owner/set.v2", True), ("data/*.jsonl", False),
        ("chats.csv", False), ("owner/chats.JSONL", False), ("./set", False), ("~/set", False),
        ("a/b/c", False), ("here", False),
    ],
)  # fmt: skip
def test_a_dataset_on_the_hub_is_told_from_what_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_dataset(path) is expected


def test_hub_settings_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
        asked.update(path=path, name=name, split=split)
        rows = datasets.Dataset.from_list([{"text": str(i)} for i in range(2500)])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for stream in (False, True):
        rows = read("someone/chats", name="en", split="train_sft", limit=2001, stream=stream)
        assert asked == {"path": "someone/chats", "name": "en", "split": "train_sft"}
        assert len(rows) == 2001
        assert rows[-1] == Row("someone/chats", "someone/chats (train_sft): row 2001", {"text": "2000"})


def test_a_hub_failure_names_the_dataset_and_the_ways_out() -> None:
    with pytest.raises(DataError) as error:
        read("nobody-at-all/nothing-here")
    assert "nobody-at-all/nothing-here" in error.value.message
    assert "hub id, a file or a glob" in str(error.value.hint)


@pytest.mark.parametrize("written", ["chats.jsonlx", "data/chat.jsn", "squad", "data/chats.jso"])
def test_a_misspelt_file_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """It could be a data set of the hub, which would be asked in vain for half a minute."""
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, tmp_path / "data"):
        place.mkdir(exist_ok=True)
        (place / "chats.jsonl").write_text("{}\n")
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    source = SourceSection(path=written)
    for ask in (check_source, identity, lambda source: list(read_source(source))):
        with pytest.raises(DataError, match=f"no file `.*{written}`") as caught:
            ask(source)
        assert "chats.jsonl" in (caught.value.hint or "")
        assert "a data set of the hub is `owner/name`" in (caught.value.hint or "")
