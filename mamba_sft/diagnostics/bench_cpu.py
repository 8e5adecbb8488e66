"""The kernels on a CPU: a training step against its peers, the scan against the processor, decoding."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import torch
from torch import Tensor
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from mamba_sft.inference.generation import State, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.kernels import cpu_loops, selective_scan
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.wording import MIB

logger = logging.getLogger(__name__)

Measurement = dict[str, Any]
LAYERS, HIDDEN, VOCABULARY = 4, 256, 1024


def measure(
    length: int = 1024, stock_length: int = 1024, quick: bool = False
) -> dict[str, list[Measurement]]:
    """Returns a table for the training step, the scan, its linearity and decoding.

    Args:
        length: Tokens of the training step.
        stock_length: The same for the stock model, which takes minutes at 1024; 0 leaves it out.
        quick: Fewer repeats and shorter rows.
    """
    channels, lengths = (512, (512, 2048, 8192)) if quick else (2048, (512, 2048, 8192, 65_536))
    repeats = 3 if quick else 7
    logger.info("measuring the scan")
    tables = {f"scan, L 2048, D {channels}, N 16, float32": scan(2048, channels, repeats)}
    tables["scan over longer rows, D 512, forward and backward"] = [
        longer_row(one, repeats) for one in lengths
    ]
    logger.info("measuring decoding")
    model = f"{LAYERS} layers, d_model {HIDDEN}"
    tables[f"decoding, {model}, batch 1"] = decoding(24 if quick else 64, repeats)
    tables[f"training step, {model}, all weights"] = training(length, stock_length, repeats)
    return tables


def best_of(repeats: int, function: Callable[[], object]) -> tuple[float, float]:
    """Returns wall and processor seconds, the least of each: the rest is what a shared machine adds."""
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return min(wall), min(processor)


def training(length: int, stock_length: int, repeats: int) -> list[Measurement]:
    """Measures forward, loss and backward of one row, with all weights trainable."""
    stock = build_model()
    ours = install(copy.deepcopy(stock))
    _step(ours, 64)()  # compiles
    rows: list[Measurement] = []

    def add(name: str, model: Any, tokens: int, repeats: int) -> None:
        logger.info("measuring a training step of %s on %d tokens", name, tokens)
        wall, processor = best_of(repeats, _step(model, tokens))
        same = [row for row in rows if row["tokens"] == tokens and row["of"] == "mamba-sft"]
        times = processor / same[0]["cpu_s"] if same else 1.0
        rows.append({"of": name, "tokens": tokens, "wall_s": wall, "cpu_s": processor, "times_ours": times})

    add("mamba-sft", ours, length, repeats)
    if importlib.util.find_spec("mambapy"):
        add("mambapy", build_model(use_falcon_mambapy=True), length, 2)
    if stock_length:
        if stock_length != length:
            add("mamba-sft", ours, stock_length, repeats)
        add("transformers", stock, stock_length, 1)
    return rows


def build_model(**config: Any) -> Any:
    """Returns the model of the benchmark with random weights, as stock `transformers` has it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return FalconMambaForCausalLM(FalconMambaConfig(**sizes, **ids, **config))


def _step(model: Any, length: int) -> Callable[[], object]:
    model.train()
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def scan(length: int, channels: int, repeats: int) -> list[Measurement]:
    """Measures the scan against the exponentials it needs: one per update, and one more in the replay.

    The floor is their time alone, at the rate of the scan's own exponential on this processor.
    """
    states = 16
    updates = length * channels * states
    rate = exponentials_per_second()
    rows: list[Measurement] = []
    forward, both = scan_steps(length, channels, states)
    for name, step, exponentials in (("forward", forward, 1), ("forward and backward", both, 2)):
        wall, processor = best_of(repeats, step)
        row: Measurement = {"of": name, "wall_ns": wall / updates * 1e9, "cpu_ns": processor / updates * 1e9}
        row["floor_cpu_ns"] = exponentials * 1e9 / rate
        row["of_floor"] = row["floor_cpu_ns"] / row["cpu_ns"]
        rows.append(row)
    return rows


def exponentials_per_second() -> float:
    """Returns the rate of the scan's exponential on one core, on rows that stay in the first-level cache."""

    @numba.njit(error_model="numpy", fastmath={"contract"})  # type: ignore[untyped-decorator, unused-ignore]
    def over(rows: Any, repeats: int) -> None:
        for _ in range(repeats):
            for i in range(rows.shape[0]):
                for j in range(32):
                    rows[i, j] = cpu_loops.exp2(-rows[i, j])

    rows, repeats = np.full((64, 32), np.float32(0.5)), 20_000
    over(rows, 1)
    return rows.size * repeats / best_of(5, lambda: over(rows, repeats))[1]


def scan_steps(length: int, channels: int, states: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns the forward alone, and forward with backward, with the decay frozen as under LoRA."""
    torch.manual_seed(0)
    u, dt, z = (torch.randn(1, length, channels).requires_grad_() for _ in range(3))
    B, C = (torch.randn(1, length, states).requires_grad_() for _ in range(2))
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    D, bias = torch.ones(channels), torch.full((channels,), -4.0)
    gradient = torch.randn(1, length, channels)

    def run() -> Tensor:
        return cast(
            Tensor, selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=True, backend="cpu")
        )

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run(), (u, dt, B, C, z), gradient)

    return forward, both


def longer_row(length: int, repeats: int, channels: int = 512) -> Measurement:
    """Measures one length; what stays the same from row to row is linear in L.

    The system's part is that of fresh pages: large results are given back and mapped anew at every call.
    """
    _, both = scan_steps(length, channels, 16)
    grown = peak_growth(both)
    updates = length * channels * 16
    user, system = min(_user_and_system(both) for _ in range(repeats if length <= 8192 else 2))
    row: Measurement = {"L": length, "user_ns": user / updates * 1e9, "system_ns": system / updates * 1e9}
    row["peak_growth_MiB"] = None if grown is None else grown / MIB
    row["bytes_per_position_and_channel"] = None if grown is None else grown / (length * channels)
    return row


def _user_and_system(step: Callable[[], object]) -> tuple[float, float]:
    """Processor seconds of a step, in the program and in the system for it (0 where that is not told)."""
    try:
        import resource
    except ImportError:  # not Unix
        return best_of(1, step)[1], 0.0
    before = resource.getrusage(resource.RUSAGE_SELF)
    step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime


def peak_growth(step: Callable[[], object]) -> int | None:
    """Returns by how many bytes this process's resident memory grows at most; None if not on Linux."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed would hide what this one takes
        reset.write_text("5", encoding="ascii")  # the peak starts again from what is resident now
        before = _kilobytes(status, "VmRSS")
        step()
        return (_kilobytes(status, "VmHWM") - before) * 1024
    except (OSError, AttributeError):
        return None


def _kilobytes(status: Path, name: str) -> int:
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def decoding(new_tokens: int, repeats: int) -> list[Measurement]:
    """Measures greedy answers to a short prompt: `generate` of stock and of ours, and our own loop."""
    model = build_model().eval()
    prompt = torch.zeros(1, 16, dtype=torch.int64)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def generate() -> None:
        model.generate(prompt, **options)

    def own() -> None:
        for _ in stream(model, [0] * 16, State(), sampling=Sampling(new_tokens), stop_ids=()):
            pass

    rows: list[Measurement] = []
    for name, run in (
        ("transformers, generate()", generate),
        ("mamba-sft, generate()", generate),
        ("mamba-sft, its own loop", own),
    ):
        if name.startswith("mamba-sft"):
            install(model)
        run()
        wall, processor = best_of(repeats, run)
        row: Measurement = {
            "of": name,
            "tokens_per_s": new_tokens / wall,
            "tokens_per_cpu_s": new_tokens / processor,
        }
        row["times_stock"] = row["tokens_per_cpu_s"] / (rows[0] if rows else row)["tokens_per_cpu_s"]
        rows.append(row)
    return rows
