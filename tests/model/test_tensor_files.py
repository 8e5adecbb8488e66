"""Our safetensors against the safetensors library's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mamba_sft.errors import ModelError
from mamba_sft.model import tensor_files
from mamba_sft.model.checkpoint import read_tensors
from mamba_sft.model.tensor_files import Layout, StoredTensors, read_rows, row_blocks, write_shard

TENSORS = {
    "wide": torch.randn(3, 70_000).bfloat16(),
    "tall": torch.randn(100_001, 7),
    "cube": torch.randn(130, 1, 4).half(),
    "line": torch.randn(999),
    "dot": torch.tensor(3.5),
    "none": torch.empty(0, 8),
}
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@pytest.fixture
def layouts() -> list[Layout]:
    return [Layout(name, NAMES[value.dtype], tuple(value.shape)) for name, value in TENSORS.items()]


def blocks(layout: Layout) -> Iterator[torch.Tensor]:
    value = TENSORS[layout.name]
    for start, stop in row_blocks(layout.shape):
        yield value[start:stop] if value.ndim else value


def test_the_library_reads_what_is_written(tmp_path: Path, layouts: list[Layout]) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, layouts, blocks)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("wrong", ["a block less", "a block more", "another dtype"])
def test_blocks_that_are_not_the_tensor_are_an_error(
    tmp_path: Path, layouts: list[Layout], wrong: str
) -> None:
    def other(layout: Layout) -> Iterator[torch.Tensor]:
        found = list(blocks(layout))
        if layout.name == "tall":
            found = {"a block less": found[:-1], "a block more": [*found, found[0]]}.get(wrong, found)
            found = [block.double() for block in found] if wrong == "another dtype" else found
        yield from found

    with pytest.raises(ModelError, match=r"^`tall` came to [\d,]+ bytes instead of 2,800,028$"):
        write_shard(tmp_path / "model.safetensors", layouts, other)


def test_what_the_library_writes_is_read_by_rows(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    stored = StoredTensors(read_tensors(tmp_path))
    for name, value in TENSORS.items():
        assert torch.equal(stored.whole(name), value.float())
        assert torch.equal(read_rows(stored.entries[name]), value)
    assert torch.equal(read_rows(stored.entries["tall"], 5000, 5003), TENSORS["tall"][5000:5003])
    assert len(list(stored.blocks("tall"))) > 1


def test_blocks_cover_every_row_once_in_multiples_of_64() -> None:
    for shape in ((1,), (64, 1 << 20), (65, 1 << 20), (100_000, 3), (0, 5), ()):
        found = list(row_blocks(shape))
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])][: len(found)]
        assert sum(stop - start for start, stop in found) == (shape[0] if shape else 1)
        assert all((stop - start) % 64 == 0 for start, stop in found[:-1])


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    entry = read_tensors(tmp_path)["line"]
    path.write_bytes(path.read_bytes()[: entry.end - 10])
    with pytest.raises(ModelError, match="ended early"):
        read_rows(entry)


def test_a_slow_disk_holds_the_computing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    written: list[int] = []
    most = 0
    write = tensor_files._write_all

    def slow(file: Any, data: Any) -> int:
        time.sleep(0.002)
        written.append(len(data))
        return write(file, data)

    def blocks(layout: Layout) -> Iterator[torch.Tensor]:
        nonlocal most
        made.append(4)
        most = max(most, len(made) - len(written))
        yield torch.zeros(1)

    monkeypatch.setattr(tensor_files, "_write_all", slow)
    tensor_files.write_shard(tmp_path / "many", [Layout(f"t{i}", "F32", (1,)) for i in range(100)], blocks)
    assert most <= tensor_files._PENDING_BLOCKS
