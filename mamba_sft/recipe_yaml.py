"""YAML in and out for the recipe: where each value stands, overrides, and readable text again.

The reader follows YAML 1.2's core schema, not PyYAML's 1.1: `1e-5` is a number, and `no`, `on`, `1:30` and
`2024-01-01` are text. Repeated keys, anchors and tags are errors, because each of them hides a value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mamba_sft.errors import RecipeError
from mamba_sft.recipe_problems import Finding, Keys, Place, find_problems

Model = TypeVar("Model", bound=BaseModel)

TAG = "tag:yaml.org,2002:"
CORE_SCHEMA = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
]
CONVERT: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}


class SyntaxProblem(Exception):  # noqa: N818
    """YAML that cannot be read, with the line (from 1) where it goes wrong."""

    def __init__(self, line: int, text: str):
        super().__init__(text)
        self.line, self.text = line, text


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise SyntaxProblem(
                event.start_mark.line + 1,
                "anchors and aliases (`&name`, `*name`) are not allowed; write the value out",
            )
        return super().compose_node(parent, index)


for _name, _pattern, _first in CORE_SCHEMA:
    _starts = ["" if character == "\0" else character for character in _first]
    _Loader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _starts)


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: It cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"cannot read `{shown(path)}`: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{shown(path)}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}", hint="save the file as UTF-8"
        ) from None


def shown(path: Path) -> str:
    """The path as messages show it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def load(model: type[Model], text: str, name: str, overrides: Sequence[str]) -> Model:
    """Reads YAML `text` (from the file `name`) and the overrides into `model`.

    Raises:
        RecipeError: All problems, those of the file by line, then those of the overrides.
    """
    places: dict[Keys, Place] = {(): Place(0, 1, f"{name}:1")}
    findings: list[Finding] = []
    tree: Any = {}
    try:
        root = _compose(text)
        tree = _convert(root, (), name, places, findings) if root else {}
    except SyntaxProblem as problem:
        raise RecipeError(f"{name}:{problem.line}: {problem.text}") from None
    if root is None:
        raise RecipeError(
            f"{name}:1: the recipe is empty", hint="`mamba-sft recipes show quickstart` prints one"
        )
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{name}:{root.start_mark.line + 1}: a recipe must be `section:` and fields, got {_kind(tree)}"
        )
    for order, override in enumerate(overrides, start=1):
        place = Place(order, 0, f"override `{override}`")
        try:
            _apply(tree, override, place, places)
        except SyntaxProblem as problem:
            findings.append(Finding(place, problem.text))
    return _validate(model, tree, places, findings)


def build(model: type[Model], values: dict[str, Any]) -> Model:
    """Validates Python values.

    Raises:
        RecipeError: All problems.
    """
    return _validate(model, values, {(): Place(0, 1, "recipe")}, [])


def _validate(model: type[Model], tree: Any, places: dict[Keys, Place], findings: list[Finding]) -> Model:
    try:
        recipe = model.model_validate(tree)
        if not findings:
            return recipe
    except ValidationError:
        findings = findings + find_problems(model, tree, places)
    lines = list(dict.fromkeys(f"{place.text}: {text}" for place, text in sorted(findings)))
    raise RecipeError("\n".join(lines))


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        tab = "\\t" in (error.problem or "")
        words = "tabs cannot indent YAML; use spaces" if tab else f"not valid YAML: {error.problem}"
        raise SyntaxProblem(mark.line + 1 if mark else 1, words) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise SyntaxProblem(line, f"not valid YAML: control character #x{error.character:04x}") from None
    except RecursionError:
        raise SyntaxProblem(1, "not valid YAML: nested too deeply") from None


def _convert(
    node: yaml.Node, path: Keys, name: str, places: dict[Keys, Place], findings: list[Finding]
) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return dict(_items(node, path, name, places, findings))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, index)] = _place(name, item.start_mark.line + 1)
        return [
            _convert(item, (*path, index), name, places, findings) for index, item in enumerate(node.value)
        ]
    kind = node.tag.removeprefix(TAG)
    if kind not in CONVERT:
        raise SyntaxProblem(line, f"tags such as `!{kind.lstrip('!')}` are not allowed")
    try:
        return CONVERT[kind](node.value)
    except ValueError:
        raise SyntaxProblem(line, f"`{node.value}` is not {kind}") from None


def _items(
    node: yaml.MappingNode, path: Keys, name: str, places: dict[Keys, Place], findings: list[Finding]
) -> Iterator[tuple[str, Any]]:
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise SyntaxProblem(line, "a field name must be a word")
        key = key_node.value
        if key in first_lines:
            dotted = ".".join(map(str, (*path, key)))
            findings.append(
                Finding(_place(name, line), f"`{dotted}` is set twice, first on line {first_lines[key]}")
            )
            continue
        first_lines[key] = line
        places[(*path, key)] = _place(name, line)
        yield key, _convert(value_node, (*path, key), name, places, findings)


def _place(name: str, line: int) -> Place:
    return Place(0, line, f"{name}:{line}")


def _apply(tree: dict[str, Any], override: str, place: Place, places: dict[Keys, Place]) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise SyntaxProblem(0, "must read `section.field=value`")
    keys: list[str | int] = list(dotted.strip().split("."))
    target: Any = tree
    for depth, key in enumerate(keys):
        if isinstance(target, list):
            keys[depth] = key = _index(target, str(key), ".".join(map(str, keys[:depth])))
        if depth == len(keys) - 1:
            break
        if not isinstance(target, list) and target.get(key) is None:
            target[key] = {}
            places.setdefault(tuple(keys[: depth + 1]), place)
        target = target[key]
        if not isinstance(target, dict | list):
            raise SyntaxProblem(0, f"`{'.'.join(map(str, keys[: depth + 1]))}` has no fields")
    path = tuple(keys)
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    places[path] = place
    node = _compose(text)
    target[keys[-1]] = None if node is None else _convert(node, path, "", {}, [])


def _index(target: list[Any], key: str, dotted: str) -> int:
    if key.isdecimal() and int(key) < len(target):
        return int(key)
    last = f"0 to {len(target) - 1}" if target else "none"
    raise SyntaxProblem(0, f"`{dotted}` has no entry `{key}` (there are: {last})")


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"`{value}`"


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would misread, and keeps short lists on one line."""


_Dumper.add_implicit_resolver(
    TAG + "float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+\Z"), list("-+.0123456789")
)
_Dumper.add_implicit_resolver(TAG + "int", re.compile(r"0o[0-7]+\Z"), ["0"])


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    short = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence(TAG + "seq", values, flow_style=short)


_Dumper.add_representer(list, _represent_list)


def dump(values: dict[str, Any]) -> str:
    """YAML text of `values`, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
