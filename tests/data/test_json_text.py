"""A JSON text in parts is the JSON text: same values, same errors, in the memory of one value."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_sft.data import json_text
from mamba_sft.data.json_text import JsonText, JsonTextError
from mamba_sft.data.sources import read_source
from mamba_sft.recipe.fields import SourceSection

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def reader(text: str | bytes) -> JsonText:
    return JsonText(io.BytesIO(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text))


@pytest.fixture(params=[1, 3, 1 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_a_text_in_small_parts_is_the_same_text() -> None:
    @given(st.lists(VALUES, max_size=4), st.sampled_from([None, 2]), st.booleans())
    def check(values: list[Any], indent: int | None, ascii_only: bool) -> None:
        written = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
        assert [value for _, value in reader(written).items()] == values
        text = reader("\ufeff\n" + "\n".join(json.dumps(value, indent=indent) for value in values))
        assert [text.value() for _ in values] == values
        assert text.next() == ""

    check()


@pytest.mark.usefixtures("block")
def test_lines_keys_and_nan() -> None:
    text = reader('\n{"a": [NaN,\n-Infinity], \n\n"b":\n12345}')
    found = [(key, text.line, text.value()) for key in text.object_keys()]
    assert [(key, line) for key, line, _ in found] == [("a", 2), ("b", 5)]
    assert str(found) == "[('a', 2, [nan, -inf]), ('b', 5, 12345)]"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("[1, 2", 1, "`,` is missing before the end of the file"),
        ("[1 2]", 1, "`,` is missing before '2]'"),
        ('[{"a": 1},\n {"a": oops}]', 2, "Expecting value, column 8"),
        ('[{"a": 1}, {"a" 1}]', 1, "Expecting ':' delimiter, column 17"),
        ('["' + "x" * 50, 1, "Unterminated string starting at, column 2"),
        ("[" + "[" * 100_000, 1, "not readable as JSON"),
        ("[1,\n" + "9" * 5000 + "]", 2, "not readable as JSON"),
        (b'[1,\n2,\n"\xff"]', 3, "not UTF-8: byte 0xff"),
        (b'["\xc3', 1, "not UTF-8: byte 0xc3"),
        ("7", 1, "`[` is missing before '7'"),
    ],
)
@pytest.mark.usefixtures("block")
def test_what_is_wrong_is_told_with_its_line(text: str | bytes, line: int, problem: str) -> None:
    with pytest.raises(JsonTextError) as caught:
        list(reader(text).items())
    assert problem in str(caught.value)
    assert caught.value.line == line


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 200})
    most = []
    for count in (2_000, 20_000):
        whole = tmp_path / f"{count}.json"
        whole.write_text('{"about": 1, "data": [' + ",".join([row] * count) + "]}")
        tracemalloc.start()
        assert sum(1 for _ in read_source(SourceSection(path=str(whole)))) == count
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] < most[0] + (1 << 20) < whole.stat().st_size
