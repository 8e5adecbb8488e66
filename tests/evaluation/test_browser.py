"""The pages in a real browser, where there is one: nothing in its console, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mamba_sft.evaluation.comparison import write_comparison
from mamba_sft.evaluation.prompts import Prompt, StepSample, pair, write_samples, write_step_samples
from mamba_sft.evaluation.report import write_report
from mamba_sft.evaluation.run_figures import Progress
from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.run import Run
from tests.evaluation.test_report import DATA

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!doctype html><body style="margin:0"><iframe id=f src="{page}"
 style="border:0;width:{width}px;height:2000px"></iframe><script>
onload = () => {{
  const d = document.getElementById("f").contentDocument
  d.querySelectorAll("details").forEach(x => x.open = true)
  const wide = [...d.querySelectorAll("body *")].filter(x => !x.closest(".scroll") && !x.closest("svg")
    && x.getBoundingClientRect().right > {width} + 0.5).map(x => x.tagName + "." + x.className)
  document.title = JSON.stringify({{width: d.documentElement.scrollWidth, wide: wide.slice(0, 5),
    plots: [...d.querySelectorAll("svg")].filter(x => x.getBoundingClientRect().width > 200).length,
    back: d.defaultView.getComputedStyle(d.querySelector("svg .back")).fill}})
}}</script>"""
LONG = "unbreakable" * 40


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / LONG[:100])
    run.path.mkdir()
    run.recipe.write_bytes(builtin_recipes()["quickstart"].read_bytes() + f"# {LONG}\n".encode())
    run.environment.write_text(json.dumps({"seconds": 3725, "steps": 40, "command": LONG}))
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory")
    lines = [{"step": i} | dict.fromkeys(names, float(i)) for i in range(1, 40)]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = [Prompt(LONG, LONG, LONG), *(Prompt(f"q{i}", "yes") for i in range(30))]
    write_samples(run.samples_file, pair(prompts, [LONG] * 31, ["yes"] * 31))
    write_step_samples(run.step_samples, [StepSample(3, Prompt(LONG, LONG), LONG)])
    run.data.write_text(json.dumps(DATA | {"warnings": [LONG]}))
    return run


def measured(page: Path, width: int) -> dict[str, object]:
    wrapper = page.with_name(f"wrapper-{width}.html")
    wrapper.write_text(MEASURE.format(page=page.as_uri(), width=width))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,2000",
             "--allow-file-access-from-files", "--enable-logging=stderr",
             f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=2000",
             "--dump-dom", wrapper.as_uri()]  # fmt: skip
    done = subprocess.run([str(BROWSER), *words], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[:500]
    found: dict[str, object] = json.loads(title[1].replace("&quot;", '"').replace("&amp;", "&"))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["report", "in progress", "comparison"])
def test_a_page_fits_and_says_nothing_in_the_console(run: Run, width: int, which: str) -> None:
    write_report(run, Progress(12, 40, 60.0) if which == "in progress" else None)
    page = run.report
    if which == "comparison":
        other = Run(run.path.with_name("other"))
        shutil.copytree(run.path, other.path)
        page = run.path.with_name("comparison.html")
        write_comparison([run, other], page)
    found = measured(page, width)
    assert found["width"] == width
    assert found["wide"] == []
    assert int(str(found["plots"])) >= 4
    assert found["back"] == "none", "the plots have the page's colour, not a slab of their own"
