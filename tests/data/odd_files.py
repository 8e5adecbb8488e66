"""Data files that somebody's program wrote half, twice or wrongly: real files of each kind, changed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import shutil
from collections.abc import Callable, Mapping
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TURNS = [{"role": "user", "content": "one fox"}, {"role": "assistant", "content": "two Grüße 世界"}]
SAVED = "-saved"
"""The ending of a directory as `save_to_disk` writes it; the bytes are those of its one file of rows."""
_SAVED_ROWS = "data-00000-of-00001.arrow"
_SAVED_STATE = {
    "_data_files": [{"filename": _SAVED_ROWS}], "_fingerprint": "0", "_split": None, "_format_columns": None,
    "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
}  # fmt: skip
_LATIN = b"_latin"
"""Part of a name, in whose place stand as many bytes that are not UTF-8."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": TURNS * (1 + i % 2)} for i in range(6)],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 5,
    "alpaca": [{"instruction": f"do {i}", "input": "", "output": "done"} for i in range(6)],
    "text": [{"text": f"line {i} of a text"} for i in range(6)],
    "tools": [{"messages": TURNS, "tools": '[{"name": "f", "parameters": {}}]'} for _ in range(4)],
    "odd": [
        {"prompt": "p", "completion": "c", "when": "2020-01-01", "n": 1e300, "deep": [[[{"a": [1, None]}]]]},
        {"prompt": "p", "completion": "c", "when": None, "n": -1, "deep": []},
    ],
}


def _table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return file.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    far = pa.array([(1 << 62) + i for i in range(len(rows))], pa.int64())
    table = pa.Table.from_pylist(rows)
    if "when" in table.column_names:
        table = table.append_column("far", far.cast(pa.timestamp("us")))
        table = table.append_column("day", pa.array([date.max] * len(rows)))
        table = table.append_column("at", pa.array([datetime(2020, 1, 1)] * len(rows)))
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def _saved(rows: list[dict[str, Any]]) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


WRITE: Mapping[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    ".ndjson": lambda rows: "".join(json.dumps(row) + "\r\n" for row in rows).encode(),
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: _table(rows, ","),
    ".tsv": lambda rows: _table(rows, "\t"),
    ".txt": lambda rows: "\n\n".join(map(str, rows)).encode(),
    ".parquet": _parquet,
    ".arrow": _arrow,
    SAVED: _saved,
}
PACK: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}
ODD = [
    b"[" * 300, b'{"a":' * 300, b'{"a": ' * 2000, b"[" * 100_000, b"]" * 300,
    b'"' + b"[" * 500 + b"]" * 500 + b'"',
    b"9" * 5000, b"1e400", b"NaN", b"-Infinity", b"\xff", b"\xed\xa0\x80", b'"\\ud800"', b"\\udcff", b"\0",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r", b"\x1b[2J", b",", b'"', b"{}", b"[]", b"null", b"messages",
    b"9999-99-99", b"\xe2\x80\xa8", b"<|im_end|>", b"<tool_call>", b"</tool_call>", b"<think>", b":", b"\t",
]  # fmt: skip


@cache
def real(kind: str, rows: str) -> bytes:
    """A file that is whole."""
    return WRITE[kind](ROWS[rows])


def changed(data: bytes, rng: random.Random) -> bytes:
    """`data` with one thing done to it that disks, programs and people do."""
    at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    start, end = sorted((at, min(other, at + rng.choice((1, 8, 64, 1 << 20)))))
    what = rng.randrange(7)
    if what == 0 and data:  # one bit
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if what == 1:  # cut short
        return data[:at]
    if what == 2:  # a block twice, or many times
        return data[:end] + data[start:end] * min(rng.choice((1, 2, 400)), 1 << 12) + data[end:]
    if what == 3:  # a block gone
        return data[:start] + data[end:]
    if what == 4:  # zeros, as a crash of the machine leaves
        return data[:start] + b"\0" * (end - start) + data[end:]
    if what == 5:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    return data[:start] + rng.choice(ODD) + data[end:]


def nested(depth: int, rng: random.Random) -> str:
    """JSON of lists, of objects, or of both in turn, `depth` deep."""
    pairs = rng.choice(([("[", "]")], [('{"a":', "}")], [("[", "]"), ('{"role":', "}")]))
    chosen = [pairs[level % len(pairs)] for level in range(depth)]
    return "".join(start for start, _ in chosen) + "1" + "".join(end for _, end in reversed(chosen))


def odd_value(rng: random.Random) -> str:
    """JSON that is right, and of which little else is."""
    depth = rng.choice((50, 101, 150, 330, 480, 700, 900, 960, 990, 1200, 5000))
    return rng.choice(
        (
            nested(depth, rng),
            '[{"role": "user", "content": "a"}, {"role": "assistant", "content": '
            + nested(depth, rng)
            + "}]",
            json.dumps(nested(depth, rng)),
            json.dumps(repr(json.loads(nested(50, rng)))),
            str(rng.choice((1 << 31, 1 << 63, 1 << 64, -(1 << 63) - 1, 10**400))),
            rng.choice(("1e400", "-1e400", "NaN", "Infinity", "null", "true", "{}", "[]", "[null]", "[[]]")),
            rng.choice(('"\\ud800"', '"\\udcff\\u0000"', '"\\u001b[2J"', '{"\\ud800": 1}', '"\\u202e"')),
            json.dumps(
                [{"role": "user", "content": rng.choice((1, None, [], {}, [[]], 1e300, "x" * 10_000))}]
            ),
        )
    )


def odd_rows(kind: str, rows: str, rng: random.Random) -> bytes:
    """A file whose rows are well written, with an odd value or an odd name for one of their values."""
    if kind in (".parquet", ".arrow", SAVED):
        return _odd_table(kind, rows, rng)
    if kind in (".csv", ".tsv"):
        name = rng.choice(
            (b"v\xf6llig", b"\xff", b"", b"a" * 70_000, b"\x1b[2J", b"messages", b"\xed\xa0\x80")
        )
        cell = b'"' + odd_value(rng).replace('"', '""').encode() + b'"'
        comma = b"," if kind == ".csv" else b"\t"
        names, *lines = real(kind, rows).splitlines()
        names = names + comma + name if rng.random() < 0.5 else names
        lines[rng.randrange(len(lines))] = comma.join([cell] * names.count(comma) + [cell])
        return b"\n".join([names, *lines])
    lines = [json.dumps(row) for row in ROWS[rows]]
    number = rng.randrange(len(lines))
    row = dict.fromkeys(ROWS[rows][number], "@@")
    row[rng.choice(list(row))] = "@here@"
    rest = iter([json.dumps(value) for value in ROWS[rows][number].values()])
    text = json.dumps(row).replace('"@here@"', odd_value(rng))
    while '"@@"' in text:
        text = text.replace('"@@"', next(rest), 1)
    lines[number] = text
    if kind == ".json":
        return f"[{', '.join(lines)}]".encode()
    return "\n".join(lines).encode()


def _odd_table(kind: str, rows: str, rng: random.Random) -> bytes:
    table = pa.Table.from_pylist(ROWS[rows])
    far = pa.array([rng.choice((0, 1 << 62, -(1 << 62)))] * len(table), pa.int64())
    to = rng.choice(
        (
            *(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")),
            *(pa.timestamp("us", zone) for zone in ("UTC", "Mars/Olympus", "+99:99", "../x")),
            *(pa.duration(unit) for unit in ("s", "us", "ns")),
            pa.date64(),
        )
    )
    deep = pa.array([1] * len(table), pa.int32())
    for _ in range(rng.choice((1, 40, 120))):
        deep = pa.StructArray.from_arrays([deep], ["a"])
    odd = rng.choice(
        (
            far.cast(pa.int64()).view(to),
            deep,
            pa.array([b"\xff"] * len(table), pa.binary()).view(pa.string()),
            pa.array([(1 << 31) - 1] * len(table), pa.int32()).view(pa.date32()),
            pa.array(["a"] * len(table)).dictionary_encode(),
            pa.array([[(b"\xff", 1)]] * len(table), pa.map_(pa.binary(), pa.int8())),
        )
    )
    table = table.append_column(rng.choice(("odd", "messages2", "\x1b[2J", _LATIN.decode())), odd)
    file = io.BytesIO()
    if kind == ".parquet":
        pq.write_table(table, file)
    else:
        open_writer = pa.ipc.new_stream if kind == SAVED else pa.ipc.new_file
        with open_writer(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue().replace(_LATIN, b"v\xf6llig")


def odd_file(seed: int) -> tuple[str, bytes]:
    """The ending and the bytes of one odd file; a packed one is changed before it was packed, or after."""
    rng = random.Random(seed)
    kind, packed = rng.choice(list(WRITE)), rng.choice(["", "", "", *PACK])
    packed = "" if kind == SAVED else packed
    rows, whole = rng.choice(list(ROWS)), rng.random()
    if whole < 0.05:
        data = rng.randbytes(rng.randrange(200))
    elif whole < 0.45:
        try:
            return kind + packed, PACK[packed](odd_rows(kind, rows, rng))
        except (pa.ArrowException, NotImplementedError, OSError):  # not every type goes into every file
            data = real(kind, rows)
    else:
        data = real(kind, rows)
    inside = rng.random() < 0.7
    for _ in range(rng.choice((1, 1, 2, 3)) if inside else 0):
        data = changed(data[: 1 << 20], rng)
    data = PACK[packed](data)
    if not inside:
        data = changed(data, rng)
    return kind + packed, data


def write_odd(path: Path, content: bytes) -> None:
    """Writes a file, or the directory of a saved data set, in the place of an earlier one."""
    if not path.name.endswith(SAVED):
        path.write_bytes(content)
        return
    shutil.rmtree(path, ignore_errors=True)  # not written over: an earlier one may still be mapped
    path.mkdir()
    (path / "state.json").write_text(json.dumps(_SAVED_STATE))
    (path / "dataset_info.json").write_text("{}")
    (path / _SAVED_ROWS).write_bytes(content)
