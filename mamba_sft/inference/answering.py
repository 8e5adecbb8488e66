"""Talking to a model: answers to a list of prompts, and conversations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError, UsageError
from mamba_sft.inference.answer import Answer
from mamba_sft.inference.answer_file import AnswerFile
from mamba_sft.inference.chat_model import ChatModel, load_chat_model, require_template, split_chat_model
from mamba_sft.inference.generation import answers
from mamba_sft.inference.model_places import ModelPlace
from mamba_sft.inference.prompt_rows import Message, Prompt, PromptRow, read_prompts
from mamba_sft.inference.request import check_files, check_system
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import ChatSession, CompareSession
from mamba_sft.inference.unfinished import asked_of, identity_of
from mamba_sft.model.chat_template import encode_batch, render, with_system
from mamba_sft.run import Run

logger = logging.getLogger(__name__)

OnAnswer = Callable[[int, Answer], None]


def generate(
    model: ChatModel | ModelPlace | Run | str | Path,
    prompts: Prompt | Path | Iterable[Prompt],
    *,
    output: AnswerFile | str | Path | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 8,
    on_answer: OnAnswer | None = None,
) -> list[Answer]:
    """Answers prompts, several at a time.

    Args:
        model: A run, a model directory, a GGUF file, a hub id, or what `load_chat_model` or `find_place`
            returned. How it is run (device, dtype, ...) is for `load_chat_model` to say.
        prompts: A text, a list of messages, several of either, or the `Path` of a JSON Lines file with one
            `{"prompt": ...}` or `{"messages": [...]}` a line, or of a txt file with one prompt a line. What
            else a line has goes into its answer; `system` is the system message of its prompt.
        output: JSON Lines file to write: prompt, `answer`, `finish_reason` (`stop` or `length`), `tokens`.
            Each is on the disk when it is given, in `NAME.unfinished.jsonl`, which becomes the file. An
            `AnswerFile` can go on with such a one.
        sampling: How to choose tokens; greedy by default.
        system: System message of prompts that have none; None takes the one the model was trained with.
        raw: Continue the texts as they are, without the chat template.
        batch_size: Prompts answered together; a GGUF file answers one by one.
        on_answer: Called with a prompt's number and answer as each one finishes, in any order; with those of
            an unfinished file first.

    Returns:
        One answer a prompt, in their order.

    Raises:
        UsageError: A prompt is blank, the output cannot be written, or gone on with; or `system` goes with
            `raw`.
        DataError: A line of the file is not a prompt (with file and line), or there is no chat template.
    """
    return answer_prompts(
        model, read_prompts(prompts), output=output, sampling=sampling, system=system, raw=raw,
        batch_size=batch_size, on_answer=on_answer,
    )  # fmt: skip


def answer_prompts(
    model: ChatModel | ModelPlace | Run | str | Path,
    rows: Sequence[PromptRow],
    *,
    output: AnswerFile | str | Path | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 8,
    on_answer: OnAnswer | None = None,
) -> list[Answer]:
    """Does what `generate` does for prompts that were read.

    Args:
        model: As `generate` takes it, and so all but `rows`.
        rows: From `read_prompts`.
        output: The same.
        sampling: The same.
        system: The same.
        raw: The same.
        batch_size: The same.
        on_answer: The same.
    """
    file = AnswerFile(Path(output)) if isinstance(output, str | Path) else output
    check_system(system, raw=raw)
    if file is not None:
        check_files(None, file.path)
    chat_model = model if isinstance(model, ChatModel) else load_chat_model(model, needs_template=not raw)
    if not raw:
        require_template(chat_model.name, chat_model.tokenizer)
    sampling = sampling or Sampling()
    _tell_idle(sampling)
    default = chat_model.system if system is None else system
    encoded = [_encode(chat_model, row, default, raw) for row in rows]

    def give(take: OnAnswer | None, only: Sequence[int]) -> list[Answer]:
        return answers(
            chat_model.model,
            chat_model.tokenizer,
            encoded,
            sampling=sampling,
            stop_ids=chat_model.stop_ids,
            batch_size=1 if chat_model.one_at_a_time else batch_size,
            on_answer=take,
            only=only,
        )

    if file is None:
        found = give(on_answer, range(len(rows)))
    else:
        identity = identity_of(*chat_model.source) if chat_model.source else {"model": chat_model.name}
        file.start(rows, asked_of(identity, sampling, system, raw))
        found = _into_file(file, give, on_answer, len(rows))
    _tell_shared(found)
    return found


def _into_file(
    file: AnswerFile,
    give: Callable[[OnAnswer | None, Sequence[int]], list[Answer]],
    on_answer: OnAnswer | None,
    count: int,
) -> list[Answer]:
    """Answers what a file has no answer to yet."""
    found = dict(file.found)
    rest = [number for number in range(count) if number not in found]

    def take(number: int, answer: Answer) -> None:
        file.add(number, answer)
        if on_answer is not None:
            on_answer(number, answer)

    with file:
        if on_answer is not None:
            for number, answer in file.found.items():
                on_answer(number, answer)
        found |= zip(rest, give(take, rest), strict=True)
    return [found[number] for number in range(count)]


def _tell_idle(sampling: Sampling) -> None:
    if sampling.idle is not None:
        logger.warning("%s", sampling.idle)


def _tell_shared(found: Sequence[Answer]) -> None:
    shared, all_of_them = (sum(getattr(one, name) for one in found) for name in _COUNTS)
    if shared:
        logger.info(
            "%s of %s prompt tokens were not read: they begin prompts as they began earlier ones",
            f"{shared:,}", f"{all_of_them:,}",
        )  # fmt: skip


_COUNTS = ("shared_tokens", "prompt_tokens")


def open_session(
    model: ChatModel | ModelPlace | Run | str | Path,
    *,
    compare: bool = False,
    merged: bool = False,
    sampling: Sampling | None = None,
    system: str | None = None,
) -> ChatSession | CompareSession:
    """Starts a conversation.

    Args:
        model: A run, a model directory, a GGUF file, a hub id, or what `load_chat_model` or `find_place`
            returned.
        compare: Talk to a run's tuned model and to its base; they share one model in memory, and an answer
            that goes round in a circle is ended.
        merged: Talk to the run's merged checkpoint rather than to base and adapter.
        sampling: How to choose tokens; greedy by default.
        system: System message; None takes the one the model was trained with.

    Raises:
        UsageError: `compare` with something that has no adapter.
        DataError: There is no chat template.
        ModelError: The model cannot be loaded.
    """
    check_system(system, raw=False)
    sampling = sampling or Sampling()
    _tell_idle(sampling)
    chat_model = (
        model
        if isinstance(model, ChatModel)
        else load_chat_model(model, merged=merged, needs_adapter=compare)
    )
    if not compare:
        return ChatSession(chat_model, sampling=sampling, system=system)
    base, tuned = (
        ChatSession(side, sampling=sampling, system=system, stop_repetition=True)
        for side in split_chat_model(chat_model)
    )
    return CompareSession(tuned, base)


def _encode(chat_model: ChatModel, row: PromptRow, system: str | None, raw: bool) -> list[int]:
    prompt = row.prompt
    if raw:
        if not isinstance(prompt, str):
            raise UsageError(f"{row.where}: `raw` continues plain text, but this is a list of messages")
        return encode_batch(chat_model.tokenizer, [prompt])[0]
    messages: list[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    )
    own: Any = row.fields.get("system")
    opening = system if own is None else own  # an empty one is none, whatever the model was trained with
    try:
        return render(chat_model.tokenizer, with_system(messages, opening), add_generation_prompt=True)[0]
    except DataError as error:
        raise DataError(f"{row.where}: {error.message}", hint=error.hint) from error
