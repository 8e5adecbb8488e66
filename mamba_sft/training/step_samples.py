"""A few of the sample prompts, answered while training goes on: how the answers change."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mamba_sft.evaluation.prompts import Prompt, StepSample, read_step_samples, write_step_samples
from mamba_sft.run import Run
from mamba_sft.wording import first_line

logger = logging.getLogger(__name__)

FEW = 6
"""Prompts that are answered in between."""


def few_of(prompts: Sequence[Prompt]) -> list[int]:
    """Returns the places of a few prompts, evenly spread over all of them."""
    count = min(FEW, len(prompts))
    return [number * len(prompts) // count for number in range(count)]


class StepSamples(TrainerCallback):
    """Answers a few prompts every so many steps and keeps the answers in the run's `step-samples.jsonl`.

    Answers are greedy, so nothing is drawn and no number of the run changes.

    Args:
        run: Where they are kept.
        prompts: All sample prompts.
        before: Their answers before training; those of a run that goes on are in the file.
        every: `eval.sample_steps`: a number of steps, or below 1 a share of the run.
        answer: Gives the answers to some prompts.
    """

    def __init__(
        self,
        run: Run,
        prompts: Sequence[Prompt],
        before: Sequence[str],
        every: float,
        answer: Callable[[Sequence[Prompt]], list[str]],
    ):
        places = few_of(prompts)
        self.prompts = [prompts[place] for place in places]
        self._before = [before[place] for place in places] if before else []
        self._run, self._every, self._answer = run, every, answer
        self._given: list[StepSample] = []
        self._stopped = False
        self._writes = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the answers of the base; on a resumed run, forgets those of steps that were lost."""
        self._writes = state.is_world_process_zero
        if state.global_step:
            earlier = read_step_samples(self._run.step_samples)
            self._given = [one for one in earlier if one.step <= state.global_step]
        else:
            self._keep(0, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Answers when it is time; not after the last step, which all prompts follow."""
        every = self._every if self._every >= 1 else math.ceil(self._every * state.max_steps)
        due = state.global_step % int(every) == 0 and state.global_step < state.max_steps
        if self._stopped or not due:
            return
        try:
            self._keep(state.global_step, self._answer(self.prompts))
        except (torch.OutOfMemoryError, OSError) as error:
            # several processes answer together: one whose disk is full goes on with the others
            self._writes = False
            self._stopped = isinstance(error, torch.OutOfMemoryError) or args.world_size == 1
            logger.warning("no more sample answers while training goes on: %s", first_line(error))

    def _keep(self, step: int, answers: Sequence[str]) -> None:
        pairs = zip(self.prompts, answers, strict=False)
        self._given += [StepSample(step, prompt, text) for prompt, text in pairs]
        if self._writes:
            write_step_samples(self._run.step_samples, self._given)
