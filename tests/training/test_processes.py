"""Two processes on a CPU: what happens to one of them is known to both, and neither waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_sft.run import Run
from mamba_sft.training.resume_points import fault_of, saved_points

ROOT = Path(__file__).parents[2]

PROCESS = """
import errno, json, os, signal, sys
from pathlib import Path
import torch.distributed as dist
from transformers import TrainerCallback
from mamba_sft import MambaSFTError, Recipe
from mamba_sft.training import spikes
from mamba_sft.training.fine_tuning import train
from mamba_sft.training.trainer import Trainer

rank, mode, where, said = int(os.environ["RANK"]), "", {}, {}
spikes.LEAST = 3
compute, take, save = Trainer.compute_loss, Trainer.take_micro_batch, Trainer._save_rng_state

def compute_loss(self, model, inputs, *args, **more):
    loss = compute(self, model, inputs, *args, **more)
    return loss * float("nan") if is_odd(self, "nan", inputs) else loss

def take_step(self, model, inputs, *args, **more):
    loss = take(self, model, inputs, *args, **more)
    return loss * 1000 if is_odd(self, "spike", inputs) else loss

def save_numbers(self, directory):
    save(self, directory)
    if (mode, rank, self.state.global_step) in {("middle", 1, 2), ("middle", 0, 3)}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)

def is_odd(trainer, what, inputs):
    odd = rank == 1 and mode == what and trainer.state.global_step == {"nan": 1, "spike": 4}[what]
    if odd:
        where.setdefault(mode, []).extend(row for rows in inputs["where"] for row in rows)
    return odd

class At(TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        step = state.global_step + 1
        if mode == "term" and rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        film = Path(args.output_dir).parents[1] / "film"
        if mode == "full" and rank == 0 and step == 2:
            try:
                with film.open("wb") as file:
                    while file.write(bytes(1 << 20)):
                        pass
            except OSError:
                pass
        if mode == "full" and rank == 0 and step == 3:
            film.unlink()

Trainer.compute_loss, Trainer.take_micro_batch = compute_loss, take_step
Trainer._save_rng_state = save_numbers
for path in sys.argv[2:]:
    mode = Path(path).stem
    try:
        train(Recipe.load(path), callbacks=[At()])
        said[mode] = "finished"
    except MambaSFTError as error:
        said[mode] = error.message
    dist.barrier()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps({"said": said, "where": where}))
"""


def test_two_processes_know_of_each_other(
    recipe: Any, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    jobs = {
        "spike": ("train.max_steps=6", "train.on_spike=warn"),
        "nan": (),
        "term": ("train.save_steps=4",),
        "middle": ("train.save_steps=1", "train.save_total_limit=9"),
        "full": (f"output_dir={small_disk('size=300m')}/run",),
    }
    paths = []
    for name, options in jobs.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(recipe(*options, name=f"run-{name}").to_yaml())
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script), str(tmp_path), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["said"] == second["said"]
    said, where = first["said"], second["where"]

    assert said["spike"] == "finished"
    told = map(json.loads, (tmp_path / "run-spike" / "spikes.jsonl").read_text().splitlines())
    (spike,) = (one for one in told if (one["step"], one["what"]) == (5, "loss"))
    assert set(spike["rows"][: len(where["spike"])]) == set(where["spike"]), "the worst first"
    assert len(spike["rows"]) > len(where["spike"]), "and those of the other process behind them"

    assert said["nan"].startswith("the loss is not a number at step 2; ")
    kept = json.loads((tmp_path / "run-nan" / "nan-batch-step-2.json").read_text())
    named = [row for rows in kept["where"] for row in rows]
    assert named
    assert set(named) <= set(where["nan"]), "of the process whose loss it was"
    assert f"`{named[0]}`" in said["nan"]

    assert "stopped at step 2 of 4" in said["term"]
    (point,) = saved_points(Run(tmp_path / "run-term"))
    assert point.name == "checkpoint-2"
    assert fault_of(point) is None

    assert said["middle"] == "finished", "what the disk refused to one of them is no step for the other"
    points = saved_points(Run(tmp_path / "run-middle"))
    assert [point.name for point in points] == ["checkpoint-4", "checkpoint-1"]
    assert all(fault_of(point) is None for point in points)
    for step in (2, 3):
        assert f"the checkpoint of step {step} is not saved: cannot write to" in launched.stderr

    assert said["full"] == "finished"
    run = Run(tmp_path / "disk" / "run")
    assert [point.name for point in saved_points(run)] == ["checkpoint-4"]
    assert "the checkpoint of step 2 is not saved" in launched.stderr
    assert run.adapter.is_dir()
    assert len([line for line in run.read_metrics() if "loss" in line]) == 4
