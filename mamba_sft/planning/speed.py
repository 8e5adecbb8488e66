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
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_sft.errors import MambaSFTError
from mamba_sft.planning.gpus import SCAN_BACKWARD, SCAN_FORWARD, Accelerator
from mamba_sft.planning.memory import Work
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
CORE_FLOPS, CORE_UPDATE_SECONDS = 4e10, (0.67e-9, 2.0e-9)
"""Of a CPU core with AVX2: float32 products per second; a state update, forward and backward (measured by
`mamba-sft bench kernels` on an AMD EPYC)."""


@dataclass(frozen=True)
class Rate:
    """Tokens per second, and how that is known.

    Args:
        tokens_per_second: Read tokens, over all of a run.
        source: `estimated`, or the run that it was measured in.
    """

    tokens_per_second: float
    source: str


def estimate(work: Work, accelerator: Accelerator) -> Rate | None:
    """Returns the rate that the count of operations allows, or None for a device whose speed is not known."""
    if accelerator.type == "cpu":
        return Rate(1 / _cpu_seconds(work, max(accelerator.multiprocessors, 1)), "estimated")
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
    head = 2 * work.shape.matrix * 3 + (2 * work.shape.matrix if work.trained_rows or work.is_full else 0)
    return 2 * work.shape.products * (2 + work.is_full + _again(work)) + head + 6 * work.lora_values


def _repeats(work: Work) -> float:
    """Forwards of the cheap part of a layer, beyond the first."""
    chunks = -(-work.length // work.chunk)
    return (work.policy != "none") + (1 - 1 / chunks)


def _again(work: Work) -> float:
    """Share of the layers' large products that is computed beyond forward and backward."""
    return _repeats(work) - (work.policy == "mamba")


def _cpu_seconds(work: Work, cores: int) -> float:
    shape = work.shape
    updates = shape.layers * shape.inner * shape.states
    forward, backward = CORE_UPDATE_SECONDS
    seconds = flops(work) / CORE_FLOPS + updates * (forward * (1 + _repeats(work)) + backward)
    return seconds / cores / EFFICIENCY


def measured(recipe: Recipe, device_name: str) -> Rate | None:
    """Returns the rate of the newest run on this device that trained the same way, if there is one.

    Looked for beside `output_dir`: the tokens of a run's sessions on this device over the seconds that its
    trainer took in them, evaluations included. The same way is the same base, number format, adapter, rows
    and policies.
    """
    beside = Path(recipe.output_dir).absolute().parent
    for run in Run.all_under(beside):
        try:
            rate = _rate_of(run, recipe, device_name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MambaSFTError):
            continue  # an older or broken run
        if rate is not None:
            return rate
    return None


def _rate_of(run: Run, recipe: Recipe, device_name: str) -> Rate | None:
    facts = read_object(run.environment)
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
