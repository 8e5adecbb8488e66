"""Packed rows and their sequence boundaries.

Rows are packed whole (best fit, longest first), never cut. A packed row is a list of rows; their tokens are
fetched when it is asked for, so packing copies nothing. The boundaries travel with each packed row as
`seq_lengths`; the collator turns them into `seq_idx`, where the model resets its state.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_sft.data.rows import IGNORED, list_table, row_lengths

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


PADDING = 2**31 - 1
"""What `seq_idx` is where a row has ended: a number that no sequence has."""


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
        dataset: Columns `input_ids`, `labels` (lists of equal length per row) and `length`.
        max_length: Tokens a packed row may hold; no row may be longer.
        seed: Which of equally long rows meet, and the order of the result.

    Returns:
        Rows of `input_ids`, `labels` and `seq_lengths` (the lengths of the rows inside, in order), put
        together when they are read.

    Raises:
        ValueError: A row is longer than `max_length`.
    """
    from datasets import Dataset as ArrowDataset

    return ArrowDataset(_bin_table(dataset, max_length, seed)).with_transform(Fetch(dataset))


def write_bins(path: Path, dataset: Dataset, max_length: int, seed: int) -> None:
    """Writes which rows `pack` puts together, for `open_packed`."""
    import pyarrow as pa

    table = _bin_table(dataset, max_length, seed)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def open_packed(path: Path, dataset: Dataset) -> Dataset:
    """Returns the packed rows of `dataset` that `write_bins` found."""
    from datasets import Dataset as ArrowDataset

    return ArrowDataset.from_file(str(path)).with_transform(Fetch(dataset))


def put_together(dataset: Dataset, rows: np.ndarray, counts: np.ndarray) -> Dataset:
    """Returns packed rows that somebody else has chosen.

    Args:
        dataset: The rows.
        rows: (m,) int64, the rows inside all packed rows, one packed row after the other.
        counts: (n,) int64, how many each packed row holds.
    """
    from datasets import Dataset as ArrowDataset

    return ArrowDataset(_bins_as_table(row_lengths(dataset), rows, counts)).with_transform(Fetch(dataset))


class Fetch:
    """Puts packed rows together from the rows they name.

    Args:
        dataset: The rows.
    """

    def __init__(self, dataset: Dataset):
        known = [name for name in ("input_ids", "labels", "where", "source") if name in dataset.column_names]
        self.dataset = dataset.select_columns(known).with_format("arrow")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[np.ndarray]]:
        """Returns `input_ids`, `labels` and `seq_lengths` of some packed rows, int32 each, and more if known.

        `where` is where each row inside came from, `source` the number of its source.
        """
        import pyarrow.compute as pc

        counts = [len(rows) for rows in batch["rows"]]
        table = self.dataset[[row for rows in batch["rows"] for row in rows]].combine_chunks()
        ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        lengths = pc.list_value_length(ids).to_numpy(zero_copy_only=False).astype(np.int32)
        rows = np.cumsum(counts)[:-1]
        tokens = np.cumsum([part.sum() for part in np.split(lengths, rows)])[:-1]
        fetched = {
            "input_ids": np.split(ids.flatten().to_numpy(zero_copy_only=False), tokens),
            "labels": np.split(labels.flatten().to_numpy(zero_copy_only=False), tokens),
            "seq_lengths": np.split(lengths, rows),
        }
        for name in ("where", "source"):
            if name in table.column_names:
                fetched[name] = np.split(table.column(name).to_numpy(), rows)
        return fetched


def _bin_table(dataset: Dataset, max_length: int, seed: int) -> Any:
    lengths = row_lengths(dataset)
    bins = assign_bins(lengths, max_length, np.random.default_rng(seed))
    order = np.concatenate([np.zeros(0, np.int64), *(np.asarray(rows, dtype=np.int64) for rows in bins)])
    return _bins_as_table(lengths, order, np.array([len(rows) for rows in bins], dtype=np.int64))


def _bins_as_table(lengths: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> Any:
    """Columns `rows` (indices into the data set) and `length` (their tokens) of each packed row."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(lengths[rows])])
    tokens = np.diff(ends[np.concatenate([[0], np.cumsum(counts)])]).astype(np.int32)
    return list_table({"rows": (rows, counts)}).append_column("length", pa.array(tokens))


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

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor | np.ndarray]:
        """Returns a batch: `input_ids`, `labels`, int64, `seq_idx`, int32, (B, L), and more for the host.

        That is `trained`, bool, (B, L), the positions whose next token is trained; `source`, int32, (B, L),
        the number of the source of each; and `where`, (B,), the origins of the rows inside each row, e.g.
        `chats.jsonl:12`. They are no tensors, so they do not go to a device with the others: what depends on
        them must not wait for the device to tell.

        `seq_idx` counts the sequences within a row; padding is one of its own, number `PADDING`. The first
        label of each sequence is -100: nothing before it predicts it. There is no mask: padding stands behind
        everything that is read, where nothing that comes before it can see it.

        Args:
            rows: `input_ids` and `labels`, `seq_lengths` for packed rows, `where` and `source` if known.
        """
        import torch

        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        seq_idx = np.full(shape, PADDING, dtype=np.int32)
        source = np.zeros(shape, dtype=np.int32)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            lengths = np.asarray(row.get("seq_lengths", [length]))
            input_ids[i, :length] = row["input_ids"]
            labels[i, :length] = row["labels"]
            labels[i, np.cumsum(lengths) - lengths] = IGNORED
            seq_idx[i, :length] = np.repeat(np.arange(len(lengths)), lengths)
            source[i, :length] = np.repeat(np.broadcast_to(row.get("source", 0), lengths.shape), lengths)
        trained = np.zeros(shape, dtype=bool)
        trained[:, :-1] = labels[:, 1:] != IGNORED
        batch = {"input_ids": input_ids, "labels": labels, "seq_idx": seq_idx}
        where = np.empty(len(rows), dtype=object)
        where[:] = [_origins(row) for row in rows]
        on_host = {"trained": trained, "source": source, "where": where}
        return {name: torch.from_numpy(value) for name, value in batch.items()} | on_host


def _origins(row: dict[str, Any]) -> tuple[str, ...]:
    where = row.get("where", ())
    return (where,) if isinstance(where, str) else tuple(where)
