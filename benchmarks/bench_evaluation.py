"""Tokens read and time taken by log-likelihoods, with shared states and in lm-eval's own way, in one run.

    python benchmarks/bench_evaluation.py                              # the tiny base; minutes on two cores
    python benchmarks/bench_evaluation.py --tokenizer DIR --documents 20    # random weights, other tokens

Makes documents of four tasks of BBH in their own format, and has lm-eval run its own leaderboard tasks on
them (3 examples before each document) twice on the same weights: with its `HFLM`, and with ours. Tokens are
counted where the model is given them, padding included. Seconds are of the clock, and of the processor where
other programs run too. Prints a table and JSON; fails where a log-likelihood differs by more than 1e-4, a
greedy flag differs, or less than four times fewer tokens were read.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SEED = 0
TOLERANCE, FEWER = 1e-4, 4.0
DATASET = "SaylorTwift/bbh"
COLOURS = ["red", "orange", "yellow", "green", "blue", "teal", "pink", "black"]
THINGS = ["cup", "notebook", "pencil", "keychain", "plate", "mug", "paperclip", "bracelet"]
NAMES = ["Alice", "Bob", "Claire"]


def date(rng: random.Random) -> dict[str, str]:
    """A question of `date_understanding`."""
    days = [f"{rng.randint(1, 12):02}/{rng.randint(1, 28):02}/{rng.randint(1930, 2020)}" for _ in range(6)]
    back, event = rng.randint(2, 30), rng.choice(["a wedding", "the first day at work", "a long flight"])
    options = "\n".join(f"({letter}) {day}" for letter, day in zip("ABCDEF", days, strict=True))
    text = f"Today, {days[0]}, is the day of {event}. What is the date {back} days ago in MM/DD/YYYY?"
    return {"input": f"{text}\nOptions:\n{options}", "target": f"({rng.choice('ABCDEF')})"}


def navigate(rng: random.Random) -> dict[str, str]:
    """A question of `navigate`."""
    ways = ["left", "right", "forward", "backward"]
    steps = [f"Take {rng.randint(1, 10)} steps {rng.choice(ways)}." for _ in range(rng.randint(3, 7))]
    text = "If you follow these instructions, do you return to the starting point? Always face forward."
    return {"input": f"{text} {' '.join(steps)}\nOptions:\n- Yes\n- No", "target": rng.choice(["Yes", "No"])}


def coloured(rng: random.Random) -> dict[str, str]:
    """A question of `reasoning_about_colored_objects`."""
    things = rng.sample(THINGS, rng.randint(3, 6))
    row = ", ".join(f"a {rng.choice(COLOURS)} {thing}" for thing in things)
    options = "\n".join(f"({letter}) {colour}" for letter, colour in zip("ABCDEFGH", COLOURS, strict=True))
    text = f"On the desk, you see the following items arranged in a row: {row}."
    text += f" What color is the {rng.choice(things)}?"
    return {"input": f"{text}\nOptions:\n{options}", "target": f"({rng.choice('ABCDEFGH')})"}


def tracking(rng: random.Random) -> dict[str, str]:
    """A question of `tracking_shuffled_objects_three_objects`."""
    things = rng.sample(THINGS, 3)
    held = ", ".join(f"{name} has the {thing}" for name, thing in zip(NAMES, things, strict=True))
    swaps = [" and ".join(rng.sample(NAMES, 2)) + " swap what they hold." for _ in range(3)]
    options = "\n".join(f"({letter}) {thing}" for letter, thing in zip("ABC", things, strict=True))
    text = (
        f"Alice, Bob, and Claire are playing a game. At the start, {held}.\nAs it goes on they trade. First, "
    )
    text += (
        f"{swaps[0]} Then, {swaps[1]} Finally, {swaps[2]} At the end of the game, {rng.choice(NAMES)} has the"
    )
    return {"input": f"{text}\nOptions:\n{options}", "target": f"({rng.choice('ABC')})"}


TASKS: dict[str, Callable[[random.Random], dict[str, str]]] = {
    "date_understanding": date,
    "navigate": navigate,
    "reasoning_about_colored_objects": coloured,
    "tracking_shuffled_objects_three_objects": tracking,
}


def write_data(directory: Path, documents: int) -> None:
    """Writes the data set as a directory that `datasets` finds under its name on the hub."""
    place, rng = directory / DATASET, random.Random(SEED)
    place.mkdir(parents=True)
    configs = []
    for task, make in TASKS.items():
        rows = [json.dumps(make(rng)) + "\n" for _ in range(documents)]
        (place / f"{task}.jsonl").write_text("".join(rows), encoding="utf-8")
        configs.append({"config_name": task, "data_files": [{"split": "test", "path": f"{task}.jsonl"}]})
    (place / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")


def load(tokenizer: Path | None) -> Any:
    """Returns the tiny base, or a model of its shape with random weights behind another tokenizer."""
    from mamba_sft.inference.chat_model import ChatModel, load_chat_model
    from mamba_sft.inference.generation import stop_token_ids

    base = ROOT / "data" / "tiny-base"
    if tokenizer is None:
        chat_model = load_chat_model(base, needs_template=False)
        chat_model.model.float()
        return chat_model
    import torch
    from transformers import AutoConfig, AutoTokenizer, FalconMambaForCausalLM

    from mamba_sft.kernels.falcon_mamba import install

    found = AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.from_pretrained(base)
    config.vocab_size, config.dtype = len(found), torch.float32
    torch.manual_seed(SEED)
    model = install(FalconMambaForCausalLM(config).eval())
    return ChatModel("random", model, found, stop_token_ids(model, found))


class Counter:
    """Counts the tokens that a model is given."""

    def __init__(self, model: Any):
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _module: Any, inputs: Any, _output: Any) -> None:
        self.tokens += inputs[0].numel()

    def take(self) -> int:
        """Returns the count, and begins anew."""
        tokens, self.tokens = self.tokens, 0
        return tokens


class Ran(NamedTuple):
    """What a model said to each request of a task, and what that took."""

    said: list[tuple[float, bool]]
    accuracy: float
    tokens: int
    seconds: float
    processor_seconds: float


def run_task(lm: Any, name: str, task: Any, counter: Counter) -> Ran:
    """Has lm-eval run one task."""
    from lm_eval.evaluator import evaluate

    counter.take()
    begun, spent = time.perf_counter(), time.process_time()
    found = evaluate(lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, bootstrap_iters=1000)
    seconds, spent = time.perf_counter() - begun, time.process_time() - spent
    said = [answer for sample in found["samples"][name] for answer in sample["filtered_resps"]]
    return Ran(said, float(found["results"][name]["acc_norm,none"]), counter.take(), seconds, spent)


def measure(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Runs every task with both models; returns a row for each."""
    import logging

    import torch
    from lm_eval import tasks
    from lm_eval.models.huggingface import HFLM

    from mamba_sft.evaluation.harness_model import HarnessModel

    logging.disable(logging.WARNING)
    chat_model = load(arguments.tokenizer)
    counter = Counter(chat_model.model)
    theirs = HFLM(
        pretrained=chat_model.model,
        tokenizer=copy.deepcopy(chat_model.tokenizer),
        backend="causal",
        max_length=2048,
        batch_size=arguments.batch_size,
    )
    ours = HarnessModel(chat_model, max_length=2048, batch_size=arguments.batch_size)
    place = Path(tasks.__file__).parent / "leaderboard" / "bbh_mc"
    manager = tasks.TaskManager(include_path=[place], include_defaults=False)
    with torch.no_grad():  # kernels are compiled before anything is timed
        chat_model.model(torch.ones(2, 40, dtype=torch.long), use_cache=True)
    rows = []
    with chdir(directory):
        for short in TASKS:
            name = f"leaderboard_bbh_{short}"
            task = manager.load([name])["tasks"][name]
            stock, shared = (run_task(lm, name, task, counter) for lm in (theirs, ours))
            pairs = list(zip(stock.said, shared.said, strict=True))
            rows.append(
                {
                    "task": short,
                    "requests": len(pairs),
                    **both("tokens", stock, shared),
                    **both("seconds", stock, shared),
                    **both("processor_seconds", stock, shared),
                    **both("accuracy", stock, shared),
                    "largest_difference": max(abs(one[0] - other[0]) for one, other in pairs),
                    "greedy_flags_differ": sum(one[1] != other[1] for one, other in pairs),
                }
            )
    return rows


def both(name: str, stock: Ran, shared: Ran) -> dict[str, dict[str, float]]:
    """Returns one entry of a row: what was measured of either."""
    return {name: {"stock": round(getattr(stock, name), 3), "shared": round(getattr(shared, name), 3)}}


def added(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of all tasks together."""
    return {
        "task": "all",
        "requests": sum(row["requests"] for row in rows),
        **{
            kind: {key: round(sum(row[kind][key] for row in rows), 2) for key in ("stock", "shared")}
            for kind in ("tokens", "seconds", "processor_seconds")
        },
        "largest_difference": max(row["largest_difference"] for row in rows),
        "greedy_flags_differ": sum(row["greedy_flags_differ"] for row in rows),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table of Markdown."""
    lines = [
        "| task | requests | tokens, HFLM | shared | fewer | s, HFLM | shared | processor s | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tokens, seconds, spent = row["tokens"], row["seconds"], row["processor_seconds"]
        lines.append(
            f"| {row['task']} | {row['requests']:,} | {tokens['stock']:,} | {tokens['shared']:,} "
            f"| {tokens['stock'] / tokens['shared']:.1f}x "
            f"| {seconds['stock']:.1f} | {seconds['shared']:.1f} "
            f"| {spent['stock']:.1f} to {spent['shared']:.1f} | {row['largest_difference']:.1e} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures and tells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=60, help="of each task; BBH itself has 250")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokenizer", type=Path, help="a directory with a tokenizer, e.g. Falcon's")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = str(Path(directory) / "cache")
        write_data(Path(directory), arguments.documents)
        rows = measure(arguments, Path(directory))
    rows.append(added(rows))
    whole = rows[-1]
    print(table(rows))
    print(json.dumps({"documents": arguments.documents, "batch_size": arguments.batch_size, "rows": rows}))
    same = whole["largest_difference"] <= TOLERANCE and not whole["greedy_flags_differ"]
    return 0 if same and whole["tokens"]["stock"] >= FEWER * whole["tokens"]["shared"] else 1


if __name__ == "__main__":
    sys.exit(main())
