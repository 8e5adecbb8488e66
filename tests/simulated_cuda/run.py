"""Jobs in a process that has a simulated card, or none.

    python -m tests.simulated_cuda.run CARD < jobs.json

Each job is a list: its kind, a name, and what it needs. What it came to is printed as JSON, the last line of
the output. `cpu` as CARD runs the same jobs on the host, for the numbers that the card's are held against.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.simulated_cuda.device import Device, start

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

SMALL = (
    "data.sources.0.limit=60", "data.validation=6", "data.max_length=96", "data.too_long=truncate",
    "train.max_steps=3", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2",
    "train.logging_steps=1", "train.warmup_steps=1", "eval.eval_steps=2", "eval.prompts=null",
    "train.lr_scheduler_type=constant",
)  # fmt: skip
"""What makes the quickstart three steps on short rows."""


def told(device: Device | None) -> dict[str, Any]:
    """Returns what was watched since `forget`: waits of ours and of others, copies, mixtures, by line."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in ("ours", "others", "upload", "mixed")}
    for event, count in device.events.items() if device else ():
        kind = ("ours" if event.ours else "others") if event.kind == "wait" else event.kind
        found[kind][f"{event.what} at {event.where}"] += count
    return {kind: dict(lines.most_common()) for kind, lines in found.items()}


def train(device: Device | None, name: str, *words: str, resume: bool = False) -> dict[str, Any]:
    """Trains the small quickstart; the third step is watched.

    Args:
        device: The card, or None.
        name: The output directory.
        words: Overrides of the recipe; `limit=BYTES` of the card's memory from the first step on;
            `leave=INPUT` keeps an input of the model on the host, which is wrong.
        resume: Go on from the newest checkpoint.
    """
    from transformers import TrainerCallback

    from mamba_sft import Recipe
    from mamba_sft.recipe.builtin import find_recipe
    from mamba_sft.training.fine_tuning import train as fine_tune

    watched: dict[str, Any] = {"most": 0}
    asked = dict(word.split("=", 1) for word in words if word.startswith(("limit=", "leave=")))
    overrides = [word for word in words if not word.startswith(("limit=", "leave="))]
    if "leave" in asked:
        _leave_on_host(asked["leave"])

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if device:
                device.forget_the_most()
                device.limit(int(asked["limit"]) if "limit" in asked else None)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if device:
                device.forget()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if device and state.global_step == 3 and "loss" in (logs or {}):
                watched.update(told(device))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            watched["most"] = device.most if device else 0

    recipe = Recipe.load(find_recipe("quickstart"), overrides=[*SMALL, *overrides, f"output_dir={name}"])
    try:
        run = fine_tune(recipe, resume=resume, overwrite=not resume, callbacks=[Watch()])
    finally:
        if device:
            device.limit(None)
    lines = run.read_metrics()
    return watched | {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "eval_losses": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "grad_norms": [line["grad_norm"] for line in lines if "grad_norm" in line],
        "weights": weights(run.adapter),
    }


def _leave_on_host(name: str) -> None:
    from dataclasses import replace

    from mamba_sft.training.figures import Figures

    make = Figures.of
    Figures.of = staticmethod(  # type: ignore[method-assign, assignment]
        lambda model, chunk, **more: make(
            model, replace(chunk, inputs=chunk.inputs | {name: chunk.inputs[name].cpu()}), **more
        )
    )


def resume(device: Device | None, name: str, run: str) -> dict[str, Any]:
    """Takes the third step of a run in fp32 again, from its checkpoint of the second."""
    import shutil

    shutil.rmtree(Path(run, "checkpoints", "checkpoint-3"))
    shutil.rmtree(Path(run, "adapter"))
    return train(device, run, "model.dtype=float32", "train.log_activations=true", resume=True)


def weights(adapter: Path) -> dict[str, list[float]]:
    """Returns size and sum of squares of each adapter tensor, and its first number."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        name: [x.numel(), float(x.double().square().sum()), float(x.flatten()[0])]
        for name, x in tensors.items()
    }


def cli(device: Device | None, name: str, *words: str) -> dict[str, Any]:
    """Runs a verb of the command line; `name` is only a name."""
    from typer.testing import CliRunner

    from mamba_sft.cli.app import app

    if device:
        device.forget()
    shown = CliRunner().invoke(app, list(words))
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    return told(device) | {"exit_code": shown.exit_code, "out": shown.stdout, "err": shown.stderr}


def answer(device: Device | None, name: str, model: str, graphs: str = "right") -> dict[str, Any]:
    """Answers prompts in a batch, and talks in two turns whose state is carried; the tokens are counted.

    Args:
        device: The card, or None.
        name: Only a name.
        model: A run or a checkpoint.
        graphs: `wrong` makes recorded steps go wrong.
    """
    import logging

    from mamba_sft.inference.answering import generate, open_session
    from mamba_sft.inference.chat_model import load_chat_model
    from mamba_sft.inference.sampling import Sampling
    from tests.simulated_cuda.graphs import Graph

    loaded = load_chat_model(model)
    sampling = Sampling(max_new_tokens=12)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mamba_sft.inference.next_token").addHandler(handler)
    logging.getLogger("mamba_sft.inference.next_token").setLevel("INFO")
    Graph.replays, Graph.spoils = 0, graphs == "wrong"
    prompts = ["Reverse the word `stone`.", "What is 7 plus 5?", "Name a colour."]
    if device:
        device.forget()
    batch = generate(loaded, prompts, sampling=sampling)
    found: dict[str, Any] = {"batch": told(device), "answers": [one.text for one in batch]}
    found["tokens"] = [one.tokens for one in batch]
    if device:
        device.forget()
    session = open_session(loaded, sampling=sampling)
    turns, written = [], []
    for text in ("What is 7 plus 5?", "And 6 plus 5?"):
        turns.append("".join(session.send(text)))
        written.append(session.last_turn.tokens if session.last_turn else 0)
    logging.getLogger("mamba_sft.inference.next_token").removeHandler(handler)
    found |= {"chat": told(device), "turns": turns, "turn_tokens": written}
    return found | {"replays": Graph.replays, "said": said}


def memory(device: Device, name: str, recipe: str, quantization: str = "") -> dict[str, Any]:
    """Holds the plan of a recipe, its shape scaled down, against the bytes of a training step."""
    from dataclasses import replace

    import torch

    from mamba_sft import Recipe
    from mamba_sft.kernels.falcon_mamba import install
    from mamba_sft.model.adapter import attach_adapter
    from mamba_sft.model.loading import load_model, resolve_dtype
    from mamba_sft.planning import memory as plan
    from mamba_sft.recipe.builtin import find_recipe
    from mamba_sft.training import fused_head
    from mamba_sft.training.activations import keep_activations
    from tests.conftest import build_model
    from tests.planning.test_memory import Case, planned_peak, step

    fused_head.VOCABULARY_TILE = plan.TILE_COLUMNS = 64  # its tile would hide the small blocks
    asked = Recipe.load(find_recipe(recipe))
    dtype, quantization = resolve_dtype(asked.model), quantization or asked.model.quantization
    stream = asked.train.stream_tokens
    case = Case(
        asked.train.checkpointing, dtype, hidden=256, length=512, rows=1, layers=4, vocabulary=2048,
        stream=None if stream is None else 128, packed=asked.data.packing, trained=(1, 2),
        adapter=tuple(asked.adapter.model_dump().items()), backend="triton",
    )  # fmt: skip
    work = replace(case.work, quantization=quantization)
    torch.manual_seed(0)
    base = Path(name).with_suffix(".base")
    shape = work.shape
    build_model(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, state_size=shape.states,
        vocab_size=shape.vocabulary, time_step_rank=shape.rank, intermediate_size=shape.inner,
    ).to(dtype).save_pretrained(base)  # fmt: skip
    section = asked.model.model_copy(
        update={"base": str(base), "revision": None, "quantization": quantization, "kernels": "triton"}
    )
    model = attach_adapter(install(load_model(section)), asked.adapter, trained_token_ids=case.trained)
    fused_head.add_fused_head(model.get_base_model())
    keep_activations(model, case.policy)
    model.train()
    step(model, case, "cuda")  # gradients are there from here on
    gc.collect()  # a graph of the first step that hangs in a circle would count as if it were always there
    before = device.in_use
    device.forget_the_most()
    step(model, case, "cuda")
    return {"planned": planned_peak(work), "counted": device.most - before}


def itself(device: Device, name: str) -> dict[str, Any]:
    """Asks the card for what it should count and refuse."""
    import torch

    x, pinned = torch.ones(8, 8, device="cuda"), torch.ones(8, 8, pin_memory=True)
    rows, mask = torch.tensor([1, 2], device="cuda"), torch.ones(8, dtype=torch.bool, device="cuda")
    asked: dict[str, Callable[[], Any]] = {
        "a product": lambda: x @ x,
        "item": lambda: x.sum().item(),
        "tolist": x.tolist,
        "to the host": x.cpu,
        "to the host, pinned and not blocking": lambda: pinned.copy_(x, non_blocking=True),
        "to the host, not blocking alone": lambda: torch.empty(8, 8).copy_(x, non_blocking=True),
        "to the card": lambda: torch.ones(3).cuda(),
        "to the card, pinned and not blocking": lambda: pinned.to("cuda", non_blocking=True),
        "nonzero": x.nonzero,
        "a mask as index": lambda: x[mask],
        "an index on the card": lambda: x[rows],
        "synchronize": torch.cuda.synchronize,
    }
    waits = {}
    for what, do in asked.items():
        device.forget()
        do()
        waits[what] = device.waits()
    found: dict[str, Any] = {"waits": waits, "name": torch.cuda.get_device_name()}
    found["capability"] = list(torch.cuda.get_device_capability())
    found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    found["fresh memory is NaN"] = bool(torch.empty(4, device="cuda").isnan().all())
    before = device.in_use
    kept = torch.empty(10_000, device="cuda")
    found["bytes of ten thousand floats"] = device.in_use - before
    try:
        kept + torch.ones(10_000)
    except RuntimeError as error:
        found["both sides"] = str(error)
    device.limit(device.in_use + 1000)
    try:
        torch.empty(10_000, device="cuda")
    except torch.OutOfMemoryError as error:
        found["beyond the limit"] = type(error).__name__
    device.limit(None)
    return found


JOBS = {"itself": itself, "train": train, "resume": resume, "cli": cli, "answer": answer, "memory": memory}


def main() -> None:
    """Runs the jobs that stand in the standard input."""
    device = None if sys.argv[1] == "cpu" else start(sys.argv[1])

    if device is not None:
        from tests.simulated_cuda import graphs, programs

        programs.stand_in(device)
        graphs.stand_in(device)
    results: dict[str, Any] = {}
    for kind, name, *words in json.load(sys.stdin):
        started = time.perf_counter()
        try:
            found = JOBS[kind](device, name, *words)
        except Exception as error:  # told to the test, which says whether it should have been one
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        results[name] = found | {"seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
