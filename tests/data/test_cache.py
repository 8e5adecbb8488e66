"""Rows are prepared once: by one process, under a name that everything they depend on decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.data import cache
from mamba_sft.data.preparing import PreparedData, prepare_data
from mamba_sft.data.tokenizing import Renderer
from mamba_sft.errors import DataError
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.recipe.fields import ChatSection, DataSection, SourceSection


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.PLACE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def setup(tiny_tokenizer: Any) -> TemplateSetup:
    return prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    write(path, 40)
    return path


def write(path: Path, rows: int, answer: str = "yes") -> None:
    chats = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def prepare(setup: TemplateSetup, path: Path, **options: Any) -> PreparedData:
    seed, system = options.pop("seed", 0), options.pop("system", None)
    source = SourceSection(path=str(path), **options.pop("source", {}))
    data = DataSection(sources=[source], **{"max_length": 64, "validation": 4} | options)
    return prepare_data(data, setup, system=system, seed=seed)


def test_a_second_time_nothing_is_tokenized_and_everything_is_the_same(
    setup: TemplateSetup, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(setup, path)
    monkeypatch.setattr(Renderer, "render", lambda *_: pytest.fail("rendered again"))
    again = prepare(setup, path)
    assert again.path == first.path
    assert again.summary.to_dict() == first.summary.to_dict()
    assert again.train[:] == first.train[:]
    assert again.validation is not None
    assert again.validation[:] == first.validation[:]  # type: ignore[index]
    rows = [[part.tolist() for part in row.values()] for row in again.train_rows]
    assert rows == [[part.tolist() for part in row.values()] for row in first.train_rows]


def test_rows_are_mapped_from_disk(setup: TemplateSetup, path: Path) -> None:
    prepared = prepare(setup, path)
    for rows in (prepared.train, prepared.train_rows, prepared.validation_rows):
        assert rows is not None
        assert [Path(file["filename"]).parent for file in rows.cache_files] == [prepared.path]


def test_whatever_decides_the_rows_has_a_name_of_its_own(setup: TemplateSetup, path: Path) -> None:
    seen = {prepare(setup, path).path}

    def is_new(prepared: PreparedData) -> None:
        assert prepared.path not in seen
        seen.add(prepared.path)

    is_new(prepare(setup, path, seed=1))
    is_new(prepare(setup, path, system="be brief"))
    is_new(prepare(setup, path, max_length=32))
    is_new(prepare(setup, path, packing=False))
    is_new(prepare(setup, path, source={"limit": 30}))
    setup.tokenizer.chat_template = setup.tokenizer.chat_template + " "
    is_new(prepare(setup, path))
    setup.tokenizer.add_tokens(["question"])
    is_new(prepare(setup, path))
    write(path, 40, answer="no!")
    os.utime(path, (0, 0))  # its date says nothing
    is_new(prepare(setup, path))
    assert len(cache.entries()) == len(seen) == 9


def test_a_place_that_is_named_needs_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("XDG_CACHE_HOME", cache.PLACE):
        monkeypatch.setenv(name, str(tmp_path))
        assert cache.cache_home().is_relative_to(tmp_path)
        monkeypatch.delenv(name)


def test_two_at_once_are_made_once(root: Path) -> None:
    made: list[Path] = []
    start = threading.Barrier(4)

    def make(directory: Path) -> Mapping[str, Any]:
        made.append(directory)
        time.sleep(0.2)
        (directory / "rows").write_text("all of them")
        return {"sources": ["x"], "rows": 1, "tokens": 2}

    def ask(_: int) -> str:
        start.wait()
        return (cache.made_once("k", make) / "rows").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {"all of them"}
    assert len(made) == 1


def test_processes_wait_for_each_other(root: Path, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from mamba_sft.data.cache import made_once
def make(directory):
    time.sleep(0.5)
    (directory / "rows").write_text("whole")
    with open(sys.argv[1], "a") as log: log.write("made\\n")
    return {"sources": [], "rows": 0, "tokens": 0}
print((made_once("k", make) / "rows").read_text())
"""
    log = tmp_path / "log"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(log)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["whole", "whole"]
    assert log.read_text() == "made\n"


def test_what_fails_leaves_nothing(root: Path, setup: TemplateSetup, path: Path) -> None:
    path.write_text(path.read_text() + '{"messages": oops}\n')
    with pytest.raises(DataError, match="1 of 41 rows cannot be trained on"):
        prepare(setup, path)
    assert cache.entries() == []
    assert not [entry for entry in root.iterdir() if entry.is_dir()]


def test_a_damaged_entry_is_prepared_again(
    setup: TemplateSetup, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each file gone, empty, cut, or with one bit turned over; and what says what there is."""
    first = prepare(setup, path)
    rows = first.train[:]
    for file in sorted(first.path.iterdir()):
        whole = file.read_bytes()
        flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
        for content in (None, b"", whole[: len(whole) // 2], flipped):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            assert len(cache.entries()) <= 1  # and no error
            caplog.clear()
            again = prepare(setup, path)
            assert again.train[:] == rows
            assert f"prepared rows in `{first.path}` are damaged" in caplog.text
            assert "prepared again" in caplog.text
    caplog.clear()
    assert prepare(setup, path).train[:] == rows
    assert "damaged" not in caplog.text


def test_a_place_that_cannot_be_written_is_one_clear_message(
    setup: TemplateSetup, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.PLACE, str(path))
    with pytest.raises(DataError, match="cannot keep prepared rows in") as caught:
        prepare(setup, path)
    assert "MAMBA_SFT_CACHE" in str(caught.value.hint)


def test_rejected_rows_are_kept_with_the_others(setup: TemplateSetup, path: Path) -> None:
    path.write_text(path.read_text() + '{"messages": oops}\n')
    for _ in range(2):
        rejected = prepare(setup, path, on_bad_row="skip").rejected
        assert rejected is not None
        assert json.loads(rejected.read_text())["where"] == f"{path}:41"


def test_the_verb_lists_and_clears(setup: TemplateSetup, path: Path, root: Path) -> None:
    prepared = prepare(setup, path)
    (root / "dead.partial").mkdir()
    listed = CliRunner().invoke(app, ["data", "--cached"])
    assert listed.exit_code == 0
    assert "chats.jsonl" in listed.output.replace("\n", "")
    assert f"{prepared.summary.train_tokens:,}" in listed.output
    cleared = CliRunner().invoke(app, ["data", "--cached", "--clear"])
    assert "one entry" in cleared.output
    assert cache.entries() == []
    assert not (root / "dead.partial").exists()
    assert len(prepared.train) == 36  # what is mapped stays readable


def test_rows_can_be_prepared_ahead(path: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "output_dir": str(tmp_path / "run"),
                "model": {"base": str(tiny_base), "dtype": "float32"},
                "data": {"sources": [{"path": str(path)}], "max_length": 64},
            }
        )
    )
    prepared = CliRunner().invoke(app, ["data", str(recipe), "--prepare"])
    assert prepared.exit_code == 0, prepared.output
    (entry,) = cache.entries()
    assert str(entry.path) in prepared.output.replace("\n", "")
    shown = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert len(cache.entries()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["quickstart", "--cached"], ["--cached", "--prepare"]])
def test_wrong_usage_is_told(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["data", *arguments]).exit_code != 0
