"""The verb `eval` on lm-eval's own tasks, with data sets made on the spot and nothing to reach."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.errors import UsageError
from mamba_sft.evaluation.harness import Harness
from mamba_sft.evaluation.leaderboards import MATH_PARTS, MUSR_CHOICES
from mamba_sft.evaluation.normalisation import rescale
from mamba_sft.evaluation.results import Results
from mamba_sft.evaluation.settings import Settings
from mamba_sft.evaluation.suite_names import find_tasks
from mamba_sft.inference.chat_model import load_chat_model
from mamba_sft.inference.model_places import find_place
from mamba_sft.merging.merge_run import merge
from mamba_sft.run import Run
from mamba_sft.run_contents import strangers
from tests.evaluation import fixture_data

MUSR = [f"leaderboard_musr_{part}" for part in MUSR_CHOICES]
SHORT = "leaderboard_musr,leaderboard_math_algebra_hard"


def run_eval(*words: object) -> Any:
    done = CliRunner().invoke(app, ["eval", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def scores(file: Path) -> dict[str, dict[str, list[float]]]:
    tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    return {
        task: {metric: one["totals"] for metric, one in found["metrics"].items()}
        for task, found in tasks.items()
    }


def columns(file: Path) -> dict[str, float]:
    return {one["title"]: one["value"] for one in json.loads(file.read_text(encoding="utf-8"))["columns"]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_score_is_what_one_computes_by_hand(reachable: Path, scored_base: Path, out: Path) -> None:
    drawn = random.getstate()
    run_eval(scored_base, "--tasks", "leaderboard_musr", "--data-dir", reachable, "--output", out)
    assert random.getstate() == drawn
    (file,) = out.glob("*.json")
    model = load_chat_model(scored_base, needs_template=False)
    for split in MUSR_CHOICES:
        rows = (reachable / f"TAUR-Lab/MuSR/default/{split}.jsonl").read_text().splitlines()
        expected = []
        for row in map(json.loads, rows):
            answers = json.loads(row["choices"].replace("'", '"'))
            listed = "".join(f"{i + 1} - {answer}\n" for i, answer in enumerate(answers))
            prompt = f"{row['narrative']}\n\n{row['question']}\n\n{listed}\nAnswer:"
            likely = [likelihood(model, prompt, f" {answer}") / len(answer) for answer in answers]
            expected.append(float(likely.index(max(likely)) == row["answer_index"]))
        assert scores(file)[f"leaderboard_musr_{split}"]["acc_norm,none"] == expected
    everything = [x for task in MUSR for x in scores(file)[task]["acc_norm,none"]]
    assert 0 < sum(everything) < len(everything)  # else it would say little


def likelihood(model: Any, prompt: str, answer: str) -> float:
    """The log-likelihood of an answer, in one forward of the whole text."""
    begin = model.tokenizer.encode(prompt)
    ids = torch.tensor([model.tokenizer.encode(prompt + answer)])
    with torch.no_grad():
        logits = model.model(ids).logits[0, len(begin) - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, ids[0, len(begin) :, None]).sum())


def test_batches_and_merging_change_no_score(reachable: Path, scored_run: Run, out: Path) -> None:
    asked = ("--tasks", f"{SHORT},leaderboard_ifeval", "--data-dir", reachable, "--limit", 2)
    run_eval(scored_run.path, *asked, "--batch-size", 1, "--output", out / "one")
    run_eval(scored_run.path, *asked, "--batch-size", 8, "--output", out / "eight")
    if not scored_run.merged.is_dir():
        merge(scored_run)
    run_eval(scored_run.merged, *asked, "--output", out / "merged")
    one, eight, merged = (next((out / name).glob("*.json")) for name in ("one", "eight", "merged"))
    assert scores(one) == scores(eight) == scores(merged)
    whole = [json.loads(file.read_text()) for file in (one, eight, merged)]
    assert whole[0]["model"]["fingerprint"] == whole[1]["model"]["fingerprint"]
    assert whole[0]["model"]["fingerprint"] != whole[2]["model"]["fingerprint"]
    assert whole[0]["settings"] == whole[1]["settings"]
    assert all(one["partial"] for one in whole)


def test_base_and_tuned_are_compared_on_the_same_documents(
    reachable: Path, scored_run: Run, out: Path
) -> None:
    asked = (scored_run.path, "--tasks", "leaderboard_musr", "--data-dir", reachable, "--output", out)
    done = run_eval(*asked, "--base", "auto")
    name = "tasks-leaderboard_musr"
    tuned, base = (Results.read(out / f"{name}{end}") for end in (".json", ".base.json"))
    assert (tuned.model["role"], base.model["role"]) == ("tuned", "base")
    assert tuned.scored[MUSR[0]].documents == base.scored[MUSR[0]].documents
    assert tuned.scored[MUSR[0]].prompts == base.scored[MUSR[0]].prompts  # one template for both
    (column,) = json.loads((out / f"{name}.json").read_text())["compared"]["columns"]
    right = [
        sum(sum(side.scored[task].metrics["acc_norm,none"].totals) for task in MUSR) for side in (base, tuned)
    ]
    assert column["raw"] == pytest.approx((right[1] - right[0]) / 9)
    assert "95 % interval" in done.stdout
    with_file = run_eval(*asked, "--against", out / f"{name}.base.json", "--resume")
    with pytest.raises(UsageError, match="has results of tasks-leaderboard_musr: nothing to compare heldout"):
        run_eval(scored_run.path, "--suite", "heldout", "--against", out / f"{name}.base.json")
    assert with_file.stdout.splitlines()[-4:-1] == done.stdout.splitlines()[-5:-2]  # the same comparison


def test_a_run_that_was_stopped_goes_on_after_the_last_task(
    reachable: Path, scored_base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (scored_base, "--tasks", "leaderboard_musr", "--data-dir", reachable, "--output", out)
    measured: list[str] = []
    real = Harness.measure

    def stopped(self: Harness, model: Any, tasks: list[str], *more: Any) -> Iterator[Any]:
        for scored in real(self, model, tasks, *more):
            measured.append(scored.task)
            yield scored
            if len(measured) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Harness, "measure", stopped)
    assert CliRunner().invoke(app, ["eval", *map(str, asked)]).exit_code != 0
    (file,) = out.glob("*.json")
    assert list(scores(file)) == measured == MUSR[:1]
    assert json.loads(file.read_text())["complete"] is False
    with pytest.raises(UsageError, match="has results of the same model and settings, 1 task\\n"):
        run_eval(*asked)
    with pytest.raises(UsageError, match="max_length: 2048 there, 1000 now"):
        run_eval(*asked, "--resume", "--max-length", 1000)
    done = run_eval(*asked, "--resume")
    assert measured == MUSR
    assert json.loads(file.read_text())["complete"] is True
    again = run_eval(*asked, "--resume")  # nothing is left to do: what is there is shown
    assert again.stdout == done.stdout
    assert measured == MUSR


def test_all_problems_are_told_at_once(
    reachable: Path, scored_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    words = (
        scored_base, "--suite", "leaderboard-v2", "--check", "--data-dir", tmp_path / "absent",
        "--base", "no/where", "--max-length", "1024", "--chat-template", "on",
    )  # fmt: skip
    with pytest.raises(UsageError) as told:
        run_eval(*words)
    message = told.value.message
    for part in (
        "`no/where` is not a directory here",
        "has no chat template, and `--chat-template on` asks for it",
        "`--data-dir {}`: no such directory".format(tmp_path / "absent"),
        "the data set `TIGER-Lab/MMLU-Pro` of `leaderboard_mmlu_pro`",
        "the data set `Idavidrein/gpqa` of `leaderboard_gpqa_diamond`",
        "`--max-length 1024` leaves no room for a prompt: answers of `leaderboard_ifeval` have up to 1,280",
        "`leaderboard_ifeval` counts sentences with nltk's `punkt_tab`",
    ):
        assert part in message
    assert told.value.exit_code == 2
    assert not (tmp_path / "evaluations").exists()


def test_a_gated_data_set_says_how_to_get_in(
    reachable: Path, scored_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(path: str, *more: Any, **named: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    gated = "the data set `Idavidrein/gpqa` of `leaderboard_gpqa_main` is gated"
    with pytest.raises(UsageError, match=gated) as told:
        run_eval(scored_base, "--tasks", "leaderboard_gpqa_main", "--check")
    assert told.value.hint == (
        "accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa, then `hf auth login`"
    )


def test_a_missing_extra_is_told_with_the_command(
    scored_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mamba_sft.evaluation import preflight

    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "langdetect" else object())
    monkeypatch.chdir(tmp_path)
    missing = "packages are missing that run `leaderboard-v2`: `langdetect`"
    with pytest.raises(UsageError, match=missing) as told:
        run_eval(scored_base, "--suite", "leaderboard-v2")
    assert told.value.hint == 'pip install "mamba-sft[eval]"'


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--suite", "leaderbord-v2"], "no suite `leaderbord-v2`", "did you mean `leaderboard-v2`"),
        (["--tasks", "leaderboard_museer"], "no task `leaderboard_museer`", "`leaderboard_musr`"),
        (["--tasks", "gsm8k:few"], "`few` is no number of shots", "gsm8k:8"),
        (["--tasks", "absent.yaml"], "no file `.*absent.yaml`", "YAML"),
        ([], "say what to score on", "--suite leaderboard-v2"),
        (["--suite", "leaderboard-v1", "--limit", "0"], "`--limit 0` is not 1 or more", ""),
        (["--suite", "leaderboard-v1", "--chat-template", "maybe"], "`--chat-template maybe`", ""),
        (["--suite", "leaderboard-v1", "--against", "absent.json"], "no results at `absent.json`", ""),
        (["--suite", "leaderboard-v1", "--resume", "--overwrite"], "`--resume` goes on", "give one"),
        (["--suite", "leaderboard-v1", "--data", "a"], "nothing reads `--data a`", "`--data-dir`"),
        (["--suite", "heldout", "--chat-template", "on"], "nothing reads `--chat-template on`", ""),
        (["--suite", "leaderboard-v1", "--math-metric", "verify"], "is for `leaderboard-v2`", ""),
        (["--suite", "leaderboard-v2", "--include-path", "."], "is for `--tasks`", ""),
    ],
)  # fmt: skip
def test_wrong_words(reachable: Path, scored_base: Path, words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as told:
        run_eval(scored_base, *words)
    assert hint in (told.value.hint or "")


def test_checks_load_no_torch(data: Path, scored_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    import subprocess
    import sys

    code = (
        "import sys; from mamba_sft.cli.app import app;"
        f"sys.argv = ['mamba-sft', 'eval', {str(scored_base)!r}, '--suite', 'leaderboard-v2', '--check',"
        f" '--data-dir', {str(data)!r}, '--max-length', '9'];"
        "\ntry: app()\nexcept Exception as error: print(error)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "leaves no room for a prompt" in done.stdout


def test_results_go_into_the_run_and_are_known_there(reachable: Path, scored_run: Run) -> None:
    run_eval(
        scored_run.path,
        "--tasks",
        "leaderboard_musr:1",
        "--limit",
        1,
        "--save-samples",
        "--data-dir",
        reachable,
    )
    name = "tasks-leaderboard_musr-1.limit-1"
    assert {path.name for path in scored_run.eval.iterdir()} == {f"{name}.json", f"{name}.samples"}
    samples = (scored_run.eval / f"{name}.samples" / f"{MUSR[0]}.jsonl").read_text().splitlines()
    (sample,) = map(json.loads, samples)
    assert sample["prompt"].count("Answer:") == 2  # one shot and the question
    assert "<|im_start|>" in sample["prompt"]
    assert (sample["choices"], len(sample["answers"])) == (["the red one", "the blue one"], 2)
    assert not [each for each in strangers(scored_run) if each.startswith("eval")]
    assert not list(Path.cwd().glob("evaluations"))


def test_a_task_of_ones_own(reachable: Path, scored_base: Path, tmp_path: Path, out: Path) -> None:
    rows = [{"q": "1+1", "a": "two"}, {"q": "2+2", "a": "four"}, {"q": "2+2", "a": "four"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"""
task: my_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}} ="
doc_to_choice: [two, four]
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    asked = (scored_base, "--tasks", "mine.yaml", "--output", out)
    run_eval(*asked)
    found = Results.read(out / "tasks-mine.json").scored["my_sums"]
    assert len(set(found.documents)) == 3  # the same document twice is two documents
    assert found.documents[2] == f"{found.documents[1]}#2"
    assert set(found.metrics) == {"acc,none"}
    with pytest.raises(UsageError, match="has results of the same model and settings"):
        run_eval(*asked, "--check")  # which tells all that is in the way
    text = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("}} =", "}} is"))
    with pytest.raises(UsageError, match=r"suite\.files\.mine: "):  # what was asked is not asked now
        run_eval(*asked, "--resume")
    (tmp_path / "two.yaml").write_text(text.replace("my_sums", "two").replace("sums.jsonl", "gone.jsonl"))
    with pytest.raises(UsageError, match=r"the files of `.*two\.yaml` cannot be read") as told:
        run_eval(scored_base, "--tasks", "mine.yaml,two.yaml", "--output", out)
    assert f"below `{tmp_path}`" in (told.value.hint or "")


def test_what_is_no_mean_has_a_column_for_each_task_of_a_group() -> None:
    suite = Harness("tasks-lambada", [])
    for name in ("one", "two"):
        suite._tasks[name] = _Perplexing()
    columns = list(suite._columns_of("lambada", ["one", "two"]))
    assert [(one.title, one.tasks) for one in columns] == [
        ("one perplexity", ("one",)),
        ("two perplexity", ("two",)),
        ("lambada acc", ("one", "two")),
    ]


class _Perplexing:
    """A task as lm-eval makes them, with a metric that is no mean over documents."""

    def aggregation(self) -> dict[str, Any]:
        from lm_eval.api.metrics import mean, perplexity

        return {"perplexity": perplexity, "acc": mean}

    def higher_is_better(self) -> dict[str, bool]:
        return {"perplexity": False, "acc": True}


@pytest.mark.slow
def test_the_second_leaderboard(reachable: Path, scored_run: Run, out: Path) -> None:
    fixture_data.write_v2(reachable)
    done = run_eval(scored_run.path, "--suite", "leaderboard-v2", "--data-dir", reachable, "--output", out)
    found = scores(out / "leaderboard-v2.json")
    assert len(found) == 39
    assert {len(one) for task, one in found.items() if "bbh" in task} == {1}
    values = columns(out / "leaderboard-v2.json")
    musr = [
        rescale(sum(found[task]["acc_norm,none"]) / 3, 1 / count)
        for task, count in zip(MUSR, MUSR_CHOICES.values(), strict=True)
    ]
    assert values["MuSR"] == pytest.approx(sum(musr) / 3)
    gpqa = [
        x
        for part in ("diamond", "extended", "main")
        for x in found[f"leaderboard_gpqa_{part}"]["acc_norm,none"]
    ]
    assert values["GPQA"] == pytest.approx(rescale(sum(gpqa) / len(gpqa), 1 / 4))
    assert len(gpqa) == 15
    math = [found[f"leaderboard_math_{part}_hard"]["exact_match_original,none"] for part in MATH_PARTS]
    assert [len(one) for one in math] == [2] * 7  # the easy ones are not asked
    average = json.loads((out / "leaderboard-v2.json").read_text())["average"]
    assert average == pytest.approx(sum(values.values()) / 6)
    titles, ours, published, _ = done.stdout.splitlines()[1:5]
    assert titles.split() == ["IFEval", "BBH", "MATH", "Lvl", "5", "GPQA", "MuSR", "MMLU-Pro", "Average"]
    assert ours.split()[-1] == f"{average:.2f}"
    assert published.split()[-1] == "15.04"


@pytest.mark.slow
def test_the_first_leaderboard_shows_as_many_examples_as_it_did(
    reachable: Path, scored_base: Path, out: Path
) -> None:
    fixture_data.write_v1(reachable)
    run_eval(
        scored_base, "--suite", "leaderboard-v1", "--data-dir", reachable, "--output", out, "--save-samples",
        "--max-length", 100_000,
    )  # fmt: skip
    found = scores(out / "leaderboard-v1.json")
    assert len(found) == 5 + 57
    marks = {
        "arc_challenge": "Answer:", "hellaswag": "Cooking:", "winogrande": "The cup", "gsm8k": "Answer:",
        "mmlu_anatomy": "Answer:", "mmlu_world_religions": "Answer:",
    }  # fmt: skip
    shots = {}
    for task, mark in marks.items():
        sample = (out / "leaderboard-v1.samples" / f"{task}.jsonl").read_text().splitlines()[0]
        shots[task] = json.loads(sample)["prompt"].count(mark) - 1
    assert shots == {
        "arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "gsm8k": 5, "mmlu_anatomy": 5,
        "mmlu_world_religions": 5,
    }  # fmt: skip
    assert Results.read(out / "leaderboard-v1.json").scored["truthfulqa_mc2"].shots == 0
    mmlu = [sum(one["acc,none"]) / 2 for task, one in found.items() if task.startswith("mmlu_")]
    assert columns(out / "leaderboard-v1.json")["MMLU"] == pytest.approx(100 * sum(mmlu) / 57)


def test_documents_that_are_shuffled_come_from_the_seed_and_stay(
    reachable: Path, scored_base: Path, tmp_path: Path
) -> None:
    fixture_data.write_gpqa(tmp_path)

    def prepared(text: str) -> Any:
        suite: Any = find_tasks(text)
        suite.prepare(find_place(scored_base), Settings(data_dir=tmp_path))
        return suite._tasks["leaderboard_gpqa_extended"]

    def right_answers(task: Any) -> list[str]:
        return [doc["answer"] for doc in task.eval_docs]

    drawn = random.getstate()
    task = prepared("leaderboard_gpqa_extended")
    first = right_answers(task)
    assert len(set(first)) > 1
    assert right_answers(task) == first  # as it is asked, and as it is scored
    assert right_answers(prepared("leaderboard_gpqa_main,leaderboard_gpqa_extended")) == first
    assert random.getstate() == drawn  # what a caller draws is the caller's
