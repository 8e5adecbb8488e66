"""Pre-train the tiny base from nothing: tokenizer, weights and log, all from fixed seeds.

A FalconMamba of 1.6M parameters reads some millions of tokens of `make_corpus.py`; `README.md` says how long
that takes.

Usage: python data/pretrain_tiny_base.py [--output DIR] [--steps N]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from make_corpus import SEPARATOR, documents
from make_tokenizer import build_tokenizer
from transformers import FalconMambaConfig, FalconMambaForCausalLM, GenerationConfig

from mamba_sft.kernels.falcon_mamba import install

HERE = Path(__file__).parent
STEPS, WARMUP, DECAY_SHARE = 2200, 50, 0.4
BATCH, LENGTH = 8, 256
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
TRAIN_SEED, HELD_OUT_SEED = 10, 11
SAMPLES = [
    "The capital of Drumania is",
    "Mira has a green lamp. Tom has a red bowl. The lamp is",
    "One Monday Anna woke up",
    "A list of words: kite, goat, spoon. Backwards:",
]


def build_model(vocabulary: int) -> Any:
    """A fresh FalconMamba with Falcon-Mamba's settings at toy width, float32.

    It learns with the head tied to the embeddings, since copying is then quickly found; `save` unties them.
    """
    config = FalconMambaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=4,
        state_size=16,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=11,
        pad_token_id=11,
    )
    torch.manual_seed(TRAIN_SEED)
    return FalconMambaForCausalLM(config).float()


def batches(tokenizer: Any, seed: int) -> Iterator[torch.Tensor]:
    """Windows of the endless token stream, (BATCH, LENGTH) int64; no stop token is ever in it."""
    stream: list[int] = []
    size = BATCH * LENGTH
    for document in documents(seed):
        stream += tokenizer(document + SEPARATOR).input_ids
        if len(stream) >= size:
            yield torch.tensor(stream[:size]).view(BATCH, LENGTH)
            stream = stream[size:]


def learning_rate(step: int, steps: int) -> float:
    """Warm up, stay, then decay to zero along a half cosine."""
    decay_from = steps * (1 - DECAY_SHARE)
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    if step < decay_from:
        return LEARNING_RATE
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - decay_from) / (steps - decay_from)))


def optimizer_for(model: Any) -> torch.optim.Optimizer:
    """AdamW; weight decay on the projections only."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        decayed.append(parameter) if "proj.weight" in name else free.append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def held_out_loss(model: Any, tokenizer: Any, count: int = 8) -> float:
    """Mean loss on batches of a stream from another seed."""
    stream = itertools.islice(batches(tokenizer, HELD_OUT_SEED), count)
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in stream]
    return sum(losses) / len(losses)


def pretrain(model: Any, tokenizer: Any, steps: int, say: Any) -> None:
    """Run the optimizer over the stream, logging every 50 steps."""
    optimizer = optimizer_for(model)
    stream = batches(tokenizer, TRAIN_SEED)
    start, tokens, total = time.perf_counter(), 0, 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids = next(stream)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens, total = tokens + ids.numel(), total + loss.item()
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - start
            speed = f"{tokens / seconds:5.0f} tokens/s  {seconds:4.0f} s"
            say(f"step {step + 1:4d}  loss {total / 50:.4f}  {speed}")
            total = 0.0


def untied(model: Any) -> Any:
    """The same function with a head of its own, as Falcon-Mamba has."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    twin = FalconMambaForCausalLM(config)
    twin.load_state_dict(model.state_dict() | {"lm_head.weight": model.get_input_embeddings().weight})
    return twin


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """Write the checkpoint as a hub snapshot has it, weights in bfloat16."""
    untied(model).to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    GenerationConfig(bos_token_id=0, eos_token_id=11, pad_token_id=11).save_pretrained(output)


def main() -> None:
    """Train, log, save, and show how the saved base continues a few openings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "tiny-base")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    install(model)
    say(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model.num_parameters():,} parameters"
    )
    pretrain(model.train(), tokenizer, arguments.steps, say)
    say(f"held-out loss {held_out_loss(model.eval(), tokenizer):.4f} in float32")
    save(model, tokenizer, arguments.output)
    model = install(FalconMambaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32))
    say(f"held-out loss {held_out_loss(model, tokenizer):.4f} as saved, rounded to bfloat16")
    for opening in SAMPLES:
        ids = tokenizer(opening, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=40, do_sample=False)
        say(f"> {tokenizer.decode(answer[0])!r}")
    arguments.output.with_name("pretraining.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
