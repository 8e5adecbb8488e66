"""How fast the CPU kernels are: a training step against its peers, the scan against the processor, decoding.

    python benchmarks/bench_kernels.py [--length 1024] [--stock-length 1024] [--skip-stock]

Prints a table and ends with one line of JSON. The stock model materialises its states and loops over time
in Python: at the default length its step takes minutes, which is the point. `--stock-length` measures it on
a shorter row.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

# OpenMP threads that wait by spinning keep the kernels' off the cores; to be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numba
import numpy as np
import torch
import transformers
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from mamba_sft.kernels import cpu_loops, selective_scan
from mamba_sft.kernels.falcon_mamba import install

LAYERS, WIDTH, VOCABULARY = 4, 256, 1024


def best_of(repeats: int, function: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds, the least of each: on a shared machine the rest measures the neighbours."""
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        function()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return min(wall), min(processor)


def build_model(**config: object) -> FalconMambaForCausalLM:
    torch.manual_seed(0)
    return FalconMambaForCausalLM(
        FalconMambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            **config,
        )
    )


def training_step(model: FalconMambaForCausalLM, length: int) -> Callable[[], object]:
    """Forward, loss and backward of one row with all weights trainable."""
    model.train()
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def measure_training(length: int, stock_length: int, skip_stock: bool) -> dict[str, float]:
    stock = build_model()
    ours = install(copy.deepcopy(stock))
    training_step(ours, 64)()  # compiles
    base = best_of(5, training_step(ours, length))
    results = {"ours_s": base[0], "ours_cpu_s": base[1]}

    def add(name: str, peer: tuple[float, float], base: tuple[float, float]) -> None:
        results[f"{name}_s"], results[f"{name}_cpu_s"] = peer
        results[f"{name}_ratio"], results[f"{name}_cpu_ratio"] = peer[0] / base[0], peer[1] / base[1]

    add("mambapy", best_of(2, training_step(build_model(use_falcon_mambapy=True), length)), base)
    if not skip_stock:
        if stock_length != length:
            base = best_of(5, training_step(ours, stock_length))
        add("stock", best_of(1, training_step(stock, stock_length)), base)
    return results


def exponentials_per_second() -> float:
    """The rate of the scan's own exponential on one core, on rows that stay in the first-level cache."""

    @numba.njit(error_model="numpy", fastmath={"contract"})
    def over(rows: np.ndarray, repeats: int) -> None:
        for _ in range(repeats):
            for i in range(rows.shape[0]):
                for j in range(32):
                    rows[i, j] = cpu_loops.exp2(-rows[i, j])

    rows, repeats = np.full((64, 32), np.float32(0.5)), 20_000
    over(rows, 1)
    return rows.size * repeats / best_of(5, lambda: over(rows, repeats))[1]


def scan_step(length: int, channels: int, states: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward alone, and forward with backward, with the decay frozen as under LoRA."""
    torch.manual_seed(0)
    u, dt, z = (torch.randn(1, length, channels).requires_grad_() for _ in range(3))
    B, C = (torch.randn(1, length, states).requires_grad_() for _ in range(2))
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    constants = {"D": torch.ones(channels), "dt_bias": torch.full((channels,), -4.0), "dt_softplus": True}
    gradient = torch.randn(1, length, channels)

    def forward() -> torch.Tensor:
        return selective_scan(u, dt, A, B, C, z=z, **constants, backend="cpu")

    def inference() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), (u, dt, B, C, z), gradient)

    return inference, both


def measure_scan() -> dict[str, float]:
    results = {"exp_per_cpu_s": exponentials_per_second()}
    length, channels, states = 2048, 2048, 16
    elements = length * channels * states
    inference, both = scan_step(length, channels, states)
    # One exponential per element in the forward, and one more in the replay: no scan can be faster than that.
    floor = 1e9 / results["exp_per_cpu_s"]
    for name, step, exponentials in (("forward", inference, 1), ("both", both, 2)):
        wall, processor = best_of(7, step)
        results[f"{name}_ns"], results[f"{name}_cpu_ns"] = wall / elements * 1e9, processor / elements * 1e9
        results[f"{name}_of_floor"] = exponentials * floor / results[f"{name}_cpu_ns"]
    for length in (512, 1024, 2048, 4096):
        _, both = scan_step(length, 512, states)
        _, processor = best_of(5, both)
        results[f"both_cpu_ns_at_{length}"] = processor / (length * 512 * states) * 1e9
    return results


def measure_decoding(new_tokens: int = 64) -> dict[str, float]:
    prompt = torch.zeros(1, 16, dtype=torch.int64)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    model = build_model().eval()
    results = {}
    for name in ("stock", "ours"):
        if name == "ours":
            install(model)
        wall, processor = best_of(7, lambda: model.generate(prompt, **options))
        results[f"{name}_tokens_per_s"] = new_tokens / wall
        results[f"{name}_tokens_per_cpu_s"] = new_tokens / processor
    return results


def machine() -> dict[str, str | int]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numba": numba.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the training step")
    parser.add_argument("--stock-length", type=int, default=1024, help="tokens of the stock model's step")
    parser.add_argument("--skip-stock", action="store_true", help="leave the stock model's step out")
    arguments = parser.parse_args()

    results = {
        "machine": machine(),
        "scan": measure_scan(),
        "decoding": measure_decoding(),
        "training": measure_training(arguments.length, arguments.stock_length, arguments.skip_stock),
    }
    for section, values in results.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:24} {value if not isinstance(value, float) else format(value, '.4g')}")
    print(json.dumps({"benchmark": "kernels", "arguments": vars(arguments)} | results))


if __name__ == "__main__":
    main()
