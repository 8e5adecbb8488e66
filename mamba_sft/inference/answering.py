"""Talking to a model: answers to a list of prompts, and conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError, UsageError
from mamba_sft.inference.answer_file import AnswerFile
from mamba_sft.inference.chat_model import ChatModel, load_chat_model, require_template, split_chat_model
from mamba_sft.inference.generation import Answer, answers
from mamba_sft.inference.model_places import ModelPlace
from mamba_sft.inference.request import check_files
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import ChatSession, CompareSession
from mamba_sft.json_lines import Row, read_prompt_file
from mamba_sft.model.chat_template import encode_batch, render, with_system
from mamba_sft.run import Run

Message = dict[str, Any]
Prompt = str | Sequence[Message]


def generate(
    model: ChatModel | ModelPlace | Run | str | Path,
    prompts: Prompt | Path | Iterable[Prompt],
    *,
    output: str | Path | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 8,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Answers prompts, several at a time.

    Args:
        model: A run, a model directory, a hub id, or what `load_chat_model` or `find_place` returned.
        prompts: A text, a list of messages, several of either, or the `Path` of a JSON Lines file with one
            `{"prompt": ...}` or `{"messages": [...]}` a line, or of a txt file with one prompt a line.
        output: JSON Lines file to write: prompt, `answer`, `finish_reason` (`stop` or `length`), `tokens`.
            Each is on the disk when it is given, in `NAME.unfinished.jsonl`, which becomes the file.
        sampling: How to choose tokens; greedy by default.
        system: System message of prompts that have none; None takes the one the model was trained with.
        raw: Continue the texts as they are, without the chat template.
        batch_size: Prompts answered together.
        on_answer: Called with a prompt's number and answer as each one finishes, in any order.

    Returns:
        One answer a prompt, in their order.

    Raises:
        UsageError: A prompt is blank, or the output cannot be written.
        DataError: A line of the file is not a prompt (with file and line), or there is no chat template.
    """
    return answer_prompts(
        model, read_prompts(prompts), output=output, sampling=sampling, system=system, raw=raw,
        batch_size=batch_size, on_answer=on_answer,
    )  # fmt: skip


def answer_prompts(
    model: ChatModel | ModelPlace | Run | str | Path,
    rows: Sequence[tuple[str, Prompt]],
    *,
    output: str | Path | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 8,
    on_answer: Callable[[int, Answer], None] | None = None,
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
    check_files(None, output)
    chat_model = model if isinstance(model, ChatModel) else load_chat_model(model, needs_template=not raw)
    system = chat_model.system if system is None else system
    if not raw:
        require_template(chat_model.name, chat_model.tokenizer)
    encoded = [_encode(chat_model, row, where, system, raw) for where, row in rows]

    def give(take: Callable[[int, Answer], None] | None) -> list[Answer]:
        return answers(
            chat_model.model,
            chat_model.tokenizer,
            encoded,
            sampling=sampling or Sampling(),
            stop_ids=chat_model.stop_ids,
            batch_size=batch_size,
            on_answer=take,
        )

    if output is None:
        return give(on_answer)
    with AnswerFile(Path(output), [row for _, row in rows]) as file:

        def take(number: int, answer: Answer) -> None:
            file.add(number, answer)
            if on_answer is not None:
                on_answer(number, answer)

        return give(take)


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
        model: A run, a model directory, a hub id, or what `load_chat_model` or `find_place` returned.
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


def read_prompts(prompts: Prompt | Path | Iterable[Prompt]) -> list[tuple[str, Prompt]]:
    """Returns (where, prompt) of one prompt, of several, or of every line of a file that is not blank.

    Raises:
        UsageError: A prompt is blank, or there is none.
        DataError: There is no such file, or a line of it is not a prompt (with file and line).
    """
    if isinstance(prompts, Path):
        check_files(prompts, None)
        return [_parse(row) for row in read_prompt_file(prompts)]
    listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if listed and isinstance(listed[0], dict):  # one conversation
        listed = [listed]
    if not listed:
        raise UsageError("there are no prompts to answer")
    rows = [(f"prompt {number}", prompt) for number, prompt in enumerate(listed, 1)]
    for where, prompt in rows:
        _check_prompt(prompt, where, UsageError)
    return rows


def _parse(row: Row) -> tuple[str, Prompt]:
    where, value = row.where, row.value
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise DataError(
            f"{where}: a line needs either `prompt` or `messages`",
            hint='for example {"prompt": "What is the capital of France?"}',
        )
    prompt = value["prompt"] if "prompt" in value else value["messages"]
    if not isinstance(prompt, str if "prompt" in value else list):
        wanted = "a string" if "prompt" in value else "a list of messages"
        raise DataError(f"{where}: `{'prompt' if 'prompt' in value else 'messages'}` is not {wanted}")
    _check_prompt(prompt, where, DataError)
    return where, prompt


def _check_prompt(prompt: Any, where: str, kind: type[UsageError | DataError]) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise kind(f"{where}: the prompt is empty")
        return
    if not prompt:
        raise kind(f"{where}: there are no messages")
    for message in prompt:
        if not _is_message(message):
            raise kind(
                f"{where}: a message needs `role` and `content`, both strings, not {message!r:.80}",
                hint='for example {"role": "user", "content": "Hello"}',
            )
    if prompt[-1]["role"] == "assistant":
        raise kind(f"{where}: the last message is the assistant's own", hint="end with a `user` message")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or bool(message.get("tool_calls"))


def _encode(chat_model: ChatModel, prompt: Prompt, where: str, system: str | None, raw: bool) -> list[int]:
    if raw:
        if not isinstance(prompt, str):
            raise UsageError(f"{where}: `raw` continues plain text, but this is a list of messages")
        return encode_batch(chat_model.tokenizer, [prompt])[0]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        return render(chat_model.tokenizer, with_system(messages, system), add_generation_prompt=True)[0]
    except DataError as error:
        raise DataError(f"{where}: {error.message}", hint=error.hint) from error
