"""Training runs in several processes on this machine, and what each of them saw.

Run as a program this is one of the processes: torchrun starts it, it takes the runs of a file one after the
other, and writes down what it saw of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mamba_sft import Recipe
from mamba_sft.errors import TrainingError
from mamba_sft.training.fine_tuning import train_prepared
from mamba_sft.training.preparation import prepare

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Launch:
    """A run to train.

    Args:
        recipe: Its recipe, as YAML.
        resume: Whether to go on with what is in its directory.
        poison: Whether the gradients of one process are no numbers.
        stop_in: The step in which SIGINT reaches the second process, or 0.
    """

    recipe: str
    resume: bool = False
    stop_in: int = 0
    poison: bool = False


class Seen(TrainerCallback):
    """What a process sees of a run."""

    def __init__(self, stop_in: int, poison: bool):
        self.stop_in = stop_in
        self.poison = poison
        self.found: dict[str, Any] = {"steps": [], "error": ""}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.poison and args.process_index == 1:
            module = next(module for name, module in model.named_modules() if name.endswith("lora_B.default"))
            module.register_forward_hook(spoil)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from torch.distributed.tensor import DTensor

        if not self.found["steps"]:
            sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
            local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
            self.found |= {
                "first_numbers": torch.get_rng_state()[24:64].tolist(),
                "sharded": sharded,
                "parameters": len(list(model.parameters())),
                "held": sum(p.numel() for p in local),
                "values": sum(p.numel() for p in model.parameters()),
            }
        self.found["steps"].append(state.global_step + 1)
        if state.global_step + 1 == self.stop_in and args.process_index == 1:
            signal.raise_signal(signal.SIGINT)


def spoil(module: Any, inputs: Any, output: Any) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * float("nan"))


def launch(directory: Path, *runs: Launch, processes: int = 2) -> list[list[dict[str, Any]]]:
    """Trains runs one after the other in several processes; returns what each process saw of each run."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = directory / "runs.json"
    spec.write_text(json.dumps([asdict(run) for run in runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               str(Path(__file__)), str(spec)]  # fmt: skip
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env=os.environ | more
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-12_000:]
    seen = [json.loads((directory / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    return [list(run) for run in zip(*seen, strict=True)]


def main() -> None:
    spec, found = Path(sys.argv[1]), []
    rank = int(os.environ["RANK"])
    for values in json.loads(spec.read_text()):
        run = Launch(**values)
        seen = Seen(run.stop_in, run.poison)
        recipe = Recipe.from_text(run.recipe, "test.yaml")
        try:
            train_prepared(prepare(recipe, resume=run.resume), callbacks=[seen])
        except TrainingError as error:
            seen.found["error"] = error.message
        found.append(seen.found)
    (spec.parent / f"seen-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
