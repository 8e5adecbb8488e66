"""Rows dealt out in shares, by chance or from easy to hard."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_sft.data.mixing import Dealer, Pieces, shares


def pieces(*lengths: list[int], difficulty: list[float] | None = None) -> Pieces:
    """Rows of sources 0, 1, ...: the lengths of each."""
    flat = np.array([length for source in lengths for length in source])
    source = np.repeat(np.arange(len(lengths)), [len(source) for source in lengths])
    hard = np.full(len(flat), np.nan) if difficulty is None else np.array(difficulty)
    return Pieces(source, flat, hard)


def dealer(rows: Pieces, *limits: float | None, by: str = "tokens") -> Dealer:
    count = int(rows.source.max()) + 1
    return Dealer(rows, limits or [None] * count, by=by, seed=1)


@given(
    lengths=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=20), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    by=st.sampled_from(["tokens", "rows"]),
)
def test_shares_are_kept_at_every_moment(lengths: list[list[int]], weights: list[float], by: str) -> None:
    rows = pieces(*lengths)
    wanted = {
        number: weight / sum(weights[: len(lengths)]) for number, weight in enumerate(weights[: len(lengths)])
    }
    taken = np.zeros(len(lengths))
    for piece in islice(dealer(rows, by=by).stage(wanted), 200):
        taken[rows.source[piece]] += rows.length[piece] if by == "tokens" else 1
        total = taken.sum()
        largest = 50 if by == "tokens" else 1
        for number, share in wanted.items():
            assert taken[number] <= share * total + largest
            assert taken[number] >= share * total - largest * len(lengths)


@given(count=st.integers(1, 30), passes=st.integers(1, 3))
def test_a_source_is_read_whole_before_a_row_of_it_comes_again(count: int, passes: int) -> None:
    rows = pieces([5] * count)
    order = list(islice(dealer(rows).stage({0: 1.0}), count * passes))
    for number in range(passes):
        assert sorted(order[number * count : (number + 1) * count]) == list(range(count))


def test_each_pass_has_an_order_of_its_own_and_the_same_seed_the_same() -> None:
    rows = pieces([5] * 20)
    order = list(islice(dealer(rows).stage({0: 1.0}), 40))
    assert order[:20] != order[20:]
    assert order == list(islice(dealer(rows).stage({0: 1.0}), 40))


def test_a_source_that_may_be_read_so_often_leaves_its_share_to_the_others() -> None:
    rows = pieces([10] * 4, [10] * 100)
    dealt = dealer(rows, 1.5, 1.0)
    order = list(dealt.stage({0: 0.5, 1: 0.5}))
    assert np.bincount(rows.source[order]).tolist() == [6, 100]
    assert dealt.passes == [1.5, 1.0]


def test_rows_that_are_too_long_wait_for_a_later_stage_and_come_first_there() -> None:
    rows = pieces([10, 90, 10, 90, 10])
    dealt = dealer(rows, 1.0)
    assert sorted(rows.length[list(dealt.stage({0: 1.0}, longest=50))]) == [10, 10, 10]
    assert rows.length[list(dealt.stage({0: 1.0}))].tolist() == [90, 90]


def test_a_stage_goes_on_where_the_one_before_stopped() -> None:
    rows = pieces([5] * 10)
    dealt = dealer(rows)
    first = list(islice(dealt.stage({0: 1.0}), 4))
    second = list(islice(dealt.stage({0: 1.0}), 6))
    assert sorted(first + second) == list(range(10))


def test_what_is_put_back_comes_next() -> None:
    rows = pieces([5] * 10)
    dealt = dealer(rows)
    stage = dealt.stage({0: 1.0})
    first = list(islice(stage, 5))
    dealt.put_back(first[3:])
    assert list(islice(stage, 2)) == first[3:]
    assert dealt.passes == [0.5]


@pytest.mark.parametrize(("curriculum", "expected"), [("length", [1, 2, 0]), ("difficulty", [2, 0, 1])])
def test_a_curriculum_goes_from_easy_to_hard(curriculum: str, expected: list[int]) -> None:
    rows = pieces([30, 10, 20], difficulty=[2.0, 3.0, 1.0])
    assert list(dealer(rows, 1.0).stage({0: 1.0}, curriculum=curriculum)) == expected


def test_a_temperature_weighs_sizes() -> None:
    rows = pieces([10] * 90, [10] * 10)
    both = {0: 1.0, 1: 1.0}
    assert shares(both, rows, by="tokens", temperature=None) == {0: 0.5, 1: 0.5}
    assert shares(both, rows, by="tokens", temperature=1.0) == pytest.approx({0: 0.9, 1: 0.1})
    assert shares(both, rows, by="rows", temperature=2.0) == pytest.approx({0: 0.75, 1: 0.25})
    assert shares({0: 1.0, 1: 3.0}, rows, by="tokens", temperature=1.0) == pytest.approx({0: 0.75, 1: 0.25})
    assert shares(both, rows, by="tokens", temperature=1e6)[1] == pytest.approx(0.5, abs=1e-3)


def test_a_source_without_rows_has_no_share() -> None:
    assert shares({0: 1.0, 1: 1.0}, pieces([10], []).up_to(5), by="tokens", temperature=None) == {}
