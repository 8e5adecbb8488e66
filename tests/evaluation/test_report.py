"""The run report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mamba_sft.evaluation.prompts import Prompt, StepSample, pair, write_samples, write_step_samples
from mamba_sft.evaluation.report import write_report
from mamba_sft.evaluation.run_figures import Progress
from mamba_sft.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "my <run>")
    run.path.mkdir()
    run.recipe.write_text("output_dir: x  # <b>\n")
    run.environment.write_text(
        json.dumps(
            {"packages": {"mamba-sft": "1.2.3"}, "seconds": 3725, "steps": 40, "best_validation_loss": 1.25}
        )
    )
    lines = [
        {"step": i + 1, "loss": 3 / (i + 1), "learning_rate": 1e-3, "num_tokens": 100 * i} for i in range(40)
    ]
    lines.insert(20, {"step": 20, "eval_loss": 1.25})
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_samples(run.samples_file, pair([Prompt("<script>", "yes")], ["no"], ["yes"]))
    return run


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def tags_of(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_the_report_holds_everything_and_nothing_from_outside(run: Run) -> None:
    [problem] = write_report(run)
    assert problem.startswith("`recipe.yaml` cannot be read as a recipe: ")
    assert "`data` is missing" in problem
    page = run.report.read_text()
    tags = tags_of(page)
    assert "svg" in tags.seen
    assert not {"script", "img", "iframe", "object"} & set(tags.seen), "a prompt is text, not markup"
    for text in ("62 min", "1.2500", "exact match before", "0.0 %", "100.0 %", "&lt;script&gt;", "3,900"):
        assert text in page, text
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_text_of_a_run_is_text_on_the_page(run: Run) -> None:
    """Names, answers, recipes and file names come from anywhere; nothing of them may become markup."""
    hostile = "<img src=x onerror=alert(1)>\"'&</pre>{{ 7*7 }}"
    write_samples(run.samples_file, pair([Prompt(hostile, hostile)], [hostile], [hostile]))
    write_step_samples(run.step_samples, [StepSample(1, Prompt(hostile, hostile), hostile)])
    run.recipe.write_text(hostile)
    facts = {"packages": {"mamba-sft": hostile}, "device": {"name": hostile}, "command": hostile}
    run.environment.write_text(json.dumps(facts))
    run.export.mkdir()
    run.quality.write_text(json.dumps({"files": {hostile: {"nbytes": 1, "method": "Q8_0"}}}))
    run.metrics_file.write_text(json.dumps({"step": 1, "loss": 1.0, hostile: 1.0}) + "\n")
    write_report(run)
    page = run.report.read_text()
    tags = tags_of(page)
    assert "img" not in tags.seen
    assert page.count("{{ 7*7 }}") == page.count("7*7") > 0
    assert page.count("&lt;img src=x") == page.count("{{ 7*7 }}") >= 14
    text = run.report_text.read_text()
    fenced = text[text.index("```yaml") :]
    assert fenced.count("<img") == 1  # the recipe, between fences
    assert not re.search(r"(?<!\\)<img", text[: text.index("```yaml")])


def test_control_characters_are_written_out(run: Run) -> None:
    steering = "a\x1b[2Jb\r\x07\u202ec\u2028"
    write_samples(run.samples_file, pair([Prompt(steering)], ["\ud800"], [steering + "\nlast"]))
    write_report(run)
    for path in (run.report, run.report_text):
        page = path.read_text(encoding="utf-8").split("</style>")[-1]
        assert "\\x1b" in page, path
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", page), path
    page = run.report.read_text()
    assert r"a\x1b[2Jb\r\x07\u202ec\u2028" + "\nlast" in page
    assert r"\ud800" in page


def test_wrong_answers_come_first_and_all_of_them_are_there(run: Run) -> None:
    prompts = [Prompt(f"question {i}", "yes") for i in range(30)]
    after = ["no" if i in (20, 25) else "yes" for i in range(30)]
    write_samples(run.samples_file, pair(prompts, ["no"] * 30, after))
    write_report(run)
    page = run.report.read_text()
    assert "12 of 30 shown; right of 30: 0 base, 28 tuned" in page
    shown, folded = page.split("<summary>12 of 30 shown: all of them</summary>")
    order = re.findall(r"question \d+", shown)
    assert order[:3] == ["question 20", "question 25", "question 0"]
    assert len(order) == 12
    assert len(re.findall(r"question \d+", folded)) == 30
    assert shown.count("✗ wrong") == 12 + 2
    assert shown.count("✓ right") == 10
    text = run.report_text.read_text()
    assert text.index("question 20") < text.index("question 25") < text.index("question 0 ")
    assert "✗ no |" in text


def test_prompts_without_a_right_answer_are_not_marked(run: Run) -> None:
    write_samples(run.samples_file, pair([Prompt("say something")], ["no"], ["yes"]))
    write_report(run)
    page = run.report.read_text()
    assert "✗" not in page
    assert "expected" not in page


def test_answers_while_it_learned(run: Run) -> None:
    prompt = Prompt("say yes", "yes")
    write_samples(run.samples_file, pair([prompt], ["no"], ["yes"]))
    write_step_samples(run.step_samples, [StepSample(20, prompt, "perhaps"), StepSample(0, prompt, "no")])
    write_report(run)
    part = run.report.read_text().split("Answers while it learned")[1]
    assert part.index("<td>base") < part.index("<td>step 20") < part.index("<td>at the end")
    assert part.index("perhaps") < part.index("✓ right")


@pytest.mark.parametrize(
    ("progress", "text", "refreshes"),
    [
        (Progress(12, 40, 170.0), "step 12 of 40, about 3 min left; this page is rewritten while", True),
        (Progress(0, 40), "step 0 of 40; this page is rewritten while it runs", True),
        (Progress(12, 40, ended="ended early: no"), "step 12 of 40; ended early: no", False),
        (None, "not finished: step 40 was the last one logged", False),
    ],
)
def test_how_far_a_run_is(run: Run, progress: Progress | None, text: str, refreshes: bool) -> None:
    write_report(run, progress)
    page = run.report.read_text()
    assert text in page
    assert ('http-equiv="refresh"' in page) is refreshes
    assert ("--resume" in page) is not refreshes
    assert text in run.report_text.read_text()


def test_a_finished_run_says_what_to_do_next(run: Run) -> None:
    run.adapter.mkdir()
    write_report(run)
    page = run.report.read_text()
    assert "mamba-sft chat &#39;" in page  # the name has a blank and a bracket
    assert "mamba-sft merge" in page
    assert "--resume" not in page


def test_every_logged_name_is_drawn(run: Run) -> None:
    names = ["learning_rate", "grad_norm", "mean_token_accuracy", "tokens_per_second", "seconds_per_step",
             "peak_memory", "rows_per_step", "tokens_per_step", "entropy", "something_new"]  # fmt: skip
    run.metrics_file.write_text(
        "".join(json.dumps({"step": i} | dict.fromkeys(names, i)) + "\n" for i in (1, 2))
    )
    write_report(run)
    assert tags_of(run.report.read_text()).seen.count("svg") == len(names)


def test_a_run_without_samples_or_metrics_still_has_a_report(run: Run) -> None:
    run.samples_file.unlink()
    run.metrics_file.unlink()
    assert run.read_metrics() == []
    write_report(run)
    assert "<h2>Loss" not in run.report.read_text()


DATA = {
    "sources": [
        {"path": "my <chats>.jsonl", "formats": {"a": "messages", "b": "messages"}, "read": 60, "bad": 1,
         "kept": 59, "weight": 2.0, "train_rows": 110},
    ],
    "train_rows": 110, "validation_rows": 4, "train_tokens": 5_500, "trained_share": 0.4,
    "lengths": {"width": 8, "counts": [1], "median": 50, "percentile_95": 61, "longest": 64},
    "packed": {"rows": 12, "max_length": 512, "fill": 0.9},
    "length": {"steps": 24, "accumulation": 3, "batch_size": 2, "tokens_per_step": 917},
    "rows": [{"where": "my <chats>.jsonl:7", "text": "hello", "trained_text": "world"}],
    "warnings": ["columns not used: `note`"],
    "changes": [{"after_step": 9, "what": ["`my <chats>.jsonl`: 60 rows then, 30 now"]}],
}  # fmt: skip


def test_the_report_has_what_was_seen_of_the_data(run: Run) -> None:
    write_report(run)
    assert "<h2>Data" not in run.report.read_text()
    run.data.write_text(json.dumps(DATA))
    write_report(run)
    page = run.report.read_text()
    cells = ("my &lt;chats&gt;.jsonl", "messages", "60", "1", "59", "2", "110")
    for text in (
        "110 to train on, 4 to validate on", "12 rows of 512 tokens, 90.0% full",
        "5,500, 40.0% of them trained",
        "24, 3 micro-batches of 2 in each, 917 tokens in the mean", "columns not used: `note`",
        "after step 9 the run went on with other data", "60 rows then, 30 now", "<pre>world</pre>",
        *(f"<pre>{cell}</pre>" for cell in cells),
        "median 50, 95% at most 61, longest 64",
    ):  # fmt: skip
        assert text in page, text


def test_the_report_of_a_batch_that_grows_says_so(run: Run) -> None:
    run.data.write_text(json.dumps(DATA | {"length": {**DATA["length"], "ramp": (8, 1280)}}))  # type: ignore[dict-item]
    write_report(run)
    assert "24, 8 to 1,280 rows in each, 917 tokens in the mean" in run.report.read_text()


def test_a_run_without_packing_has_a_data_section_too(run: Run) -> None:
    run.data.write_text(json.dumps(DATA | {"packed": None, "lengths": {}, "warnings": [], "changes": []}))
    write_report(run)
    page = run.report.read_text()
    assert "<h2>Data" in page
    assert "packed into" not in page
    assert "Worth a look" not in page
