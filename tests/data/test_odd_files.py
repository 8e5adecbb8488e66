"""Any bytes under any name: rows, or one message; never a traceback, never for long."""

from __future__ import annotations

import io
import json
import logging
import lzma
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba_sft.data.preparing import PreparedData, prepare_data
from mamba_sft.data.readers import KINDS
from mamba_sft.data.sources import read_source
from mamba_sft.errors import DataError
from mamba_sft.json_lines import DEEPEST, is_too_deep, parse_json
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.packed_files import PACKED
from mamba_sft.recipe.fields import ChatSection, DataSection, SourceSection
from tests.data.odd_files import PACK, SAVED, odd_file, real, write_odd

ENDINGS = [SAVED, *KINDS, *(kind + packed for kind in KINDS for packed in PACKED), ".arrow", ""]


def setup_for(tokenizer: Any) -> TemplateSetup:
    return prepare_tokenizer(tokenizer, ChatSection(), {0, 11})


@pytest.fixture
def setup(tiny_tokenizer: Any) -> TemplateSetup:
    return setup_for(tiny_tokenizer)


def answer_to(name: str, content: bytes, setup: TemplateSetup, scratch: Path) -> str:
    """What becomes of a file as training data: `rows`, or the message; it must be one of both, and soon."""
    path = scratch / f"odd{name}"
    write_odd(path, content)
    started = time.monotonic()
    data = DataSection(
        sources=[SourceSection(path=str(path))], validation=0, on_bad_row="skip", packing=False
    )
    try:
        made = prepare_data(data, setup, system=None, seed=0)
        answer = "rows"
        assert isinstance(made, PreparedData)
        assert len(made.train) > 0
    except DataError as error:
        answer = error.message
        assert str(path) in answer or "no row is left" in answer
    assert time.monotonic() - started < 10
    return answer


fuzzing = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzzing
@given(number=st.integers(0, 1 << 32))
def test_real_files_with_something_done_to_them(setup: TemplateSetup, tmp_path: Path, number: int) -> None:
    answer_to(*odd_file(number), setup, tmp_path)


@fuzzing
@given(name=st.sampled_from(ENDINGS), content=st.binary(max_size=200))
def test_any_bytes(setup: TemplateSetup, tmp_path: Path, name: str, content: bytes) -> None:
    answer_to(name, content, setup, tmp_path)


PARTS = (
    *("messages", "conversations", "role", "content", "from", "value", "prompt", "completion", "input"),
    *("output", "text", "instruction", "tools", "tool_calls", "function", "name", "arguments", "system"),
    *("history", "chosen", "rejected", "weight", "train"),
)
names = st.text(max_size=4) | st.sampled_from(PARTS)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@fuzzing
@given(rows=st.lists(st.dictionaries(names, json_values, max_size=4) | json_values, max_size=4))
def test_any_json(setup: TemplateSetup, tmp_path: Path, rows: list[Any]) -> None:
    answer_to(".jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode(), setup, tmp_path)
    answer_to(".json", json.dumps(rows).encode(), setup, tmp_path)


def packed(name: str, content: bytes) -> bytes:
    return PACK[Path(name).suffix](content) if Path(name).suffix in PACK else content


def rows_of(path: Path) -> list[Any]:
    return list(read_source(SourceSection(path=str(path))))


@pytest.mark.parametrize("depth", [DEEPEST - 2, DEEPEST + 5, 900, 100_000])
def test_a_deep_cell_is_a_bad_row_or_a_text(setup: TemplateSetup, tmp_path: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    good = json.dumps({"text": "fine"})
    bad = '{"messages": ' + deep + "}"
    answers = {
        ".jsonl": f"{good}\n{bad}\n",
        ".json": f"[{good}, {bad}]",
        ".csv": f'text,messages\nfine,\n,"{deep}"\n',
    }
    for name, content in answers.items():
        answer_to(name, content.encode(), setup, tmp_path)
    (tmp_path / "deep.jsonl").write_text(answers[".jsonl"])
    problems = [row.problem for row in rows_of(tmp_path / "deep.jsonl")]
    assert problems[0] is None
    assert (problems[1] is None) == (depth < DEEPEST)


def save(directory: Path, table: Any) -> None:
    from datasets import Dataset

    Dataset(table).save_to_disk(str(directory))


def test_a_saved_data_set_with_what_python_cannot_hold(tmp_path: Path) -> None:
    far = pa.array([0, 1 << 62], pa.int64()).cast(pa.timestamp("us"))
    save(tmp_path / "far", pa.table({"text": ["a", "b"], "far": far}))
    with pytest.raises(DataError, match="cannot load the dataset"):
        rows_of(tmp_path / "far")


def test_a_damaged_saved_data_set(setup: TemplateSetup, tmp_path: Path) -> None:
    save(tmp_path / "saved", pa.table({"text": ["a", "b"]}))
    for file in sorted((tmp_path / "saved").iterdir()):
        whole = file.read_bytes()
        for content in (
            b"",
            whole[: len(whole) // 2],
            b"\0" * len(whole),
            b"[" * 100_000,
            b"[]",
            b'{"a": 1}',
        ):
            file.write_bytes(content)
            with suppress(DataError):
                rows_of(tmp_path / "saved")
        file.write_bytes(whole)
    assert len(rows_of(tmp_path / "saved")) == 2


def test_a_wrong_offset_in_a_saved_data_set_does_not_end_the_process(tmp_path: Path) -> None:
    """Arrow follows it to wherever it leads: in a process of its own, which a signal ended before."""
    text = "abcdefgh" * 8
    save(tmp_path / "saved", pa.table({"text": [text, text]}))
    (rows,) = (tmp_path / "saved").glob("*.arrow")
    offsets = struct.pack("<3i", 0, len(text), 2 * len(text))
    assert rows.read_bytes().count(offsets) == 1
    rows.write_bytes(rows.read_bytes().replace(offsets, struct.pack("<3i", 0, 1 << 30, (1 << 30) + 64)))
    code = f"from tests.data.test_odd_files import rows_of, Path; rows_of(Path({str(tmp_path / 'saved')!r}))"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "DataError: cannot load the dataset" in ended.stderr


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_wrong_offset_in_an_arrow_file_of_a_directory(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": [SIXTY_FOUR, SIXTY_FOUR]})
    path = tmp_path / "plain" / "rows.arrow"
    path.parent.mkdir()
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)
    assert len(rows_of(path.parent)) == 2 if kind == "stream" else True  # `datasets` takes streams alone
    offsets = struct.pack("<3i", 0, 64, 128)
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, struct.pack("<3i", 0, 1 << 30, (1 << 30) + 64)))
    with pytest.raises(DataError, match=r"rows\.arrow` is not a readable Arrow file"):
        rows_of(path.parent)


SIXTY_FOUR = "abcdefgh" * 8


def test_a_packed_file_that_asks_for_gigabytes(tmp_path: Path) -> None:
    """An xz header may ask for 4 GiB, which are taken before a byte is read."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1536 << 20}]
    packed = lzma.compress(b'{"text": "a"}\n', filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])
    (tmp_path / "a.jsonl.xz").write_bytes(packed)
    assert len(rows_of(tmp_path / "a.jsonl.xz")) == 1
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n', filters=filters))
    with pytest.raises(DataError, match="Memory usage limit"):
        rows_of(tmp_path / "b.jsonl.xz")


def test_how_deep_is_too_deep() -> None:
    assert not is_too_deep(parse_json("[" * DEEPEST + "]" * DEEPEST))
    for depth in (DEEPEST + 2, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json("[" * depth + "]" * depth)


def test_a_header_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,völlig\na,b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv:1: the header is not UTF-8") as found:
        rows_of(tmp_path / "a.csv")
    assert "iconv" in (found.value.hint or "")


LATIN = b"v\xf6llig"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".csv.gz", b"prompt," + LATIN + b"\na,b\n"),
        (".tsv", b"prompt\t" + LATIN + b"\na\tb\n"),
        (".jsonl.xz", b'{"prompt": "a", "' + LATIN + b'": "b"}\n'),
        (".json.bz2", b'[{"prompt": "a", "' + LATIN + b'": "b"}]'),
        (".parquet", real(".parquet", "alpaca").replace(b"output", LATIN)),
        (SAVED, real(SAVED, "alpaca").replace(b"output", LATIN)),
    ],
)
def test_a_name_of_a_column_that_is_not_utf8(
    setup: TemplateSetup, tmp_path: Path, name: str, content: bytes
) -> None:
    """Each kind of file has a library of its own for it, which raises what is its own."""
    answer = answer_to(name, packed(name, content), setup, tmp_path)
    assert "UTF-8" in answer or "'utf-8' codec can't decode byte 0xf6" in answer


DEEP_CELL = '{"text": "a", "b": ' + "[" * 900 + "]" * 900 + "}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".jsonl.zst", DEEP_CELL),
        (".ndjson", DEEP_CELL + "\r\n"),
        (".json", f"[{DEEP_CELL}]"),
        (".json.gz", DEEP_CELL.replace(",", ",\n")),
        (".json.xz", '{"version": 1, "rows": [' + DEEP_CELL + "]}"),
    ],
)
def test_deeply_nested_cells_in_every_form_of_json(
    setup: TemplateSetup, tmp_path: Path, name: str, content: str
) -> None:
    answer = answer_to(name, packed(name, content.encode()), setup, tmp_path)
    assert "nested too deeply" in answer


@pytest.mark.parametrize(("kind", "unit"), [("timestamp", "ms"), ("timestamp", "us"), ("duration", "s")])
def test_times_that_python_cannot_hold(setup: TemplateSetup, tmp_path: Path, kind: str, unit: str) -> None:
    far = pa.array([(1 << 62) - 1], pa.int64()).view(getattr(pa, kind)(unit))
    table = pa.table({"text": ["a"], "far": far})
    file = io.BytesIO()
    pq.write_table(table, file)
    assert "Python cannot hold" in answer_to(".parquet", file.getvalue(), setup, tmp_path)
    save(tmp_path / "saved", table)
    with pytest.raises(DataError, match=r"cannot load the dataset .*: \w*Error: "):
        rows_of(tmp_path / "saved")


def test_files_of_a_directory_say_why_they_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_bytes(b"text," + LATIN + b"\na,b\n")
    with pytest.raises(DataError, match="UnicodeDecodeError: 'utf-8' codec can't decode byte 0xf6"):
        rows_of(tmp_path / "rows")


def test_what_python_cannot_hold_is_told_with_its_row(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    far = pa.array([0, 1 << 62], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["a", "b"], "far": far}), tmp_path / "a.parquet")
    first, second = rows_of(tmp_path / "a.parquet")
    assert first.problem is None
    assert "Python cannot hold" in (second.problem or "")
    assert second.where.endswith("row 2")
