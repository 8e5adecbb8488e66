"""What was done with rows beyond reading them, for the report: plain counts that add up over batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mamba_sft.wording import count_text

Level = Literal["row", "turn", "tool call"]
"""Where a key stands."""

CHAT = "through the chat template"
PLAIN = "outside the chat template"
WHOLE = "trained whole"
WEIGHT_ZERO = "left out for weight 0"
NOT_CHOSEN = "left out as rejected"
CONTEXT = "answers kept as context"
ASSISTANT_FIRST = "assistant first"
SYSTEM_JOINED = "system turns joined"
SYSTEM_LATER = "system turn later on"
REASONING_KEPT = "reasoning kept"
REASONING_DROPPED = "reasoning dropped"
TOOLS_LISTED = "tools listed in the system turn"

MARKED = "chat marks in plain text"
FOREIGN = "chat marks as ordinary text"

_SENTENCES = {
    MARKED: "text holds chat marks already in {rows}: all of it is trained, the users' turns too;"
    " as `messages` only answers would be",
    FOREIGN: "chat marks such as [INST] or ### Human: stand in the text of {rows} and are trained as ordinary"
    " text; as `messages` such rows would get the marks of this chat template",
    WEIGHT_ZERO: "left out for a weight of 0: {rows}",
    NOT_CHOSEN: "left out because the answer was rejected: {rows}",
    CONTEXT: "answers with weight 0 are context, not trained, in {rows}",
    ASSISTANT_FIRST: "the assistant begins in {rows}: that turn is context, not trained",
    SYSTEM_JOINED: "several system texts at the start are joined into one turn in {rows}",
    SYSTEM_LATER: "a system turn stands later on, and stays there, in {rows}",
    REASONING_KEPT: "reasoning is trained as <think>...</think> before the answer in {rows};"
    " `chat.reasoning: drop` leaves it out",
    REASONING_DROPPED: "reasoning is left out of {rows}, as `chat.reasoning: drop` says",
    TOOLS_LISTED: "the system turn lists the tools already, so they are not added again, in {rows}",
}
"""What the report says of a note; those without a sentence are counted only."""

_NAMED = 100
"""Unused keys that are told apart, at each level: rows may have a name of their own for every column."""


@dataclass
class Notes:
    """Counts of rows, under what happened to them.

    Args:
        counts: Note -> rows.
        unused: Level -> key that nothing reads -> rows that have it.
        missing: Column that the recipe names -> rows that do not have it.
    """

    counts: dict[str, int] = field(default_factory=dict)
    unused: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        """Notes something of one row; twice is once."""
        self.counts[what] = 1

    def note_unused(self, level: Level, key: str) -> None:
        """Notes a key of one row that nothing reads."""
        self.unused.setdefault(level, {})[key] = 1

    def add(self, other: Notes) -> None:
        """Adds the counts of other rows."""
        for own, others in ((self.counts, other.counts), (self.missing, other.missing)):
            for what, count in others.items():
                own[what] = own.get(what, 0) + count
        for level, keys in other.unused.items():
            known = self.unused.setdefault(level, {})
            for key, count in keys.items():
                if key in known or len(known) < _NAMED:
                    known[key] = known.get(key, 0) + count

    def sentences(self) -> list[str]:
        """What a reader should know of it."""
        found = [
            sentence.format(rows=count_text(self.counts[what], "row"))
            for what, sentence in _SENTENCES.items()
            if self.counts.get(what)
        ]
        if self.counts.get(WHOLE) and self.counts.get(CHAT):
            found.append(
                f"{count_text(self.counts[WHOLE], 'row')} of text outside the chat template: all of a text is"
                " trained, whatever `assistant_only_loss` says"
            )
        parts = [
            _keys(level, self.unused[level])
            for level in ("row", "turn", "tool call")
            if self.unused.get(level)
        ]
        if parts:
            found.append("columns not used: " + "; ".join(parts))
        return found

    def never_found(self) -> list[str]:
        """Columns that the recipe names and no row has."""
        rows = self.counts.get(CHAT, 0) + self.counts.get(PLAIN, 0)
        return [column for column, count in self.missing.items() if count == rows]

    @property
    def fits_no_chat(self) -> bool:
        """Whether rows are trained on, and none of them goes through the chat template."""
        return bool(self.counts.get(PLAIN)) and not self.counts.get(CHAT)


def _keys(level: str, keys: dict[str, int]) -> str:
    names = ", ".join(f"`{key}`" for key in sorted(keys, key=lambda key: -keys[key])[:12])
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return names + more if level == "row" else f"of {level}s {names}{more}"
