"""Runs in two processes against the same run in one: same rows, same losses, same adapter, and back again."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from safetensors.torch import load_file

from mamba_sft import Run
from mamba_sft.errors import TrainingError
from mamba_sft.training.fine_tuning import train
from mamba_sft.training.first_checks import check_sharing
from mamba_sft.training.sharding import own_environment
from tests.conftest import build_model
from tests.training.several import Launch, launch
from tests.training.test_fine_tuning import assert_same_adapter, losses

NO_FSDP = Version(version("torch")) < Version("2.13")
EXACT = 1e-5
"""How far losses and adapters may be apart: two processes add up in another order."""
OPTIONS = (
    "data.packing=true",
    "data.validation=9",
    "data.max_length=80",
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
    return [line[name] for line in map(json.loads, run.metrics_file.read_text().splitlines()) if name in line]


def assert_same_run(ours: Run, theirs: Run) -> None:
    for name in ("loss", "eval_loss", "grad_norm", "num_tokens", "epoch"):
        assert lines(ours, name) == pytest.approx(lines(theirs, name), rel=EXACT), name
    assert_same_adapter(ours, theirs, EXACT)
    assert ours.samples_file.read_text() == theirs.samples_file.read_text()


def in_the_middle(run: Run, place: Path, step: int) -> Run:
    """A copy of a run as it was when it had just saved after a step."""
    shutil.copytree(run.path, place)
    copy = Run(place)
    for path in (copy.result, copy.report):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for point in copy.checkpoints.glob("checkpoint-*"):
        if int(point.name.rpartition("-")[2]) > step:
            shutil.rmtree(point)
    return copy


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "zero2"])
def test_two_processes_equal_one(recipe: Any, tmp_path: Path, parallel: str) -> None:
    """From the start, resumed bit for bit, and resumed by one process more or fewer."""
    if parallel == "zero2" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `pip install 'mamba-sft[deepspeed]'`")
    if parallel == "fsdp" and NO_FSDP:
        pytest.skip("`train.parallel: fsdp` needs torch 2.13")
    more = (*OPTIONS, with_prompts(tmp_path), f"train.parallel={parallel}")
    one, two = ((*more, f"train.gradient_accumulation_steps={n}") for n in (4, 2))
    theirs = train(recipe(*one, name="of-one"))
    in_the_middle(theirs, tmp_path / "one-then-two", step=4)
    of_two, stopped = recipe(*two, name="of-two"), recipe(*two, name="stopped")
    runs = [
        Launch(of_two.to_yaml()),
        Launch(stopped.to_yaml(), stop_in=3),
        Launch(stopped.to_yaml(), resume=True),
        Launch(recipe(*one, name="one-then-two").to_yaml(), resume=True),
        Launch(recipe(*two, name="poisoned").to_yaml(), poison=True),
    ]
    seen = launch(tmp_path / "launched", *runs)
    ours = Run(Path(of_two.output_dir))
    assert json.loads(ours.data.read_text())["length"]["rows"] == 11  # in steps of 4, 4 and 3
    assert_same_run(ours, theirs)
    check_resumed(seen[:4], ours, theirs, tmp_path)
    assert all("the gradient is not a number at step 1" in rank["error"] for rank in seen[4])
    check_parts(parallel, seen[0], ours)
    in_the_middle(ours, tmp_path / "two-then-one", step=4)
    assert_same_run(train(recipe(*two, name="two-then-one"), resume=True), theirs)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "zero2"])
def test_two_processes_train_all_weights_as_one_does(recipe: Any, tmp_path: Path, parallel: str) -> None:
    """The whole model in parts: from the start, resumed, and resumed by one process more or fewer."""
    if parallel == "zero2" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `pip install 'mamba-sft[deepspeed]'`")
    if parallel == "fsdp" and NO_FSDP:
        pytest.skip("`train.parallel: fsdp` needs torch 2.13")
    more = (*OPTIONS, with_prompts(tmp_path), f"train.parallel={parallel}", "adapter=none",
            "train.weight_decay=0.1")  # fmt: skip
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
    assert_same_training(ours, theirs)
    assert lines(Run(tmp_path / "stopped"), "loss") == losses(ours)
    assert_same_model(Run(tmp_path / "stopped"), ours, 0.0)
    assert_same_training(Run(tmp_path / "one-then-two"), theirs)
    check_parts(parallel, seen[0], ours)
    in_the_middle(ours, tmp_path / "two-then-one", step=4)
    assert_same_training(train(recipe(*two, name="two-then-one"), resume=True), theirs)


def assert_same_training(ours: Run, theirs: Run) -> None:
    for name in ("loss", "eval_loss", "grad_norm", "num_tokens", "epoch"):
        assert lines(ours, name) == pytest.approx(lines(theirs, name), rel=EXACT), name
    assert_same_model(ours, theirs, EXACT)
    assert ours.samples_file.read_text() == theirs.samples_file.read_text()


def assert_same_model(ours: Run, theirs: Run, bound: float) -> None:
    one, other = (load_file(run.model / "model.safetensors") for run in (ours, theirs))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).abs().max()) <= bound * float(other[name].abs().max()), name


def check_resumed(seen: Any, ours: Run, theirs: Run, tmp_path: Path) -> None:
    """What a launch came to: a whole run, one that was stopped, and two that went on."""
    whole, stopped, resumed, wider = seen
    steps = whole[0]["steps"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(
        rank["error"].startswith("stopped at step 3 of 6") and rank["steps"] == steps[:3] for rank in stopped
    )
    assert all(rank["steps"] == steps[3:] for rank in resumed)
    assert lines(Run(tmp_path / "stopped"), "loss") == losses(ours)
    assert_same_adapter(Run(tmp_path / "stopped"), ours, 0.0)
    assert all(rank["steps"] == steps[4:] for rank in wider)
    assert_same_run(Run(tmp_path / "one-then-two"), theirs)
    # no process draws the numbers of the run's start again, or those of another process
    first, second = (rank["first_numbers"] for rank in wider)
    assert first != second
    assert whole[0]["first_numbers"] not in (first, second)


def check_parts(parallel: str, seen: Any, run: Run) -> None:
    """How much of the model each process held while it trained."""
    for rank in seen:
        if parallel == "fsdp":  # accelerate alone would have run DDP on CPUs, without a word
            assert len(rank["sharded"]) == rank["parameters"]
            assert rank["held"] == pytest.approx(rank["values"] / 2, rel=0.01)
        else:
            assert rank["sharded"] == []
    told = json.loads(run.environment.read_text())
    assert (told["parallel"], told["processes"]) == (parallel, 2)
    assert told["held_bytes"] == [4 * rank["held"] for rank in seen]


@pytest.mark.skipif(NO_FSDP, reason="`train.parallel: fsdp` needs torch 2.13")
def test_quantized_weights_are_in_parts_too(recipe: Any, tmp_path: Path) -> None:
    """With DoRA, which reads them, in 16 bits, and with answers in between."""
    more = (*OPTIONS, with_prompts(tmp_path), "model.quantization=nf4", "model.dtype=bfloat16",
            "adapter.use_dora=true", "eval.sample_steps=2")  # fmt: skip
    theirs = train(recipe(*more, "train.gradient_accumulation_steps=4", name="of-one"))
    of_two = recipe(*more, "train.gradient_accumulation_steps=2", "train.parallel=fsdp", name="of-two")
    (seen,) = launch(tmp_path / "launched", Launch(of_two.to_yaml()))
    ours = Run(Path(of_two.output_dir))
    assert lines(ours, "loss") == pytest.approx(lines(theirs, "loss"), rel=1e-3)
    assert_same_adapter(ours, theirs, 1e-3)
    assert ours.samples_file.read_text() == theirs.samples_file.read_text()
    assert ours.step_samples.read_text() == theirs.step_samples.read_text()
    for rank in seen:
        assert len(rank["sharded"]) == rank["parameters"]
        assert rank["held"] == pytest.approx(rank["values"] / 2, rel=0.01)


def test_a_launcher_that_says_otherwise_is_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="was told to use fsdp"):
        check_sharing(recipe(), 2)
    monkeypatch.setattr("mamba_sft.training.first_checks.version", lambda name: "2.13.0")
    check_sharing(recipe("train.parallel=fsdp"), 2)
    for old in ("2.12.1+cu130", "2.11.0"):
        monkeypatch.setattr("mamba_sft.training.first_checks.version", lambda name, old=old: old)
        check_sharing(recipe("train.parallel=fsdp"), 1)
        with pytest.raises(TrainingError, match=re.escape(f"needs torch 2.13, and this is {old}:")):
            check_sharing(recipe("train.parallel=fsdp"), 2)


def test_what_accelerate_writes_into_the_environment_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("FSDP_VERSION", "1")
    before = dict(os.environ)
    with own_environment():
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
        del os.environ["FSDP_VERSION"]
    assert dict(os.environ) == before


def test_zero2_without_deepspeed_is_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.training.first_checks.find_spec", lambda name: None)
    check_sharing(recipe("train.parallel=zero2"), 1)
    with pytest.raises(TrainingError, match="needs DeepSpeed, which is not installed") as caught:
        check_sharing(recipe("train.parallel=zero2"), 2)
    assert "mamba-sft[deepspeed]" in (caught.value.hint or "")


def test_a_tied_base_is_not_cut_in_parts(
    recipe: Any, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mamba_sft.training.first_checks.version", lambda name: "2.13.0")
    build_model(tie_word_embeddings=True).save_pretrained(tiny_base)
    check_sharing(recipe("train.parallel=ddp"), 2)
    with pytest.raises(TrainingError, match="its embeddings and its head are one matrix"):
        check_sharing(recipe("train.parallel=fsdp"), 2)


def test_whether_processes_can_share_a_base_is_asked_without_fetching_its_weights(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mamba_sft.model.checkpoint._download", lambda *words, **more: pytest.fail("fetched"))
    monkeypatch.setattr("mamba_sft.training.first_checks.version", lambda name: "2.13.0")
    check_sharing(recipe("model.base=tiiuae/falcon-mamba-7b", "train.parallel=fsdp"), 2)
