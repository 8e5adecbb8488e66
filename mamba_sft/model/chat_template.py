"""The chat template: which tokens a conversation becomes, and which of them are the assistant's.

A rendered chat is tokenized in pieces, cut at the template's generation marks, never as one text. So the
prompt of an answer has the very tokens it has when the model is asked for that answer, however the answer
begins, and the mask is exact without mapping characters to tokens.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import DataError
from mamba_sft.model.literal_text import Marked, Marks, choose_marks, encode_as_text, spellings_of, unescaped
from mamba_sft.model.special_tokens import is_single, rename_tokens, settle_pad, unused_slots
from mamba_sft.model.template_process import (
    LONGEST_TEMPLATE,
    Outcome,
    built_in_template,
    check_template,
    render_template,
)
from mamba_sft.model.template_rendering import RefusedError
from mamba_sft.wording import shown

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import ChatSection

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Pieces = list[tuple[str, bool]]

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

_NO_FILES = ("chatml", "tokenizer")
"""Values of `chat.template` that are no path."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBE: list[Message] = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]


@dataclass(frozen=True)
class Carried:
    """What a chat template renders besides the text of turns; it drops the rest without a word.

    Args:
        tools: The tools on offer.
        calls: Calls of tools.
        reasoning: `reasoning_content` of an answer.
        name: The `name` of who speaks.
    """

    tools: bool = False
    calls: bool = False
    reasoning: bool = False
    name: bool = False


@dataclass
class TemplateSetup:
    """A tokenizer with its chat template installed, and what the model has to know about it.

    Args:
        tokenizer: A copy of the base's tokenizer: template installed, `eos_token` is the stop token.
        trained_token_ids: Embedding rows that were given a new meaning and must be trained.
        resize_to: Rows the embedding matrix must grow to, or None where it stays as it is.
        stop_token: What ends an assistant turn.
        stop_token_ids: Ids that end generation: the stop token, and the base's own end of text.
        template: Where the template came from, for messages: `chatml`, `tokenizer` or a path.
    """

    tokenizer: Any
    trained_token_ids: list[int]
    resize_to: int | None
    stop_token: str
    stop_token_ids: list[int]
    template: str = "chatml"
    renamed: dict[str, str] = field(default_factory=dict)
    """Old name -> new name of the vocabulary rows that were given a new meaning."""
    carries: Carried = Carried()
    """What the template renders besides text."""
    reasoning: str = "keep"
    """`chat.reasoning` of the recipe."""

    def identity(self) -> dict[str, Any]:
        """Returns everything that decides which tokens a conversation becomes, as JSON can hold it."""
        import tokenizers

        return {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special_tokens": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            "template": self.tokenizer.chat_template,
            "stop_token": self.stop_token,
            "reasoning": self.reasoning,
            "version": tokenizers.__version__,
        }


def prepare_tokenizer(
    tokenizer: Any, chat: ChatSection, reserved_ids: Collection[int], embedding_rows: int | None = None
) -> TemplateSetup:
    """Installs the chat template on a copy of `tokenizer` and settles its special tokens.

    Args:
        tokenizer: The base's tokenizer; it is not changed.
        chat: The recipe's `chat` section.
        reserved_ids: Ids that must keep their meaning, e.g. those the model's config names.
        embedding_rows: Rows of the embedding matrix; by default as many as the tokenizer has tokens.

    Returns:
        The tokenizer to train, save and talk with, and what the model must be told about it.

    Raises:
        DataError: There is no template, it cannot be rendered, or its assistant turns end with no stop token.
    """
    base_length = len(tokenizer)
    base_eos = tokenizer.eos_token_id
    source, text = _template_text(tokenizer, chat.template)
    missing = [token for token in (TURN_START, TURN_END) if token in text and not is_single(tokenizer, token)]
    slots = unused_slots(tokenizer, reserved_ids) if chat.special_tokens == "auto" else []
    renamed: dict[str, str] = {}
    if not missing:
        tokenizer = copy.deepcopy(tokenizer)
    elif len(slots) >= len(missing):
        renamed = dict(zip(slots, missing, strict=False))
        tokenizer = rename_tokens(tokenizer, renamed)
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": missing})
    tokenizer.chat_template = text
    stop_token = find_stop_token(tokenizer, source)
    tokenizer.eos_token = stop_token
    settle_pad(tokenizer, base_eos, reserved_ids)
    stop_ids = [tokenizer.convert_tokens_to_ids(stop_token)]
    if base_eos is not None and base_eos not in stop_ids:
        stop_ids.append(base_eos)
    rows = base_length if embedding_rows is None else embedding_rows
    return TemplateSetup(
        tokenizer=tokenizer,
        trained_token_ids=sorted(tokenizer.convert_tokens_to_ids(token) for token in missing),
        resize_to=len(tokenizer) if len(tokenizer) > rows else None,
        stop_token=stop_token,
        stop_token_ids=stop_ids,
        template=source,
        renamed=renamed,
        carries=carried(tokenizer),
        reasoning=chat.reasoning,
    )


def carried(tokenizer: Any) -> Carried:
    """Returns what the tokenizer's chat template renders, found by rendering it."""
    call = {"type": "function", "function": {"name": "probed_call", "arguments": {}}}
    user: Message = {"role": "user", "content": "question"}
    thought: Message = {"role": "assistant", "content": "answer", "reasoning_content": "probed_thought"}
    answer: Message = {"role": "assistant", "content": "answer"}
    tool = {"type": "function", "function": {"name": "probed_tool", "description": "", "parameters": {}}}
    return Carried(
        tools=_shows("probed_tool", tokenizer, [user, answer], [tool]),
        calls=_shows("probed_call", tokenizer, [user, {**answer, "content": "", "tool_calls": [call]}]),
        reasoning=_shows("probed_thought", tokenizer, [user, thought]),
        name=_shows("probed_name", tokenizer, [{**user, "name": "probed_name"}, answer]),
    )


def _shows(mark: str, tokenizer: Any, messages: Sequence[Message], tools: Tools = None) -> bool:
    try:
        return any(mark in text for text, _ in split_rendered(tokenizer, messages, tools=tools))
    except DataError:
        return False


def render(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = None
) -> tuple[list[int], list[int]]:
    """Renders one conversation.

    Args:
        tokenizer: `TemplateSetup.tokenizer`.
        messages: `{"role", "content"}` and, for tools, `tool_calls`.
        add_generation_prompt: End with the opening of an assistant turn, for the model to answer.
        tools: JSON schemas of the tools on offer, passed to the template.

    Returns:
        Token ids, and a mask of the same length: 1 for what the assistant writes (its stop token included).
        A template without generation marks gives a mask of zeros.

    Raises:
        DataError: The template refuses the conversation, or marks a turn without its stop token.
    """
    pieces = split_rendered(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
    return join_pieces(tokenizer, pieces, encode_batch(tokenizer, [text for text, _ in pieces]))


_rendering = threading.Lock()
"""A template is compiled once for all threads, and where the generation marks are is noted in it."""


def split_rendered(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools = None
) -> list[tuple[str, bool]]:
    """Renders one conversation to text, cut at the generation marks: [(text, written by the assistant)].

    Special tokens that messages spell out are text, marked as such for `encode_batch` (`literal_text`).

    Raises:
        DataError: The template refuses the conversation.
    """
    [found] = split_rendered_batch(
        tokenizer, [(messages, tools)], add_generation_prompt=add_generation_prompt
    )
    if isinstance(found, DataError):
        raise found
    return found


def split_rendered_batch(
    tokenizer: Any, chats: Sequence[tuple[Sequence[Message], Tools]], *, add_generation_prompt: bool = False
) -> list[Pieces | DataError]:
    """Renders conversations as `split_rendered` does; the error is in the place of what is refused.

    Args:
        tokenizer: `TemplateSetup.tokenizer`.
        chats: Messages and tools of each. All at once are rendered in half the time of one after the other
            where the template has a process of its own.
        add_generation_prompt: End with the opening of an assistant turn, for the model to answer.

    Raises:
        EndlessTemplateError: The template takes too long.
    """
    asked = [_variables(tokenizer, messages, tools) for messages, tools in chats]
    more = {"documents": None, "add_generation_prompt": add_generation_prompt, **tokenizer.special_tokens_map}
    good = [more | one[0] for one in asked if not isinstance(one, DataError)]
    try:
        with _rendering:
            rendered = iter(render_template(tokenizer.chat_template, good))
    except RefusedError as error:
        rendered = repeat(error)
    return [one if isinstance(one, DataError) else _cut(next(rendered), one[1]) for one in asked]


def _variables(
    tokenizer: Any, messages: Sequence[Message], tools: Tools
) -> tuple[dict[str, Any], Marks | None] | DataError:
    """What the template sees of a conversation, and what stands round special tokens that it spells out."""
    written = [_with_every_name({k: v for k, v in m.items() if v is not None}) for m in messages]
    spellings, literal = spellings_of(tokenizer), None
    try:
        if not (spellings.stand_apart(written) and spellings.stand_apart(tools)):
            literal = choose_marks(written, tools)
            written, tools = spellings.enclose(written, literal), spellings.enclose(tools, literal)
    except DataError as error:
        return error
    except RecursionError:
        return DataError("the chat template refuses this conversation: it is nested too deeply")
    return {"messages": written, "tools": tools or None}, literal


def _cut(outcome: Outcome, literal: Marks | None) -> Pieces | DataError:
    """The pieces of a rendered conversation."""
    if isinstance(outcome, RefusedError):
        return DataError(f"the chat template refuses this conversation: {shown(str(outcome), 400)}")
    (text, marks), end = outcome, 0
    pieces: Pieces = []
    for first, last in marks:
        pieces += [(text[end:first], False), (text[first:last], True)]
        end = last
    pieces.append((text[end:], False))
    found = [(piece, trained) for piece, trained in pieces if piece]
    if literal is None:
        return found
    return [(Marked.of(unescaped(piece, literal), literal), trained) for piece, trained in found]


def _with_every_name(message: Message) -> Message:
    """The message with its reasoning under each name that templates know it by."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def encode_batch(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text; special tokens written out in a text count as such, none are added.

    What `split_rendered` has marked is text.
    """
    found = _encode(tokenizer, [text for text in texts if not isinstance(text, Marked)])
    marked = [text for text in texts if isinstance(text, Marked)]
    if not marked:
        return found
    plain, literal = iter(found), iter(_encode_marked(tokenizer, marked))
    return [next(literal if isinstance(text, Marked) else plain) for text in texts]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # what the tokenizer itself does, without the copies and the offsets of its call: a seventh of the time
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [one.ids for one in encoded]


def _encode_marked(tokenizer: Any, texts: list[Marked]) -> Iterator[list[int]]:
    """Token ids of each text, its control tokens apart from what they stand between."""
    spellings = spellings_of(tokenizer)
    cut = [list(spellings.cut(text)) for text in texts]
    plain = [part for parts in cut for part in parts if isinstance(part, str)]
    found = iter(encode_as_text(tokenizer, plain))
    for parts in cut:
        yield [token for part in parts for token in ([part] if isinstance(part, int) else next(found))]


def join_pieces(
    tokenizer: Any, pieces: Sequence[tuple[str, bool]], encoded: Sequence[list[int]]
) -> tuple[list[int], list[int]]:
    """Token ids and assistant mask of a conversation from its tokenized pieces.

    Raises:
        DataError: A piece the assistant writes does not hold the stop token.
    """
    check_stops(tokenizer, pieces, encoded)
    ids: list[int] = []
    mask: list[int] = []
    for (_, trained), tokens in zip(pieces, encoded, strict=True):
        ids += tokens
        mask += [int(trained)] * len(tokens)
    return ids, mask


def check_stops(tokenizer: Any, pieces: Sequence[tuple[str, bool]], encoded: Sequence[list[int]]) -> None:
    """Checks that every piece the assistant writes holds the stop token.

    Raises:
        DataError: One does not.
    """
    stop = tokenizer.eos_token_id
    for (text, trained), tokens in zip(pieces, encoded, strict=True):
        if trained and stop not in tokens[-2:] and stop not in tokens:
            raise DataError(
                f"the chat template marks an assistant turn without its stop token"
                f" {tokenizer.eos_token}: {text[-60:]!r}",
                hint=f"move {{% endgeneration %}} behind {tokenizer.eos_token}",
            )


def check_generation_marks(setup: TemplateSetup) -> None:
    """Checks that the mask of a multi-turn chat covers every assistant turn with its stop token, and no more.

    Raises:
        DataError: It does not; names the template.
    """
    pieces = split_rendered(setup.tokenizer, _PROBE)
    trained = [text for text, is_trained in pieces if is_trained]
    answers = [message["content"] for message in _PROBE if message["role"] == "assistant"]
    if not trained:
        raise DataError(
            f"the chat template `{setup.template}` has no {{% generation %}} marks, which"
            " `data.assistant_only_loss` needs to know the assistant's tokens",
            hint="use `chat.template: chatml`, add the marks to a copy of the template, or set"
            " `data.assistant_only_loss: false`",
        )
    if len(trained) != len(answers) or any(a not in t for a, t in zip(answers, trained, strict=False)):
        raise DataError(
            f"the chat template `{setup.template}` marks {len(trained)} of {len(answers)} assistant turns",
            hint="put {% generation %} ... {% endgeneration %} around the assistant's branch of the loop",
        )
    for text in trained:
        if setup.stop_token not in text:
            raise DataError(
                f"the chat template `{setup.template}` leaves the stop token {setup.stop_token} outside its"
                f" generation marks: a model trained on {text!r} never stops",
                hint=f"move {{% endgeneration %}} behind {setup.stop_token}",
            )


def with_reasoning_as_text(messages: Sequence[Message]) -> list[Message]:
    """`messages`, reasoning put before the answer as text, for a template that does not know it."""
    return [
        message
        if not message.get("reasoning_content")
        else {key: value for key, value in message.items() if key != "reasoning_content"}
        | {"content": f"<think>{message['reasoning_content']}</think>\n{message['content']}"}
        for message in messages
    ]


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """`messages`, opened by the default system message where they have none of their own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def check_template_file(template: str) -> None:
    """Checks a template of a file of its own, where `template` names one: that it is there and can be used.

    Args:
        template: `chat.template`.

    Raises:
        DataError: It cannot be read or used.
    """
    if template not in _NO_FILES:
        _template_file(template)


def _template_text(tokenizer: Any, template: str) -> tuple[str, str]:
    if template == "chatml":
        return template, built_in_template()
    if template == "tokenizer":
        if not tokenizer.chat_template:
            raise DataError(
                "`chat.template: tokenizer`, but the base's tokenizer has no chat template",
                hint="use `chat.template: chatml`, or the path of a .jinja file",
            )
        return template, _checked(template, tokenizer.get_chat_template())
    return template, _template_file(template)


def _template_file(template: str) -> str:
    from mamba_sft.recipe.builtin import find_path

    path = find_path(template)
    try:
        with path.open(encoding="utf-8") as file:
            return _checked(template, file.read(LONGEST_TEMPLATE + 1))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the chat template `{template}`: {getattr(error, 'strerror', None) or error}",
            hint="`chat.template` is `chatml`, `tokenizer` or the path of a .jinja file",
        ) from error


def _checked(name: str, template: Any) -> str:
    try:
        check_template(template)
    except RefusedError as error:
        raise DataError(f"the chat template `{shown(name)}` cannot be used: {error}") from error
    return str(template)


def find_stop_token(tokenizer: Any, template: str) -> str:
    """The first special token after an assistant's answer, as the tokenizer's chat template writes it.

    Args:
        tokenizer: With a chat template.
        template: What to call the template in messages.

    Raises:
        DataError: The template cannot render a plain chat, or ends an answer with no special token.
    """
    try:
        text = "".join(piece for piece, _ in split_rendered(tokenizer, _PROBE))
    except DataError as error:
        raise DataError(
            f"the chat template `{template}` cannot render a plain chat: {error.message}"
        ) from error
    answer = _PROBE[-1]["content"]
    if answer not in text:
        raise DataError(f"the chat template `{template}` drops the assistant's answer")
    tail = text[text.rindex(answer) + len(answer) :]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = re.search("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)", tail)
    if not found:
        raise DataError(
            f"the chat template `{template}` ends an assistant turn with no special token (it writes"
            f" {tail!r}), so a model trained with it never stops",
            hint="end assistant turns with `{{ eos_token }}` or <|im_end|>",
        )
    return found.group()
