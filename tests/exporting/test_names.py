"""What files are called stays in the directory that is exported to."""

from __future__ import annotations

import pytest

from mamba_sft.errors import UsageError
from mamba_sft.exporting.request import ExportRequest


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "..", ".", "", "a\\b", "C:x", "x\0", "a\x1b[2J", "\udcff", "x" * 201]
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be what the files are called"):
        ExportRequest("run", [], None, name, lambda stage, done, total: None)


@pytest.mark.parametrize("name", ["my-model", "Grüße 世界", "v1.0", None])
def test_a_name_is_taken(name: str | None) -> None:
    assert ExportRequest("run", [], None, name, lambda stage, done, total: None).name == name
