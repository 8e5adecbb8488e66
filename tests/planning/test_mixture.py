"""The course of a run whose sources are mixed, stage after stage."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import numpy as np
import pytest

from mamba_sft import Recipe
from mamba_sft.data.mixing import Pieces
from mamba_sft.errors import DataError, RecipeError
from mamba_sft.planning.mixture import Mixture, _Packer, _Planner, plan_mixture

RNG = np.random.default_rng(0)
LENGTHS = {"short": RNG.integers(5, 60, 300), "long": RNG.integers(20, 400, 100)}
PIECES = Pieces(
    np.repeat([0, 1], [300, 100]), np.concatenate([*LENGTHS.values()]), np.full(400, np.nan)
)  # fmt: skip


def recipe(
    *, mixture: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **train: Any
) -> Recipe:
    sources = [{"id": name, "path": f"{name}.jsonl"} for name in LENGTHS]
    section = {"sources": sources, "max_length": 400, "mixture": mixture or {}} | (data or {})
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return Recipe.build(output_dir="run", model={"base": "b"}, data=section, train=defaults | train)


def read(mixture: Mixture, first: int, last: int) -> np.ndarray:
    """The rows of steps `first` to `last`, from 1."""
    ends = np.concatenate([[0], np.cumsum(mixture.counts)])
    start, end = mixture.course.starts[first - 1], mixture.course.starts[last]
    return mixture.pieces[ends[start] : ends[end]]


STAGES = [
    {"until": 0.5, "max_length": 64, "sources": {"short": 0.75, "long": 0.25}},
    {"sources": {"long": 1.0}},
]


def test_stages_end_at_their_share_of_the_steps_and_keep_their_length_and_shares() -> None:
    mixture = plan_mixture(recipe(max_steps=20, stages=STAGES), PIECES)
    first, second = mixture.stages
    assert (first.first, first.last, second.first, second.last) == (1, 10, 11, 20)
    assert PIECES.length[read(mixture, 1, 10)].max() <= 64
    assert max(mixture.lengths[: mixture.course.starts[10]]) <= 64
    total = sum(first.tokens.values())
    assert first.tokens["short"] / total == pytest.approx(0.75, abs=0.05)
    assert set(second.tokens) == {"long"}
    assert set(PIECES.source[read(mixture, 11, 20)]) == {1}
    assert mixture.course.sizes.tolist() == [4] * 20
    assert mixture.course.tokens.sum() == mixture.lengths.sum() == PIECES.length[mixture.pieces].sum()


def test_packed_rows_are_well_filled_and_none_is_too_long() -> None:
    mixture = plan_mixture(recipe(max_steps=20), PIECES)
    assert mixture.lengths.max() <= 400
    assert mixture.lengths.mean() > 0.9 * 400


def test_a_run_of_epochs_reads_so_many_tokens() -> None:
    mixture = plan_mixture(recipe(num_train_epochs=1.5), PIECES)
    wanted = 1.5 * PIECES.length.sum()
    assert wanted <= mixture.course.tokens.sum() <= wanted + 4 * 400
    assert mixture.course.epochs[-1] == pytest.approx(1.5, abs=0.1)


def test_the_same_seed_gives_the_same_course_and_processes_share_out_more_rows() -> None:
    one, same = (plan_mixture(recipe(max_steps=6, stages=STAGES), PIECES) for _ in range(2))
    assert one.pieces.tolist() == same.pieces.tolist()
    four = plan_mixture(recipe(max_steps=6), PIECES, processes=4)
    assert four.course.sizes.tolist() == [16] * 6


def test_rows_that_a_stage_did_not_come_to_keep_their_turn() -> None:
    """They were packed with others that were read, and are dealt next, in the order they had."""
    planner = _Planner(recipe(max_steps=4), PIECES, 1)
    packer = _Packer(planner, planner.dealer.stage({0: 1.0}), 400, np.random.default_rng(0))
    taken = [piece for rows in packer.take(3) for piece in rows]
    left = [packer.seen[row] for row in sorted(row for rows in packer.ready for row in rows)]
    assert len(left) + len(taken) == len(packer.seen) > 300, "some of them twice"
    assert left != sorted(left)
    packer.put_back()
    assert list(islice(planner.dealer.stage({0: 1.0}), len(left))) == left
    first = [piece for piece in packer.seen[:300] if piece not in taken]
    assert [piece for piece in left if piece not in taken][: len(first)] == first, "as they were dealt"


def test_a_curriculum_goes_from_short_to_long_rows() -> None:
    mixture = plan_mixture(recipe(mixture={"curriculum": "length"}, max_steps=8), PIECES)
    means = [PIECES.length[read(mixture, step, step)].mean() for step in (1, 8)]
    assert means[0] < means[1]


def test_without_packing_each_row_stays_by_itself() -> None:
    mixture = plan_mixture(recipe(data={"packing": False}, max_steps=5), PIECES)
    assert set(mixture.counts) == {1}
    assert mixture.lengths.tolist() == PIECES.length[mixture.pieces].tolist()


def test_sources_that_are_read_up_end_the_run() -> None:
    limited = [{"id": name, "path": f"{name}.jsonl", "max_epochs": 1.0} for name in LENGTHS]
    mixture = plan_mixture(recipe(data={"sources": limited}, num_train_epochs=3.0), PIECES)
    assert sorted(mixture.pieces) == list(range(400))
    assert mixture.passes == {"short": 1.0, "long": 1.0}


def test_a_batch_that_grows_grows_in_a_mixture_too() -> None:
    ramp = {"from": 2, "to": 8, "tokens": 5000}
    mixture = plan_mixture(recipe(gradient_accumulation_steps=None, batch_ramp=ramp, max_steps=12), PIECES)
    sizes = mixture.course.sizes
    assert (sizes[0], sizes[-1]) == (2, 8)
    assert (np.diff(sizes) >= 0).all()


def test_a_stage_whose_rows_are_all_too_long_is_refused() -> None:
    stages = [{"until": 0.5, "max_length": 10, "sources": {"long": 1.0}}, {}]
    with pytest.raises(DataError, match=r"stage 1 .* reads `long`, which has no row of at most 10 tokens"):
        plan_mixture(recipe(max_steps=10, stages=stages), PIECES)


def test_a_source_without_rows_is_told_where_there_are_no_stages() -> None:
    lacking = Pieces(PIECES.source[:300], PIECES.length[:300], PIECES.difficulty[:300])
    with pytest.raises(DataError) as caught:
        plan_mixture(recipe(max_steps=10), lacking)
    assert caught.value.message.startswith("`data.mixture` reads `long`, which has no row")
    assert "stage" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([{"until": 0.5}], "must be left out in the last stage"),
        ([{}, {}], "needs `until`"),
        ([{"until": 0.5}, {"until": 0.4}, {}], "must be above that of the stage before, 0.5"),
        ([{"max_length": 500}], "must be at most `data.max_length`"),
        ([{"sources": {"shrot": 1.0}}], "did you mean `short`"),
        ([{"sources": {"short": 0.0}}], "must have a weight above 0"),
        ([{"curriculum": "difficulty"}], "does not say which"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        recipe(stages=stages)


def test_sources_of_a_mixture_have_names_of_their_own() -> None:
    sources = [{"path": "a/chats.jsonl"}, {"path": "b/chats.parquet"}]
    with pytest.raises(RecipeError, match=r"several called `chats`"):
        recipe(data={"sources": sources})
    with pytest.raises(RecipeError, match="a limit within a mixture"):
        Recipe.build(
            output_dir="r", model={"base": "b"}, data={"sources": [{"path": "a.jsonl", "max_epochs": 2.0}]}
        )
