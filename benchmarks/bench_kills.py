"""Whether a run that is killed again and again ends as one that never was.

    python benchmarks/bench_kills.py                # 20 kills: minutes on two cores
    python benchmarks/bench_kills.py --kills 2 --seed 7

A small quickstart with dropout, validation and sample answers is trained once undisturbed. Then it is trained
again, and its process gets SIGKILL at moments that the seed draws: half of them by the clock, anywhere from
the start to the end, half of them when a file of the run is being opened for writing, renamed or removed, and
up to a few milliseconds later. Each kill is followed by a resumption. A run that ends is compared with the
undisturbed one: every tensor of the adapter to the last bit, every logged number, the tokens read; then the
next one begins, until all kills are spent. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["MAMBA_SFT_CACHE"] = tempfile.mkdtemp(prefix="bench-kills-cache-")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from compare_runs import adapter_differences, metric_differences

from mamba_sft import Recipe, Run
from mamba_sft.errors import TrainingError
from mamba_sft.recipe.builtin import find_recipe
from mamba_sft.training.fine_tuning import train

OVERRIDES = [
    "train.max_steps=14", "train.save_steps=2", "train.logging_steps=3",
    "train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=2", "adapter.lora_dropout=0.1",
    "data.max_length=64", "data.sources.0.limit=120", "data.validation=8", "eval.eval_steps=4",
    "eval.load_best_model_at_end=false", "eval.max_new_tokens=4",
]  # fmt: skip
"""Small, and with everything that a resume point has to hold; saved between two logged steps too."""
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
"""Audit events after which a file of the run is another."""
WRITES = os.O_WRONLY | os.O_RDWR


class Kill(NamedTuple):
    """When a process is killed.

    Args:
        event: So many changes of the run's files after its start; None: by the clock alone.
        seconds: So long after that, or after the start.
    """

    event: int | None
    seconds: float


class Outcome(NamedTuple):
    """What became of a process: whether it was killed, how long it ran, how many files it changed."""

    killed: bool
    seconds: float
    events: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bench-kills-"))
    try:
        return bench(root, arguments.kills, random.Random(arguments.seed))
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(os.environ["MAMBA_SFT_CACHE"], ignore_errors=True)


def bench(root: Path, kills: int, draw: random.Random) -> int:
    """Kills `kills` times and prints what came of it; returns the exit code."""
    started = time.monotonic()
    whole = Run(root / "whole")
    start(whole, root)  # also makes what later ones find: prepared rows, compiled kernels
    shutil.rmtree(whole.path)
    undisturbed = start(whole, root)
    done, runs, in_writes, differences = 0, 0, 0, []
    while done < kills:
        runs += 1
        run, sessions = Run(root / f"run-{runs}"), 0
        while True:
            sessions += 1
            kill = next_kill(draw, undisturbed, by_event=done % 2 == 1) if done < kills else None
            outcome = start(run, root, kill)
            if not outcome.killed:
                break
            done += 1
            in_writes += kill is not None and kill.event is not None
        found = differences_of(whole, run)
        print(f"run {runs}: {sessions} sessions, {'; '.join(found) or 'the same'}", flush=True)
        differences += found
        shutil.rmtree(run.path)
    seconds = time.monotonic() - started
    print(
        f"\n{done} kills, {in_writes} of them in the middle of a change of files, in {runs} runs of "
        f"{undisturbed.seconds:.1f} s and {undisturbed.events} changes: "
        f"{len(differences) or 'no'} differences from the undisturbed run, in {seconds:.0f} s"
    )
    return bool(differences)


def next_kill(draw: random.Random, undisturbed: Outcome, *, by_event: bool) -> Kill:
    """Draws when the next process dies."""
    if by_event:
        return Kill(draw.randint(1, undisturbed.events), draw.choice([0.0, draw.uniform(0, 0.005)]))
    return Kill(None, draw.uniform(0, undisturbed.seconds))


def differences_of(whole: Run, run: Run) -> list[str]:
    """Returns what is not the same in two runs, a line each."""
    facts = [json.loads(each.environment.read_text(encoding="utf-8")) for each in (whole, run)]
    found = [*metric_differences(whole.read_metrics(), run.read_metrics()), *adapter_differences(whole, run)]
    found += [f"{name}: {facts[0][name]}, {facts[1][name]}" for name in ("tokens", "steps")
              if facts[0][name] != facts[1][name]]  # fmt: skip
    found += [f"left over: {path}" for path in run.path.rglob("*.partial")]
    if whole.samples_file.read_bytes() != run.samples_file.read_bytes():
        found.append("the sample answers are others")
    return found


def start(run: Run, root: Path, kill: Kill | None = None) -> Outcome:
    """Trains in a process of its own, from what is there, and kills it when it is time.

    Raises:
        SystemExit: The process failed by itself.
    """
    started = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        train_here(run, writing, root / "log.txt")
    os.close(writing)
    events, due = 0, started + kill.seconds if kill and kill.event is None else None
    while True:
        left = None if due is None else max(0.0, due - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            break
        told = os.read(reading, 4096)
        if not told:
            break
        events += len(told)
        if kill and kill.event is not None and due is None and events >= kill.event:
            due = time.monotonic() + kill.seconds
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in {0, -signal.SIGKILL}:
        print((root / "log.txt").read_text(encoding="utf-8")[-5000:], file=sys.stderr)
        raise SystemExit(f"a session of {run.path.name} failed by itself, with exit code {status}")
    return Outcome(status != 0, time.monotonic() - started, events)


def train_here(run: Run, told: int, log: Path) -> None:
    """Trains in this process, tells through a pipe of every change of a file of the run, and ends."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def tell(event: str, words: Sequence[Any]) -> None:
        ours = event in CHANGES and str(words[0]).startswith(str(run.path))
        if ours and (event != "open" or int(words[2]) & WRITES):
            os.write(told, b".")

    sys.addaudithook(tell)
    code = 1
    try:
        recipe = Recipe.load(find_recipe("quickstart"), overrides=[*OVERRIDES, f"output_dir={run.path}"])
        train(recipe, resume=run.recipe.is_file())
        code = 0
    except TrainingError as error:  # the process before was killed when all was written
        code = 0 if error.message.endswith("is finished") else 1
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
