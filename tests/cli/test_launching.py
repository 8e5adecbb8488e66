"""`train` in two processes on a CPU: how they are started, and how the run ends when one of them does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from mamba_sft import Run
from mamba_sft.cli.app import app
from tests.training.test_fine_tuning import adapter

ROOT = Path(__file__).parents[2]
OURS = [sys.executable, "-m", "mamba_sft", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
"""Without a GPU they use the CPU. With `--cpu` it starts one, whatever their number, unless there is MPI."""

FAILS = """
import os
if os.environ.get("RANK") == "1":
    from mamba_sft.training.callbacks import MetricsLog
    def broken(self, args, state, control, **more):
        if state.global_step == 2:
            raise ValueError("a bug in one process")
    MetricsLog.on_step_end = broken
"""


def environment(*before: Path) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (*before, ROOT)))
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "PYTHONPATH": paths, "NO_COLOR": "1", "COLUMNS": "200"}


def start(words: list[str], *before: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, env=environment(*before), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=seconds)
    return process.returncode, stdout, stderr


@pytest.fixture
def long(recipe: Any, tmp_path: Path) -> Path:
    """A run that lasts until it is stopped, with a resume point after two steps."""
    path = tmp_path / "long.yaml"
    path.write_text(recipe("train.max_steps=5000", "train.save_steps=2", name="long").to_yaml())
    return path


def begun(process: subprocess.Popen[str], run: Run) -> list[psutil.Process]:
    """The processes of a run, by rank, when they are training."""
    until = time.monotonic() + 100
    while not list(run.checkpoints.glob("checkpoint-*[0-9]")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    found = [one for one in psutil.Process(process.pid).children() if "mamba_sft" in one.cmdline()]
    return sorted(found, key=lambda one: int(one.environ()["RANK"]))


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_other_launchers_train_the_same(recipe: Any, tmp_path: Path, theirs: list[str]) -> None:
    """And one process of the two speaks."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("train.max_steps=2").to_yaml())
    launchers = {
        "ours": [*OURS, str(path), "--processes", "2"],
        "theirs": [*theirs, "-m", "mamba_sft", "train", str(path)],
    }
    runs = {name: Run(tmp_path / name) for name in launchers}
    for name, words in launchers.items():
        code, stdout, stderr = ended(start([*words, f"output_dir={runs[name].path}"]))
        assert code == 0, stderr
        assert stdout.count("trained:") == 1
        assert stderr.count("loading `") == 1
        facts = json.loads(runs[name].environment.read_text())
        assert {key: facts[key] for key in ("processes", "nodes", "parallel")} == {
            "processes": 2, "nodes": 1, "parallel": "ddp",
        }, name  # fmt: skip
    assert " --processes 2" in json.loads(runs["ours"].environment.read_text())["command"]
    weights, others = adapter(runs["ours"]), adapter(runs["theirs"])
    assert weights.keys() == others.keys()
    assert all((weights[name] - others[name]).abs().max() < 1e-6 for name in weights)


def test_a_killed_process_ends_the_run_and_is_named(long: Path, tmp_path: Path) -> None:
    process = start([*OURS, str(long), "--processes", "2"])
    workers = begun(process, Run(tmp_path / "long"))
    workers[1].send_signal(signal.SIGKILL)
    code, _, stderr = ended(process, seconds=60)
    assert code == 1
    assert f"error: rank 1 (process {workers[1].pid}) was killed by SIGKILL, which ended the run" in stderr
    assert "--processes 2 --resume`" in stderr
    assert "Traceback" not in stderr
    assert not [worker for worker in workers if worker.is_running()]


def test_a_bug_in_one_process_is_told_once_with_rank_and_traceback(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("train.max_steps=5000").to_yaml())
    code, _, stderr = ended(start([*OURS, str(path), "--processes", "2"], tmp_path))
    assert code == 1
    assert "error: rank 1 failed, which ended the run: ValueError: a bug in one process" in stderr
    assert stderr.count("Traceback") == 1
    assert ", in broken" in stderr


@pytest.mark.parametrize("to", ["all", "one", pytest.param("nobody", marks=pytest.mark.slow)])
def test_a_signal_stops_all_with_one_resume_point(long: Path, tmp_path: Path, to: str) -> None:
    """To the command, or to one process; or the command is killed, and its processes see that it is gone."""
    run = Run(tmp_path / "long")
    process = start([*OURS, str(long), "--processes", "2"])
    workers = begun(process, run)
    if to == "one":
        workers[1].send_signal(signal.SIGTERM)
    else:
        process.send_signal(signal.SIGINT if to == "all" else signal.SIGKILL)
    code, _, stderr = ended(process, seconds=60)
    psutil.wait_procs(workers, timeout=60)
    assert not [worker for worker in workers if worker.is_running()]
    points = [json.loads((path / "trainer_state.json").read_text()) for path in run.checkpoints.iterdir()]
    assert max(point["global_step"] for point in points) < 5000
    assert not list(run.checkpoints.glob("*.partial"))
    if to != "nobody":
        assert code == 130
        assert stderr.count("stopped: at step") == 1
        assert "--processes 2 --resume`" in stderr


@pytest.mark.slow
def test_two_machines_meet(recipe: Any, tmp_path: Path) -> None:
    """Two commands on this one, a process each; both end when a process of one is killed."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("train.max_steps=5000", "train.save_steps=2").to_yaml())
    words = [*OURS, str(path), "--processes", "1", "--nodes", "2", "--master", f"127.0.0.1:{free_port()}"]
    second = start([*words, "--rank", "1"])
    first = start([*words, "--rank", "0"])
    begun(first, Run(tmp_path / "run"))
    facts = json.loads(Run(tmp_path / "run").environment.read_text())
    assert (facts["processes"], facts["nodes"]) == (2, 2)
    (worker,) = (one for one in psutil.Process(second.pid).children() if "mamba_sft" in one.cmdline())
    worker.send_signal(signal.SIGKILL)
    code, _, stderr = ended(second, seconds=60)
    assert code == 1
    assert "rank 1 (process" in stderr
    code, _, stderr = ended(first, seconds=60)
    assert code == 1
    assert "error: rank 0 failed" in stderr


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.slow
def test_a_dry_run_counts_the_steps_of_all_processes(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("train.max_steps=-1", "data.packing=false").to_yaml())
    alone = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert "; 12 steps;" in alone.stdout
    code, stdout, stderr = ended(start([*OURS, str(path), "--processes", "2", "--dry-run"]))
    assert code == 0, stderr
    assert stdout.count("; 6 steps;") == 1
    assert not (tmp_path / "run").exists()


def test_the_recipe_and_an_earlier_run_are_checked_before_any_process(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().to_yaml())
    started: list[Any] = []
    monkeypatch.setattr("mamba_sft.training.launching.launch", lambda *words: started.append(words))
    words = ["train", str(path), "--processes", "2"]
    assert CliRunner().invoke(app, [*words, "train.learning_rte=1"]).exit_code != 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 1\n")
    assert CliRunner().invoke(app, words).exit_code != 0
    assert not started
    second = [*words, "--nodes", "2", "--rank", "1", "--master", "127.0.0.1:1"]  # the first machine writes
    assert CliRunner().invoke(app, second).exit_code == 0
    shutil.rmtree(tmp_path / "run")
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(started) == 2
