"""One command measures everything on a GPU: no part of it may take the others with it, or the results."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "first_gpu_run.py"
FACTS = {
    "date": "2026-01-01", "card": "A Card", "driver": "1.0", "versions": {"torch": "2.11.0"},
    "commit": "abc", "command": "python benchmarks/first_gpu_run.py", "tiny": False,
}  # fmt: skip
WRITE = 'import sys; open(sys.argv[-1], \'a\').write(\'{"table": "t", "of": "%s"}\\n\');'


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("first_gpu_run")


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What runs in the parts, in this process."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("first_gpu_parts")


@pytest.fixture
def run(script: ModuleType, tmp_path: Path) -> Any:
    """Runs parts given as (name, Python code), and returns them and the entry as it was written."""

    def of(*codes: tuple[str, str], seconds: float = 60, most: float = 30, least: float = 0) -> Any:
        parts = [script.Part(name, [sys.executable, "-c", code], least, most) for name, code in codes]
        entry = script.Entry(FACTS, parts, tmp_path / "entry.json")
        script.run_parts(entry, time.monotonic() + seconds)
        return entry

    return of


def status(entry: Any) -> dict[str, str]:
    return {part["name"]: part["status"] for part in json.loads(entry.path.read_text())["parts"]}


def test_a_part_that_crashes_is_killed_or_raises_does_not_end_the_others(run: Any) -> None:
    entry = run(
        ("raises", "raise MemoryError('no such memory')"),
        ("killed", WRITE % "killed" + "import os; os.kill(os.getpid(), 9)"),
        ("crashes", "import ctypes; ctypes.string_at(0)"),
        ("works", WRITE % "works"),
    )
    assert status(entry) == {"raises": "failed", "killed": "failed", "crashes": "failed", "works": "done"}
    reasons = [part.reason for part in entry.parts]
    assert reasons == ["MemoryError: no such memory", "killed by SIGKILL", "killed by SIGSEGV", ""]
    assert "no such memory" in entry.parts[0].log[-1]
    assert [row["of"] for part in entry.parts for row in part.rows] == ["killed", "works"]
    text = entry.path.with_suffix(".md").read_text()
    assert "| raises | failed: MemoryError: no such memory |" in text
    assert "t:\n\n| of |\n|---|\n| killed |\n| works |\n" in text


def test_a_part_that_hangs_is_ended_with_what_it_started_and_keeps_its_rows(run: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    hang = (
        WRITE % "row" + "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    entry = run(("hangs", hang), ("works", WRITE % "works"), most=1.5)
    assert status(entry) == {"hangs": "out of time", "works": "done"}
    assert entry.parts[0].rows == [{"table": "t", "of": "row"}]
    assert entry.parts[0].seconds < 10
    time.sleep(2.5)
    assert not mark.exists()


def test_the_entry_is_written_after_each_part(run: Any, tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    copy = f"import shutil; shutil.copy({str(tmp_path / 'entry.json')!r}, {str(seen)!r})"
    run(("first", WRITE % "first"), ("second", copy), ("third", "pass"))
    then = json.loads(seen.read_text())["parts"]
    assert (then[0]["name"], then[0]["status"]) == ("first", "done")
    assert [part["status"] for part in then[1:]] == ["running", "waiting"]
    assert then[0]["rows"] == [{"table": "t", "of": "first"}]
    assert not list(tmp_path.glob("*.partial"))


def test_parts_for_which_no_time_is_left_are_listed(run: Any) -> None:
    sleep = "import time; time.sleep(60)"
    entry = run(("long", sleep), ("next", "pass"), ("last", "pass"), seconds=3, least=2)
    assert status(entry) == {"long": "out of time", "next": "not run", "last": "not run"}
    text = entry.path.with_suffix(".md").read_text()
    assert "| next | not run: it needs about 2 s, and 1 s were left |" in text


def test_a_part_that_hangs_leaves_time_for_those_after_it(run: Any) -> None:
    entry = run(("hangs", "import time; time.sleep(60)"), ("next", "pass"), seconds=8, least=4, most=60)
    assert 3.9 < entry.parts[0].seconds < 5


def test_without_a_gpu_nothing_else_is_begun(
    run: Any, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps({"error": script.NO_GPU}) + "\n"
    says = f"import sys; open(sys.argv[-1], 'a').write({row!r}); sys.exit(1)"
    entry = run(("doctor", says), ("next", WRITE % "next"), ("last", "pass"))
    assert status(entry) == {"doctor": "failed", "next": "not run", "last": "not run"}
    assert {part.reason for part in entry.parts} == {script.NO_GPU}
    assert "| last | not run: torch sees no CUDA device |" in entry.path.with_suffix(".md").read_text()
    assert capsys.readouterr().out.count("--device cpu --tiny") == 1


def test_a_program_that_is_not_there_is_a_line(script: ModuleType, tmp_path: Path) -> None:
    entry = script.Entry(FACTS, [script.Part("none", ["/no/such/program"], 0)], tmp_path / "entry.json")
    script.run_parts(entry, time.monotonic() + 10)
    assert entry.parts[0].status == "failed"
    assert "/no/such/program" in entry.parts[0].reason


def test_a_row_that_is_cut_off_waits_for_its_rest(script: ModuleType, tmp_path: Path) -> None:
    part = script.Part("one", [])
    entry, rows = script.Entry(FACTS, [part], tmp_path / "entry.json"), tmp_path / "rows"
    for more, count in (('{"of": 1}\n{"o', 1), ('f": 2}\n', 2), ("no\n", 3)):
        with rows.open("a") as out:
            out.write(more)
        script.take_rows(entry, part, rows)
        assert len(part.rows) == count
    assert part.rows == [{"of": 1}, {"of": 2}, {"note": "unreadable: no"}]


def test_an_earlier_run_of_the_day_is_kept(script: ModuleType, tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = script.free_path(tmp_path, FACTS)
        path.touch()
        names.append(path.name)
    assert names == ["2026-01-01-a-card.json", "2026-01-01-a-card-2.json", "2026-01-01-a-card-3.json"]


def test_the_parts_are_in_order_and_have_time(script: ModuleType) -> None:
    parts = script.planned_parts("cuda", tiny=False, base=None)
    assert [part.name for part in parts if "training" in part.name] == [
        "training step, 16 bits, 2,048 tokens", "training step, 16 bits, 8,192 tokens",
        "training step, 16 bits, 32,768 tokens", "training step, nf4, 2,048 tokens",
        "training step, nf4, 8,192 tokens", "training step, nf4, 32,768 tokens",
        "training step, 16 bits, 32,768 tokens streamed",
    ]  # fmt: skip
    kinds = list(dict.fromkeys(part.name.split(",")[0] for part in parts))
    assert kinds == ["doctor", "gpu tests", "kernels", "training step", "decode", "residual", "kernel tests"]
    assert all(part.least < part.most for part in parts)
    assert sum(part.least for part in parts) < 25 * 60


def test_a_run_that_is_told_to_end_ends_its_part_and_keeps_the_entry(
    script: ModuleType, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    late = WRITE % "row" + f"import time; time.sleep(2); open({str(mark)!r}, 'w')"

    def told(entry: Any, part: Any, path: Path) -> None:
        if path.read_text():
            script.stop(15, None)

    monkeypatch.setattr(script, "take_rows", told)
    with pytest.raises(SystemExit):
        run(("late", late), ("next", "pass"))
    time.sleep(2)
    assert not mark.exists()


SETTINGS = {"length": 8192, "quantization": "none", "stream": None, "tiny": False, "base": None}


@pytest.mark.parametrize(
    ("memory", "tried"),
    [
        (200e9, [("mamba", "all"), ("block", "all"), ("block", "fewer")]),
        (35e9, [("block", "all"), ("block", "fewer")]),
        (16e9, [("block", "fewer")]),
        (1e9, []),
    ],
)
def test_a_card_that_is_too_small_gets_fewer_layers_and_is_told(
    measuring: ModuleType, monkeypatch: pytest.MonkeyPatch, memory: float, tried: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(measuring, "usable_bytes", lambda: memory)
    notes: list[str] = []
    options = argparse.Namespace(**SETTINGS)
    found = list(measuring.attempts(options, lambda **row: notes.append(row["note"])))
    names = [
        (words[-1].rpartition("=")[2], "all" if layers == of else "fewer") for words, layers, of in found
    ]
    assert names == tried
    assert all(0 < layers <= of == 64 for _, layers, of in found)
    assert bool(notes) == (memory < 20e9)


def test_a_step_that_runs_out_of_memory_is_measured_with_fewer_layers(
    measuring: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = importlib.import_module("bench_train_step")

    def measure(words: Any, repeats: int, against_stock: bool, *, layers: int, budget: float) -> Any:
        if layers == 64:
            raise torch.OutOfMemoryError("out of memory")
        names = ("tokens", "tokens_per_second", "planned_tokens_per_second", "mfu", "with_repeats")
        return dict.fromkeys((*names, "peak_bytes", "planned_peak_bytes"), 1)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(measuring, "usable_bytes", lambda: 200e9)
    rows: list[dict[str, Any]] = []
    measuring.train(argparse.Namespace(**SETTINGS), lambda **row: rows.append(row))
    assert [row["note"].rpartition(": ")[2] for row in rows[:-1]] == ["out of memory"] * 2
    assert rows[-1]["layers"].endswith(" of 64")
    assert rows[-1]["layers"] != "64 of 64"


def test_random_weights_are_those_of_their_seed_and_shape(measuring: ModuleType) -> None:
    bench = importlib.import_module("bench_train_step")
    words = measuring.recipe_words(argparse.Namespace(**SETTINGS | {"tiny": True}))
    recipe, shape, _ = bench.load(words, layers=2)
    one, other = (bench.build(recipe, shape, torch.bfloat16) for _ in range(2))
    assert sum(parameter.numel() for parameter in one.parameters()) == shape.parameters
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())
    first, second = (layer.mixer.in_proj.weight for layer in one.backbone.layers)
    assert not torch.equal(first, second)


def test_a_cpu_computes_nothing_that_is_asked_of_a_gpu(
    measuring: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        measuring.need_a_gpu(argparse.Namespace(device="cuda"))
    measuring.need_a_gpu(argparse.Namespace(device="cpu"))


def trial(output: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--tiny", "--output", output, *words],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    (path,) = output.glob("*.json")
    return ran, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_one_part_of_a_trial(tmp_path: Path) -> None:
    ran, entry, text = trial(tmp_path, "--only", "residual", "--minutes", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (part,) = entry["parts"]
    (row,) = part["rows"]
    assert row["table"] == "residual"
    assert row["largest"] == max(row["of each layer"]) > 0
    assert row["logits off"] < 0.05
    assert "A trial of the script on tiny shapes" in text
    assert str(SCRIPT.parents[1]) not in json.dumps(part)


@pytest.mark.slow
def test_a_trial_of_every_part(tmp_path: Path) -> None:
    ran, entry, text = trial(tmp_path, "--minutes", "9")
    assert {part["name"]: part["reason"] for part in entry["parts"] if part["status"] != "done"} == {}
    assert ran.returncode == 0
    tables = [row["table"] for part in entry["parts"] for row in part["rows"] if "table" in row]
    assert tables.count("training") == 5
    assert tables.count("decoding") == 4
    assert all(f"\n{title}:\n\n|" in text for title in dict.fromkeys(tables))
    assert entry["parts"][0]["rows"][0]["facts"]["findings"]
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".md"]
