from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_sft.data.packing import PADDING, Collator, assign_bins, pack
from mamba_sft.data.rows import IGNORED, row_lengths


def rows_of(lengths: list[int]) -> Dataset:
    ids = [[row * 1000 + i for i in range(length)] for row, length in enumerate(lengths)]
    labels = [[IGNORED, *row[1:]] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": lengths})


def unpacked(packed: Dataset) -> list[list[int]]:
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"])
        start = 0
        for length in row["seq_lengths"]:
            found.append(row["input_ids"][start : start + length].tolist())
            start += length
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(0, 3))
def test_every_row_is_packed_once_and_whole(lengths: list[int], seed: int) -> None:
    packed = pack(rows_of(lengths), 16, seed)
    assert sorted(unpacked(packed)) == rows_of(lengths)["input_ids"][:]
    assert all(len(row["input_ids"]) <= 16 for row in packed)
    assert len(packed) <= 2 * -(-sum(lengths) // 16)  # any two bins hold more than one bin's worth


def test_labels_travel_with_their_tokens() -> None:
    for row in pack(rows_of([5, 3, 7, 2, 9]), 10, 0):
        start = 0
        for length in row["seq_lengths"]:
            ids, labels = (row[name][start : start + length].tolist() for name in ("input_ids", "labels"))
            assert labels == [IGNORED, *ids[1:]]
            start += length


def test_packing_depends_on_the_seed_and_nothing_else() -> None:
    lengths = np.random.default_rng(1).integers(1, 50, 200).tolist()
    first, again, other = (unpacked(pack(rows_of(lengths), 64, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_dataset_with_selected_rows_is_packed_as_selected() -> None:
    rows = rows_of([4, 4, 4, 4]).select([3, 1])
    assert sorted(unpacked(pack(rows, 8, 0))) == [rows[1]["input_ids"], rows[0]["input_ids"]]


@pytest.mark.parametrize("limit", [1024, 2048, 8192])
def test_ordinary_chat_lengths_fill_98_percent(limit: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 0.9, 5000), 8, limit).astype(np.int64)
    bins = assign_bins(lengths, limit, rng)
    assert sorted(index for rows in bins for index in rows) == list(range(5000))
    assert lengths.sum() / (len(bins) * limit) >= 0.98


def test_a_hundred_thousand_rows_take_seconds() -> None:
    import time

    lengths = np.random.default_rng(0).integers(1, 8192, 100_000)
    start = time.process_time()
    assign_bins(lengths, 8192, np.random.default_rng(0))
    assert time.process_time() - start < 10


def test_a_row_that_fits_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit max_length 10"):
        pack(rows_of([3, 11]), 10, 0)


def test_a_batch_of_packed_rows() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]},
        {"input_ids": [6, 7, 8], "labels": [IGNORED, 7, 8], "seq_lengths": [3]},
    ]
    batch = Collator(pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 4, 5], [-100, 7, 8, -100, -100]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, PADDING, PADDING]]
    assert {name: str(value.dtype) for name, value in batch.items()} == {
        "input_ids": "torch.int64", "labels": "torch.int64", "seq_idx": "torch.int32",
        "trained": "bool", "source": "int32", "where": "object",
    }  # fmt: skip


def test_rows_keep_where_they_came_from() -> None:
    dataset = rows_of([5, 3, 7]).add_column("where", ["a:1", "a:2", "a:3"])
    packed = pack(dataset, 8, 0)
    batch = Collator(0)([packed[i] for i in range(len(packed))])
    assert sorted(map(sorted, batch["where"])) == [["a:1", "a:2"], ["a:3"]]
    lengths = {"a:1": 5, "a:2": 3, "a:3": 7}
    for row, where in zip(packed, batch["where"], strict=True):
        assert row["seq_lengths"].tolist() == [lengths[one] for one in where]
    assert [list(where) for where in Collator(0)(list(dataset))["where"]] == [["a:1"], ["a:2"], ["a:3"]]


def test_a_batch_of_plain_rows_is_padded_to_the_longest() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = Collator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100] * 3]
    assert batch["trained"].tolist() == [[True, True, False], [False] * 3]
    assert batch["seq_idx"].tolist() == [[0, 0, 0], [0, PADDING, PADDING]]


def test_packed_datasets_go_through_the_collator() -> None:
    packed = pack(rows_of([5, 3, 7]), 8, 0)
    batch = Collator(0)([packed[i] for i in range(len(packed))])
    starts = batch["seq_idx"].diff(dim=1, prepend=torch.full((len(packed), 1), -1)) != 0
    assert (batch["labels"][starts] == IGNORED).all()
    assert (batch["labels"][~starts & (batch["seq_idx"] != PADDING)] != IGNORED).all()


def test_padding_needs_no_mask() -> None:
    """What stands behind a row changes no number of it, so that no mask is sent."""
    from mamba_sft.kernels.falcon_mamba import install
    from tests.conftest import build_model

    model = install(build_model())
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (9, 30)]
    batch = Collator(pad_token_id=11)(rows)
    labels = batch.pop("labels")
    del batch["trained"]
    masked = model(**batch, attention_mask=(batch["seq_idx"] != PADDING).long()).logits
    plain = model(**batch).logits
    read = batch["seq_idx"] != PADDING
    assert torch.equal(plain[read], masked[read])
    assert (labels[~read] == IGNORED).all()


def test_loss_and_gradients_of_a_packed_batch_are_those_of_its_rows() -> None:
    """And also when the packed rows come one after the other, as under accumulation."""
    from mamba_sft.kernels.falcon_mamba import install
    from mamba_sft.training.figures import Figures
    from mamba_sft.training.streaming import split
    from tests.conftest import build_model
    from tests.training.test_streaming import assert_same, gradients, with_adapter

    model = with_adapter(install(build_model()))
    numbers = torch.Generator().manual_seed(0)
    rows = []
    for length in (1, 2, 3, 5, 9, 14, 20, 31):
        ids = torch.randint(0, 512, (length,), generator=numbers)
        ids[1::5], ids[2::5] = 3, 4  # the trained rows of the vocabulary
        rows.append({"input_ids": ids.tolist(), "labels": ids.tolist(), "length": length})
    packed = pack(Dataset.from_list(rows), 32, 0)
    total = sum(len(row["input_ids"]) - 1 for row in rows)

    def run(batches: list[list[dict[str, object]]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        losses = []
        for batch in batches:
            (whole,) = split(Collator(pad_token_id=11)(batch), None)
            losses.append(Figures.of(model, whole).loss / total)
            losses[-1].backward()
        return sum(loss.item() for loss in losses), gradients(model)

    alone = run([[row] for row in rows])
    assert len(packed) < len(rows) / 2
    assert_same(run([list(packed)]), alone)
    assert_same(run([[row] for row in packed]), alone)
    assert_same(run([rows]), alone)  # padded


def test_a_row_knows_its_length() -> None:
    assert row_lengths(rows_of([3, 1, 7]).select([2, 0])).tolist() == [7, 3]
    assert row_lengths(pack(rows_of([3, 1, 7]), 8, 0)).sum() == 11
