"""What `bench generate` times: reading a prompt and going on from it, ours and stock transformers.

Each runs in a process of its own and tells one fact for each batch size and length, shorter ones first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_sft.diagnostics.measured_process import Moment
from mamba_sft.inference.chat_model import load_chat_model
from mamba_sft.inference.evaluating import evaluation_mode
from mamba_sft.inference.generation import PREFILL_CHUNK
from mamba_sft.inference.model_places import find_place
from mamba_sft.inference.next_token import NextToken, forward
from mamba_sft.model.checkpoint import resolve_base
from mamba_sft.training.pace import peak_memory, wait_for
from mamba_sft.wording import count_text, size_text

if TYPE_CHECKING:
    from mamba_sft.diagnostics.measured_process import Tell

WARM_UP = 64
"""Tokens of the prompt that is read before anything counts: it compiles what has to be."""
REPEATED_SECONDS, MOST_REPEATS = 1.0, 5
"""Short prompts are read again until they have taken so long; the quickest counts."""
SPARED = 0.8
"""Of the free memory, what the peer may take: a machine that has none left ends other programs."""


class Answer(NamedTuple):
    """Seconds that a prompt was read and an answer written, by the clock and in processor time."""

    read: float
    written: float
    read_cpu: float
    written_cpu: float

    @classmethod
    def between(cls, begun: Moment, read: Moment, written: Moment) -> Answer:
        """Returns what lies between three moments."""
        return cls(
            read.wall - begun.wall, written.wall - read.wall,
            read.processor - begun.processor, written.processor - read.processor,
        )  # fmt: skip


def time_ours(tell: Tell, model: str, sizes: Sequence[int], lengths: Sequence[int], new_tokens: int) -> None:
    """Times our own loop.

    Args:
        tell: Takes `dtype`, then `batch_size`, `length`, `prefill_seconds`, `decode_seconds` and
            `peak_bytes` of each.
        model: A run, a model directory or a hub id.
        sizes: Rows that are answered together.
        lengths: Tokens of the prompts.
        new_tokens: Tokens that are decoded.
    """
    loaded = load_chat_model(model, needs_template=False).model
    tell({"dtype": str(loaded.dtype).removeprefix("torch.")})

    def answer(ids: Tensor) -> Answer:
        begun, cache, logits = Moment.now(), None, None
        for start in range(0, ids.shape[1], PREFILL_CHUNK):
            logits, cache = forward(loaded, ids[:, start : start + PREFILL_CHUNK], cache)
        wait_for(ids.device)
        read, next_token = Moment.now(), NextToken(loaded, cache)
        for _ in range(new_tokens):
            logits = next_token(logits.argmax(-1, keepdim=True))  # type: ignore[union-attr]
        wait_for(ids.device)
        return Answer.between(begun, read, Moment.now())

    with evaluation_mode(loaded):
        answer(_prompt(loaded, 1, WARM_UP))
        for size in sizes:
            for length in lengths:
                tell(_timed(answer, _prompt(loaded, size, length)))


def time_stock(
    tell: Tell, model: str, sizes: Sequence[int], lengths: Sequence[int], new_tokens: int, dtype: str
) -> None:
    """Times `generate` of stock transformers: the same weights, or of a run its base alone.

    A length is left out, and said, that would take more memory than is free.

    Args:
        tell: Takes what `time_ours` tells, and `left_out` of a length that is not tried.
        model: As there.
        sizes: As there.
        lengths: As there.
        new_tokens: As there.
        dtype: What ours was loaded in.
    """
    from transformers import FalconMambaForCausalLM, StoppingCriteria, StoppingCriteriaList

    section = find_place(model).section
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = FalconMambaForCausalLM.from_pretrained(
        resolve_base(section.base, section.revision), dtype=getattr(torch, dtype),
        device_map={"": device}, use_safetensors=True, local_files_only=True,
    ).eval()  # fmt: skip

    class Clock(StoppingCriteria):  # type: ignore[misc]
        """Takes the time after each token, and stops nothing."""

        def __init__(self) -> None:
            self.times: list[Moment] = []

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            wait_for(input_ids.device)
            self.times.append(Moment.now())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def answer(ids: Tensor) -> Answer:
        clock, begun, count = Clock(), Moment.now(), new_tokens + 1
        loaded.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
            min_new_tokens=count, stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return Answer.between(begun, clock.times[0], clock.times[-1])

    with torch.no_grad():
        answer(_prompt(loaded, 1, WARM_UP))
        tell({"loaded": True})
        for size in sizes:
            taken: dict[str, Any] | None = None
            for length in lengths:
                if taken is not None and (short := _too_large(taken, length, device)):
                    tell({"batch_size": size, "length": length, "left_out": short})
                    break
                taken = _timed(answer, _prompt(loaded, size, length), repeats=1)
                tell(taken)


def _prompt(model: Any, size: int, length: int) -> Tensor:
    numbers = torch.Generator().manual_seed(length)
    ids = torch.randint(0, int(model.config.vocab_size), (size, length), generator=numbers)
    return ids.to(model.device)


def _timed(answer: Callable[[Tensor], Answer], ids: Tensor, repeats: int = MOST_REPEATS) -> dict[str, Any]:
    before = _forget_peak(ids.device)
    found: list[Answer] = []
    begun = time.perf_counter()
    while not found or (len(found) < repeats and time.perf_counter() - begun < REPEATED_SECONDS):
        found.append(answer(ids))
    return {
        "batch_size": ids.shape[0],
        "length": ids.shape[1],
        "prefill_seconds": min(one.read for one in found),
        "decode_seconds": min(one.written for one in found),
        "prefill_cpu_seconds": min(one.read_cpu for one in found),
        "decode_cpu_seconds": min(one.written_cpu for one in found),
        "peak_bytes": int(peak_memory(ids.device)),
        "grown_bytes": max(0, int(peak_memory(ids.device)) - before),
    }


def _forget_peak(device: torch.device) -> int:
    """Has the peak begin anew; returns what is held now. Not on Linux, it stays the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(peak_memory(device))


def _too_large(taken: dict[str, Any], length: int, device: torch.device) -> str | None:
    """Why a longer prompt is not tried after `taken`, or None."""
    if device.type == "cuda":
        return None
    import psutil  # type: ignore[import-untyped]

    needed = taken["grown_bytes"] * length / taken["length"]
    free = psutil.virtual_memory().available
    if needed <= SPARED * free:
        return None
    tokens = count_text(length, "token")
    return f"at {tokens} it would take some {size_text(needed)}, and {size_text(free)} are free"
