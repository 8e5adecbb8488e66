"""What is said of places that hold no model to talk to; commands in it can be pasted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mamba_sft.errors import AdapterError, UsageError
from mamba_sft.inference.model_places import find_place
from tests.inference.conftest import make_run


def command_in(text: str) -> list[str]:
    """The words of the command of ours that stands between backticks."""
    return shlex.split(next(part for part in text.split("`") if part.startswith("mamba-sft ")))


def test_a_directory_with_a_blank_in_its_name(tmp_path: Path, base: Path) -> None:
    made = make_run(tmp_path / "my run", base)
    with pytest.raises(UsageError, match="no merged checkpoint") as caught:
        find_place(made, merged=True)
    assert command_in(str(caught.value.hint)) == ["mamba-sft", "merge", str(made.path)]
    made.adapter.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="no adapter yet") as caught:
        find_place(made)
    assert command_in(str(caught.value.hint)) == ["mamba-sft", "train", str(made.recipe), "--resume"]


def test_an_adapter_right_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(Path, "resolve", lambda path, strict=False: Path("/adapter"))
    with pytest.raises(AdapterError, match="does not say which base"):
        find_place(tmp_path)
