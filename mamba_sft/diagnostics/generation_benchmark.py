"""`bench generate`: tokens per second and memory against the length of the prompt, ours and stock.

Imports no torch; the models are loaded in processes of their own, one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mamba_sft.diagnostics.measured_process import Fact, NoMemoryError, TooLongError, told_by
from mamba_sft.diagnostics.training_benchmark import current_load, machine_facts
from mamba_sft.inference.model_places import ModelPlace
from mamba_sft.wording import count_text, time_text

logger = logging.getLogger(__name__)

OURS, PEER = "mamba-sft", "transformers"


def measure_generation(
    place: ModelPlace,
    *,
    lengths: Sequence[int],
    batch_sizes: Sequence[int] = (1,),
    new_tokens: int = 32,
    peer: bool = True,
    peer_seconds: float = 120.0,
) -> dict[str, Any]:
    """Times prefill and decoding at every length and batch size, and stock transformers on the same prompts.

    Args:
        place: From `find_place`.
        lengths: Tokens of the prompts.
        batch_sizes: Prompts that are answered together.
        new_tokens: Tokens that are decoded for each.
        peer: Whether to measure stock transformers.
        peer_seconds: When they are stopped, counted from when they are loaded.

    Returns:
        JSON-safe: `benchmark`, `machine`, `settings`, `rows` (one for each side, batch size and length),
        `flat` (for each batch size, the longest against the shortest prompt), `against_peer` (ours against
        stock at the longest prompt that both did), `peer_ended` (why stock has not
        done all, or None) and `peer_is_base` (whether stock had no adapter, unlike ours).
    """
    load = current_load()
    lengths, batch_sizes = sorted(set(lengths)), sorted(set(batch_sizes))
    asked = (place.name, batch_sizes, lengths, new_tokens)
    ours, _, dtype = _measure(OURS, asked, None)
    stock, ended, _ = _measure(PEER, (*asked, dtype), peer_seconds) if peer else ([], None, None)
    return {
        "benchmark": "generate",
        "machine": machine_facts(load),
        "settings": {
            "model": place.name, "dtype": dtype, "quantization": place.section.quantization,
            "lengths": lengths, "batch_sizes": batch_sizes, "new_tokens": new_tokens,
        },
        "rows": [*ours, *stock],
        "flat": [_flatness(ours, size) for size in batch_sizes],
        "against_peer": [one for size in batch_sizes if (one := _against(ours, stock, size))],
        "peer_ended": ended,
        "peer_is_base": bool(stock) and place.adapter is not None,
    }  # fmt: skip


def _measure(
    side: str, asked: tuple[Any, ...], seconds: float | None
) -> tuple[list[Fact], str | None, str | None]:
    """The rows of one side, why they are not all, and the number format, where it was told."""
    from mamba_sft.diagnostics import generation_steps

    limit = "" if seconds is None else f", {time_text(seconds)} at most"
    logger.info("measuring %s%s", side, limit)
    step = generation_steps.time_ours if side == OURS else generation_steps.time_stock
    rows: list[Fact] = []
    ended, dtype = [], None
    try:
        for fact in told_by(step, *asked, what=side, seconds=seconds):
            dtype = fact.get("dtype", dtype)
            if "left_out" in fact:
                ended.append(fact["left_out"])
            elif "length" in fact:
                rows.append({"of": side} | with_rates(fact, asked[3]))
    except TooLongError:
        last = f" after {count_text(rows[-1]['length'], 'token')}" if rows else ""
        ended.append(f"stopped{last}: {time_text(seconds or 0)} were over")
    except NoMemoryError:
        if side == OURS:
            raise
        ended.append("out of memory")
    return rows, "; ".join(ended) or None, dtype


def with_rates(fact: Fact, new_tokens: int) -> Fact:
    """Returns what was told of a length, with tokens per second of all its rows together."""
    size = fact["batch_size"]
    return fact | {
        "prefill_tokens_per_second": size * fact["length"] / fact["prefill_seconds"],
        "decode_tokens_per_second": size * new_tokens / fact["decode_seconds"],
        "prefill_tokens_per_cpu_second": size * fact["length"] / max(fact["prefill_cpu_seconds"], 1e-9),
        "decode_tokens_per_cpu_second": size * new_tokens / max(fact["decode_cpu_seconds"], 1e-9),
    }


def _against(ours: Sequence[Fact], stock: Sequence[Fact], size: int) -> dict[str, Any] | None:
    """Ours as a multiple of stock, at the longest prompt that stock did."""
    done = [row for row in stock if row["batch_size"] == size]
    if not done:
        return None
    theirs = done[-1]
    mine = next(row for row in ours if (row["batch_size"], row["length"]) == (size, theirs["length"]))
    ratios = {name: mine[name] / theirs[name] for name in _compared(theirs)}
    return {"batch_size": size, "length": theirs["length"]} | ratios


def _compared(row: Fact) -> list[str]:
    return [name for name in row if name.startswith(("prefill_tok", "decode_tok", "peak"))]


def _flatness(rows: Sequence[Fact], size: int) -> dict[str, Any]:
    """The longest prompt against the shortest: 1 is flat."""
    of_size = [row for row in rows if row["batch_size"] == size]
    first, last = of_size[0], of_size[-1]
    ratios = {name: last[name] / first[name] for name in _compared(first)}
    return {"batch_size": size, "from": first["length"], "to": last["length"]} | ratios
