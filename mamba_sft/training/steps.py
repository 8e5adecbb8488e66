"""The trainer's step for rows that stream, states that are carried, and micro-batches that may not fit.

Loss and metrics are TRL's, see `figures`. Processes exchange nothing while they are in a micro-batch, because
each may have another number of chunks; its last backward synchronizes the gradients, once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_sft.data.packing import PADDING
from mamba_sft.data.rows import IGNORED, row_lengths
from mamba_sft.kernels.carry import Carry
from mamba_sft.model.full_weights import without_wrapper
from mamba_sft.recipe.fields import TrainSection
from mamba_sft.training.figures import Figures
from mamba_sft.training.out_of_memory import AutoBatch
from mamba_sft.training.streaming import Chunk, States, backpropagate, split, sweep


class ChunkedSteps:
    """Takes training steps and evaluation losses for a trainer.

    Args:
        trainer: Whose model, accelerator and data are used.
        section: `stream_tokens`, `carry_state` and `auto_batch`; recipes keep them to `parallel: ddp`.
    """

    def __init__(self, trainer: Any, section: TrainSection):
        self.trainer = trainer
        self.tokens = section.stream_tokens
        self.passed_on: States | None = None
        self._carry_state = section.carry_state
        self._auto_batch = self._make_auto_batch() if section.auto_batch else None
        self._tried = False

    @staticmethod
    def wanted(section: TrainSection) -> bool:
        """Returns whether the section asks for anything that TRL's own steps do not do."""
        return section.stream_tokens is not None or section.carry_state or section.auto_batch

    @property
    def parts(self) -> int:
        """In how many parts a micro-batch runs, so that it fits."""
        return 1 if self._auto_batch is None else self._auto_batch.parts

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            model: As the trainer wrapped it.
            inputs: From the collator.
            num_items_in_batch: Trained tokens of the optimizer step, over all processes.

        Returns:
            The micro-batch's share of the loss, detached.
        """
        model.train()
        batch = self.trainer._prepare_inputs(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = _labels(batch) * self.trainer.current_gradient_accumulation_steps
        step = partial(self._run_rows, model, num_items_in_batch)
        if self._auto_batch is None:
            results = [step(batch, True)]
        else:
            self._try_longest(model)
            results = self._auto_batch.run(batch, step)
        figures = Figures.total(results)
        self.trainer.tally.add("train", figures, batch)
        return figures.loss

    def evaluation_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Returns the mean loss of a batch, from a single pass over its chunks without a graph."""
        step = partial(self._evaluate_rows, model)
        results = [step(inputs)] if self._auto_batch is None else self._auto_batch.evaluate(inputs, step)
        figures = Figures.total(results)
        self.trainer.tally.add("eval", figures, inputs)
        return figures.loss / figures.labels.clamp(min=1)

    def save(self, directory: Path, process: int) -> None:
        """Writes the states that the next rows will start from beside a checkpoint, if there are any."""
        if self.passed_on is not None:
            conv, scan = (torch.stack(states) for states in zip(*self.passed_on, strict=True))
            save_file({"conv": conv, "scan": scan}, directory / _CARRIED.format(process))

    def load(self, directory: Path, process: int) -> None:
        """Reads what `save` wrote, if it did."""
        path = directory / _CARRIED.format(process)
        if path.is_file():
            saved = load_file(path, device=str(self.trainer.args.device))
            self.passed_on = list(zip(saved["conv"], saved["scan"], strict=True))

    def _evaluate_rows(self, model: Any, batch: dict[str, Any]) -> Figures:
        states: States | None = None
        parts = []
        for chunk in split(batch, self.tokens):
            carry = Carry(chunk.enter(states))
            parts.append(Figures.of(model, chunk, sources=len(self.trainer.tally.sources), carry=carry))
            states = carry.after
        return Figures.total(parts)

    def _run_rows(self, model: Any, num_items: Tensor | int, batch: dict[str, Any], last: bool) -> Figures:
        """Forward and backward of some rows; `last` ones synchronize the gradients if the trainer does."""
        accelerator = self.trainer.accelerator
        chunks = split(batch, self.tokens)
        initial = self._initial_states(len(batch["input_ids"]))
        with accelerator.autocast():  # of its own: what it caches of the weights has no graph
            boundaries = sweep(self._backbone, chunks, initial)
        # As TRL: `num_items` counts all processes' tokens, and DDP takes the mean of their gradients.
        scale = accelerator.num_processes if self.trainer.args.average_tokens_across_devices else 1
        share = scale / torch.as_tensor(num_items).clamp(min=1)
        parts: list[Figures] = []

        def run(chunk: Chunk, carry: Carry, close: Callable[[Tensor], Tensor]) -> None:
            self.trainer.give_up_if_late()
            synchronizes = last and chunk is chunks[0]
            with nullcontext() if synchronizes else accelerator.no_sync(model):
                figures = Figures.of(model, chunk, sources=len(self.trainer.tally.sources), carry=carry)
                figures = figures._replace(loss=figures.loss * share)
                accelerator.backward(close(figures.loss))
            parts.append(figures._replace(loss=figures.loss.detach()))

        with self.trainer.maybe_activation_offload_context:
            final = backpropagate(chunks, boundaries, run)
        if self._carry_state:
            self._pass_on(final, batch["seq_idx"], initial)
        return Figures.total(parts)

    @property
    def _backbone(self) -> Any:
        return without_wrapper(self.trainer.model).base_model

    def _initial_states(self, rows: int) -> States | None:
        if self.passed_on is None:
            return None
        pick = torch.arange(rows, device=self.trainer.args.device) % len(self.passed_on[0][0])
        return [(conv[pick], scan[pick]) for conv, scan in self.passed_on]

    def _pass_on(self, final: States, seq_idx: Tensor, initial: States | None) -> None:
        """Keeps the states of the rows that fill the batch's width; behind padding there are none.

        If none of them does, what they started from is kept. Which rows these are stays on the device: the
        host would have to wait to know.
        """
        full = seq_idx[:, -1] != PADDING
        any_full = full.any()
        first = torch.argsort((~full).int(), stable=True)
        rows = first[torch.arange(len(full), device=full.device) % full.sum().clamp(min=1)]
        earlier = initial or [(conv * 0, scan * 0) for conv, scan in final]
        self.passed_on = [
            (torch.where(any_full, conv[rows], old_conv), torch.where(any_full, scan[rows], old_scan))
            for (conv, scan), (old_conv, old_scan) in zip(final, earlier, strict=True)
        ]

    def _make_auto_batch(self) -> AutoBatch:
        rows = int(self.trainer.course.sizes.max())
        return AutoBatch(self.trainer.model, effective_batch=rows, processes=self.trainer.args.world_size)

    def _try_longest(self, model: Any) -> None:
        """Before the first step, runs the longest rows together: no batch of the run needs more memory."""
        if self._auto_batch is None or self._tried:
            return
        self._tried = True
        trainer, passed_on = self.trainer, self.passed_on
        batch = self._longest(trainer.train_dataset, trainer.args.train_batch_size)
        step = partial(self._run_rows, model, _labels(batch))
        self._auto_batch.run(batch, lambda rows, last: step(rows, False), trial=True)
        parts = torch.tensor([self._auto_batch.parts], device=trainer.args.device)
        self._auto_batch.parts = int(trainer.accelerator.gather(parts).max())
        self.passed_on = passed_on
        if trainer.eval_dataset is not None:
            model.eval()
            with torch.no_grad(), trainer.compute_loss_context_manager():
                rows = self._longest(trainer.eval_dataset, trainer.args.eval_batch_size)
                self._auto_batch.evaluate(rows, partial(self._evaluate_rows, model), trial=True)
            model.train()

    def _longest(self, dataset: Any, rows: int) -> Any:
        """Returns the longest rows of a data set as one batch on the device."""
        longest = np.argsort(row_lengths(dataset))[-rows:].tolist()
        return self.trainer._prepare_inputs(self.trainer.data_collator([dataset[row] for row in longest]))


_CARRIED = "carried-states-{}.safetensors"


def _labels(batch: dict[str, Any]) -> Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()
