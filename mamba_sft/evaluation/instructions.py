"""The suite `instructions`: does a model do as it is told, as far as code can tell?

Prompts come with constraints (`checks`) or with their one right answer; see `prompts`. A prompt counts where
all of it is met, a constraint by itself, both on the answer as it was given: the strict accuracies of IFEval.
A small model is asked the prompts marked `small`, which the quickstart's can do; others are asked the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import DataError, MambaSFTError
from mamba_sft.evaluation.normalisation import Column, Pool
from mamba_sft.evaluation.prompts import Prompt, load_prompts
from mamba_sft.evaluation.scores import Scores, TaskScores, document_keys, short_digest
from mamba_sft.evaluation.settings import Settings
from mamba_sft.evaluation.suites import Problem, Progress
from mamba_sft.recipe.builtin import find_path

if TYPE_CHECKING:
    from mamba_sft.inference.answer import Answer
    from mamba_sft.inference.chat_model import ChatModel
    from mamba_sft.inference.model_places import ModelPlace

logger = logging.getLogger(__name__)

NAME = "instructions"
PROMPTS = "data/instructions.jsonl"
"""What is asked where no other file is named."""
SMALL = 100_000_000
"""Weights below which a model is asked what small models can do."""
LONGEST, LONGEST_OF_SMALL = 512, 64
"""Tokens of an answer at most; one that is not ended by then does not stop by itself."""
PROMPT, CONSTRAINT = "prompt_strict_acc", "constraint_strict_acc"


class Instructions:
    """Strict accuracy per prompt and per constraint."""

    name = NAME
    published: Mapping[str, Sequence[float]] = {}

    def __init__(self) -> None:
        self._prompts: list[Prompt] = []
        self._longest = LONGEST
        self._facts: dict[str, Any] = {}

    def uses_template(self, settings: Settings, has_template: bool) -> bool:
        """Whether prompts are put into the chat template; a base has none, and continues them as texts."""
        return has_template if settings.chat_template == "auto" else settings.chat_template == "on"

    def problems(self, place: ModelPlace | None, settings: Settings) -> list[Problem]:
        """Reads the prompts with their checks, for which nothing but the file is needed."""
        try:
            _read(settings)
        except MambaSFTError as error:
            return [Problem(error.message, error.hint)]
        return []

    def prepare(self, place: ModelPlace, settings: Settings) -> list[str]:
        """Reads the prompts.

        Raises:
            DataError: A line is none, its checks are not to be understood, or nothing in the file is scored.
        """
        path, scored, left_out = _read(settings)
        if left_out:
            logger.warning(
                "%d prompts of `%s` have neither `checks` nor an `answer`: they are not asked", left_out, path
            )
        is_small = _weights(place) < SMALL
        if settings.rows is None:
            scored = [one for one in scored if one.small == is_small]
        self._prompts = scored[: settings.limit]
        self._longest = min(LONGEST_OF_SMALL if is_small else LONGEST, max(1, settings.max_length // 2))
        digest = short_digest(path.read_bytes())
        self._facts = {"prompts": len(scored), "digest": digest, "longest_answer": self._longest}
        return [NAME]

    def facts(self) -> dict[str, Any]:
        """Returns how many prompts there are, a digest of their file, and how long an answer may be."""
        return self._facts

    def columns(self) -> Sequence[Column]:
        """Returns the shares of prompts that were met as a whole, and of constraints."""
        return [
            Column("prompts met", (Pool((NAME,), PROMPT),), averaged=False),
            Column("constraints met", (Pool((NAME,), CONSTRAINT),), averaged=False),
        ]

    def measure(
        self, chat_model: ChatModel, tasks: Sequence[str], settings: Settings, progress: Progress
    ) -> Iterator[TaskScores]:
        """Asks every prompt, and checks the answers."""
        from mamba_sft.inference.generation import answers
        from mamba_sft.inference.sampling import Sampling

        begun, done = time.monotonic(), 0
        with_template = self.uses_template(settings, bool(chat_model.tokenizer.chat_template))
        kept = max(1, settings.max_length - self._longest)
        whole = [_encode(chat_model, prompt, with_template) for prompt in self._prompts]
        asked = [tokens[-kept:] for tokens in whole]
        if cut := sum(len(tokens) > kept for tokens in whole):
            logger.warning(
                "%d of %d prompts are longer than %d tokens and lose their beginning: `--max-length %d`"
                " leaves no more beside an answer of %d",
                cut, len(whole), kept, settings.max_length, self._longest,
            )  # fmt: skip

        def count(_number: int, _answer: Answer) -> None:
            nonlocal done
            done += 1
            progress(NAME, done, len(asked))

        given = answers(
            chat_model.model,
            chat_model.tokenizer,
            asked,
            sampling=Sampling(max_new_tokens=self._longest),
            stop_ids=chat_model.stop_ids,
            batch_size=settings.batch_size,
            on_answer=count,
        )
        met = [
            what_is_met(prompt, answer.text, stopped=answer.finish_reason == "stop")
            for prompt, answer in zip(self._prompts, given, strict=True)
        ]
        yield TaskScores(
            task=NAME,
            shots=0,
            documents=document_keys(str(prompt.to_json()) for prompt in self._prompts),
            prompts=document_keys(map(str, asked)),
            metrics={
                PROMPT: Scores.of([float(all(each.values())) for each in met]),
                CONSTRAINT: Scores(
                    tuple(float(sum(each.values())) for each in met), tuple(float(len(each)) for each in met)
                ),
            },
            seconds=time.monotonic() - begun,
            samples=tuple(
                {"prompt": prompt.prompt, "given": answer.text, "ended_by": answer.finish_reason, "met": each}
                for prompt, answer, each in zip(self._prompts, given, met, strict=True)
            ),
        )


def what_is_met(prompt: Prompt, answer: str, stopped: bool | None = None) -> dict[str, bool]:
    """Returns for each constraint of a prompt, by kind, whether an answer meets it.

    Args:
        prompt: The prompt; its one right answer, where it has one, is a constraint called `answer`.
        answer: What was answered.
        stopped: Whether the model ended the answer.
    """
    met = {check.kind: check.holds(answer, stopped) for check in prompt.checks}
    if prompt.answer is not None:
        met["answer"] = prompt.answer.strip() == answer.strip()
    return met


def _read(settings: Settings) -> tuple[Path, list[Prompt], int]:
    """The file, its prompts that can be scored, and how many cannot."""
    path = find_path(settings.rows or PROMPTS)
    prompts = load_prompts(path, named_by="--data")
    scored = [one for one in prompts if one.is_scored]
    if not scored:
        raise DataError(
            f"no prompt of `{path}` has `checks` or an `answer`, so none can be scored",
            hint='for example {"prompt": "Name a fruit.", "checks": {"words": {"exactly": 1}}}',
        )
    return path, scored, len(prompts) - len(scored)


def _weights(place: ModelPlace) -> int:
    from mamba_sft.model.checkpoint import read_config, resolve_base
    from mamba_sft.model.shape import Shape

    directory = resolve_base(place.section.base, place.section.revision, weights=False)
    return Shape.from_config(read_config(directory)).parameters


def _encode(chat_model: ChatModel, prompt: Prompt, with_template: bool) -> list[int]:
    from mamba_sft.model.chat_template import encode_batch, render

    if with_template:
        messages = prompt.messages(chat_model.system)
        return render(chat_model.tokenizer, messages, add_generation_prompt=True)[0]
    return encode_batch(chat_model.tokenizer, [prompt.prompt])[0]
