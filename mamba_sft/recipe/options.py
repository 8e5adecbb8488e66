"""Fields of the recipe that somebody writes as options, as other tools have them: `--max-steps 20`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args, get_origin

from mamba_sft.recipe.messages import BOOLEANS, dotted, homes, section_at
from mamba_sft.recipe.other_tools import FOREIGN_KEYS, UNWANTED_KEYS, meant
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.recipe.trainer_arguments import ALLOWED, FIXED, OWNED

NEGATIVE = re.compile(r"-(\d|\.\d)")
"""How a value begins that is a number and no option."""


class Field(NamedTuple):
    """A field that has a value of its own.

    Args:
        name: As overrides write it: `train.max_steps`; of lists of sections the first entry.
        annotation: The type of its values.
        about: The first sentence of its help.
    """

    name: str
    annotation: Any
    about: str

    @property
    def bare(self) -> str:
        """Its name without those of its sections."""
        return self.name.rpartition(".")[2]

    @property
    def choices(self) -> list[str]:
        """The words it takes, `true` and `false` among them; none where it takes anything else."""
        kinds = [self.annotation, *get_args(self.annotation)]
        literals = [kind for kind in kinds if get_origin(kind) is Literal]
        words = [str(word) for literal in literals for word in get_args(literal)]
        return ["true", "false"] if self.annotation is bool else words

    @property
    def takes_list(self) -> bool:
        """Whether its value is a list."""
        return get_origin(self.annotation) is list


def fields() -> Iterator[Field]:
    """Yields every field of a recipe that has a value of its own, in their order."""
    for name, home in homes(Recipe):
        section = section_at(Recipe, home)
        if section is None or section_at(Recipe, (*home, name)) is not None:
            continue
        info = next(info for key, info in section.model_fields.items() if (info.alias or key) == name)
        path = [part for key in home for part in ((key, 0) if key in ("sources", "stages") else (key,))]
        about = re.split(r"(?<=[.;:])\s", " ".join((info.description or "").split()), maxsplit=1)[0]
        yield Field(dotted((*path, name)), info.annotation, about.rstrip(".;:"))


class Answer(NamedTuple):
    """What to write instead of an option.

    Args:
        option: As it was written, without its value.
        override: What to write, or None where there is nothing.
        reason: Why there is nothing, or None.
    """

    option: str
    override: str | None
    reason: str | None = None


def answers(words: Sequence[str], options: set[str]) -> list[Answer]:
    """Returns what to write instead of options that are fields of the recipe, or were in another tool.

    Args:
        words: What follows the verb.
        options: The options that the verb has, which are left alone, and all that nobody knows.
    """
    known = {field.name: field for field in fields()}
    found = []
    for word, after in zip(words, [*words[1:], None], strict=True):
        option, equals, text = word.partition("=")
        if word == "--":
            break
        if option in options or not option.startswith("-") or NEGATIVE.match(option):
            continue
        value = text if equals else after
        if value is not None and not equals and value.startswith("-") and not NEGATIVE.match(value):
            value = None
        name = option.lstrip("-").replace("-", "_").lower()
        answer = _answer(name, value, known) or _answer(name.rpartition(".")[2], value, known)
        if answer is None and not get_close_matches(option, options, cutoff=0.8):  # a slip of the hand
            close = get_close_matches(name, [known[path].bare for path in known], n=1, cutoff=0.85)
            answer = _answer(close[0], value, known) if close else None
        if answer:
            found.append(answer._replace(option=option))
    return found


def _answer(word: str, value: str | None, known: dict[str, Field]) -> Answer | None:
    name, fixed, note = _meaning(word, known)
    if name in known:
        if fixed and str(value).lower() in ("false", "no", "0"):
            return Answer(word, None, "what is not wanted is left out")
        return Answer(word, f"{name}={fixed or _written(known[name], value, 'opposite' in note)}")
    if word in ALLOWED:
        return Answer(word, f"train.trainer_arguments.{word}={value or '...'}")
    reason = UNWANTED_KEYS.get(word) or FIXED.get(word)
    return Answer(word, None, reason) if reason else None


def _meaning(word: str, known: dict[str, Field]) -> tuple[str, str, str]:
    """The field that a name means, the value that the name stands for, and a note on it; or empty texts."""
    for name, field in known.items():
        if word in (name, field.bare):
            return name, "", ""
    ours, _, note = (FOREIGN_KEYS.get(word) or OWNED.get(word, "").strip("`")).partition(" (")
    name, _, fixed = ours.partition(": ")
    return ("data.sources.0.path" if name == "data.sources" else name), fixed, note


def _written(field: Field, value: str | None, opposite: bool) -> str:
    """The value as an override has it, where that is plain."""
    if field.annotation is bool:
        truth = BOOLEANS.get(str(value).lower(), "true") == "true"
        return "true" if truth != opposite else "false"
    if value is None:
        return "..."
    if field.takes_list and not value.startswith("["):
        return f"[{', '.join(value.replace(',', ' ').split())}]"
    return value if not field.choices else meant(value, field.choices) or value
