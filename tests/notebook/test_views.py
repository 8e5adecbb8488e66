"""What results show of themselves in a notebook: tables, escaped, with nothing from the net, and as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from mamba_sft import Recipe, Run, doctor, export, memory, merge, plan, preview, report
from mamba_sft.diagnostics.memory_in_use import MemoryNow
from mamba_sft.errors import UsageError
from mamba_sft.evaluation.prompts import Prompt, Sample
from mamba_sft.exporting.request import Exported, GGUFFile, Pushed, Quality
from mamba_sft.inference.generation import Answer
from mamba_sft.notebook.answers import Answers, Samples
from tests.notebook.conftest import HOSTILE, is_safe


def shown(result: Any) -> tuple[str, str]:
    """The HTML and the text of a result, which is what IPython asks for."""
    bundle = result._repr_mimebundle_()
    assert bundle["text/html"] == result._repr_html_()
    assert bundle["text/plain"] == str(result)
    assert is_safe(bundle["text/html"])
    assert "(self" not in bundle["text/plain"]
    assert f"{type(result).__name__}(" not in bundle["text/plain"], "a dataclass on one line"
    return bundle["text/html"], bundle["text/plain"]


def test_ipython_shows_the_text_and_no_dump(tiny_run: Run) -> None:
    format_of = pytest.importorskip("IPython.core.formatters").DisplayFormatter().format
    for result in (tiny_run, tiny_run.samples(), Answers([Answer("in", "stop", 1)], ["p"], "tuned")):
        assert format_of(result)[0]["text/plain"] == str(result)


def test_a_recipe(tiny_recipe: Recipe) -> None:
    html, text = shown(tiny_recipe)
    assert "LoRA r 4 on in_proj, x_proj, out_proj" in text
    assert "<details>" in html
    assert "per_device_train_batch_size: 2" in html
    assert "all weights" in str(Recipe.load("quickstart", ["adapter=none"]))


def test_a_plan_that_fits_and_one_that_does_not() -> None:
    html, text = shown(plan("instruct-qlora", card="4090"))
    assert "fits, " in text
    assert 'class="fill"' in html
    assert 'fill over"' not in html
    html, text = shown(plan("instruct", card="4090"))
    assert "does not fit" in text
    assert 'class="fill over"' in html
    assert "train.per_device_train_batch_size=1" in text


def test_doctor() -> None:
    _, text = shown(doctor())
    assert text.startswith("doctor: ready to train")
    assert "✓ " in text


def test_memory_with_and_without_a_gpu() -> None:
    now = memory()
    assert now.process_peak > 1 << 20
    assert "GPU" not in shown(now)[1]
    gpu = MemoryNow("T4", 16 << 30, 8 << 30, 4 << 30, 6 << 30, 12 << 30, 10 << 30, 1 << 30, 2 << 30)
    html, text = shown(gpu)
    assert "8.00 GiB of 16.0 GiB" in text
    assert "width:37.5%" in html


def test_the_rows_and_their_mask(tiny_recipe: Recipe) -> None:
    html, text = shown(preview(tiny_recipe, rows=1))
    assert "chats.jsonl:" in text
    row = next(line for line in text.splitlines() if "[quick" in line)
    assert row.partition("[")[2].startswith("quick")
    assert html.count('class="tokens"') == 1
    assert '<span class="ts">&lt;|im_end|&gt;</span>' in html
    assert "10 to train on, 2 to validate on" in text


def test_a_run(tiny_run: Run) -> None:
    html, text = shown(tiny_run)
    assert "finished" in text
    assert "best validation loss" in text
    assert "<svg" in html
    assert f"chat(&quot;{tiny_run.path}&quot;, compare=True)" in html
    assert "nothing there yet" in str(Run(Path("runs/none")))


def test_the_metrics_are_a_table(tiny_run: Run, tmp_path: Path) -> None:
    table = tiny_run.metrics
    assert isinstance(table, pandas.DataFrame)
    assert table.index.name == "step"
    assert list(table.index) == [1, 2, 3]
    assert table["loss"].notna().all()
    assert table["eval_loss"].notna().sum() >= 1
    none = Run(tmp_path).metrics
    assert len(none) == 0
    assert none.index.name == "step"


def test_the_plot(tiny_run: Run, tmp_path: Path) -> None:
    html, _ = shown(tiny_run.plot())
    assert html.count("<svg") == 1
    tiny_run.plot().save(tmp_path / "loss.svg")
    for place in (tmp_path, tmp_path / "loss.svg" / "loss.svg"):
        with pytest.raises(UsageError, match=r"is a (directory|file)"):
            tiny_run.plot().save(place)
    assert (tmp_path / "loss.svg").read_text().startswith("<svg ")
    assert "nothing was logged yet" in str(Run(tmp_path).plot())


def test_the_samples_of_a_run(tiny_run: Run) -> None:
    samples = tiny_run.samples()
    assert len(samples) == 13
    assert samples[0].prompt.answer == "yes"
    html, text = shown(samples)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "right of 1: 0 base, 0 tuned" in text
    assert "8 of 13 shown" in text
    assert "none: the recipe has no" in str(Run(Path("runs/none")).samples())


def test_right_and_wrong_are_marked() -> None:
    html, text = shown(Samples([Sample(Prompt("p", "in"), "out", "in")], ("base", "tuned")))
    assert "p | in | ✗ out | ✓ in" in text
    assert 'class="bad"' in html
    assert 'class="good"' in html


def test_answers_and_answers_beside_others() -> None:
    before = Answers([Answer(HOSTILE, "length", 2)], ["p"], "base")
    after = Answers([Answer("in", "stop", 1)], ["p"], "tuned")
    assert before[0].text == HOSTILE
    assert "cut off" in shown(before)[1]
    html, text = shown(before.beside(after))
    assert "&lt;script&gt;" in html
    assert r"\x1b[31m\u202e" in text
    assert text.splitlines()[1] == "  prompt | base | tuned"
    with pytest.raises(UsageError, match="other prompts"):
        before.beside(Answers([], ["q"], "tuned"))


def test_a_merge_and_its_check(tiny_run: Run) -> None:
    done = merge(tiny_run)
    html, text = shown(done)
    assert "logits differ from base + adapter by" in text
    assert done.checksums
    assert next(iter(done.checksums.values())) not in html
    assert "became infinite" in shown(replace(done, overflowed=3))[1]


def test_exported_files() -> None:
    quality = Quality(0.01, 0.97, 512, 28, "a", 1, 1)
    files = [
        GGUFFile(Path("e/<b>.gguf"), "Q4_K_M", 1 << 20, quality),
        GGUFFile(Path("e/a.gguf"), "f16", 1, None),
    ]
    html, text = shown(Exported(Path("e"), files, [Path("e/Modelfile")], None))
    assert "<b>" not in html
    assert "Q4_K_M | 1.00 MiB | 0.01 | 97.0%" in text
    assert "pushed to" in shown(Exported(Path("e"), pushed=Pushed("hub.example/a/b", [], [], [])))[1]


def test_an_export_is_refused_before_anything_is_loaded(tiny_run: Run) -> None:
    with pytest.raises(UsageError, match="no format"):
        export(tiny_run, format="onnx")


def test_the_report_is_in_a_frame_of_its_own(tiny_run: Run) -> None:
    page = report(tiny_run)
    html = page._repr_html_()
    assert html.startswith('<iframe sandbox=""')
    assert html.count("<") == html.count(">") == 2, "the page is an attribute, and no part of the notebook"
    assert "srcdoc=" in html
    assert repr(page).endswith("report.html")
    with pytest.raises(UsageError, match="same run twice"):
        report(tiny_run, tiny_run)
    with pytest.raises(UsageError, match="for a comparison"):
        report(tiny_run, output="x.html")
