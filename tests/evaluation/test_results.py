"""Files of results: whole at every moment, gone on with where nothing differs; and their tables."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mamba_sft.errors import UsageError
from mamba_sft.evaluation.leaderboards import V2
from mamba_sft.evaluation.normalisation import Column, Pool
from mamba_sft.evaluation.paired import difference
from mamba_sft.evaluation.results import Results, begin, differing, finished
from mamba_sft.evaluation.scores import Scores, TaskScores
from mamba_sft.evaluation.table import differences_table, notes, scores_table, settings_text
from mamba_sft.run import Run, evaluation_place, result_file

COLUMNS = [
    Column(title, (Pool((title,), "acc"),)) for title in ("IFEval", "BBH", "MATH", "GPQA", "MuSR", "Pro")
]
SETTINGS = {"max_length": 2048, "limit": None, "suite": {"shots": {"BBH": 3}}}


def task(name: str, right: int, count: int = 4, prompt: str = "") -> TaskScores:
    keys = tuple(f"{name}{i}" for i in range(count))
    marks = Scores.of([1.0] * right + [0.0] * (count - right))
    return TaskScores(name, 0, keys, tuple(prompt + key for key in keys), {"acc": marks})


def results(*right: int, role: str = "tuned", fingerprint: str = "f", **settings: object) -> Results:
    model = {"name": f"runs/{role}", "role": role, "fingerprint": fingerprint}
    found = Results("leaderboard-v2", model, {**SETTINGS, **settings})
    for column, count in zip(COLUMNS, right, strict=False):
        found.scored[column.title] = task(column.title, count)
    found.fill(COLUMNS)
    return found


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "eval/leaderboard-v2.json"
    before = results(1, 2, 3, 4, 0, 1)
    before.write(path)
    after = Results.read(path)
    assert (after.suite, after.model, after.settings) == (before.suite, before.model, before.settings)
    assert after.scored == before.scored
    assert [(column.title, one) for column, one in after.figures] == [
        (column.title, one) for column, one in before.figures
    ]
    assert after.average == before.average == pytest.approx(100 * 11 / 24)
    assert json.loads(path.read_text())["version"] == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "mamba-sft evaluation", "version": 2}',
        '{"format": "other", "version": 1}',
    ],
)
def test_another_file_is_no_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=r"x\.json` does not hold results of `mamba-sft eval`"):
        Results.read(tmp_path / "x.json")


def test_a_count_that_no_integer_is_makes_it_no_results(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results(1).write(path)
    path.write_text(path.read_text().replace('"n": 4', '"n": Infinity', 1))
    with pytest.raises(UsageError, match=r"does not hold results .*: it is laid out otherwise"):
        Results.read(path)


def test_one_goes_on_where_nothing_differs(tmp_path: Path) -> None:
    path = tmp_path / "leaderboard-v2.json"
    assert begin(path, results(), resume=True, overwrite=False).scored == {}  # there is nothing to go on with
    results(1, 2).write(path)
    assert set(begin(path, results(), resume=True, overwrite=False).scored) == {"IFEval", "BBH"}
    assert begin(path, results(), resume=False, overwrite=True).scored == {}
    with pytest.raises(UsageError, match="has results of the same model and settings, 2 tasks"):
        begin(path, results(), resume=False, overwrite=False)
    results(1).write(path)
    with pytest.raises(UsageError, match=r"settings, 1 task\n"):
        begin(path, results(), resume=False, overwrite=False)


def test_what_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "leaderboard-v2.json"
    results(1, 2).write(path)
    other = results(fingerprint="g", max_length=1500, suite={"shots": {"BBH": 0}})
    with pytest.raises(UsageError) as told:
        begin(path, other, resume=True, overwrite=False)
    assert told.value.message.splitlines()[1:] == [
        "  - the model: it was runs/tuned with other weights or another template",
        "  - max_length: 2048 there, 1500 now",
        "  - suite.shots.BBH: 3 there, 0 now",
    ]
    assert list(differing({"a": 1}, {"b": {"c": 1}})) == [
        "a: 1 there, null now",
        'b: null there, {"c": 1} now',
    ]


def test_the_table_has_the_published_row_and_no_partial_mean() -> None:
    whole, broken = results(1, 2, 3, 4, 0, 1), results(1, 2, 3)
    table = scores_table([whole], V2.published)
    assert table.titles == ["", "IFEval", "BBH", "MATH", "GPQA", "MuSR", "Pro", "Average"]
    assert table.rows == [
        ["runs/tuned", "25.00", "50.00", "75.00", "100.00", "0.00", "25.00", "45.83"],
        ["Falcon-Mamba-7B (published)", "33.36", "19.88", "3.63", "8.05", "10.86", "14.47", "15.04"],
    ]
    assert scores_table([broken], {}).rows == [["runs/tuned", "25.00", "50.00", "75.00", "", "", "", ""]]
    assert notes([broken], []) == ["no average, since GPQA, MuSR, Pro is missing"]


def test_partial_numbers_are_marked_and_nothing_published_stands_beside_them() -> None:
    table = scores_table([results(1, 2, 3, 4, 0, 1, limit=4)], V2.published)
    assert table.rows == [
        ["runs/tuned", "25.00*", "50.00*", "75.00*", "100.00*", "0.00*", "25.00*", "45.83*"]
    ]
    (note,) = notes([results(1, limit=4)] * 2, [])[:1]
    assert note.startswith("* partial: at most 4 documents of each task")


def test_differences_are_told_with_what_makes_them_uncertain() -> None:
    before, after = {"BBH": task("BBH", 1)}, {"BBH": task("BBH", 3, prompt="<chat>")}
    pairs = [(COLUMNS[1], difference(COLUMNS[1], before, after)), (COLUMNS[2], None)]
    table = differences_table("base", "tuned", pairs)
    assert table.rows[0][:4] == ["BBH", "25.00", "75.00", "+50.00"]
    assert table.rows[0][4:] == ["-6.58 to +106.58", "+0.5000", "4"]
    assert table.rows[1] == ["MATH", "", "", "", "", "", ""]
    chance, prompts = notes([results(1, 2, 3, 4, 0, 1)], pairs)
    assert chance.startswith("at chance, where a score is cut off at 0: MuSR;")
    assert "different prompts" in prompts


def test_settings_that_two_models_do_not_share_are_told() -> None:
    one = results(1, 2, 3, 4, 1, 1)
    differs = list(differing({"quantization": "none"}, {"quantization": "nf4"}))
    one.compared = {"settings_that_differ": differs}
    (note,) = notes([one], [])
    assert note.endswith('were not scored alike: quantization: "none" there, "nf4" now')


def test_settings_are_one_line() -> None:
    one = results(1, chat_template=True, quantization="nf4", dtype="bfloat16")
    assert (
        settings_text(one) == "leaderboard-v2: chat template on, at most 2,048 tokens, held in nf4, bfloat16"
    )


def test_only_what_is_whole_is_shown_of_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "eval"
    results(1, 2, 3, 4, 0, 1).write(result_file(place, "leaderboard-v2"))
    results(1, 2, 3, 4, 0, 0, role="base").write(result_file(place, "leaderboard-v2", is_base=True))
    results(1, 2, 3, 4, 0, 1, limit=4).write(result_file(place, "leaderboard-v2", limit=4))
    results(1, 2).write(result_file(place, "leaderboard-v1"))
    (place / "heldout.json").write_text("{")
    (place / "mine.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        ((tuned, base),) = finished(place)
    assert (tuned.model["role"], base.model["role"], tuned.limit) == ("tuned", "base", None)
    assert [record.message for record in caplog.records if "heldout" in record.message]
    assert not [record.message for record in caplog.records if "mine" in record.message]
    assert finished(tmp_path / "absent") == []


def test_results_go_where_the_model_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path("runs/a"))
    for part in (run.merged, run.checkpoints / "checkpoint-20", Path("models/b")):
        part.mkdir(parents=True)
    run.recipe.write_text("")
    assert evaluation_place(run) == evaluation_place("runs/a") == run.eval
    assert evaluation_place("runs/a/merged") == run.path.resolve() / "eval/merged"
    assert evaluation_place("runs/a/checkpoints/checkpoint-20") == run.path.resolve() / "eval/checkpoint-20"
    assert evaluation_place("models/b") == Path("evaluations/b")
    assert evaluation_place("tiiuae/falcon-mamba-7b") == Path("evaluations/tiiuae--falcon-mamba-7b")
