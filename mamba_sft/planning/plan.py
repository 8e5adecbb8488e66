"""What a recipe will take, before anything is downloaded: memory, time, disk, and what would fit instead."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from mamba_sft.errors import UsageError
from mamba_sft.model.shape import find_shape
from mamba_sft.planning.course import Course
from mamba_sft.planning.environment import describe_device
from mamba_sft.planning.extent import RunLength, run_length, settled_accumulation
from mamba_sft.planning.fitting import Fix, fixes, largest_length, largest_rows
from mamba_sft.planning.gpus import Accelerator, find_gpu, recognized
from mamba_sft.planning.memory import Part, Work, peak, planned_parts
from mamba_sft.planning.settling import Settled, settle
from mamba_sft.planning.speed import Rate, Rows, estimate, flops, measured
from mamba_sft.planning.storage import checkpoint_sizes, result_bytes
from mamba_sft.recipe.builtin import find_path, is_here
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.showing import Showing

TEMPLATE_TOKENS = 2
"""Rows of the vocabulary that the chat templates need and a base does not have: turn start and turn end."""
Q4_K_M_BYTES = 0.578
"""Per weight, of a whole Falcon-Mamba-7B in GGUF's Q4_K_M."""


@dataclass(frozen=True)
class Plan(Showing):
    """What a recipe will take.

    Args:
        base: The base model, and where its sizes were read.
        accelerator: The device it is planned for.
        work: The training step.
        parts: Bytes of each part of its memory, see `memory.planned_parts`.
        peak: Bytes held at once, at most.
        largest_rows: Micro-batch that still fits; 0: none.
        largest_length: Tokens of a row that still fit at the recipe's micro-batch.
        accumulation: Micro-batches of an optimizer step; None where `train.batch_ramp` says the batch.
        tokens_per_step: Positions of an optimizer step, on one device; with a ramp, of those at its end.
        length: What the rows come to; None where the data has to be seen first.
        course: Which rows each step takes; None where they are not on this machine.
        most_tokens: Tokens of the run, at most, None where that is not known.
        rate: Tokens per second, None where the device's speed is not known.
        disk: Bytes of what is downloaded and written.
        fixes: What to change if it does not fit.
        wants_bfloat16: Whether the recipe asks for bfloat16.
    """

    base: tuple[str, str]
    accelerator: Accelerator
    work: Work
    parts: dict[Part, int]
    peak: int
    largest_rows: int
    largest_length: int
    accumulation: int | None
    tokens_per_step: int
    length: RunLength | None
    course: Course | None
    most_tokens: int | None
    rate: Rate | None
    disk: dict[str, int]
    fixes: list[Fix]
    wants_bfloat16: bool

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory that the device gives."""
        return self.peak <= self.accelerator.usable_bytes

    @property
    def steps(self) -> int | None:
        """Optimizer steps, None where the data has to be seen first."""
        return self.length.steps if self.length else None

    @property
    def seconds(self) -> float | None:
        """Seconds of training, None where tokens or rate are not known."""
        if self.most_tokens is None or self.rate is None:
            return None
        return self.most_tokens / self.rate.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-safe values; bytes, seconds and tokens as numbers."""
        shape = self.work.shape
        return {
            "base": self.base[0],
            "shape_from": self.base[1],
            "parameters": shape.parameters,
            "trained_parameters": self.work.trained,
            "quantized": self.work.quantized,
            "device": asdict(self.accelerator),
            "memory": dict(self.parts),
            "peak_bytes": self.peak,
            "host_state_bytes": self.work.boundaries,
            "fits": self.fits,
            "largest_batch_size": self.largest_rows,
            "largest_length": self.largest_length,
            "tokens_per_step": self.tokens_per_step,
            "steps": self.steps,
            "gradient_accumulation_steps": self.accumulation,
            "warnings": self.length.warnings() if self.length else [],
            "most_tokens": self.most_tokens,
            "gflop_per_token": flops(self.work) / 1e9,
            "tokens_per_second": self.rate and self.rate.tokens_per_second,
            "rate_source": self.rate and self.rate.source,
            "rate_processor": self.rate and self.rate.processor,
            "seconds": self.seconds,
            "disk": self.disk,
            "fixes": [asdict(fix) for fix in self.fixes],
        }

    def to_json(self) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def make_plan(recipe: Recipe, gpu: str | None = None) -> Plan:
    """Plans a recipe without loading or downloading its base or its data.

    Args:
        recipe: What would be trained.
        gpu: A name of `gpus.GPUS`; None plans for the device of this machine.

    Raises:
        UsageError: No such GPU, the `reference` kernels, or rows of no known length.
        ModelError: The base cannot be found.
    """
    if recipe.model.kernels == "reference":
        raise UsageError(
            "`model.kernels: reference` is for checking, and what it keeps is not planned",
            hint="plan with `model.kernels=auto`",
        )
    accelerator = find_gpu(gpu) if gpu else recognized(describe_device())
    shape, source = find_shape(recipe.model)
    settled = settled_here(recipe)
    longest = int(settled.lengths.max()) if settled is not None else recipe.train.stream_tokens
    length = recipe.data.max_length or longest
    if length is None:
        raise UsageError(
            "`data.max_length` is null, so how long rows are is not known before the data is read",
            hint="plan for a length: `data.max_length=32768`",
        )
    trained = 0 if recipe.chat.template == "tokenizer" else TEMPLATE_TOKENS
    work = Work.of(recipe, shape, accelerator, length=length, trained_rows=trained)
    parts = planned_parts(work)
    extent = settled.length if settled is not None else _extent(recipe)
    accumulation = extent.accumulation if extent else settled_accumulation(recipe.train, None)
    ramp = recipe.train.batch_ramp
    per_step = length * (ramp.to if ramp is not None else work.rows * accumulation)
    usable, mode = accelerator.usable_bytes, recipe.train.parallel
    rate = None if gpu else _measured_here(recipe, accelerator)
    return Plan(
        base=(recipe.model.base, source),
        accelerator=accelerator,
        work=work,
        parts=parts,
        peak=peak(parts),
        largest_rows=largest_rows(work, usable),
        largest_length=largest_length(work, usable),
        accumulation=None if ramp is not None else accumulation,
        tokens_per_step=per_step,
        length=extent,
        course=settled.course if settled is not None else None,
        most_tokens=_most_tokens(recipe, extent, per_step),
        rate=rate or estimate(work, accelerator, _rows(recipe, settled)),
        disk=_disk(recipe, work),
        fixes=[]
        if peak(parts) <= usable
        else fixes(work, None if ramp else accumulation, accelerator, mode=mode),
        wants_bfloat16=recipe.model.dtype == "bfloat16",
    )


def _measured_here(recipe: Recipe, accelerator: Accelerator) -> Rate | None:
    """The rate of an earlier run on this machine; on a CPU, with as many threads."""
    threads = accelerator.multiprocessors if accelerator.type == "cpu" else None
    return measured(recipe, accelerator.name, threads)


def _rows(recipe: Recipe, settled: Settled | None) -> Rows | None:
    """What the rows are like, where they are here."""
    if settled is None:
        return None
    summary = settled.data.summary
    trained = summary.trained_tokens / max(1, summary.train_tokens)
    size = recipe.train.per_device_train_batch_size
    return Rows.of(settled.course, settled.lengths, size=size, trained=trained)


def settled_here(recipe: Recipe) -> Settled | None:
    """Returns the rows as they are trained and the steps that take them, if base and data are here."""
    if not find_path(recipe.model.base).exists():
        return None
    if not all(is_here(source.path) for source in recipe.data.sources):
        return None
    from mamba_sft.data.preparing import read_corpus

    return settle(recipe, read_corpus(recipe)[1])


def _extent(recipe: Recipe) -> RunLength | None:
    """What the run comes to, as far as that is known without rows."""
    return run_length(recipe, rows=0, tokens=0) if recipe.train.max_steps > 0 else None


def _most_tokens(recipe: Recipe, extent: RunLength | None, per_step: int) -> int | None:
    """The most tokens of a run, as far as they are known."""
    if extent is not None and extent.read is not None:
        return extent.read
    if extent is not None and extent.rows:
        batch = extent.batch_size * extent.accumulation
        return int(extent.steps * batch * extent.tokens / extent.rows)
    if extent is not None:
        return extent.steps * per_step
    limits = [source.limit for source in recipe.data.sources]
    if recipe.data.max_length is None or None in limits:
        return None
    shown = sum(source.weight * (source.limit or 0) for source in recipe.data.sources)
    return int(recipe.train.num_train_epochs * shown * recipe.data.max_length)


def _disk(recipe: Recipe, work: Work) -> dict[str, int]:
    parameters, checkpoint = work.shape.parameters, checkpoint_sizes(work.trained, recipe.train.optim)
    return {
        "download": 0 if find_path(recipe.model.base).exists() else 2 * parameters,
        recipe.trains: result_bytes(recipe, work.trained),
        "checkpoints": recipe.train.save_total_limit * sum(checkpoint),
        "merged": 0 if work.is_full else 2 * parameters,
        "gguf_f16": 2 * parameters,
        "gguf_q4_k_m": int(Q4_K_M_BYTES * parameters),
    }
