"""How long training takes: from an earlier run on this machine, or by counting operations.

The count, per token (`estimate`): the matrix products, 2 operations for each weight that takes part, in the
forward, in the backward for the inputs only (frozen weights get no gradient; those of `adapter: none` do),
and again where checkpointing or streaming repeats them; the head once more, because TRL's loss computes its
logits twice; the adapter's own; over the sustained rate of the GPU. The scan: state updates (layers * D * N)
times the clocks that a pass needs on the busiest pipe of a multiprocessor, from counted instructions, or what
it moves over the bandwidth if that takes longer. The bytes that norms, convolution and adapter move. And per
micro-batch the weights, read (or with nf4 unpacked, which moves 2.55 bytes a weight) once for each pass. The
sum is divided by `EFFICIENCY`, because what is left out (launches, other streams, imperfect tiles) takes time
too. Nothing of it has been measured on a GPU yet.

On a CPU the parts of a step are measured on the machine itself (`processor`): what a layer takes however few
its tokens, what each of them adds, the rate of matrix products, the loss. They are put together for the rows
as they are trained (`Rows`): padding takes time and is no token, and only trained tokens have a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mamba_sft.errors import MambaSFTError
from mamba_sft.planning.course import Course
from mamba_sft.planning.gpus import SCAN_BACKWARD, SCAN_FORWARD, Accelerator
from mamba_sft.planning.memory import Work
from mamba_sft.planning.processor import Processor, this_processor
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.run_reading import read_object
from mamba_sft.wording import path_text

EFFICIENCY = 0.65
"""Of what the count allows; kernels that are written well reach 0.6 to 0.75 of it."""
SUSTAINED = 0.8
"""Of the peak rate of matrix products: what large ones reach at the clock that the power limit allows."""
MOVED = {"none": 28, "mamba": 36, "block": 41}
"""Numbers moved per token, layer and channel by norms, convolution and adapter, by policy."""
FORWARD_MOVED, BACKWARD_MOVED = 4, 9
"""The same for the scan, without the states it saves: u, dt, z, y; the gradients, dB and dC in parts."""
NF4_MOVED = 2.55
CPU_EFFICIENCY = 0.88
"""Of a CPU's parts put together, by ten runs on an idle machine (`benchmarks/LOG.md`)."""
EXTRA_LAYERS = 3
"""What a micro-batch takes beside layers, products and loss, in layers without tokens."""
_STEPS_SEEN = 50


@dataclass(frozen=True)
class Rate:
    """Tokens per second, and how that is known.

    Args:
        tokens_per_second: Read tokens, over all of a run.
        source: `estimated`, or the run that it was measured in.
        processor: Of an estimate for a CPU, how its processor was measured.
        cpu_seconds: Of the same, processor seconds of all threads for a token.
    """

    tokens_per_second: float
    source: str
    processor: str | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch, as far as they change how long it takes.

    Args:
        positions: Of a micro-batch, padding included.
        filled: The share of them that holds tokens.
        trained: The share of the tokens that has a loss.
    """

    positions: float
    filled: float = 1.0
    trained: float = 1.0

    @classmethod
    def of(cls, course: Course, lengths: np.ndarray, *, size: int, trained: float) -> Rows:
        """Returns those of a run, in the mean.

        Args:
            course: Which rows each step takes.
            lengths: (n,) tokens of each row.
            size: Rows of a micro-batch.
            trained: The share of the tokens that has a loss.
        """
        positions, tokens = [], []
        for step in range(min(course.steps, _STEPS_SEEN)):
            of_step = lengths[course.rows(step)]
            for start in range(0, len(of_step), size):
                batch = of_step[start : start + size]
                positions.append(int(batch.max()) * len(batch))
                tokens.append(int(batch.sum()))
        return cls(float(np.mean(positions)), sum(tokens) / sum(positions), trained)


def estimate(work: Work, accelerator: Accelerator, rows: Rows | None = None) -> Rate | None:
    """Returns the rate to be expected, or None for a device whose speed is not known.

    That of a GPU is what the count of operations allows. A CPU is measured, if it has not been before.

    Args:
        work: The training step.
        accelerator: Where it is taken; if that is a CPU, this machine's.
        rows: On a CPU, what is known of its rows. None: they are full, and all of their tokens are trained.
    """
    if accelerator.type == "cpu":
        processor = this_processor("bfloat16" if work.mixed else "float32")
        rows = rows or Rows(work.tokens)
        seconds = cpu_seconds(work, processor, rows)
        alone = cpu_seconds(work, replace(processor, threads=1), rows)
        return Rate(rows.filled / seconds, "estimated", processor.described, alone / rows.filled)
    if not accelerator.flops:
        return None
    shape, e = work.shape, work.itemsize
    rate = accelerator.flops * SUSTAINED / (1 if work.mixed else 8)
    passes = 1 + _again(work)
    lanes = accelerator.fp32_lanes
    clocks = SCAN_FORWARD.clocks(lanes) * (1 + _repeats(work)) + SCAN_BACKWARD.clocks(lanes)
    updates = shape.layers * shape.inner * shape.states
    seconds = flops(work) / rate
    number = e * shape.layers * shape.inner / accelerator.bandwidth  # seconds to move one per channel
    states = 4 * shape.states / (work.state_stride * e)  # numbers per channel, float32 as they are
    scan_moved = (FORWARD_MOVED + states) * (1 + _repeats(work)) + BACKWARD_MOVED + states
    scan = updates * clocks / (accelerator.multiprocessors * accelerator.clock_hz)
    seconds += max(scan, scan_moved * number) + MOVED[work.policy] * number
    moved = NF4_MOVED if work.quantization == "nf4" else e + 4 * (work.is_full and work.mixed)
    seconds += (passes + 1) * shape.products * moved / accelerator.bandwidth / work.tokens
    return Rate(EFFICIENCY / seconds, "estimated")


def flops(work: Work) -> float:
    """Returns the operations of matrix products per token of a training step, repeated ones included."""
    return _layer_flops(work) + _head_flops(work)


def _layer_flops(work: Work) -> float:
    return 2 * work.shape.products * (2 + work.is_full + _again(work)) + 6 * work.lora_values


def _head_flops(work: Work) -> float:
    return 2 * work.shape.matrix * 3 + (2 * work.shape.matrix if work.trained_rows or work.is_full else 0)


def _repeats(work: Work) -> float:
    """Forwards of the cheap part of a layer, beyond the first."""
    chunks = -(-work.length // work.chunk)
    return (work.policy != "none") + (1 - 1 / chunks)


def _again(work: Work) -> float:
    """Share of the layers' large products that is computed beyond forward and backward."""
    return _repeats(work) - (work.policy == "mamba")


def cpu_seconds(work: Work, processor: Processor, rows: Rows) -> float:
    """Returns the seconds of a training step on a CPU, for each of its positions.

    Threads share what tokens add; what a layer takes without is the work of one.

    Args:
        work: The training step.
        processor: How fast the CPU is.
        rows: What is known of its rows.
    """
    shape, positions = work.shape, rows.positions
    if work.streams:
        positions = min(positions, work.tokens)
    trained = rows.trained * rows.filled
    passes = 1 + processor.forward * _repeats(work)
    alone = processor.layer * (shape.layers * passes + EXTRA_LAYERS) / positions
    shared = processor.channel * shape.layers * shape.inner * passes
    shared += (_layer_flops(work) + trained * _head_flops(work)) / processor.products
    shared += trained * shape.vocabulary * processor.logit
    return (alone + shared / processor.threads) / CPU_EFFICIENCY


def measured(recipe: Recipe, device_name: str, threads: int | None = None) -> Rate | None:
    """Returns the rate of the newest run on this device that trained the same way, if there is one.

    Looked for beside `output_dir`: the tokens of a run's sessions on this device over the seconds that its
    trainer took in them, evaluations included. The same way is the same base, number format, adapter, rows
    and policies.

    Args:
        recipe: What would be trained.
        device_name: Where.
        threads: On a CPU, with how many threads; a run that had others does not count.
    """
    beside = Path(recipe.output_dir).absolute().parent
    for run in Run.all_under(beside):
        try:
            rate = _rate_of(run, recipe, device_name, threads)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MambaSFTError):
            continue  # an older or broken run
        if rate is not None:
            return rate
    return None


def _rate_of(run: Run, recipe: Recipe, device_name: str, threads: int | None) -> Rate | None:
    facts = read_object(run.environment)
    if threads is not None and facts["device"].get("threads", threads) != threads:
        return None
    several = facts.get("processes", 1) != 1
    if _way(Recipe.load(run.recipe)) != _way(recipe) or several:
        return None  # another way, or the rate of several
    if "sessions" in facts:
        here = [one for one in facts["sessions"] if one["device"] == device_name and one["tokens"]]
        tokens, seconds = (sum(session[name] for session in here) for name in ("tokens", "train_seconds"))
        return Rate(tokens / seconds, path_text(run.path)) if tokens and seconds else None
    if facts["device"]["name"] != device_name:  # an earlier version's run, of one session
        return None
    lines = run.read_metrics()
    seconds = max((line.get("train_runtime", 0.0) for line in lines), default=0.0)
    tokens = max((line.get("num_tokens", 0) for line in lines), default=0)
    return Rate(tokens / seconds, path_text(run.path)) if tokens and seconds else None


def _way(recipe: Recipe) -> tuple[Any, ...]:
    model, data, train = recipe.model, recipe.data, recipe.train
    return (
        model.base, model.dtype, model.quantization, data.max_length, data.packing, recipe.adapter,
        train.per_device_train_batch_size, train.checkpointing, train.stream_tokens,
    )  # fmt: skip
