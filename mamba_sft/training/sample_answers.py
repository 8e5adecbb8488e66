"""The answers to the sample prompts: before training, while it goes on, and after it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

from accelerate.utils import broadcast_object_list

from mamba_sft.evaluation.prompts import Prompt, prompts_digest
from mamba_sft.inference.generation import answers, stop_token_ids
from mamba_sft.inference.sampling import Sampling
from mamba_sft.model.chat_template import render
from mamba_sft.model.shards import is_sharded
from mamba_sft.run import write_atomically
from mamba_sft.run_reading import read_object
from mamba_sft.training.dealing import deal_out
from mamba_sft.training.preparation import Preparation
from mamba_sft.training.saving import left_out_if_refused
from mamba_sft.training.step_samples import StepSamples
from mamba_sft.training.trainer import Trainer

logger = logging.getLogger(__name__)

ANSWERED_TOGETHER = 32
"""Sample prompts answered in one batch."""
Tell = Callable[[int, int], None]
"""Told how many of how many prompts this process has answered."""


def answers_before(preparation: Preparation, trainer: Trainer) -> list[str]:
    """The answers of the model that training starts from; a resumed run has them from its first session."""
    path, digest = preparation.run.answers_before, prompts_digest(preparation.prompts)
    main = trainer.is_world_process_zero()
    count, asked = len(preparation.prompts), preparation.resumed and main
    kept = [_kept_answers(path, digest, count) if asked else None]
    broadcast_object_list(kept)
    if kept[0] is not None:
        return kept[0]
    given = _answer(preparation, trainer, "before")
    if given and main:
        text = json.dumps({"digest": digest, "answers": given}, ensure_ascii=False) + "\n"
        with left_out_if_refused(path):
            write_atomically(path, text)
    return given


def answers_after(preparation: Preparation, trainer: Trainer) -> list[str]:
    """The answers of the trained model."""
    return _answer(preparation, trainer, "after")


def watch_answers(preparation: Preparation, trainer: Trainer, before: list[str]) -> None:
    """Has a few prompts answered while training goes on, where `eval.sample_steps` asks for it.

    Args:
        preparation: Of the run.
        trainer: Answers them.
        before: The answers before training.
    """
    every = preparation.recipe.eval.sample_steps
    if every is not None and preparation.prompts:
        answer = partial(_given, preparation, trainer)
        trainer.add_callback(StepSamples(preparation.run, preparation.prompts, before, every, answer))


def _answer(preparation: Preparation, trainer: Trainer, when: str) -> list[str]:
    prompts = preparation.prompts
    if not prompts:
        return []
    logger.info("answering %d sample prompts %s training", len(prompts), when)
    watchers = [
        callback.on_sample_answer
        for callback in trainer.callback_handler.callbacks
        if hasattr(callback, "on_sample_answer") and trainer.is_world_process_zero()
    ]

    def tell(done: int, total: int) -> None:
        for watcher in watchers:
            watcher(when, done, total)

    return _given(preparation, trainer, prompts, tell)


def _kept_answers(path: Path, digest: str, count: int) -> list[str] | None:
    """Answers to the same prompts that were kept, or None: then they are asked again, of the same model."""
    kept = read_object(path)
    given = kept.get("answers")
    if kept.get("digest") != digest or not isinstance(given, list) or len(given) != count:
        return None
    return [str(answer) for answer in given]


def _given(
    preparation: Preparation, trainer: Trainer, prompts: Sequence[Prompt], tell: Tell | None = None
) -> list[str]:
    """The model's answers to prompts, as it is now, in every process.

    The processes share the prompts out, unless each of them holds a part of the model: then they give every
    answer together.
    """
    answer = partial(_own_answers, preparation, trainer, tell)
    return answer(prompts) if is_sharded(trainer.model) else deal_out(answer, prompts)


def _own_answers(
    preparation: Preparation, trainer: Trainer, tell: Tell | None, prompts: Sequence[Prompt]
) -> list[str]:
    done = count(1)
    recipe, tokenizer = preparation.recipe, preparation.setup.tokenizer
    chats = [prompt.messages(recipe.chat.system) for prompt in prompts]
    given = answers(
        trainer.model,
        tokenizer,
        [render(tokenizer, chat, add_generation_prompt=True)[0] for chat in chats],
        sampling=Sampling(max_new_tokens=recipe.eval.max_new_tokens),
        stop_ids=stop_token_ids(trainer.model, tokenizer),
        batch_size=ANSWERED_TOGETHER,
        on_answer=None if tell is None else lambda number, answer: tell(next(done), len(prompts)),
    )
    return [answer.text for answer in given]
