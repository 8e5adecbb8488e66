"""A small packed file that unpacks to very much is refused at the first row that is too long."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mamba_sft import json_lines
from mamba_sft.data import json_files
from mamba_sft.data.sources import read_source
from mamba_sft.errors import DataError
from mamba_sft.json_lines import read_prompt_file
from mamba_sft.recipe.fields import SourceSection
from tests.data.odd_files import PACK

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONGEST", LIMIT)


def rows_of(path: Path, content: bytes, **fields: Any) -> list[Any]:
    path.write_bytes(PACK.get(path.suffix, bytes)(content))
    return list(read_source(SourceSection(path=str(path), **fields)))


LONG = b"a" * (LIMIT + 1)
FIRST = b'{"text": "fine"}'


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize(
    ("name", "content", "line", "fields"),
    [
        (".jsonl", FIRST + b'\n{"text": "' + LONG + b'"}\n', 2, {}),
        (".jsonl", LONG, 1, {}),
        (".ndjson", b"\n\n" + LONG, 3, {}),
        (".json", b"[" + FIRST + b',\n{"text": "' + LONG + b'"}]', 2, {}),
        (".json", b'{"data": [' + FIRST + b',\n{"text": "' + LONG + b'"}]}', 2, {}),
        (".json", b'{"text":\n"' + LONG + b'"}', 2, {}),
        (".json", b'{"text": "' + LONG + b'"}', 1, {}),
        (".csv", b"text\nfine\n" + LONG + b"\n", 3, {}),
        (".csv", LONG, 1, {}),
        (".tsv", b'text\tb\nfine\tb\n"' + b"a\n" * (LIMIT // 2) + b'"\tb\n', 3, {}),
        (".txt", b"fine\n\n" + LONG, 3, {}),
        (".txt", b"fine\n\n" + b"a\n" * (LIMIT // 2 + 1), 3, {}),
        (".txt", b"fine\n" + LONG, 2, {"sample_by": "line"}),
        (".txt", b"a\n\n" * (LIMIT // 3 + 1), 1, {"sample_by": "document"}),
    ],
)
def test_a_row_that_is_too_long_is_named_with_its_file(
    tmp_path: Path, packed: str, name: str, content: bytes, line: int, fields: dict[str, Any]
) -> None:
    path = tmp_path / f"a{name}{packed}"
    with pytest.raises(DataError, match=r"a row of more than 1\.00 MiB") as found:
        rows_of(path, content, **fields)
    assert found.value.message.startswith(f"{path}:{line}: ")
    assert ("itself has" in found.value.message) == bool(packed)


def test_a_row_as_long_as_may_be_is_taken(tmp_path: Path) -> None:
    text = "a" * (LIMIT - 20)
    for name, content in (
        (".jsonl", f'{{"text": "{text}"}}\n' * 3),
        (".json", f'[{{"text": "{text}"}}, {{"text": "{text}"}},\n{{"text": "{text}"}}]'),
        (".csv", "text\n" + f"{text}\n" * 3),
        (".txt", f"{text}\n\n" * 3),
    ):
        assert [row.value["text"] for row in rows_of(tmp_path / f"a{name}", content.encode())] == [text] * 3


@pytest.mark.parametrize("packed", [ending for ending in PACK if ending])
@pytest.mark.parametrize("name", [".jsonl", ".json", ".csv", ".txt"])
def test_what_comes_behind_it_is_not_unpacked(tmp_path: Path, packed: str, name: str) -> None:
    start = {".json": b'[{"text": "', ".csv": b"text\n"}.get(name, b"")
    path = tmp_path / f"a{name}{packed}"
    path.write_bytes(PACK[packed](start + b"a" * (64 * LIMIT)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="a row of more than"):
            list(read_source(SourceSection(path=str(path))))
        assert tracemalloc.get_traced_memory()[1] < 24 * LIMIT
    finally:
        tracemalloc.stop()


def test_an_object_of_very_many_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_KEYS", 1000)
    keys = ", ".join(f'"{number}": 1' for number in range(LIMIT // 10))
    with pytest.raises(DataError, match=r"a\.json\.gz:1: a row of more than"):
        rows_of(tmp_path / "a.json.gz", ("{" + keys + "}").encode())


def test_prompts_too(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(PACK[".gz"](b'{"prompt": "a"}\n' + LONG))
    with pytest.raises(DataError, match=r"prompts\.jsonl\.gz:2: a row of more than .* itself has"):
        read_prompt_file(path)
