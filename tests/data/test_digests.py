"""A digest of rows tells rows from other rows, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_sft.data.digests import RowsDigest
from mamba_sft.data.preparing import prepare_data
from mamba_sft.data.tokenizing import Tokens
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.recipe.fields import ChatSection, DataSection, SourceSection


def tokens(ids: list[int], trained: list[bool] | None = None, where: str = "x:1") -> Tokens:
    mask = np.array(trained if trained is not None else [True] * len(ids))
    return Tokens(where, np.array(ids, dtype=np.int32), mask)


def digest(*rows: list[Tokens]) -> str:
    made = RowsDigest()
    for row in rows:
        made.add(row)
    return made.text()


def test_where_a_row_stood_does_not_matter() -> None:
    assert digest([tokens([1, 2, 3])]) == digest([tokens([1, 2, 3], where="elsewhere:9")])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[tokens([1, 2, 4])], [tokens([5])]],
        [[tokens([1, 2, 3], [False, True, True])], [tokens([5])]],
        [[tokens([5])], [tokens([1, 2, 3])]],
        [[tokens([1, 2, 3]), tokens([5])]],
        [[tokens([1, 2]), tokens([3])], [tokens([5])]],
        [[tokens([1, 2, 3])], [tokens([5])], [tokens([5])]],
    ],
)
def test_everything_that_is_trained_does(rows: list[list[Tokens]]) -> None:
    assert digest(*rows) != digest([tokens([1, 2, 3])], [tokens([5])])


@pytest.fixture
def setup(tiny_tokenizer: Any) -> TemplateSetup:
    return prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})


def test_a_source_keeps_its_digest_when_only_the_file_changes(setup: TemplateSetup, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"hello {i}"},
                          {"role": "assistant", "content": f"fox {i}"}]} for i in range(9)]  # fmt: skip
    as_lines, as_array, other = (tmp_path / name for name in ("a.jsonl", "b.json", "c.jsonl"))
    as_lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    as_array.write_text(json.dumps(rows, indent=1))
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    sources = [SourceSection(path=str(path)) for path in (as_lines, as_array, other)]
    summary = prepare_data(DataSection(sources=sources), setup, system=None, seed=0).summary
    first, second, third = (source.digest for source in summary.sources)
    assert first == second != third
    assert (
        prepare_data(DataSection(sources=sources[:1]), setup, system=None, seed=7).summary.sources[0].digest
        == first
    )
