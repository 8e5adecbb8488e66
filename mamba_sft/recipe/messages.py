"""What is wrong with a recipe, in words: one line per problem, with its place and the likely fix."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from mamba_sft.credentials import masked
from mamba_sft.recipe.conflicts import ConflictError, Keys
from mamba_sft.recipe.fields import NoSectionError
from mamba_sft.recipe.other_tools import ALL_WEIGHTS, FOREIGN_KEYS, UNWANTED_KEYS, meant
from mamba_sft.wording import shown

Error = Mapping[str, Any]
"""What pydantic says of one wrong value: `type`, `loc`, `input`, and the `ctx` that it was held against."""


class Place(NamedTuple):
    """Where a value was written. Places in the file sort by line, overrides come after it in their order."""

    order: int
    line: int
    text: str


class Finding(NamedTuple):
    """A problem and where it is."""

    place: Place
    text: str


PLACEHOLDERS: dict[str, Any] = {
    "output_dir": "x",
    "model": {"base": "x"},
    "base": "x",
    "data": {"sources": [{"path": "x"}]},
    "sources": [{"path": "x"}],
    "path": "x",
    "from": 1,
    "to": 1,
    "tokens": 1,
}
"""Values for required fields, so that the rest of a broken recipe can be checked."""


MOST_PROBLEMS = 30
"""More are counted only: nobody reads them, and looking for what was meant takes a millisecond each."""


def find_problems(
    model: type[BaseModel], tree: dict[str, Any], places: dict[Keys, Place]
) -> tuple[list[Finding], int]:
    """What is wrong with `tree`: the first problems, and how many more there are.

    Clashes between fields show only in a recipe that is valid otherwise. So wrong values are taken out and
    the rest is validated again; a clash that a wrong value takes part in is left for later.
    """
    errors = [error for error in _errors(model, tree) if error["loc"]]  # clashes have no place of their own
    broken = [error["loc"] for error in errors]
    told = [error for error in errors if error["type"] == "missing" or _is_written(tree, error["loc"])]
    told.sort(key=lambda error: _place(error["loc"], places))
    findings = [
        Finding(_place(error["loc"], places), _describe(model, error)) for error in told[:MOST_PROBLEMS]
    ]
    tree = copy.deepcopy(tree)
    for error in errors:
        _repair(tree, error["loc"])
    for error in _errors(model, tree):
        conflict = error.get("ctx", {}).get("error")
        for path, text, others in conflict.problems if isinstance(conflict, ConflictError) else []:
            if not any(part[: len(bad)] == bad for bad in broken for part in (path, *others)):
                findings.append(Finding(_place(path, places), f"`{dotted(path)}` {text}"))
    return findings, len(told[MOST_PROBLEMS:])


def dotted(path: Keys) -> str:
    """The path as overrides write it: `data.sources.0.path`."""
    return shown(masked(".".join(map(str, path))))


def _errors(model: type[BaseModel], tree: dict[str, Any]) -> list[Any]:
    try:
        model.model_validate(tree)
    except ValidationError as error:
        return [_at_its_value(found, tree) for found in error.errors()]
    return []


def _at_its_value(error: Error, tree: Any) -> Error:
    """The error, placed at its value.

    Pydantic puts `[key]` behind the name of an entry, and the names of types (`list`, `float`) between the
    keys of a value that may be of several.
    """
    *path, last = error["loc"] or ("",)
    if last == "[key]":
        return {**error, "loc": tuple(path), "names": True}
    kept: list[str | int] = []
    for key in error["loc"]:
        if not isinstance(tree, dict | list | None):
            break
        if key == type(tree).__name__ and (isinstance(tree, list) or key not in (tree or ())):
            continue
        kept.append(key)
        inside = isinstance(tree, dict) and key in tree
        inside |= isinstance(tree, list) and isinstance(key, int) and key < len(tree)
        tree = tree[key] if inside else None  # type: ignore[index]
    return {**error, "loc": tuple(kept)}


def _place(path: Keys, places: dict[Keys, Place]) -> Place:
    while path not in places:
        path = path[:-1]
    return places[path]


def _is_written(tree: Any, path: Keys) -> bool:
    """Whether the value at `path` is the author's; a derived default repeats the error of its origin."""
    for key in path:
        if isinstance(tree, dict) and key not in tree:
            return False
        tree = tree[key] if isinstance(tree, dict | list) else None  # type: ignore[index]
    return True


def _repair(tree: Any, path: Keys) -> None:
    """Takes the wrong value at `path` out, or puts a placeholder where one is required."""
    for index, key in enumerate(path):
        if isinstance(key, int) and path[index - 1] != "sources":
            path = path[:index]  # a list with a wrong entry goes as a whole
            break
    *parents, last = path
    for key in parents:
        if isinstance(tree, dict) and tree.get(key) is None:
            tree[key] = {}  # an empty section, or one that holds only derived defaults
        tree = tree[key]
    if isinstance(last, int):
        tree[last] = {"path": "x"}
    elif last in PLACEHOLDERS:
        tree[last] = copy.deepcopy(PLACEHOLDERS[last])
    else:
        tree.pop(last, None)


def _describe(model: type[BaseModel], error: Error) -> str:
    path = error["loc"]
    if error["type"] == "extra_forbidden":
        return f"unknown field `{dotted(path)}`{_suggestion(model, path)}"
    if error["type"] == "missing":
        section = section_at(model, path) if len(path) == 1 else None
        needs = _names(section, required=True) if section else []
        return f"`{dotted(path)}` is missing" + "".join(
            f"; it needs `{dotted((*path, name))}`" for name in needs
        )
    named = "names in " if error.get("names") else ""
    return f"{named}`{dotted(path[:-1] if named else path)}` {_expectation(error)}"


def section_at(model: type[BaseModel], path: Keys) -> type[BaseModel] | None:
    """The section that `path` leads to; list entries count as their list."""
    section: type[BaseModel] | None = model
    for key in path:
        if section and isinstance(key, str):
            field = section.model_fields.get(key)
            kinds = (field.annotation, *get_args(field.annotation)) if field else ()
            section = next(
                (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None
            )
    return section


def _names(section: type[BaseModel], required: bool = False) -> list[str]:
    fields = section.model_fields.items()
    return [field.alias or name for name, field in fields if field.is_required() or not required]


def homes(model: type[BaseModel], path: Keys = ()) -> Iterator[tuple[str, Keys]]:
    """Every field name with the section it belongs to."""
    for name in _names(model):
        yield name, path
        section = section_at(model, (name,))
        if section:
            yield from homes(section, (*path, name))


def _suggestion(model: type[BaseModel], path: Keys) -> str:
    key = str(path[-1])
    if ":" in key:  # `base:x` is one word to YAML
        return "; a blank goes behind the colon"
    word = key.strip().lower().replace("-", "_")
    at = dict(homes(model))
    section = section_at(model, path[:-1])
    own = _names(section) if section else []
    if word in own:
        return f"; did you mean `{word}`?"
    if word in at:
        return f"; it goes {_where(at[word])}"
    if word in UNWANTED_KEYS:
        return f"; {UNWANTED_KEYS[word]}"
    if word in FOREIGN_KEYS:
        ours, bracket, note = FOREIGN_KEYS[word].partition(" (")
        return f"; here it is `{ours}`{bracket}{note}"
    for names in (own, list(at)):
        if close := get_close_matches(word, names, n=1, cutoff=0.7):
            return f"; did you mean `{close[0] if names is own else dotted((*at[close[0]], close[0]))}`?"
    if "trainer_arguments" in own:
        return "; other fields of SFTConfig go under `train.trainer_arguments`"
    return ""


def _where(home: Keys) -> str:
    if not home:
        return "at the top level"
    return f"into an entry of `{dotted(home)}`" if len(home) > 1 else f"under `{home[0]}`"


MOST_DIGITS = 100
"""The longest number of a recipe."""
EXPECTATIONS = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:.10g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:.10g}",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_unicode": "must not hold half of a surrogate pair",
    "string_too_long": "must have at most {max_length:,} characters",
    "list_type": "must be a list",
    "too_short": "must have at least one entry",
    "dict_type": "must be a section with fields of its own",
    "model_type": "must be a section with fields of its own",
    "value_error": "{error}",
}
BOOLEANS = dict.fromkeys(("yes", "on", "true", "1"), "true") | dict.fromkeys(
    ("no", "off", "false", "0"), "false"
)


def _expectation(error: Error) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "literal_error":
        return _choice(error["ctx"]["expected"], value)
    rule = EXPECTATIONS.get(kind)
    if rule is None:
        return f"is not valid: {error['msg'][:1].lower()}{error['msg'][1:]}"
    got = "" if kind in ("string_too_short", "too_short") else f", got {shown_value(value)}"
    if isinstance(context.get("error"), NoSectionError):
        fix = _adapter_fix(value)
    else:
        fix = _source_fix(error["loc"], value) or _fix(kind, value)
    return rule.format(**context) + got + fix


def _choice(expected: str, value: Any) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    close = meant(str(value), choices)
    question = f"; did you mean `{close}`?" if close else ""
    got = f"`{shown(value)}`" if isinstance(value, str) else shown_value(value)
    return f"must be one of {', '.join(f'`{choice}`' for choice in choices)}, got {got}{question}"


def _fix(kind: str, value: Any) -> str:
    """The value as it should have been written, where that is plain to see."""
    if kind in ("int_type", "float_type") and isinstance(value, str):
        number = re.sub(r"[_,\s]", "", value[:MOST_DIGITS])
        if re.fullmatch(
            r"[-+]?[0-9]+" + (r"(\.[0-9]*)?([eE][-+]?[0-9]+)?" if kind == "float_type" else ""), number
        ):
            return f"; write {number} without quotes"
    if kind == "int_type" and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {value:.0f}"
    if kind == "bool_type" and isinstance(value, str | int) and shown_number(value).lower() in BOOLEANS:
        return f"; write {BOOLEANS[shown_number(value).lower()]}"
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if kind == "list_type" and value in ("all-linear", "all"):  # PEFT's word for `target_modules`
        return "; leave the line out for in_proj, x_proj and out_proj"
    if kind == "list_type" and isinstance(value, str) and value.isprintable() and len(value) <= 80:
        return f"; write [{', '.join(value.replace(',', ' ').split())}]" if value != "none" else "; write []"
    return ""


def _source_fix(path: Keys, value: Any) -> str:
    """A source as it should have been written, where only its path was."""
    is_path = isinstance(value, str) and re.fullmatch(r"[\w.~/][\w./*~-]{0,80}", value)
    if "sources" not in path[-2:] or not is_path:
        return ""
    source = f"{{path: {value}}}"
    return f"; write [{source}]" if path[-1] == "sources" else f"; write {source}"


def _adapter_fix(value: Any) -> str:
    """What whoever wrote something else for the section `adapter` wants."""
    if value is None:
        return "; leave the line out for LoRA with its defaults, or write `none` to train all weights"
    word = str(value).strip().lower().replace("-", "_").replace(" ", "_")
    if word in ALL_WEIGHTS:
        return "; did you mean `none`, which trains all weights?"
    if word in ("lora", "qlora", "true", "peft"):
        return "; leave the line out for LoRA with its defaults"
    return ""


def shown_value(value: Any) -> str:
    """A value as messages show it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text `{shown(masked(value))}`"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "fields"
    return shown_number(value)


def shown_number(value: Any) -> str:
    """A number, or anything else that Python can hold, as text; Python does not write out huge numbers."""
    if isinstance(value, int) and abs(value).bit_length() > 4 * MOST_DIGITS:
        return f"a number of some {abs(value).bit_length() * math.log10(2):,.0f} digits"
    return shown(str(value))
