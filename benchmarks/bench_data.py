"""How fast rows are prepared, against the tokenizer alone on the same text, and in how much memory.

    python benchmarks/bench_data.py --chats 40000                     # 46M tokens; minutes
    python benchmarks/bench_data.py --chats 5000 --tokenizer data/tiny-base

Makes chats with a seed, then measures three processes one after the other: the tokenizer's `encode_batch` on
the text of the rows as the chat template renders it, in batches of a thousand rows; the first start, which
prepares, packs and keeps the rows; and a second start, which finds them. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS = ROOT / "data" / "quickstart.jsonl"
SEED = 0
BATCH = 1000


def make_chats(path: Path, chats: int) -> None:
    """Writes chats of about a thousand tokens: two to eight turns of words from the quickstart's own text."""
    rng = random.Random(SEED)
    words = sorted(set(WORDS.read_text(encoding="utf-8").replace('"', " ").replace("\\n", " ").split()))
    with path.open("w", encoding="utf-8") as file:
        for number in range(chats):
            messages = []
            for turn in range(2 * rng.randint(1, 4)):
                text = " ".join(rng.choices(words, k=rng.randint(20, 260)))
                role = "assistant" if turn % 2 else "user"
                messages.append({"role": role, "content": f"{text} {number}."})
            file.write(json.dumps({"messages": messages}) + "\n")


def recipe_of(base: str, data: Path) -> Any:
    """Returns a recipe that trains on the chats with the default settings."""
    from mamba_sft.recipe.recipe import Recipe

    return Recipe.from_text(
        json.dumps(
            {"output_dir": "runs/x", "model": {"base": base}, "data": {"sources": [{"path": str(data)}]}}
        ),
        "bench",
    )


def spent() -> float:
    """Returns the processor seconds of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak() -> int:
    """Returns the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def raw(base: str, data: Path) -> dict[str, float]:
    """The tokenizer alone; rendering is done before the clock starts."""
    from mamba_sft.model.chat_template import split_rendered
    from mamba_sft.model.loading import load_setup

    recipe = recipe_of(base, data)
    tokenizer = load_setup(recipe.model, recipe.chat).tokenizer
    wall = cpu = 0.0
    tokens = 0
    batch: list[str] = []

    def encode() -> None:
        nonlocal wall, cpu, tokens
        started, before = time.perf_counter(), spent()
        encoded = tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False)
        wall, cpu = wall + time.perf_counter() - started, cpu + spent() - before
        tokens += sum(len(one) for one in encoded)
        batch.clear()

    with data.open(encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            batch.append("".join(text for text, _ in split_rendered(tokenizer, messages)))
            if len(batch) == BATCH:
                encode()
    if batch:
        encode()
    return {"wall": wall, "cpu": cpu, "tokens": tokens}


def start(base: str, data: Path) -> dict[str, float]:
    """One start of a run, up to where the weights would be loaded."""
    import datasets  # noqa: F401  # what every start imports is not counted
    import pyarrow  # noqa: F401

    from mamba_sft.data.preparing import prepare_data
    from mamba_sft.model.loading import load_setup

    recipe = recipe_of(base, data)
    setup = load_setup(recipe.model, recipe.chat)
    started, before, resident = time.perf_counter(), spent(), peak()
    prepared = prepare_data(recipe.data, setup, system=recipe.chat.system, seed=recipe.seed)
    return {
        "wall": time.perf_counter() - started,
        "cpu": spent() - before,
        "growth": peak() - resident,
        "tokens": prepared.summary.train_tokens + prepared.summary.validation_tokens,
        "rows": len(prepared.train_rows),
    }


def measured(part: str, base: str, data: Path, cache: str) -> dict[str, float]:
    """Runs a part in a process of its own, and returns what it measured."""
    found = subprocess.run(
        [sys.executable, __file__, "--part", part, "--tokenizer", base, "--data", str(data)],
        env=os.environ | {"MAMBA_SFT_CACHE": cache, "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        sys.exit(found.stderr)
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measures, or is one of the measured processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=int, default=40_000)
    parser.add_argument("--tokenizer", default=str(ROOT / "data" / "tiny-base"), help="a base's directory")
    parser.add_argument("--part", choices=["raw", "start"], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps({"raw": raw, "start": start}[options.part](options.tokenizer, options.data)))
        return
    with tempfile.TemporaryDirectory() as directory:
        data, cache = Path(directory, "chats.jsonl"), str(Path(directory, "cache"))
        make_chats(data, options.chats)
        alone = measured("raw", options.tokenizer, data, cache)
        first = measured("start", options.tokenizer, data, cache)
        second = measured("start", options.tokenizer, data, cache)
        size = data.stat().st_size
    print(
        f"{options.chats:,} chats, {size / 1e6:,.0f} MB, {first['tokens']:,.0f} tokens, {os.cpu_count()} CPUs"
    )
    print(f"{'':28}{'wall s':>9}{'cpu s':>9}{'MB more':>9}")
    print(f"{'encode_batch alone':28}{alone['wall']:9.1f}{alone['cpu']:9.1f}")
    for name, one in (("first start: prepared", first), ("second start: found", second)):
        print(f"{name:28}{one['wall']:9.1f}{one['cpu']:9.1f}{one['growth'] / 1e6:9.0f}")
    ratios = {
        "throughput, of encode_batch": alone["wall"] / first["wall"],
        "processor time, of encode_batch": first["cpu"] / alone["cpu"],
        "bytes of memory per token": first["growth"] / first["tokens"],
    }
    for name, ratio in ratios.items():
        print(f"{name:34}{ratio:9.2f}")
    print(json.dumps({"alone": alone, "first": first, "second": second, "ratios": ratios}))


if __name__ == "__main__":
    main()
