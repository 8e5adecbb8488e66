"""Runs in two processes against the same run in one: same rows, same losses, same adapter, and back again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mamba_sft import Run
from mamba_sft.training.fine_tuning import train
from tests.training.several import Launch, launch
from tests.training.test_fine_tuning import assert_same_adapter, losses

EXACT = 1e-5
"""How far losses and adapters may be apart: two processes add up in another order."""
OPTIONS = (
    "data.packing=true",
    "data.validation=5",
    "eval.eval_steps=2",
    "train.save_steps=2",
    "train.max_steps=-1",
    "train.num_train_epochs=2",
    "train.per_device_train_batch_size=1",
    "train.learning_rate=1.0e-3",
    "train.save_total_limit=20",
    "eval.max_new_tokens=6",
)


def with_prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"hello {n}"}) + "\n" for n in range(5)))
    return f"eval.prompts={path}"


def lines(run: Run, name: str) -> list[float]:
    return [line[name] for line in map(json.loads, run.metrics.read_text().splitlines()) if name in line]


def assert_same_run(ours: Run, theirs: Run) -> None:
    for name in ("loss", "eval_loss", "grad_norm", "num_tokens", "epoch"):
        assert lines(ours, name) == pytest.approx(lines(theirs, name), rel=EXACT), name
    assert_same_adapter(ours, theirs, EXACT)
    assert ours.samples.read_text() == theirs.samples.read_text()


def in_the_middle(run: Run, place: Path, step: int) -> Run:
    """A copy of a run as it was when it had just saved after a step."""
    shutil.copytree(run.path, place)
    copy = Run(place)
    for path in (copy.adapter, copy.report):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for point in copy.checkpoints.glob("checkpoint-*"):
        if int(point.name.rpartition("-")[2]) > step:
            shutil.rmtree(point)
    return copy


def test_ddp(recipe: Any, tmp_path: Path) -> None:
    """Equal to one process, resumed bit for bit, and resumed by one process more or fewer."""
    more = (*OPTIONS, with_prompts(tmp_path))
    one, two = ((*more, f"train.gradient_accumulation_steps={n}") for n in (4, 2))
    theirs = train(recipe(*one, name="of-one"))
    in_the_middle(theirs, tmp_path / "one-then-two", step=4)
    of_two, stopped = recipe(*two, name="of-two"), recipe(*two, name="stopped")
    seen = launch(
        tmp_path / "launched",
        Launch(of_two.to_yaml()),
        Launch(stopped.to_yaml(), stop_in=3),
        Launch(stopped.to_yaml(), resume=True),
        Launch(recipe(*one, name="one-then-two").to_yaml(), resume=True),
    )
    ours = Run(Path(of_two.output_dir))
    assert_same_run(ours, theirs)
    check_resumed(seen, ours, theirs, tmp_path)
    in_the_middle(ours, tmp_path / "two-then-one", step=4)
    assert_same_run(train(recipe(*two, name="two-then-one"), resume=True), theirs)


def check_resumed(seen: Any, ours: Run, theirs: Run, tmp_path: Path) -> None:
    """What the launch of `test_ddp` came to, but for its first run."""
    whole, stopped, resumed, wider = seen
    steps = whole[0]["steps"]
    assert all(rank["stopped"] and rank["steps"] == steps[:3] for rank in stopped)
    assert all(rank["steps"] == steps[3:] for rank in resumed)
    assert lines(Run(tmp_path / "stopped"), "loss") == losses(ours)
    assert_same_adapter(Run(tmp_path / "stopped"), ours, 0.0)
    assert all(rank["steps"] == steps[4:] for rank in wider)
    assert_same_run(Run(tmp_path / "one-then-two"), theirs)
    # no process draws the numbers of the run's start again, or those of another process
    first, second = (rank["first_numbers"] for rank in wider)
    assert first != second
    assert whole[0]["first_numbers"] not in (first, second)


def test_fsdp(recipe: Any, tmp_path: Path) -> None:
    """Equal to one process with every block in parts; resumed in as many processes, in one, and from one."""
    more = (*OPTIONS, with_prompts(tmp_path))
    one, two = ((*more, f"train.gradient_accumulation_steps={n}") for n in (4, 2))
    fsdp = (*two, "train.parallel=fsdp")
    theirs = train(recipe(*one, name="of-one"))
    in_the_middle(theirs, tmp_path / "one-then-two", step=4)
    of_two, stopped = recipe(*fsdp, name="of-two"), recipe(*fsdp, name="stopped")
    seen = launch(
        tmp_path / "launched",
        Launch(of_two.to_yaml()),
        Launch(stopped.to_yaml(), stop_in=3),
        Launch(stopped.to_yaml(), resume=True),
        Launch(recipe(*one, "train.parallel=fsdp", name="one-then-two").to_yaml(), resume=True),
    )
    ours = Run(Path(of_two.output_dir))
    assert_same_run(ours, theirs)
    check_resumed(seen, ours, theirs, tmp_path)
    for rank in seen[0]:  # accelerate alone would have run DDP, without a word
        assert len(rank["sharded"]) == rank["parameters"]
        assert rank["held"] == pytest.approx(rank["values"] / 2, rel=0.01)
    in_the_middle(ours, tmp_path / "two-then-one", step=4)
    assert_same_run(train(recipe(*fsdp, name="two-then-one"), resume=True), theirs)
