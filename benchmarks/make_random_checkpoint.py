"""Writes a FalconMamba checkpoint of random weights, of any size, in little memory.

By default it has the shape of falcon-mamba-7b: 7.27B parameters in bfloat16, 14.5 GB in three shards. Memory,
time and file layout do not depend on the values, so they can be measured without the real weights.

    python benchmarks/make_random_checkpoint.py /tmp/random-7b --tokenizer path/of/a/tokenizer
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from mamba_sft.model.tensor_files import DTYPES, Layout, row_blocks, write_shard

_POOL = torch.Generator().manual_seed(0)


def make_checkpoint(output: Path, config: FalconMambaConfig, *, dtype: str, shard_bytes: int) -> int:
    """Writes the checkpoint and returns its parameters' count."""
    output.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = FalconMambaForCausalLM(config)
    layouts = [
        Layout(name, dtype, tuple(value.shape))
        for name, value in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    ]
    shards: list[list[Layout]] = [[]]
    for layout in layouts:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + layout.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(layout)
    values = torch.randn((1 << 22) + 1021, generator=_POOL)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(output / file, shard, lambda layout: random_blocks(layout, values))
        weight_map |= {layout.name: file for layout in shard}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(layout.nbytes for layout in layouts)},
            "weight_map": weight_map,
        }
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.architectures = ["FalconMambaForCausalLM"]
    config.dtype = str(DTYPES[dtype]).removeprefix("torch.")
    config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    return sum(math.prod(layout.shape) for layout in layouts)


def random_blocks(layout: Layout, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields rows of plausible size: normal with variance 1 / inputs, and a recurrence that is stable."""
    columns = math.prod(layout.shape[1:])
    for start, stop in row_blocks(layout.shape):
        count = (stop - start) * columns
        offset = int(torch.randint(1021, (), generator=_POOL))
        repeats = -(-count // (len(values) - 1021))
        block = plausible(layout.name, values[offset:].repeat(repeats)[:count], columns)
        yield block.reshape(stop - start, *layout.shape[1:]).to(DTYPES[layout.dtype])


def plausible(name: str, normal: torch.Tensor, columns: int) -> torch.Tensor:
    """Makes the values of a tensor, or of some of its rows, of as many normal ones."""
    leaf = ".".join(name.split(".")[-2:])
    if leaf.endswith("A_log"):
        rates = torch.arange(1, columns + 1, device=normal.device, dtype=torch.float32)
        return rates.log().expand(len(normal) // columns, -1)
    if leaf.rpartition(".")[2] == "D" or "norm" in leaf:
        return torch.ones_like(normal)
    return normal - 4.0 if leaf == "dt_proj.bias" else normal * columns**-0.5


def randomize(module: torch.nn.Module) -> None:
    """Gives a module such values where it is, on its own device and from torch's seed."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            normal = torch.randn(parameter.numel(), dtype=torch.float32, device=parameter.device)
            values = plausible(name, normal, math.prod(parameter.shape[1:]))
            parameter.copy_(values.reshape(parameter.shape))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=256, help="of the time step")
    parser.add_argument("--vocabulary", type=int, default=65024)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="BF16")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--tied", action="store_true", help="one matrix for embeddings and head")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path(__file__).parents[1] / "data" / "tiny-base",
        help="directory whose tokenizer is copied beside the weights",
    )
    given = parser.parse_args(arguments)
    config = FalconMambaConfig(
        hidden_size=given.hidden,
        intermediate_size=2 * given.hidden,
        num_hidden_layers=given.layers,
        state_size=16,
        time_step_rank=given.rank,
        vocab_size=given.vocabulary,
        tie_word_embeddings=given.tied,
        bos_token_id=0,
        eos_token_id=11,
        pad_token_id=11,
    )
    started = time.time()
    count = make_checkpoint(given.output, config, dtype=given.dtype, shard_bytes=int(given.shard_gb * 1e9))
    for path in given.tokenizer.glob("*token*") if given.tokenizer else ():
        shutil.copyfile(path, given.output / path.name)
    size: dict[str, Any] = {"parameters": count, "seconds": round(time.time() - started, 1)}
    print(json.dumps({"checkpoint": str(given.output)} | size))


if __name__ == "__main__":
    main()
