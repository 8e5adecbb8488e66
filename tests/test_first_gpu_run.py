"""One command measures everything on a GPU: no part of it may take the others with it, or the results."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "first_gpu_run.py"
FACTS = {
    "date": "2026-01-01", "card": "A Card", "driver": "1.0", "versions": {"torch": "2.11.0"},
    "commit": "abc", "command": "python benchmarks/first_gpu_run.py", "tiny": False,
}  # fmt: skip
WRITE = "import sys; open(sys.argv[-1], 'a').write('{\"table\": \"t\", \"of\": \"%s\"}\\n');"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_gpu_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "first_gpu_run", module)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


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
    assert then[2]["status"] == "waiting"
    assert then[0]["rows"] == [{"table": "t", "of": "first"}]
    assert not list(tmp_path.glob("*.partial"))


def test_parts_for_which_no_time_is_left_are_listed(run: Any) -> None:
    entry = run(("long", "import time; time.sleep(60)"), ("next", "pass"), seconds=2, least=1)
    assert status(entry) == {"long": "out of time", "next": "not run"}
    text = entry.path.with_suffix(".md").read_text()
    assert "| next | not run: it needs about 1 s, and 0 s were left |" in text


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
    parts = script.planned_parts(tiny=False, base=None)
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
