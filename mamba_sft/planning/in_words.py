"""What a plan says, in words: for the terminal and for a notebook, which lay it out each in their own way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mamba_sft.model.quantization import misfits
from mamba_sft.wording import GIB, size_text, time_text

if TYPE_CHECKING:
    from mamba_sft.planning.plan import Plan
    from mamba_sft.planning.speed import Rate

NAMES = {
    "weights": "base weights",
    "adapter": "adapter, float32",
    "gradients": "its gradients",
    "optimizer": "its optimizer state",
    "states": "states of the recurrence",
    "kept": "kept for the backward",
    "block": "one block in backward",
    "dequantized": "a weight, unpacked",
    "loss": "loss, in chunks",
    "rows": "gradient of the embeddings",
    "overhead": "CUDA and allocator",
}
FULL_NAMES = {"weights": "weights, float32", "gradients": "gradients", "optimizer": "optimizer state"}
"""What is otherwise named where all weights are trained."""
FALLS_BACK = "it has no bfloat16, so the run would take float16"


def model(made: Plan) -> Iterator[tuple[str, str]]:
    """Yields what is trained and in which steps, as (head or nothing, line)."""
    shape, work = made.work.shape, made.work
    share = work.trained / shape.parameters
    yield ("model", f"{made.base[0]} (sizes from {made.base[1]})")
    yield ("", f"{_count(shape.parameters)} parameters, {_count(work.trained)} trained ({share:.2%})")
    micro = f"{work.rows} x {work.length:,} tokens at once"
    if work.streams:
        micro = f"{work.rows} x {work.length:,} tokens, {work.chunk:,} at a time"
    bits = "32-bit" if work.itemsize == 4 else "16-bit"
    if work.is_full and work.mixed:
        bits = "32-bit weights, products in 16-bit"
    numbers = bits if work.quantization == "none" else f"{work.quantization} and {bits}"
    yield ("step", f"{micro}, checkpointing {work.policy}, {numbers}")
    for name, reason in misfits(shape, work.quantization).items():
        yield ("", f"`{name}` stays {bits}: {reason}")


def memory_parts(made: Plan) -> Iterator[tuple[str, int, bool]]:
    """Yields the parts of the memory: name, bytes, and whether it is held at the time of the peak."""
    parts = made.parts
    ends = {
        "block": parts["block"] + parts["dequantized"] >= parts["loss"],
        "loss": parts["block"] + parts["dequantized"] < parts["loss"],
    }
    names = NAMES | (FULL_NAMES if made.work.is_full else {})
    for name, size in parts.items():
        if round(size / GIB, 2) == 0:
            continue
        counted = ends.get("block" if name == "dequantized" else name, name != "rows")
        yield (
            names[name] if name != "overhead" or made.accelerator.type == "cuda" else "libraries",
            size,
            counted,
        )


def device(made: Plan) -> tuple[str, str]:
    """Returns the device with its memory, and whether the run fits."""
    left = made.accelerator.usable_bytes - made.peak
    usable = f"{size_text(made.accelerator.usable_bytes)} usable"
    verdict = f"fits, {size_text(left)} left" if made.fits else f"does not fit: {size_text(-left)} too much"
    return f"{made.accelerator.name_with_memory}, {usable}: ", verdict


def falls_back(made: Plan) -> bool:
    """Returns whether the run would compute in float16 because the device has no bfloat16."""
    return made.wants_bfloat16 and not made.accelerator.bfloat16


def largest(made: Plan) -> Iterator[tuple[str, str]]:
    """Yields what would still fit: a batch, a row."""
    work = made.work
    rows = f"a batch of {made.largest_rows:,}" if made.largest_rows else "no batch"
    yield "largest", f"{rows} at {work.length:,} tokens"
    yield "", f"{_longest(made)} at a batch of {work.rows:,}"
    if work.boundaries and made.accelerator.type == "cuda":
        yield "", f"states of the chunks wait in host memory: {size_text(work.boundaries)}"


def _longest(made: Plan) -> str:
    if made.largest_length >= 1 << 20:
        return "rows of any length"
    return f"rows of {made.largest_length:,} tokens" if made.largest_length else "no row"


def time(made: Plan) -> Iterator[tuple[str, str]]:
    """Yields tokens, steps and how long they take."""
    steps = "steps: known when the data is here" if made.steps is None else f"{made.steps:,} steps"
    growing = "up to " if made.accumulation is None else ""  # by `train.batch_ramp`
    yield ("tokens", f"{growing}{made.tokens_per_step:,} a step on one device; {steps}")
    if made.length is not None and made.length.chosen:
        yield ("", f"gradient_accumulation_steps left out, so {made.accumulation}")
    if made.most_tokens is not None:
        known = "about" if made.steps is not None else "at most"
        yield ("", f"{known} {_count(made.most_tokens)} in all")
    if made.rate is None:
        yield ("time", "unknown: there is no run here to go by, and the device is not in the table")
        return
    yield ("time", f"{made.rate.tokens_per_second:,.0f} tokens/s, {_known_from(made.rate)}")
    if made.rate.processor is not None:
        yield ("", f"this processor: {made.rate.processor}")
    if made.seconds is not None:
        bound = "" if made.steps is not None else "at most "
        yield ("", f"{bound}{time_text(made.seconds)} of training")
    else:
        yield ("", f"{time_text(1e6 / made.rate.tokens_per_second)} for a million tokens")


def _known_from(rate: Rate) -> str:
    if rate.source != "estimated":
        return f"measured in {rate.source}"
    return "estimated by counting operations" if rate.processor is None else "estimated from parts of a step"


def disk(made: Plan) -> Iterator[tuple[str, str]]:
    """Yields what is downloaded and written."""
    sizes, result = made.disk, "model" if made.work.is_full else "adapter"
    yield (
        "disk",
        f"download {size_text(sizes['download'])}, {result} {size_text(sizes[result])}, "
        f"checkpoints {size_text(sizes['checkpoints'])}",
    )
    merged = "" if made.work.is_full else f"merged {size_text(sizes['merged'])}, "
    yield ("", f"{merged}GGUF F16 {size_text(sizes['gguf_f16'])}, Q4_K_M {size_text(sizes['gguf_q4_k_m'])}")


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
