"""Packed rows and their sequence boundaries.

Rows are packed whole (best fit, longest first), never cut. The boundaries travel with each packed row as
`seq_lengths`; the collator turns them into `seq_idx`, where the model resets its state.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

IGNORED = -100
"""The label of a token that is not trained, by PyTorch's convention."""


@dataclass(frozen=True)
class Packed:
    """What packing makes of an epoch: rows, what each may hold, and the share of it that holds tokens."""

    rows: int
    max_length: int
    fill: float

    @classmethod
    def of(cls, rows: int, max_length: int, tokens: int) -> Packed:
        """Returns it for `tokens` in `rows` packed rows."""
        return cls(rows, max_length, tokens / max(1, rows * max_length))

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON can hold it."""
        return asdict(self)


def pack(dataset: Dataset, max_length: int, seed: int) -> Dataset:
    """Packs rows into rows of at most `max_length` tokens.

    Args:
        dataset: Columns `input_ids` and `labels`, lists of equal length per row.
        max_length: Tokens a packed row may hold; no row may be longer.
        seed: Which of equally long rows meet, and the order of the result.

    Returns:
        Columns `input_ids`, `labels` and `seq_lengths` (the lengths of the rows inside, in order).

    Raises:
        ValueError: A row is longer than `max_length`.
    """
    from datasets import Dataset as ArrowDataset

    ids, offsets = _flat_column(dataset, "input_ids")
    labels, _ = _flat_column(dataset, "labels")
    lengths = np.diff(offsets)
    bins = assign_bins(lengths, max_length, np.random.default_rng(seed))
    order = (
        np.concatenate([np.asarray(rows, dtype=np.int64) for rows in bins]) if bins else np.zeros(0, np.int64)
    )
    rows_per_bin = np.array([len(rows) for rows in bins])
    tokens_per_bin = np.array([lengths[rows].sum() for rows in bins])
    take = _gather(offsets, order)
    return ArrowDataset(
        list_table(
            {
                "input_ids": (ids[take], tokens_per_bin),
                "labels": (labels[take], tokens_per_bin),
                "seq_lengths": (lengths[order].astype(np.int32), rows_per_bin),
            }
        )
    )


def assign_bins(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> list[list[int]]:
    """Best-fit decreasing: each length goes to the fullest bin that still holds it.

    Args:
        lengths: (n,) integers, each at most `capacity`.
        capacity: What a bin holds.
        rng: Breaks ties between equal lengths and shuffles the bins and their contents.

    Returns:
        For each bin, the indices it holds.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit max_length {capacity}")
    shuffled = rng.permutation(len(lengths))
    by_length = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> bins that have exactly that many
    rooms: list[int] = []  # the keys of with_room, sorted: at most `capacity` of them
    for index, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        position = bisect_left(rooms, length)
        if position == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[position]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[position]
        bins[chosen].append(index)
        left = room - length
        if left and left not in with_room:
            insort(rooms, left)
        with_room.setdefault(left, []).append(chosen)
    for rows in bins:
        rng.shuffle(rows)
    return [bins[i] for i in rng.permutation(len(bins)).tolist()]


class Collator:
    """Makes a batch of packed or unpacked rows, padded on the right.

    Args:
        pad_token_id: What fills the end of a short row.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels`, `attention_mask` int64 and `seq_idx` int32, all (B, L).

        `seq_idx` counts the sequences within a row; padding is one more sequence of its own. The first label
        of each sequence is -100: nothing before it predicts it.

        Args:
            rows: `input_ids` and `labels`, and `seq_lengths` for packed rows.
        """
        import torch

        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        seq_idx = np.zeros(shape, dtype=np.int32)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            lengths = np.asarray(row.get("seq_lengths") or [length])
            input_ids[i, :length] = row["input_ids"]
            labels[i, :length] = row["labels"]
            labels[i, np.cumsum(lengths) - lengths] = IGNORED
            attention_mask[i, :length] = 1
            seq_idx[i, :length] = np.repeat(np.arange(len(lengths)), lengths)
            seq_idx[i, length:] = len(lengths)
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "seq_idx": seq_idx,
        }
        return {name: torch.from_numpy(value) for name, value in batch.items()}


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Returns the number of tokens of each row, (n,) int64."""
    import pyarrow.compute as pc

    column = dataset.select_columns("input_ids").with_format("arrow")[:].column(0)
    lengths: np.ndarray = pc.list_value_length(column).to_numpy().astype(np.int64)
    return lengths


def list_table(columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """A `pyarrow.Table` of list columns, each given as (all values in a row, the length of each list)."""
    import pyarrow as pa

    arrays = {}
    for name, (values, lengths) in columns.items():
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        narrow = offsets[-1] < np.iinfo(np.int32).max
        kind = pa.ListArray if narrow else pa.LargeListArray
        arrays[name] = kind.from_arrays(
            pa.array(offsets.astype(np.int32) if narrow else offsets), pa.array(values)
        )
    return pa.table(arrays)


def _flat_column(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a list column in a row (int32), and the offsets of its rows (n + 1,)."""
    table = dataset.with_format("arrow")[:]
    chunks = table.column(name).chunks
    lengths = [np.asarray(chunk.value_lengths()) for chunk in chunks]
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    offsets = np.concatenate([[0], *[np.asarray(length) for length in lengths]]).cumsum()
    return np.concatenate([np.zeros(0, np.int32), *values]).astype(np.int32), offsets.astype(np.int64)


def _gather(offsets: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Positions in the flat column of the rows `order`, one after the other."""
    lengths = offsets[order + 1] - offsets[order]
    ends = np.cumsum(lengths)
    shifts = np.repeat(offsets[order] - (ends - lengths), lengths)
    return shifts + np.arange(len(shifts))
