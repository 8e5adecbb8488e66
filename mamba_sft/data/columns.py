"""Which column of a row plays which part: known layouts, and what the recipe's `columns` says.

A part is what a column is for: `messages`, or `prompt`, `input` and `response`, or `text`; beside them
`system`, `history`, `tools`, `chosen` and `rejected`. Names are compared without case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mamba_sft.data.keys import HARMLESS
from mamba_sft.data.values import BadRowError, from_json
from mamba_sft.recipe.yaml_text import flow_text

Columns = Mapping[str, str]
"""Part -> column."""

TURN_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of turns; what is in them must be turns."""
_MAYBE_TURNS = ("chat", "dialog", "dialogue", "turns")
"""Columns that are turns where they hold a list of objects; elsewhere a text, or a number of turns."""

_ASKS = ("instruction", "prompt", "question", "query", "problem")
_ANSWERS = ("output", "completion", "response", "answer", "solution", "expected")
_SPEAKERS = (("human", "user"), ("assistant", "gpt", "bot"))
NAMED_PAIRS = (("instruction", "output"), ("prompt", "completion"))
"""Layouts with a name of their own; they hold whatever else is in the row."""
_EXTRAS = {
    "input": ("instruction", "prompt", "question", "query", "problem"),
    "context": ("instruction", "question", "query"),
}
"""Columns that go with a question, and the names of the question they go with."""

_BESIDE = {
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools",),
    "functions": ("functions",),
    "chosen": ("chosen",),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
}
"""Parts that may stand beside any format, and the names they go by."""

NAMES = frozenset((
    *TURN_COLUMNS, *_MAYBE_TURNS, *_ASKS, *_ANSWERS, *(name for group in _SPEAKERS for name in group),
    *_EXTRAS, *(name for names in _BESIDE.values() for name in names), "text",
))  # fmt: skip
"""All names that say what a column of a row is."""

STRUCTURE = ("messages", "prompt", "response", "text")
"""Parts that make a format."""


@dataclass(frozen=True)
class Layout:
    """What the columns of a row are, by their names.

    Args:
        beside: Part -> column, for the parts that go with any format.
        turns: Columns that hold turns, as their name says.
        maybe_turns: Columns that hold turns if their value does.
        pair: Parts `prompt`, `response` and maybe `input` -> column, or None.
        text: The column of plain text, or None.
        unclear: Columns that could each be the question or each be the answer, where nothing tells which.
    """

    beside: Columns
    turns: tuple[str, ...]
    maybe_turns: tuple[str, ...]
    pair: Columns | None
    text: str | None
    unclear: tuple[str, ...] = ()

    def turn_column(self, row: Mapping[str, Any]) -> str | None:
        """The column that holds this row's turns."""
        if self.turns:
            return self.turns[0]
        return next((column for column in self.maybe_turns if _is_list_of_objects(row[column])), None)


def layout_of(row: Mapping[str, Any], mapped: Columns) -> Layout:
    """What the columns of a row are; `mapped` (part -> column) wins over names."""
    return _layout(tuple(map(str, row)), tuple(sorted(mapped.items())))


@lru_cache(maxsize=512)
def _layout(keys: tuple[str, ...], mapped: tuple[tuple[str, str], ...]) -> Layout:
    own = {part: column for part, column in mapped if column in keys}
    taken = {column for _, column in mapped}
    names: dict[str, str] = {}
    for key in keys:
        if key not in taken:
            names.setdefault("_".join(key.casefold().split()), key)
    beside = {
        part: found
        for part, known in _BESIDE.items()
        if (found := own.get(part) or _first(names, known)) is not None
    }
    wanted = {part for part, _ in mapped if part in STRUCTURE}
    if not wanted:
        pair, unclear = _pair(names, own, beside)
        turns = tuple(names[name] for name in TURN_COLUMNS if name in names)
        maybe = tuple(names[name] for name in _MAYBE_TURNS if name in names)
        return Layout(beside, turns, maybe, pair, names.get("text"), unclear)
    asks_for_pair = bool(wanted & {"prompt", "response"}) and wanted <= own.keys()
    pair, unclear = _pair(names, own, beside) if asks_for_pair else (None, ())
    turns = (own["messages"],) if "messages" in own else ()
    return Layout(beside, turns, (), pair, own.get("text"), unclear)


def _first(names: Mapping[str, str], known: tuple[str, ...]) -> str | None:
    return next((names[name] for name in known if name in names), None)


def _pair(names: dict[str, str], own: Columns, beside: Columns) -> tuple[Columns | None, tuple[str, ...]]:
    """Question and answer, with what goes with the question; or the columns that leave it unclear."""
    for asked, answered in NAMED_PAIRS:
        if not {"prompt", "response"} & own.keys() and asked in names and answered in names:
            return _with_extra({"prompt": names[asked], "response": names[answered]}, asked, names, own), ()
    asks = [names[name] for name in _ASKS if name in names] or _listed(names, "input")
    answers = [names[name] for name in _ANSWERS if name in names]
    if not answers and "chosen" in beside:
        answers = [beside["chosen"]]
    if not asks and answers and "response" not in own:
        asks = _listed(names, "context")
    if not asks and not answers:
        asks, answers = ([names[name] for name in group if name in names][:1] for group in _SPEAKERS)
    asks = [own["prompt"]] if "prompt" in own else asks
    answers = [own["response"]] if "response" in own else answers
    if not asks or not answers:
        return None, ()
    if len(asks) > 1 or len(answers) > 1:
        return None, (*(asks if len(asks) > 1 else ()), *(answers if len(answers) > 1 else ()))
    return _with_extra({"prompt": asks[0], "response": answers[0]}, asks[0].casefold(), names, own), ()


def _listed(names: Mapping[str, str], name: str) -> list[str]:
    return [names[name]] if name in names else []


def _with_extra(pair: dict[str, str], asked: str, names: Mapping[str, str], own: Columns) -> Columns:
    if "input" in own:
        return pair | {"input": own["input"]}
    for name, goes_with in _EXTRAS.items():
        if name in names and asked in goes_with and names[name] not in pair.values():
            return pair | {"input": names[name]}
    return pair


def _is_list_of_objects(value: Any) -> bool:
    try:
        read = from_json(value)
    except BadRowError:
        return False
    if isinstance(read, dict):
        return bool(read) and all(isinstance(values, list) for values in read.values())
    return isinstance(read, list) and bool(read) and all(isinstance(entry, dict | list) for entry in read)


def likeliest_columns(row: Mapping[str, Any], layout: Layout) -> str | None:
    """The line of recipe that most likely says what the columns are, where a row has two texts."""
    texts = [
        key
        for key, value in row.items()
        if isinstance(value, str) and value.strip() and key.casefold() not in HARMLESS["row"]
    ]
    names = {key.casefold(): key for key in texts}
    asked = next((names[name] for name in (*_ASKS, "input", *_SPEAKERS[0]) if name in names), None)
    answered = next((names[name] for name in (*_ANSWERS, *_SPEAKERS[1]) if name in names), None)
    rest = [key for key in texts if key not in (asked, answered, *layout.beside.values())]
    if asked is None and rest:
        asked = rest.pop(0)
    if answered is None and rest:
        answered = rest.pop()
    if asked is None or answered is None:
        return None
    return f"columns: {{prompt: {flow_text(asked)}, response: {flow_text(answered)}}}"
