"""Peak memory of a training step against the length of its row, and what each policy keeps and repeats.

    python benchmarks/bench_memory.py                      # the length table; an hour on one core
    python benchmarks/bench_memory.py --lengths 2048 8192  # shorter
    python benchmarks/bench_memory.py --layer              # bytes and FLOPs of a layer, for the 7B

The length table trains the quickstart's model (data/tiny-base, LoRA r=16, float32) on one row of random
tokens, every cell in a process of its own: a short step first, then the growth of the process's peak resident
memory over the measured step. Cells that would not fit in `--limit` by the growth of the one before are left
out, and say what that growth amounts to. The layer table counts the bytes of all distinct tensors that a
forward leaves alive, the most that are alive at once in the step beyond these, and the FLOPs of its matrix
products, each as the difference of two models that differ by a layer and two rows that differ in length. The
models have a quarter of the 7B's width and rank, so bytes count four times and FLOPs sixteen times. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from mamba_sft.data.packing import Collator
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import attach_adapter
from mamba_sft.model.loading import load_model
from mamba_sft.recipe.fields import AdapterSection, ModelSection
from mamba_sft.training.activations import keep_activations
from mamba_sft.training.figures import Figures
from mamba_sft.training.fused_head import add_fused_head
from mamba_sft.training.streaming import backpropagate, split, sweep

BASE = Path(__file__).parents[1] / "data" / "tiny-base"
LENGTHS = (2_048, 8_192, 32_768, 131_072, 524_288, 1_000_000)
WIDTH = 4
"""What the layer table's models are narrower by than the 7B."""
WAYS = {
    "none": "none",
    "mamba": "mamba",
    "block": "block",
    "stream 1024": "none",
    "stream 1024, block": "block",
}
"""How a step is taken, and the checkpointing policy of it."""


def row(tokens: int, vocabulary: int) -> dict[str, Any]:
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return Collator(pad_token_id=0)([{"input_ids": ids, "labels": ids}])


def step(model: Any, batch: dict[str, Any], stream_tokens: int | None) -> None:
    """Forward and backward of a batch, as a training run takes it."""
    chunks, count = split(batch, stream_tokens), batch["input_ids"].numel()

    def run(chunk: Any, carry: Any, close: Any) -> None:
        loss = Figures.of(model, chunk, carry=carry).loss / count
        close(loss).backward()

    backpropagate(chunks, sweep(model.get_base_model().backbone, chunks), run)


def prepare(model: Any, policy: Any, rank: int = 16) -> Any:
    model = attach_adapter(model, AdapterSection(r=rank))
    add_fused_head(model.get_base_model())
    keep_activations(model, policy)
    return model.train()


def measure_cell(way: str, tokens: int) -> None:
    """In a process of its own: prints the growth of the peak, the peak (bytes), and the seconds."""
    stream_tokens = 1024 if way.startswith("stream") else None
    model = prepare(load_model(ModelSection(base=str(BASE), dtype="float32"), device="cpu"), WAYS[way])
    size = model.config.vocab_size
    step(model, row(512, size), stream_tokens)
    batch = row(tokens, size)
    before, started = peak(), time.perf_counter()
    step(model, batch, stream_tokens)
    print(json.dumps({"grown": peak() - before, "peak": peak(), "seconds": time.perf_counter() - started}))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def length_table(lengths: list[int], ways: list[str], limit: float) -> dict[str, Any]:
    print(f"{'tokens':>10}" + "".join(f"{way:>24}" for way in ways))
    results: dict[str, Any] = {way: {} for way in ways}
    for tokens in lengths:
        print(f"{tokens:>10,}", end="", flush=True)
        for way in ways:
            last = max(results[way], default=None)
            expected = results[way][last]["grown"] * tokens / last if last else 0
            if not way.startswith("stream") and expected > limit:
                text = f"not run (~{expected / (1 << 30):,.0f} GiB)"
                print(f"{text:>24}", end="", flush=True)
                continue
            command = [sys.executable, __file__, "--cell", way, str(tokens)]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[way][tokens] = cell = json.loads(ran.stdout.splitlines()[-1])
            text = f"{cell['grown'] / (1 << 20):,.0f} MiB {cell['seconds']:,.1f} s"
            print(f"{text:>24}", end="", flush=True)
        print()
    return results


class Alive(TorchDispatchMode):
    """Bytes of the distinct storages that were made inside and still are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages or self.storages[storage._cdata][0].expired():
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.bytes())
        return out

    def bytes(self) -> int:  # noqa: D102
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        return sum(size for _, size in self.storages.values())


def measure_layers(policy: Any, layers: int, tokens: int) -> dict[str, float]:
    """Bytes and FLOPs of a step of a model with a few narrow layers, bf16 with LoRA."""
    config = FalconMambaConfig(
        vocab_size=256, hidden_size=4096 // WIDTH, num_hidden_layers=layers, state_size=16,
        time_step_rank=256 // WIDTH, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = FalconMambaForCausalLM(config).bfloat16()
    model = prepare(install(model), policy, rank=16 // WIDTH)
    batch = row(tokens, 256)
    with Alive() as alive, FlopCounterMode(display=False) as flops, torch.autocast("cpu", torch.bfloat16):
        chunk = split(batch, None)[0]
        loss = Figures.of(model, chunk).loss / tokens
        kept = alive.bytes()
        loss.backward()
    return {"kept": kept, "most": alive.most, "flops": flops.get_total_flops()}


def layer_table(tokens: int = 128) -> dict[str, Any]:
    print(f"{'policy':>8}{'kept, KiB/token':>18}{'at work, KiB/token':>20}{'GFLOP/token, 64 layers':>26}")
    results = {}
    for policy in ("none", "mamba", "block"):
        # Bytes and FLOPs are a + b * tokens for each layer, with a for what is made of its weights.
        one, two = (
            [measure_layers(policy, layers, length) for length in (tokens, 2 * tokens)] for layers in (1, 2)
        )
        slopes = [{name: (y[name] - x[name]) / tokens for name in x} for x, y in (one, two)]
        kept = WIDTH * (slopes[1]["kept"] - slopes[0]["kept"])
        work = WIDTH * (slopes[1]["most"] - slopes[1]["kept"])
        flops = 64 * WIDTH**2 * (slopes[1]["flops"] - slopes[0]["flops"])
        results[policy] = {"kept": kept, "work": work, "flops": flops}
        print(f"{policy:>8}{kept / 1024:>18.1f}{work / 1024:>20.1f}{flops / 1e9:>26.2f}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--limit", type=float, default=8e9, help="bytes a cell may take")
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if options.cell:
        measure_cell(options.cell[0], int(options.cell[1]))
        return
    if options.layer:
        print(json.dumps(layer_table()))
        return
    results = length_table(options.lengths, options.ways, options.limit)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
