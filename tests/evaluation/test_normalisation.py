"""Scores to the figures of a card: published counts, the examples of the documentation, what is missing."""

from __future__ import annotations

from math import exp, inf, sqrt
from pathlib import Path

import pytest

from mamba_sft.evaluation.leaderboards import (
    BBH_CHOICES,
    GPQA,
    MATH_PARTS,
    MUSR_CHOICES,
    V1,
    V2,
    columns_of,
)
from mamba_sft.evaluation.normalisation import Column, Figure, Pool, average, figure, rescale
from mamba_sft.evaluation.scores import Scores, TaskScores

COLUMNS = {column.title: column for column in columns_of(V2, "original", [])}


def task(name: str, metric: str, values: list[float], **more: list[float]) -> TaskScores:
    metrics = {metric: Scores.of(values)} | {key: Scores.of(other) for key, other in more.items()}
    keys = tuple(f"{name}-{i}" for i in range(len(values)))
    return TaskScores(name, 0, keys, keys, metrics)


def marks(right: int, count: int) -> list[float]:
    return [1.0] * right + [0.0] * (count - right)


def shared_out(right: int, sizes: dict[str, int], metric: str) -> dict[str, TaskScores]:
    """Tasks of these sizes with so many right answers among them all, the first tasks having them."""
    found = {}
    for name, size in sizes.items():
        here = min(right, size)
        found[name] = task(name, metric, marks(here, size))
        right -= here
    return found


def test_the_published_math_is_a_count_over_all_parts() -> None:
    names = [f"leaderboard_math_{part}_hard" for part in MATH_PARTS]
    sizes = dict(zip(names, [307, 123, 132, 280, 154, 193, 135], strict=True))
    found = figure(COLUMNS["MATH Lvl 5"], shared_out(48, sizes, "exact_match_original,none"))
    assert found is not None
    assert found.n == 1324
    assert round(found.value, 2) == 3.63 == V2.published["Falcon-Mamba-7B"][2]


def test_the_published_gpqa_is_pooled_and_then_rescaled() -> None:
    sizes = dict(zip(GPQA, [198, 546, 448], strict=True))
    scored = shared_out(370, sizes, "acc_norm,none")
    found = figure(COLUMNS["GPQA"], scored)
    assert found is not None
    assert found.n == 1192
    assert round(found.value, 2) == 8.05 == V2.published["Falcon-Mamba-7B"][3]
    each = [rescale(scored[name].metrics["acc_norm,none"].mean, 1 / 4) for name in GPQA]
    assert sum(each) / 3 != pytest.approx(found.value, abs=1)  # the mean of the parts is another figure


@pytest.mark.parametrize(
    ("title", "right", "of"),
    [("ARC", 727, 1172), ("HellaSwag", 8116, 10042), ("Winogrande", 933, 1267), ("GSM8K", 693, 1319)],
)
def test_the_first_leaderboard_counts_right_answers(title: str, right: int, of: int) -> None:
    columns = columns_of(V1, "original", [f"mmlu_{i}" for i in range(57)])
    (place,) = [i for i, column in enumerate(columns) if column.title == title]
    (pool,) = columns[place].pools
    found = figure(columns[place], {pool.tasks[0]: task(pool.tasks[0], pool.metric, marks(right, of))})
    assert found is not None
    assert round(found.value, 2) == V1.published["Falcon-Mamba-7B"][place]


@pytest.mark.parametrize("board", [V1, V2], ids=lambda board: board.name)
def test_the_published_averages_are_means_of_the_columns(board: object) -> None:
    *values, published = board.published["Falcon-Mamba-7B"]  # type: ignore[attr-defined]
    given = [(Column("x", ()), Figure(value, value, None, 1, 0)) for value in values]
    found = average(given)
    assert found is not None
    assert round(found, 2) == published


def test_the_examples_of_the_documentation() -> None:
    assert round(rescale(0.6, 0.25), 2) == 46.67
    parts = dict(zip(MUSR_CHOICES, (0.7, 0.4, 0.6), strict=True))
    scored = {
        f"leaderboard_musr_{part}": task(
            f"leaderboard_musr_{part}", "acc_norm,none", marks(round(share * 10), 10)
        )
        for part, share in parts.items()
    }
    found = figure(COLUMNS["MuSR"], scored)
    assert found is not None
    assert found.value == pytest.approx(35.0)


def test_worse_than_guessing_is_cut_off_in_each_part_by_itself() -> None:
    names = [f"leaderboard_musr_{part}" for part in MUSR_CHOICES]
    scored = {
        name: task(name, "acc_norm,none", marks(count, 10))
        for name, count in zip(names, (0, 10, 10), strict=True)
    }
    found = figure(COLUMNS["MuSR"], scored)
    assert found is not None
    assert found.value == pytest.approx(200 / 3)  # and not (-100 + 100 + 100) / 3
    assert found.raw == pytest.approx(2 / 3)


def test_bbh_weighs_its_parts_alike_whatever_their_size() -> None:
    scored = {}
    for i, part in enumerate(BBH_CHOICES):
        name = f"leaderboard_bbh_{part}"
        scored[name] = task(name, "acc_norm,none", marks(10 * (i == 0), 10 if i == 0 else 250))
    found = figure(COLUMNS["BBH"], scored)
    assert found is not None
    assert found.value == pytest.approx(100 / 24)


def test_ifeval_is_the_mean_of_both_counts_and_its_error_counts_a_document_once() -> None:
    keys = tuple("abcd")
    prompt, inst = Scores.of([1, 0, 0, 1]), Scores((1, 1, 0, 2), (1, 2, 1, 2))
    metrics = {"prompt_level_strict_acc,none": prompt, "inst_level_strict_acc,none": inst}
    scored = {"leaderboard_ifeval": TaskScores("leaderboard_ifeval", 0, keys, keys, metrics)}
    found = figure(COLUMNS["IFEval"], scored)
    assert found is not None
    assert found.stderr is not None
    assert found.value == pytest.approx(100 * (1 / 2 + 4 / 6) / 2)
    each = [
        50 * ((x - 0.5) / 4 + (t - 4 / 6 * w) / 6)
        for x, t, w in zip(prompt.totals, inst.totals, inst.weights, strict=True)
    ]
    assert found.stderr == pytest.approx(sqrt(sum(x * x for x in each) * 4 / 3))


def test_a_missing_part_leaves_the_column_and_the_average_blank() -> None:
    names = [f"leaderboard_musr_{part}" for part in MUSR_CHOICES]
    scored = {name: task(name, "acc_norm,none", marks(5, 10)) for name in names[:2]}
    assert figure(COLUMNS["MuSR"], scored) is None
    there = Figure(50.0, 0.5, None, 1, 0)
    assert average([(COLUMNS["BBH"], there), (COLUMNS["MuSR"], None)]) is None


def test_the_standard_error_of_a_rescaled_score_is_stretched_like_the_score() -> None:
    scored = {name: task(name, "acc_norm,none", marks(5, 10)) for name in GPQA}
    found = figure(COLUMNS["GPQA"], scored)
    assert found is not None
    assert found.stderr is not None
    raw = Scores.of(marks(15, 30)).stderr
    assert raw == pytest.approx(sqrt(0.25 * 30 / 29 / 30))
    assert found.stderr == pytest.approx(raw * 100 / 0.75)


def test_numbers_and_perplexities_are_shown_as_they_are() -> None:
    losses = TaskScores("rows", 0, ("a", "b"), ("a", "b"), {"loss": Scores((6.0, 2.0), (3.0, 1.0))})
    loss = figure(Column("loss", (Pool(("rows",), "loss"),), kind="number"), {"rows": losses})
    assert loss is not None
    assert (loss.value, loss.stderr) == (2.0, 0.0)  # each row loses 2 a token
    perplexity = figure(Column("ppl", (Pool(("rows",), "loss"),), kind="perplexity"), {"rows": losses})
    assert perplexity is not None
    assert perplexity.value == pytest.approx(exp(2))


def test_a_loss_that_no_perplexity_can_be_made_of_is_told_all_the_same() -> None:
    losses = TaskScores("rows", 0, ("a", "b"), ("a", "b"), {"loss": Scores((999.0, 998.0), (1.0, 1.0))})
    found = figure(Column("ppl", (Pool(("rows",), "loss"),), kind="perplexity"), {"rows": losses})
    assert found is not None
    assert (found.value, found.raw) == (inf, 998.5)


def test_one_document_has_no_standard_error() -> None:
    assert Scores.of([1.0]).stderr is None
    found = figure(Column("x", (Pool(("t",), "acc"),)), {"t": task("t", "acc", [1.0])})
    assert found is not None
    assert found.stderr is None


def test_scores_come_back_as_they_were_written() -> None:
    metrics = {"acc": Scores.of([1.0, 0.0]), "loss": Scores((1.5, 2.5), (3.0, 4.0))}
    before = TaskScores("t", 3, ("a", "b"), ("p", "q"), metrics, {"f1": (0.5, None)}, 1.5)
    assert TaskScores.from_json("t", before.to_json()) == before
    broken = before.to_json() | {"documents": ["a"]}
    with pytest.raises(ValueError, match="2 scores of 1 documents"):
        TaskScores.from_json("t", broken)


def test_the_choices_of_bbh_are_those_of_lm_eval() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval.tasks._yaml_loader import load_yaml

    place = Path(tasks.__file__).parent / "leaderboard/bbh_mc"
    files = {path.stem: load_yaml(path, resolve_func=False) for path in place.glob("[!_]*.yaml")}
    assert {name: len(one["doc_to_choice"]) for name, one in files.items()} == BBH_CHOICES
