"""Rows as examples: six formats, recognised by looking at the rows.

Every format becomes one of two things: a `Chat`, which the chat template renders, or a `Passage` of plain
text, which it does not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mamba_sft.data.chat_marks import note_marks_of_chat, note_marks_of_text
from mamba_sft.data.chats import Chat, LeftOut, check_encodable, check_text, make_chat
from mamba_sft.data.columns import NAMED_PAIRS, Columns, Layout, layout_of, likeliest_columns
from mamba_sft.data.keys import note_unused, refuse_media, row_flags, row_is_trained
from mamba_sft.data.notes import CHAT, NOT_CHOSEN, PLAIN, WEIGHT_ZERO, WHOLE, Notes
from mamba_sft.data.preferences import ADVICE, LABELS, is_rejected, preference_columns, refuse_preferences
from mamba_sft.data.roles import known_roles
from mamba_sft.data.tool_calls import read_tools
from mamba_sft.data.turns import (
    REASONING,
    Turn,
    TurnRules,
    looks_like_turns,
    read_messages,
    read_reasoning,
    read_turns,
)
from mamba_sft.data.values import BadRowError, from_json, is_empty, is_nan, kind_of, python_list
from mamba_sft.errors import DataError

if TYPE_CHECKING:
    from mamba_sft.model.chat_template import TemplateSetup
    from mamba_sft.recipe.fields import SourceSection

LOOKED_AT = 50
"""Rows of a file that are looked at to recognise its format."""

NEEDS = {
    "messages": "`messages`: a list of {role, content}",
    "sharegpt": "`conversations`: a list of {from, value}",
    "alpaca": "`instruction` and `output`, with `input` and `system` where they apply",
    "prompt_completion": "`prompt` and `completion`: two texts, or two lists of {role, content}",
    "plain_completion": "`prompt` and `completion`: two texts",
    "text": "`text`",
}
_CHATS = ("messages", "sharegpt")


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read, as the recipe says.

    Args:
        columns: Part -> column, where names do not say it; see `columns`.
        turns: Roles, reasoning and names.
        prefers_chosen: Train on what preference data prefers; else such rows are refused.
        stop_token: What ends an answer, which plain text may hold already.
    """

    columns: Columns = field(default_factory=dict)
    turns: TurnRules = field(default_factory=TurnRules)
    prefers_chosen: bool = False
    stop_token: str | None = None

    @classmethod
    def of(cls, source: SourceSection, setup: TemplateSetup) -> Reading:
        """Returns what the recipe says of a source, for one chat template."""
        rules = TurnRules(known_roles(source.roles), setup.reasoning == "keep", setup.carries.name)
        columns = {str(part): column for part, column in source.columns.items()}
        return cls(columns, rules, source.preference == "chosen", setup.stop_token)


_AS_IT_STANDS = Reading()


@dataclass
class Passage:
    """Plain text, outside the chat template: `text` is trained, a stop token behind it; `prompt` is not."""

    text: str
    prompt: str = ""
    notes: Notes = field(default_factory=Notes, compare=False)


def detect(row: Mapping[str, Any], columns: Columns | None = None) -> str | None:
    """The format a row's columns fit, or None. Chats win over `text`: many data sets carry both."""
    layout = layout_of(row, columns or {})
    if (column := layout.turn_column(row)) is not None:
        turns = row[column]
        first = turns[0] if isinstance(turns, list) and turns else turns
        names = set(first) if isinstance(first, dict) else set()
        is_sharegpt = bool(names & {"from", "value"}) if names else column != "messages"
        return "sharegpt" if is_sharegpt else "messages"
    if layout.pair:
        names = {layout.pair["prompt"].casefold(), layout.pair["response"].casefold()}
        return "alpaca" if names == {"instruction", "output"} else "prompt_completion"
    if layout.text is not None:
        return "text"
    return "messages" if _is_chosen_chat(row, layout) else None


def _is_chosen_chat(row: Mapping[str, Any], layout: Layout) -> bool:
    """Whether all there is of a chat is in `chosen`."""
    return "chosen" in layout.beside and looks_like_turns(row[layout.beside["chosen"]])


def detect_file(
    file: str, rows: Sequence[dict[str, Any]], reading: Reading = _AS_IT_STANDS
) -> tuple[str, str]:
    """The format most of `rows` fit, and a sentence saying what was seen.

    Args:
        file: Its name, for the sentence.
        rows: The first `LOOKED_AT` readable rows of the file.
        reading: What the recipe says of its source.

    Raises:
        DataError: None of them fits any format.
    """
    formats = Counter(found for row in rows if (found := detect(row, reading.columns)))
    columns = Counter(key for row in rows for key in row)
    count = f"first {len(rows)} rows" if len(rows) > 1 else "only row"
    seen = f"looked at the {count} of `{file}`: columns {_listed(columns)}"
    if not formats:
        raise _no_format(seen, rows[0], reading)
    (best, fitting), *others = formats.most_common()
    mixed = f" (others look like {', '.join(name for name, _ in others)})" if others else ""
    parts = _parts_text(next(row for row in rows if detect(row, reading.columns) == best), reading)
    return best, f"{seen}; {fitting} fit {best}{parts}{mixed}"


def _no_format(seen: str, row: dict[str, Any], reading: Reading) -> DataError:
    layout = layout_of(row, reading.columns)
    missing = [f"`{column}`" for column in reading.columns.values() if column not in row]
    if missing:
        return DataError(f"{seen}; `columns` names {', '.join(missing)}, which are not among them")
    if layout.unclear:
        names = ", ".join(f"`{column}`" for column in layout.unclear)
        said = f"{seen}; which of {names} to train on is not clear"
    else:
        said = f"{seen}; no format has these"
    line = likeliest_columns(row, layout)
    name_them = f"say under `data.sources` what they are, such as `{line}`; " if line else ""
    needs = [need for name, need in NEEDS.items() if name != "plain_completion"]  # the columns of another
    return DataError(said, hint=f"{name_them}rows need " + "; or ".join(needs))


def _parts_text(row: dict[str, Any], reading: Reading) -> str:
    """Which columns are taken for question and answer, where the format's name does not say it."""
    layout = layout_of(row, reading.columns)
    if layout.turn_column(row) is not None or not layout.pair:
        return ""
    pair = layout.pair
    if (pair["prompt"], pair["response"]) in NAMED_PAIRS:
        return ""
    extra = f" and `{pair['input']}`" if "input" in pair else ""
    return f" (`{pair['prompt']}`{extra} as the prompt, `{pair['response']}` as the answer)"


def refuse_preference_file(file: str, rows: Sequence[dict[str, Any]], reading: Reading) -> None:
    """Refuses a file of preference data that the recipe does not say what to do with.

    Raises:
        DataError: It is one.
    """
    if reading.prefers_chosen:
        return
    found = [
        preference_columns(
            row,
            layout_of(row, reading.columns).beside,
            has_answer=detect(row, reading.columns) not in ("text", None),
        )
        for row in rows
    ]
    refuse_preferences(file, found)


def parse(
    row: dict[str, Any],
    expected: str,
    reading: Reading = _AS_IT_STANDS,
) -> Chat | Passage | LeftOut:
    """Reads a row as the format `expected`.

    Args:
        row: Its columns.
        expected: One of `NEEDS`.
        reading: What the recipe says of its source.

    Returns:
        What to train on, with notes on how the row was understood, or that the row takes no part.

    Raises:
        BadRowError: It is not that format, or cannot be trained on.
    """
    try:
        return _parse(row, expected, reading)
    except RecursionError as error:
        raise BadRowError("nested too deeply") from error


def _parse(row: dict[str, Any], expected: str, reading: Reading) -> Chat | Passage | LeftOut:
    layout = layout_of(row, reading.columns)
    if not _fits(row, layout, expected):
        found = detect(row, reading.columns)
        looks = f"it looks like {found}" if found else f"its columns are {_listed(row)}"
        raise BadRowError(f"not {expected}: {looks}; {expected} needs {NEEDS[expected]}")
    refuse_media("", row)
    notes = Notes()
    one = _Row(row, layout, reading, notes)
    if not row_is_trained(row):
        notes.note(WEIGHT_ZERO)
        return LeftOut(notes)
    if preferring := preference_columns(row, layout.beside, has_answer=expected != "text"):
        if not reading.prefers_chosen:
            told = " and ".join(f"`{column}`" for column in preferring)
            raise BadRowError(
                f"{told}: preference data, where not every answer is meant to be learned; {ADVICE}"
            )
        if is_rejected(row):
            notes.note(NOT_CHOSEN)
            return LeftOut(notes)
    example = _READERS[expected](one)
    if (column := reading.columns.get("difficulty")) is not None:
        one.used.add(column)
        difficulty_of(row, column)
    note_unused("row", row, one.used, notes)
    notes.missing = {column: 1 for column in reading.columns.values() if column not in row}
    if isinstance(example, Chat):
        notes.note(CHAT)
        note_marks_of_chat(example.messages, notes)
        check_text(example)
    elif isinstance(example, Passage):
        notes.note(PLAIN)
        text = example.prompt + example.text
        note_marks_of_text(text, reading.stop_token, notes)
        check_encodable("text", text)
    return example


def difficulty_of(row: Mapping[str, Any], column: str) -> float:
    """Returns the number in a row's column of difficulty.

    Raises:
        BadRowError: It holds none.
    """
    value = row.get(column)
    try:
        found = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRowError(f"`{column}`, by which rows are ordered, is {kind_of(value)}, not a number")
    return found


def _fits(row: Mapping[str, Any], layout: Layout, expected: str) -> bool:
    if expected in _CHATS:
        return layout.turn_column(row) is not None or _is_chosen_chat(row, layout)
    return layout.text is not None if expected == "text" else layout.pair is not None


@dataclass
class _Row:
    """A row on its way to an example, and which of its columns were read."""

    values: Mapping[str, Any]
    layout: Layout
    reading: Reading
    notes: Notes
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.used |= row_flags(self.values)
        if self.reading.prefers_chosen:
            self.used |= {*LABELS, *(self.layout.beside.get(part, "") for part in ("chosen", "rejected"))}

    def read(self, column: str) -> Any:
        self.used.add(column)
        return self.values.get(column)

    def beside(self, part: str) -> Any:
        """What stands in the column of a part, None where the row has none."""
        column = self.layout.beside.get(part)
        return None if column is None else self.read(column)

    def text(self, column: str, *, optional: bool = False) -> str:
        value = self.read(column)
        if optional and (value is None or is_nan(value)):
            return ""
        if not isinstance(value, str):
            raise BadRowError(f"`{column}` is {kind_of(value)}, not text")
        return value

    def turns(self, column: str, value: Any, start: int) -> list[Turn]:
        self.used.add(column)
        return read_messages(read_turns(column, value), self.reading.turns, self.notes, start)


def _read_chat(row: _Row) -> Chat | LeftOut:
    column = row.layout.turn_column(row.values)
    before = [*_system(row), *_history(row)]
    listed = [] if column is None else row.turns(column, row.values[column], start=1)
    _note_prompt(row, listed)
    if not is_empty(row.beside("chosen")):
        return _chosen(row, before, listed)
    return make_chat(_after_system(before, listed), row.notes, tools=_tools(row))


def _after_system(before: list[Turn], turns: list[Turn]) -> list[Turn]:
    """`turns` behind what goes before them; a system turn of their own stays at the head."""
    system = [turn for turn in before if turn.message["role"] == "system"]
    own = next((i for i, turn in enumerate(turns) if turn.message["role"] != "system"), len(turns))
    return [*system, *turns[:own], *before[len(system) :], *turns[own:]]


def _note_prompt(row: _Row, turns: Sequence[Turn]) -> None:
    """Takes a `prompt` beside the turns for read where it only says their first question again."""
    first = next((turn.message["content"] for turn in turns if turn.message["role"] == "user"), None)
    if row.values.get("prompt") == first:
        row.used.add("prompt")


def _chosen(row: _Row, before: list[Turn], asked: list[Turn]) -> Chat | LeftOut:
    """The chat that ends with the chosen answer; answers before it are context."""
    column = row.layout.beside["chosen"]
    value = from_json(row.values[column])
    if isinstance(value, str):
        answer = [Turn({"role": "assistant", "content": value}, number=len(asked) + 1)]
    else:
        answer = row.turns(column, value if isinstance(value, list) else [value], start=len(asked) + 1)
    if any(turn.message["role"] == "user" for turn in answer):  # the whole chat, its question included
        asked = []
    elif asked and asked[-1].message == answer[0].message:  # the chat ends with it already
        asked = asked[:-1]
    turns = _after_system(before, [*asked, *answer])
    last = max((i for i, turn in enumerate(turns) if turn.message["role"] == "assistant"), default=0)
    return make_chat(turns, row.notes, tools=_tools(row), context=last)


def _read_pair(row: _Row) -> Chat | LeftOut:
    pair = row.layout.pair or {}
    before = [*_system(row), *_history(row)]
    asked = _asked(row, pair, len(before) + 1)
    if not is_empty(row.beside("chosen")):
        return _chosen(row, before, asked)
    answered = _answered(row, pair["response"], len(before) + len(asked) + 1)
    turns = _after_system(before, asked)
    context = len(turns) if any(turn.message["role"] == "assistant" for turn in asked) else 0
    return make_chat([*turns, *answered], row.notes, tools=_tools(row), context=context)


def _asked(row: _Row, pair: Columns, start: int) -> list[Turn]:
    column = pair["prompt"]
    extra = row.text(pair["input"], optional=True) if "input" in pair else ""
    value = _messages_or_text(column, row.read(column))
    if isinstance(value, list):
        turns = row.turns(column, value, start) if value else []
        return (
            [*turns, Turn({"role": "user", "content": extra}, number=start + len(turns))]
            if extra.strip()
            else turns
        )
    asked = "\n\n".join(part for part in (row.text(column), extra) if part.strip())
    return [Turn({"role": "user", "content": asked}, number=start)]


def _answered(row: _Row, column: str, start: int) -> list[Turn]:
    value = _messages_or_text(column, row.read(column))
    if isinstance(value, list):
        turns = row.turns(column, value, start)
        if not any(turn.message["role"] == "assistant" for turn in turns):
            raise BadRowError(f"`{column}` has no assistant turn")
        return turns
    if not row.text(column).strip():
        raise BadRowError(f"`{column}` is empty")
    answer = {"role": "assistant", "content": row.text(column)}
    return read_messages([answer | _reasoning(row)], row.reading.turns, row.notes, start)


def _messages_or_text(column: str, value: Any) -> Any:
    """Messages as a list, also where they are JSON text or a single object; a text as itself."""
    if looks_like_turns(value):
        return from_json(value)
    if isinstance(value, str) and looks_like_turns(python_list(value)):
        return read_turns(column, value)
    return [value] if isinstance(value, dict) else value


def _reasoning(row: _Row) -> dict[str, str]:
    reasoning = read_reasoning("row", row.values)
    row.used.update(key for key in REASONING if reasoning and isinstance(row.values.get(key), str))
    return {"reasoning_content": reasoning} if reasoning else {}


def _read_plain_completion(row: _Row) -> Passage:
    pair = row.layout.pair or {}
    prompt, completion = row.read(pair["prompt"]), row.read(pair["response"])
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        kinds = f"{kind_of(prompt)} and {kind_of(completion)}"
        raise BadRowError(f"`{pair['prompt']}` and `{pair['response']}` are {kinds}: both must be texts")
    if not completion.strip():
        raise BadRowError(f"`{pair['response']}` is empty")
    return Passage(completion, prompt, row.notes)


def _read_text(row: _Row) -> Passage:
    column = row.layout.text or "text"
    text = row.text(column)
    if not text.strip():
        raise BadRowError(f"`{column}` is empty")
    row.notes.note(WHOLE)
    return Passage(text, notes=row.notes)


def _system(row: _Row) -> list[Turn]:
    column = row.layout.beside.get("system")
    text = "" if column is None else row.text(column, optional=True)
    return [Turn({"role": "system", "content": text})] if text.strip() else []


def _history(row: _Row) -> list[Turn]:
    column = row.layout.beside.get("history")
    if column is None or is_empty(row.read(column)):
        return []
    return row.turns(column, row.read(column), start=1)


def _tools(row: _Row) -> list[dict[str, Any]]:
    return [tool for part in ("tools", "functions") for tool in read_tools(part, row.beside(part))]


_READERS = {
    "messages": _read_chat,
    "sharegpt": _read_chat,
    "alpaca": _read_pair,
    "prompt_completion": _read_pair,
    "plain_completion": _read_plain_completion,
    "text": _read_text,
}


def _listed(names: Any) -> str:
    shown = [f"`{name}`" for name in list(names)[:12]]
    return ", ".join(shown) + (", ..." if len(names) > 12 else "") if shown else "(none)"
