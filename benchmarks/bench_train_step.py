"""A training step: real tokens per second, MFU and peak memory, beside the plan's figures.

    python benchmarks/bench_train_step.py                                # what suits this machine, see below
    python benchmarks/bench_train_step.py instruct data.max_length=8192  # the step of any recipe
    python benchmarks/bench_train_step.py --stock                        # and stock transformers + PEFT

The model has the recipe's shape and random weights, made on the device, so nothing is downloaded; rows are
random tokens, packed of sequences of 37 to 1,500 tokens. A step is what a micro-batch takes in training:
forward, backward, clipping and the optimizer. Without a recipe, a GPU gets the three steps of `ON_A_GPU` at
the 7B shape; a CPU gets a tiny model, and the ratio to stock transformers and PEFT on the same model (which
have to leave packing and `out_proj` out). MFU counts 4 N operations a token, N the weights of all matrix
products, over the card's peak. Peak memory is CUDA's counter, on a CPU that of the process. Ends with one
line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from make_random_checkpoint import randomize
from transformers import FalconMambaConfig, FalconMambaForCausalLM
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaBlock

from mamba_sft.data.packing import PADDING, Collator
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.model.adapter import attach_adapter
from mamba_sft.model.loading import resolve_dtype
from mamba_sft.model.quantization import never_pack, quantized_projections
from mamba_sft.model.shape import Shape, find_shape
from mamba_sft.planning.environment import describe_device
from mamba_sft.planning.gpus import recognized
from mamba_sft.planning.memory import Work, peak, planned_parts
from mamba_sft.planning.speed import estimate, flops
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.training.activations import keep_activations
from mamba_sft.training.figures import Figures
from mamba_sft.training.fused_head import add_fused_head
from mamba_sft.training.streaming import backpropagate, split, sweep

ROWS_OF_8K = ("data.max_length=8192", "train.per_device_train_batch_size=1", "train.checkpointing=mamba")
ON_A_GPU = {
    "bf16 LoRA, 8k packed rows": ("instruct", *ROWS_OF_8K),
    "QLoRA, 8k packed rows": ("instruct-qlora", *ROWS_OF_8K),
    "long context, 32k tokens streamed": ("long-context",),
}
ON_A_CPU = {"quickstart": ("quickstart", "data.max_length=512", "train.per_device_train_batch_size=1")}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAINED = (1, 2)


def model_flops(work: Work) -> int:
    """Returns 4 N: the operations per token that training an adapter needs, N the weights of all products."""
    return 4 * (work.shape.products + work.shape.matrix)


def build(recipe: Recipe, shape: Shape, dtype: torch.dtype) -> Any:
    """Makes the model of a recipe on the device, of random weights, in NF4 layer by layer.

    The same seed and shape give the same weights.
    """
    config = FalconMambaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=0, state_size=shape.states, time_step_rank=shape.rank,
        conv_kernel=shape.width, tie_word_embeddings=shape.tied, residual_in_fp32=shape.residual_in_fp32,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with made_in(dtype):
        model = FalconMambaForCausalLM(config)
    randomize(model.to(dtype))
    config.num_hidden_layers = shape.layers
    for number in range(shape.layers):
        with made_in(dtype):
            block = FalconMambaBlock(config, layer_idx=number)
        randomize(block.to(dtype))
        if recipe.model.quantization == "nf4":
            quantize(block.mixer, shape, dtype)
        model.backbone.layers.append(block)
    if recipe.model.quantization == "nf4":
        never_pack(model)
        model.is_loaded_in_4bit = True
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return model


@contextlib.contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, modules are made on the device and in `dtype`."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def quantize(mixer: Any, shape: Shape, dtype: torch.dtype) -> None:
    """Puts the projections of a mixer into NF4, one after another."""
    import bitsandbytes as bnb

    for name in quantized_projections(shape, "nf4"):
        linear = getattr(mixer, name)
        small = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=True, device="meta",
        )  # fmt: skip
        small.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        small.bias = linear.bias
        setattr(mixer, name, small.to(DEVICE))


def rows_of(recipe: Recipe, shape: Shape) -> list[dict[str, Any]]:
    """Makes full rows of random tokens, cut into sequences as packing would."""
    length, rng = recipe.data.max_length or 2048, np.random.default_rng(0)
    rows = []
    for _ in range(recipe.train.per_device_train_batch_size):
        ids = rng.integers(3, shape.vocabulary, length).tolist()
        cuts = np.cumsum(rng.integers(37, 1500, length // 37 + 1))
        lengths = np.diff([0, *cuts[cuts < length], length]).tolist() if recipe.data.packing else [length]
        rows.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths})
    return rows


def ours(recipe: Recipe, model: Any, dtype: torch.dtype, rows: list[dict[str, Any]]) -> Callable[[], None]:
    """Returns a training step of this package."""
    model = install(model, recipe.model.kernels)
    model = attach_adapter(model, recipe.adapter, trained_token_ids=TRAINED)
    add_fused_head(model.get_base_model())
    keep_activations(model, recipe.train.checkpointing)
    model.train()
    batch = on_device(Collator(0)(rows))
    labels = int((batch["labels"][:, 1:] != -100).sum())

    def run(chunk: Any, carry: Any, close: Any) -> None:
        with mixed(dtype):
            loss = Figures.of(model, chunk, carry=carry).loss / labels
        close(loss).backward()

    def backward() -> None:
        chunks = split(batch, recipe.train.stream_tokens)
        with mixed(dtype):
            boundaries = sweep(model.get_base_model().backbone, chunks)
        backpropagate(chunks, boundaries, run)

    return with_optimizer(model, backward)


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def stock(recipe: Recipe, model: Any, dtype: torch.dtype, rows: list[dict[str, Any]]) -> Callable[[], None]:
    """Returns the step of stock transformers and PEFT: sequences as padded rows, no adapter on `out_proj`."""
    from peft import LoraConfig, get_peft_model

    targets = [name for name in recipe.adapter.target_modules if name != "out_proj"]
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=recipe.adapter.r, target_modules=targets)
    )
    if recipe.train.checkpointing != "none":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    pieces = []
    for row in rows:
        ends = np.cumsum(row["seq_lengths"])
        pieces += [
            row["input_ids"][end - size : end] for end, size in zip(ends, row["seq_lengths"], strict=True)
        ]
    batch = Collator(0)([{"input_ids": ids, "labels": ids} for ids in pieces])
    del batch["trained"]
    seq_idx = batch.pop("seq_idx")
    batch["attention_mask"] = (seq_idx != PADDING).long()  # stock knows padding by its mask alone
    batch = on_device(batch)

    def backward() -> None:
        with mixed(dtype):
            loss = model(**batch).loss
        loss.backward()

    return with_optimizer(model, backward)


def with_optimizer(model: Any, backward: Callable[[], None]) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def mixed(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE, dtype)


def timed(step: Callable[[], None], repeats: int, budget: float = float("inf")) -> tuple[float, int]:
    """Returns the median seconds of a step after a first one, and the most bytes held.

    No step is begun `budget` seconds after the first of those that count.
    """
    step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < budget:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if DEVICE == "cuda":
        return sorted(seconds)[len(seconds) // 2], torch.cuda.max_memory_allocated()
    return sorted(seconds)[len(seconds) // 2], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(words: Sequence[str], layers: int | None = None) -> tuple[Recipe, Shape, Work]:
    """Returns a recipe, the shape of its base, or of one with fewer layers, and its step as plans see it."""
    recipe = Recipe.load(words[0], overrides=words[1:])
    shape, _ = find_shape(recipe.model)
    shape = shape if layers is None else replace(shape, layers=layers)
    length = recipe.data.max_length or 2048
    here = recognized(describe_device())
    return recipe, shape, Work.of(recipe, shape, here, length=length, trained_rows=len(TRAINED))


def measure(
    words: Sequence[str],
    repeats: int,
    against_stock: bool,
    *,
    layers: int | None = None,
    budget: float = float("inf"),
) -> dict[str, Any]:
    """Measures the step of a recipe, and beside it puts what the plan says.

    Args:
        words: The recipe and overrides of its values.
        repeats: Steps, of which the median counts.
        against_stock: Whether to measure stock transformers and PEFT too.
        layers: Of the model, for a card that is too small for all; everything in the result is of these.
        budget: Seconds after which no further step is begun.
    """
    recipe, shape, work = load(words, layers)
    dtype, rows = resolve_dtype(recipe.model), rows_of(recipe, shape)
    tokens = sum(len(row["input_ids"]) for row in rows)
    accelerator = recognized(describe_device())
    parts, rate = planned_parts(work), estimate(work, accelerator)
    if DEVICE == "cuda":  # what the counter does not see
        parts["overhead"] = 0
    model = build(recipe, shape, dtype)
    twin = copy.deepcopy(model) if against_stock else None
    seconds, most = timed(ours(recipe, model, dtype, rows), repeats, budget)
    of_peak = tokens / seconds / accelerator.flops if accelerator.flops else None
    result = {
        "tokens_per_second": tokens / seconds,
        "mfu": of_peak and model_flops(work) * of_peak,
        "with_repeats": of_peak and flops(work) * of_peak,
        "peak_bytes": most,
        "planned_tokens_per_second": rate and rate.tokens_per_second,
        "planned_peak_bytes": peak(parts),
        "tokens": tokens,
    }
    if twin is not None:
        del model
        seconds, most = timed(stock(recipe, twin, dtype, rows), 1)
        result |= {"stock_tokens_per_second": tokens / seconds, "stock_peak_bytes": most}
        result["times_stock"] = result["tokens_per_second"] / result["stock_tokens_per_second"]
    return result


def show(name: str, result: dict[str, Any]) -> None:
    mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
    planned = result["planned_tokens_per_second"] or 0
    print(
        f"{name:<34}{result['tokens_per_second']:>10,.0f}{planned:>10,.0f}{mfu:>8}"
        f"{result['peak_bytes'] / 1e9:>10.2f}{result['planned_peak_bytes'] / 1e9:>10.2f}",
        flush=True,
    )
    if "times_stock" in result:
        print(
            f"{'  stock transformers + PEFT':<34}{result['stock_tokens_per_second']:>10,.0f}{'':>18}"
            f"{result['stock_peak_bytes'] / 1e9:>10.2f}   ours is {result['times_stock']:.1f} times as fast"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="*", help="a recipe, and overrides of its values")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stock", action="store_true", help="measure stock transformers and PEFT too")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    cases = {options.recipe[0]: tuple(options.recipe)} if options.recipe else ON_A_CPU
    if not options.recipe and DEVICE == "cuda":
        cases = ON_A_GPU
    head = f"on {describe_device()['name']}"
    print(f"{head:<34}{'tokens/s':>10}{'planned':>10}{'MFU':>8}{'GB':>10}{'planned':>10}")
    results = {}
    for name, words in cases.items():
        against = options.stock or (not options.recipe and DEVICE == "cpu")
        results[name] = measure(words, options.repeats, against)
        show(name, results[name])
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({"device": describe_device(), "results": results}))


if __name__ == "__main__":
    main()
