"""Peak memory of reading a prompt against its length, and what prompts with one beginning cost.

    python benchmarks/bench_prefill.py                     # minutes; fails where memory is not flat
    python benchmarks/bench_prefill.py --lengths 10000 100000
    python benchmarks/bench_prefill.py --shared            # the second table only

The first table answers prompts of random tokens with one token, the tiny base in float32, every cell in a
process of its own: a short prompt first, then the growth of the process's peak resident memory. `alone` is a
prompt in a stream, as `chat` reads it; `batch` is two of them at once, one a hundred tokens shorter, as
`generate` reads a file. The ids of a prompt are Python numbers in lists, whose size is told beside it: beyond
them memory must not grow. `tokenize` is a text of as many tokens. The second table answers 32 prompts with
one beginning, as they are and with that beginning read for each. These two are in processor seconds, which
other programs on the same cores change little. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mamba_sft.inference import prefixes
from mamba_sft.inference.generation import State, answers, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.model.chat_template import encode_batch
from mamba_sft.model.loading import load_model, load_tokenizer
from mamba_sft.recipe.fields import ModelSection

BASE = Path(__file__).parents[1] / "data" / "tiny-base"
LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
WAYS = ("alone", "batch", "tokenize")
SECTION = ModelSection(base=str(BASE), dtype="float32")
ONE = Sampling(max_new_tokens=1)
ALLOWED = 16 << 20
"""Bytes by which the memory may differ that is not the prompt's ids: what an allocator keeps."""
BYTES_OF_AN_ID = 48
"""An int object of 28 bytes, its place in the prompt and in what the state has read, of lists that grow."""


def random_ids(tokens: int) -> list[int]:
    return torch.randint(12, 1500, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def read(model: Any, tokenizer: Any, way: str, tokens: int) -> None:
    ids = random_ids(tokens)
    if way == "alone":
        list(stream(model, ids, State(), sampling=ONE, stop_ids=()))
    else:
        answers(model, tokenizer, [ids, ids[100:]], sampling=ONE, stop_ids=())


def cell(way: str, tokens: int) -> dict[str, Any]:
    """One cell of the first table, in this process."""
    tokenizer = load_tokenizer(SECTION)
    if way == "tokenize":
        text = "the quick brown fox jumps over 12 lazy dogs, and it's naïve... " * (tokens // 16)
        began = time.process_time()
        [ids] = encode_batch(tokenizer, [text])
        took = time.process_time() - began
        return {"way": way, "tokens": len(ids), "seconds": took, "bytes": len(text.encode())}
    model = load_model(SECTION)
    read(model, tokenizer, way, 5_000)
    before = peak()
    began = time.perf_counter()
    read(model, tokenizer, way, tokens)
    grown = peak() - before
    return {"way": way, "tokens": tokens, "seconds": time.perf_counter() - began, "grown": grown}


def in_a_process(way: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", way, str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def length_table(lengths: list[int]) -> list[dict[str, Any]]:
    found = []
    for way in WAYS:
        for tokens in lengths:
            one = in_a_process(way, tokens)
            found.append(one)
            if way == "tokenize":
                size = one["bytes"] / 1e6
                print(f"{way:9} {one['tokens']:>9,} tokens  {size:6.2f} MB in {one['seconds']:.2f} s")
                continue
            lists = BYTES_OF_AN_ID * tokens * (1 if way == "alone" else 2)
            one["ids"] = lists
            print(
                f"{way:9} {tokens:>9,} tokens  {one['grown'] / 2**20:7.1f} MiB more, of which ids take up to"
                f" {lists / 2**20:6.1f}  {one['seconds']:7.1f} s"
            )
    grown = [one for one in found if "grown" in one and one["grown"] > one["ids"] + ALLOWED]
    if grown:
        raise SystemExit(f"memory grows with the prompt: {grown}")
    return found


def shared_table() -> list[dict[str, Any]]:
    """32 prompts of 20 tokens behind beginnings of different lengths; the least processor time of three."""
    model, tokenizer, found = load_model(SECTION), load_tokenizer(SECTION), []
    sampling = Sampling(max_new_tokens=8)
    for beginning in (128, 512, 2048):
        ids = random_ids(beginning + 32 * 20)
        prompts = [ids[:beginning] + ids[beginning + 20 * n : beginning + 20 * (n + 1)] for n in range(32)]
        row: dict[str, Any] = {"beginning": beginning, "prompt_tokens": sum(map(len, prompts))}
        given = {}
        for name, least in (("each", 10**9), ("once", prefixes.LEAST)):
            prefixes.find_beginnings.__defaults__ = (least,)
            seconds = []
            for _ in range(3):
                began = time.process_time()
                given[name] = answers(model, tokenizer, prompts, sampling=sampling, stop_ids=())
                seconds.append(time.process_time() - began)
            row[name] = min(seconds)
            row[f"{name}_tokens"] = row["prompt_tokens"] - sum(one.shared_tokens for one in given[name])
        if given["each"] != given["once"]:
            raise SystemExit("answers behind a state differ from those of reading everything")
        print(
            f"beginning of {beginning:>5,} tokens, 32 prompts: {row['each_tokens']:>6,} tokens in"
            f" {row['each']:6.2f} s, read once {row['once_tokens']:>6,} in {row['once']:6.2f} s:"
            f" {row['each'] / row['once']:.1f} times faster"
        )
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--shared", action="store_true", help="the second table only")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.cell:
        print(json.dumps(cell(asked.cell[0], int(asked.cell[1]))))
        return
    lengths = [] if asked.shared else length_table(asked.lengths)
    print(json.dumps({"lengths": lengths, "shared": shared_table()}))


if __name__ == "__main__":
    main()
