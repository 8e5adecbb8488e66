"""What the keys of a row, a turn and a tool call mean, apart from the columns a format is made of.

A key is harmless (it names or files the row and says nothing to a model), honoured, refused, or unknown; the
report names unknown ones. A key without a value says nothing at any level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mamba_sft.data.notes import Level, Notes
from mamba_sft.data.values import BadRowError, from_json, is_empty, kind_of

HARMLESS: dict[Level, frozenset[str]] = {
    "row": frozenset((
        "id", "idx", "index", "uid", "uuid", "guid", "hash", "source", "dataset", "data_source", "origin",
        "url", "split", "prompt_id", "conversation_id", "conversation_hash", "chat_id", "thread_id",
        "category", "task", "task_type", "topic", "domain", "tags", "language", "lang", "license", "length",
        "model", "timestamp", "created", "created_at", "date", "version", "meta", "metadata",
        "checks", "small", "__index_level_0__",
    )),
    "turn": frozenset((
        "id", "uid", "uuid", "index", "idx", "turn", "turn_id", "message_id", "parent_id", "timestamp",
        "created", "created_at", "date", "model", "meta", "metadata", "tool_call_id", "type",
    )),
    "tool call": frozenset(("id", "index", "call_id", "type", "status")),
}  # fmt: skip
"""Keys that may be left unread without a word."""

MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))
"""Keys whose entries a model of text never sees."""

FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale")
"""Keys of a turn that say whether it is trained: OpenAI's and Mistral's, axolotl's, ms-swift's (2026)."""

_UNCLEAR_FLAGS = ("mask", "masked", "loss_mask", "train_detail", "training_detail")
_ROW_WEIGHTS = ("weight", "loss_weight", "sample_weight")
_ROW_SWITCHES = ("train", "trainable", "loss")
_OFF = frozenset(("0", "0.0", "false", "no", "off"))
_ON = frozenset(("1", "1.0", "true", "yes", "on"))


def switch(value: Any) -> bool | None:
    """Whether a value means on or off: booleans, 0 and 1, and these as text; None if it is neither."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        word = value.strip().casefold()
        return True if word in _ON else False if word in _OFF else None
    return None


def is_trained(what: str, turn: Mapping[str, Any]) -> bool | None:
    """Whether the flags of a turn say that it is trained; None where they say nothing.

    Raises:
        BadRowError: A flag is neither 0 nor 1, or it is one that others read in opposite ways.
    """
    said = None
    for key, value in _said(turn, FLAGS):
        on = switch(value)
        if on is None:
            raise BadRowError(f"{what}: `{key}` is {_shown(value)}; a turn has 0 (context) or 1 (trained)")
        said = on if said is None else said and on
    for key, _ in _said(turn, _UNCLEAR_FLAGS):
        raise BadRowError(f"{what}: `{key}` may mean either way; write `weight`: 0 (context) or 1 (trained)")
    return said


def row_is_trained(row: Mapping[str, Any]) -> bool:
    """Whether a row's own weight lets it take part.

    Raises:
        BadRowError: The weight is neither 0 nor 1.
    """
    for key, value in _said(row, _ROW_WEIGHTS):
        on = switch(value)
        if on is None:
            raise BadRowError(
                f"`{key}` is {_shown(value)}; a row has 0 (left out) or 1: rows cannot be weighed one"
                " by one yet; remove the column if it means something else"
            )
        if not on:
            return False
    return not any(switch(row[key]) is False for key in _ROW_SWITCHES if key in row)


def row_flags(row: Mapping[str, Any]) -> set[str]:
    """The keys that `row_is_trained` reads here; a number under `loss` may be somebody's measurement."""
    switches = {key for key in _ROW_SWITCHES if key in row and switch(row[key]) is not None}
    return switches.union(_ROW_WEIGHTS)


def refuse_media(what: str, values: Mapping[str, Any]) -> None:
    """Refuses pictures, films and sounds beside the text.

    Raises:
        BadRowError: There is one.
    """
    for key in values:
        if key.casefold() in MEDIA and not is_empty(from_json(values[key])):
            raise BadRowError(f"{what}`{key}` has entries; only text can be trained on")


def note_unused(level: Level, values: Mapping[str, Any], used: Iterable[str], notes: Notes) -> None:
    """Notes the keys that are not in `used`, are not harmless, and hold something."""
    for key in values.keys() - used:
        name = str(key)
        if (
            name.casefold() not in HARMLESS[level]
            and name.casefold() not in MEDIA
            and not is_empty(values[key])
        ):
            notes.note_unused(level, name)


def _said(values: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Those of the keys that hold something, with what they hold."""
    return ((key, values[key]) for key in keys if key in values and not is_empty(values[key]))


def _shown(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, str | int | float) else kind_of(value)
