"""Training runs that stream, carry states and run out of memory, against runs that do not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_sft import Run
from mamba_sft.data.rows import row_lengths
from mamba_sft.errors import TrainingError
from mamba_sft.training.figures import Figures
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from mamba_sft.training.steps import ChunkedSteps
from tests.training.test_fine_tuning import SignalAt, adapter, assert_same_adapter, losses

ROOT = Path(__file__).parents[2]
METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_entropy",
           "eval_mean_token_accuracy", "eval_num_tokens")  # fmt: skip


def metrics(run: Run) -> list[dict[str, float]]:
    lines = map(json.loads, run.metrics_file.read_text().splitlines())
    return [{name: line[name] for name in METRICS if name in line} for line in lines]


def assert_same_run(ours: Run, theirs: Run, names: tuple[str, ...] = METRICS) -> None:
    """Every metric of every step and evaluation, under the same names, and the weights."""
    for one, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert list(one) == list(other)
        chosen = [{name: line[name] for name in names if name in line} for line in (one, other)]
        assert chosen[0] == pytest.approx(chosen[1], rel=1e-4)
    # Adam divides by the size of a gradient, so a rounding of one near zero can turn its first step round.
    for name, tensor in adapter(ours).items():
        difference = (tensor - adapter(theirs)[name]).norm() / tensor.norm()
        assert difference < 0.01, name


@pytest.mark.parametrize(
    "how",
    [
        ("train.stream_tokens=7",),
        ("train.stream_tokens=1000",),
        ("train.stream_tokens=16", "train.checkpointing=mamba"),
        ("train.auto_batch=true", "train.checkpointing=none"),
        ("train.stream_tokens=16", "train.auto_batch=true"),
    ],
)
@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_is_the_same_run(recipe: Any, how: tuple[str, ...], packing: str) -> None:
    """Accumulation, clipping, padded batches, metrics and evaluation included."""
    common = (f"data.packing={packing}", "data.validation=6", "eval.eval_steps=2", "train.max_grad_norm=0.5",
              "eval.per_device_eval_batch_size=2")  # fmt: skip
    assert_same_run(train(recipe(*common, *how, name="ours")), train(recipe(*common, name="theirs")))


@pytest.mark.parametrize("more", ["model.dtype=bfloat16", "adapter.use_dora=true", "model.quantization=nf4"])
def test_precisions_and_variants_stream(recipe: Any, more: str) -> None:
    theirs = train(recipe(more, name="theirs"))
    ours = train(recipe(more, "train.stream_tokens=16", name="ours"))
    tolerance = 0.02 if "bfloat16" in more else 1e-4
    assert losses(ours) == pytest.approx(losses(theirs), rel=tolerance)


@pytest.mark.parametrize("how", ["train.stream_tokens=16", "train.carry_state=true"])
def test_2n_steps_equal_n_and_resume_n(recipe: Any, how: str) -> None:
    """With dropout, whose numbers are part of the state, and in the middle of an epoch of packed rows."""
    options = (how, "adapter.lora_dropout=0.2", "train.max_steps=-1", "train.num_train_epochs=2",
               "train.gradient_accumulation_steps=1", "train.per_device_train_batch_size=1",
               "train.save_steps=5")  # fmt: skip
    whole = train(recipe(*options, name="whole"))
    steps = len(losses(whole))
    assert steps > 10
    assert steps % 2 == 0
    assert (steps // 2) % 5 != 0, "the interruption must not fall on the end of an epoch"
    halves = recipe(*options, name="halves")
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(halves), callbacks=[SignalAt(steps // 2 - 2)])
    run = train(halves, resume=True)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert_same_adapter(whole, run, 1e-6)


def test_carrying_states_starts_rows_elsewhere(recipe: Any) -> None:
    """Off: what it was. On: the first row starts from nothing, later ones do not; evaluation always does."""
    options = ("train.gradient_accumulation_steps=1", "train.learning_rate=1e-12", "data.validation=6",
               "eval.eval_steps=4", "eval.load_best_model_at_end=false")  # fmt: skip
    plain = train(recipe(*options, name="plain"))
    carried = train(recipe(*options, "train.carry_state=true", name="carried"))
    assert losses(carried)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    for ours, theirs in zip(losses(carried)[1:], losses(plain)[1:], strict=True):
        assert ours != pytest.approx(theirs, rel=1e-6)
    ours, theirs = (
        [line["eval_loss"] for line in metrics(run) if "eval_loss" in line] for run in (carried, plain)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_carried_states_are_those_of_the_rows_before(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row starts from is what the model holds after reading the row before, whole."""
    started: list[Any] = []
    initial = ChunkedSteps._initial_states
    monkeypatch.setattr(
        ChunkedSteps, "_initial_states", lambda self, rows: started.append(initial(self, rows)) or started[-1]
    )
    seen = Watch()
    options = ("train.carry_state=true", "train.stream_tokens=16", "train.gradient_accumulation_steps=1",
               "train.per_device_train_batch_size=1", "train.max_steps=2",
               "train.learning_rate=1e-12")  # fmt: skip
    monkeypatch.setattr(ChunkedSteps, "training_step", seen.watch(ChunkedSteps.training_step))
    train_prepared(prepare(recipe(*options)))
    assert started[0] is None
    backbone = seen.model.get_base_model().backbone.eval()
    cache = backbone(
        **{k: v for k, v in seen.batches[0].items() if k != "labels"}, use_cache=True
    ).cache_params
    for layer, (_, scan) in zip(cache.layers, started[1], strict=True):
        assert not scan.requires_grad
        torch.testing.assert_close(scan, layer.recurrent_states[0], rtol=1e-4, atol=1e-5)


class Watch:
    """Keeps the batches of a run."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.model: Any = None

    def watch(self, step: Any) -> Any:
        def watched(steps: Any, model: Any, inputs: Any, *args: Any) -> Any:
            self.batches.append(inputs)
            self.model = steps.trainer.model
            return step(steps, model, inputs, *args)

        return watched


class Narrow:
    """Makes the model run out of memory at more than `tokens` positions, at any call or from one on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, after: int = 0):
        self.calls, forward = 0, Figures.of

        def narrow(model: Any, chunk: Any, **more: Any) -> Any:
            self.calls += 1
            figures = forward(model, chunk, **more)
            if self.calls > after and chunk.inputs["input_ids"].numel() > tokens:
                if figures.loss.requires_grad:
                    figures.loss.backward(retain_graph=True)  # half a backward leaves gradients behind
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            return figures

        monkeypatch.setattr(Figures, "of", narrow)


@pytest.mark.parametrize("after", [0, 5])
def test_out_of_memory_is_survived(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    """At the trial of the longest rows, and in the middle of the run: the same losses and weights."""
    wide = (
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=2",
        "data.packing=false",
    )
    theirs = train(recipe(*wide, name="theirs"))
    Narrow(monkeypatch, tokens=2 * 40, after=after)
    with caplog.at_level(logging.WARNING, "mamba_sft.training.out_of_memory"):
        ours = train(recipe(*wide, "train.auto_batch=true", name="ours"))
    assert_same_run(ours, theirs)
    said = [r.getMessage() for r in caplog.records if r.name == "mamba_sft.training.out_of_memory"]
    assert len(said) == 1
    assert "4 rows of" in said[0]
    assert said[0].endswith("at once: going on with 2; an optimizer step still has 8")


def test_out_of_memory_in_an_evaluation_is_survived(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The trial before the first step finds it, and the losses are those of all rows at once."""
    wide = ("data.packing=false", "data.validation=6", "eval.per_device_eval_batch_size=6",
            "train.max_steps=2", "eval.eval_steps=1")  # fmt: skip
    theirs = train(recipe(*wide, name="theirs"))
    Narrow(monkeypatch, tokens=2 * 40)
    with caplog.at_level(logging.WARNING, "mamba_sft.training.out_of_memory"):
        ours = train(recipe(*wide, "train.auto_batch=true", name="ours"))
    assert_same_run(ours, theirs)
    said = [r.getMessage() for r in caplog.records if r.name == "mamba_sft.training.out_of_memory"]
    assert said
    assert all(one.endswith("an evaluation still reads every row") for one in said)
    Narrow(monkeypatch, tokens=8)
    with pytest.raises(TrainingError, match="out of memory"):
        train(recipe(*wide, "train.auto_batch=true", name="none-fits"))


def test_the_longest_rows_come_first(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    run_rows = ChunkedSteps._run_rows

    def watch(self: Any, model: Any, num_items: Any, batch: Any, last: bool) -> Any:
        widths.append(batch["input_ids"].shape[1])
        return run_rows(self, model, num_items, batch, last)

    monkeypatch.setattr(ChunkedSteps, "_run_rows", watch)
    preparation = prepare(recipe("train.auto_batch=true", "data.packing=false", "train.max_steps=1"))
    train_prepared(preparation)
    assert widths[0] == row_lengths(preparation.data.train_rows).max()


def test_the_trial_gives_back_the_states_it_carried(recipe: Any) -> None:
    """Else the first row of the run would start from what the longest rows left behind."""
    options = ("train.carry_state=true", "data.packing=false", "train.max_steps=2")
    alone = train(recipe(*options, name="alone"))
    tried = train(recipe(*options, "train.auto_batch=true", name="tried"))
    assert losses(tried) == pytest.approx(losses(alone), rel=1e-6)


def test_the_fused_head_is_ours_whatever_trl_does(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's loss and our own steps never materialise the logits, even if TRL no longer saw to it."""
    theirs = train(recipe("train.max_steps=2", name="theirs"))
    monkeypatch.setattr("trl.trainer.sft_trainer.add_fused_lm_head", lambda *args, **options: None)
    for number, more in enumerate(((), ("train.stream_tokens=16",))):
        ours = train(recipe("train.max_steps=2", *more, name=f"ours-{number}"))
        assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


def test_out_of_memory_without_auto_batch_names_it(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Narrow(monkeypatch, tokens=8)
    with pytest.raises(TrainingError, match="out of memory") as caught:
        train(recipe("train.stream_tokens=16"))
    assert "train.auto_batch: true" in (caught.value.hint or "")


PROCESS = """
import json, sys
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from mamba_sft import Recipe
from mamba_sft.training.fine_tuning import train

counts, make = [], DistributedDataParallel.__init__

def counting(self, *args, **kwargs):
    make(self, *args, **kwargs)
    counts.append(0)
    def hook(group, bucket):
        counts[-1] += bucket.is_last()
        return allreduce_hook(group, bucket)
    self.register_comm_hook(None, hook)

DistributedDataParallel.__init__ = counting
for path in sys.argv[1:]:
    train(Recipe.load(path))
    assert dist.get_world_size() == 2
if dist.get_rank() == 0:
    print("synchronizations:", json.dumps(counts))
"""


def test_two_processes(recipe: Any, tmp_path: Path) -> None:
    """Gloo on a CPU: the runs of one process with twice the accumulation, synchronized once a step.

    Unpacked rows have different lengths, so the processes have different numbers of chunks.
    """
    unpacked = "data.packing=false"
    whole = ("train.max_steps=1", "train.gradient_accumulation_steps=1")
    eight = "data.max_length=138"
    packed_rows = len(prepare(recipe(eight)).data.train_rows)
    assert packed_rows == 8, "or a process would get a row twice"
    jobs: dict[str, tuple[str, ...]] = {
        "plain": ("train.gradient_accumulation_steps=2",),
        "streamed": ("train.gradient_accumulation_steps=2", "train.stream_tokens=16"),
        "unpacked": (unpacked, "train.gradient_accumulation_steps=2", "train.stream_tokens=5",
                     "train.per_device_train_batch_size=1", "train.checkpointing=mamba",
                     "train.auto_batch=true"),
        "whole-unpacked": (*whole, unpacked, "train.per_device_train_batch_size=24"),
        "whole-packed": (*whole, f"train.per_device_train_batch_size={packed_rows // 2}"),
    }  # fmt: skip
    paths = []
    for name, options in jobs.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(recipe(eight, *options, name=name).to_yaml())
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    counts = json.loads(launched.stdout.rpartition("synchronizations:")[2])
    assert counts == [4, 4, 4, 1, 1], "one for each optimizer step"

    runs = {name: Run(tmp_path / name) for name in jobs}
    assert_same_run(runs["streamed"], runs["plain"])
    alone = train(
        recipe(eight, "train.gradient_accumulation_steps=4", "train.stream_tokens=16", name="alone")
    )
    learned = ("loss", "grad_norm")  # the other metrics are means over micro-batches, here other ones
    assert_same_run(runs["plain"], alone, learned)
    apart = train(
        recipe(
            unpacked,
            "train.gradient_accumulation_steps=4",
            "train.per_device_train_batch_size=1",
            name="apart",
        )
    )
    assert_same_run(runs["unpacked"], apart, learned)
    packed, plain = (metrics(runs[name])[0] for name in ("whole-packed", "whole-unpacked"))
    assert packed["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
