"""Rows of tokens on disk: written in batches, then mapped, so that memory does not grow with their number.

A row of the data is one piece, or several if it was cut. Tokens, labels and origins of all pieces lie in one
Arrow file, which the `datasets` library maps; what is known of them without reading a token (lengths,
digests, where each came from) is a few numbers a row, kept as arrays.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mamba_sft.data.tokenizing import Tokens

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""The label of a token that is not trained, by PyTorch's convention."""
_BATCH_TOKENS = 1 << 20
"""Tokens held in memory until they are written."""


@dataclass(frozen=True)
class RowIndex:
    """What is known of the rows without reading their tokens.

    Args:
        difficulty: (n,) float64, from the column that the recipe names; NaN where it names none.
        source: (n,) int32, the number of the source that each row came from.
        pieces: (n + 1,) int64, row i is the pieces from `pieces[i]` up to `pieces[i + 1]`.
        digest: (n,) 16 bytes each, equal for rows that are equal token for token.
        length: (p,) int32, tokens of each piece.
        trained: (p,) int32, trained tokens of each piece.
    """

    difficulty: np.ndarray
    source: np.ndarray
    pieces: np.ndarray
    digest: np.ndarray
    length: np.ndarray
    trained: np.ndarray

    def pieces_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the pieces of these rows, in their order, (m,) int64."""
        starts, counts = self.pieces[rows], np.diff(self.pieces)[rows]
        ends = np.cumsum(counts)
        return np.repeat(starts - (ends - counts), counts) + np.arange(counts.sum())


class RowWriter:
    """Writes pieces as they come; a context manager, whose `index` is there when it has ended.

    Args:
        path: The Arrow file to write.
    """

    def __init__(self, path: Path):
        self.path = path
        self._sources, self._counts, self._difficulties = array("i"), array("i"), array("d")
        self._lengths, self._trained = array("i"), array("i")
        self._digests = bytearray()
        self._waiting: list[tuple[int, Tokens]] = []
        self._tokens = 0

    def __enter__(self) -> Self:
        import pyarrow as pa

        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, _table([]).schema)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()
        self._sink.close()

    def add(self, source: int, pieces: Sequence[Tokens], difficulty: float = math.nan) -> None:
        """Adds a row of a source."""
        digest = blake2b(digest_size=16)
        for piece in pieces:
            digest.update(piece.ids.tobytes())
            self._lengths.append(len(piece.ids))
            self._trained.append(int(piece.trained.sum()))
            self._tokens += len(piece.ids)
        self._digests += digest.digest()
        self._sources.append(source)
        self._difficulties.append(difficulty)
        self._counts.append(len(pieces))
        self._waiting += [(source, piece) for piece in pieces]
        if self._tokens >= _BATCH_TOKENS:
            self._flush()

    @property
    def index(self) -> RowIndex:
        """What was written."""
        return RowIndex(
            difficulty=np.array(self._difficulties, dtype=np.float64),
            source=np.array(self._sources, dtype=np.int32),
            pieces=np.concatenate([[0], np.cumsum(np.array(self._counts, dtype=np.int64))]).astype(np.int64),
            digest=np.frombuffer(bytes(self._digests), dtype="V16"),
            length=np.array(self._lengths, dtype=np.int32),
            trained=np.array(self._trained, dtype=np.int32),
        )

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(_table(self._waiting))
        self._waiting, self._tokens = [], 0


def _table(rows: list[tuple[int, Tokens]]) -> Any:
    import pyarrow as pa

    pieces = [piece for _, piece in rows]
    lengths = np.array([len(piece.ids) for piece in pieces], dtype=np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in pieces)])
    trained = np.concatenate([np.zeros(0, bool), *(piece.trained for piece in pieces)])
    labels = np.where(trained, ids, np.int32(IGNORED))
    return (
        list_table({"input_ids": (ids, lengths), "labels": (labels, lengths)})
        .append_column("length", pa.array(lengths))
        .append_column("where", pa.array([piece.where for piece in pieces], pa.string()))
        .append_column("source", pa.array([source for source, _ in rows], pa.int32()))
    )


def open_rows(path: Path) -> Dataset:
    """Maps the pieces that `RowWriter` wrote: `input_ids`, `labels`, `length`, `where` and `source`."""
    from datasets import Dataset as ArrowDataset

    return ArrowDataset.from_file(str(path))


def list_table(columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """A `pyarrow.Table` of list columns, each given as (all values in a row, the length of each list)."""
    import pyarrow as pa

    arrays = {}
    for name, (values, lengths) in columns.items():
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        arrays[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    return pa.table(arrays)


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Returns the number of tokens of each row, (n,) int64, from the column `length`: no token is read."""
    lengths = dataset.select_columns("length").with_format("arrow")[:].column(0)
    return np.asarray(lengths.to_numpy()).astype(np.int64)
