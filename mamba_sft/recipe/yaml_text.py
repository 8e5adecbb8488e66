"""YAML in and out for the recipe: where each value stands, overrides, and readable text again.

The reader follows YAML 1.2's core schema, not PyYAML's 1.1: `1e-5` is a number, and `no`, `on`, `1:30` and
`2024-01-01` are text. Repeated keys, anchors and tags are errors, because each of them hides a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mamba_sft.credentials import masked
from mamba_sft.errors import RecipeError
from mamba_sft.recipe.conflicts import Keys
from mamba_sft.recipe.messages import MOST_DIGITS, Finding, Place, dotted, find_problems, shown_value
from mamba_sft.wording import count_text, path_text, shown, size_text

Model = TypeVar("Model", bound=BaseModel)

LARGEST = 256 << 10
"""Bytes of a recipe. The longest of ours have 3,000; YAML is read at some 100 kB a second."""
MOST_VALUES, DEEPEST = 5_000, 50
"""Values in a recipe, and how deep one lies in others: what is read in a fraction of a second."""
MESSAGE, LINE = 3_500, 600
"""Characters of all problems together, after which the rest is counted, and of a single one."""

TAG = "tag:yaml.org,2002:"
CORE_SCHEMA = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
]
EXPONENT = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"
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


def _in_plain_words(error: yaml.MarkedYAMLError) -> SyntaxProblem:
    """What PyYAML says of broken YAML; the mistakes that people make are told in plain words."""
    problem, context = error.problem or "", error.context or ""
    mark = error.problem_mark or error.context_mark
    words = f"not valid YAML: {problem}"
    if "'\\t'" in problem:
        words = "tabs cannot indent YAML; use spaces"
    elif "alias" in context:
        words = "not valid YAML: a text that begins with `*` needs quotes of its own: `'*.jsonl'`"
    elif "quoted scalar" in context and "end of stream" in problem:
        mark = error.context_mark or mark
        words = "not valid YAML: a quotation mark opens here and nothing closes it"
    elif "another document" in problem:
        words = "not valid YAML: `---` begins a second document, and a recipe is one"
    elif "mapping values" in problem:
        words = "not valid YAML: this line is indented further than the one above, or has a second `:`"
    return SyntaxProblem(mark.line + 1 if mark else 1, words)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]

    def __init__(self, text: str):
        self.values = self.depth = 0
        super().__init__(text)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.values += 1
        if self.values > MOST_VALUES:
            raise SyntaxProblem(event.start_mark.line + 1, f"holds more than {MOST_VALUES:,} values")
        if self.depth == DEEPEST:
            raise SyntaxProblem(event.start_mark.line + 1, "not valid YAML: nested too deeply")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise SyntaxProblem(
                event.start_mark.line + 1,
                "anchors and aliases (`&name`, `*name`) are not allowed; write the value out",
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _name, _pattern, _first in CORE_SCHEMA:
    _starts = ["" if character == "\0" else character for character in _first]
    _Loader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _starts)


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: It cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise _too_large(shown(path_text(path), LINE // 2), path.stat().st_size)
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"cannot read `{shown(path_text(path))}`: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{shown(path_text(path), LINE // 2)}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from None


def _too_large(name: str, nbytes: int) -> RecipeError:
    return RecipeError(
        f"`{name}` has {size_text(nbytes)}, and a recipe has at most {size_text(LARGEST)}",
        hint="a recipe holds settings; data goes into files that `data.sources` names",
    )


def flow_text(text: str) -> str:
    """Returns a text as YAML has it inside `{...}`: in quotes where it would be read as something else."""
    plain = re.fullmatch(r"[\w./~][\w./ -]*(?<! )", text) is not None
    is_text = _Loader("").resolve(yaml.ScalarNode, text, (True, False)) == f"{TAG}str"  # type: ignore[no-untyped-call]
    return text if plain and is_text else json.dumps(text, ensure_ascii=False)


def load(model: type[Model], text: str, name: str, overrides: Sequence[str]) -> Model:
    """Reads YAML `text` (from the file `name`) and the overrides into `model`.

    Raises:
        RecipeError: All problems, those of the file by line, then those of the overrides; of very many the
            first, and how many more there are.
    """
    name = shown(name, LINE // 2)
    if len(text) > LARGEST:
        raise _too_large(name, len(text))
    source = _Source(lambda line: Place(0, line, f"{name}:{line}"), {}, [])
    try:
        tree = source.read(text)
    except SyntaxProblem as problem:
        raise RecipeError(shown(f"{name}:{problem.line}: {problem.text}", LINE)) from None
    if tree is None:
        raise RecipeError(
            f"{name}:1: the recipe is empty", hint="`mamba-sft recipes show quickstart` prints one"
        )
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{name}:1: a recipe must consist of fields (`name: value`), got {shown_value(tree)}"
        )
    for order, override in enumerate(_override_texts(overrides), start=1):
        place = Place(order, 0, f"override `{shown(masked(override), 120)}`")
        try:
            _apply(tree, override, place, source)
        except SyntaxProblem as problem:
            source.findings.append(Finding(place, problem.text))
    return _validate(model, tree, source.places | {(): Place(0, 1, f"{name}:1")}, source.findings)


def _override_texts(overrides: Any) -> Sequence[str]:
    """The overrides one by one; a single text is one, and not a list of letters."""
    listed = [overrides] if isinstance(overrides, str) else overrides
    if isinstance(listed, Sequence) and all(isinstance(one, str) for one in listed):
        return listed
    given = shown(masked(str(overrides)), 120)
    raise RecipeError(
        f"overrides are a list of texts, each `section.field=value`, not `{given}`",
        hint='for example `["train.max_steps=20"]`',
    )


def build(model: type[Model], values: dict[str, Any]) -> Model:
    """Validates Python values; a path may be a `Path`.

    Raises:
        RecipeError: All problems.
    """
    return _validate(model, _without_paths(values), {(): Place(0, 1, "recipe")}, [])


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return str(value) if isinstance(value, PurePath) else value


def _validate(
    model: type[Model], tree: dict[str, Any], places: dict[Keys, Place], findings: list[Finding]
) -> Model:
    more = 0
    try:
        recipe = model.model_validate(tree)
        if not findings:
            return recipe
    except ValidationError:
        found, more = find_problems(model, tree, places)
        findings = findings + found
    lines = list(dict.fromkeys(shown(f"{place.text}: {text}", LINE) for place, text in sorted(findings)))
    told, length = 0, 0
    while told < len(lines) and length + len(lines[told]) <= MESSAGE:
        length += len(lines[told])
        told += 1
    more += len(lines) - told
    raise RecipeError("\n".join(lines[:told] + [f"and {count_text(more, 'more problem')}"] * bool(more)))


@dataclass
class _Source:
    """Reads YAML into plain values, and notes where each of them stands.

    Args:
        place_of: The place that a line (from 1) of this text has in messages.
        places: Where each value stands, by its path; filled by reading.
        findings: Problems that do not stop the reading.
    """

    place_of: Callable[[int], Place]
    places: dict[Keys, Place]
    findings: list[Finding]

    def read(self, text: str, path: Keys = ()) -> Any:
        """The value of `text`, which stands at `path` of the recipe; None for nothing.

        Raises:
            SyntaxProblem: The text is not YAML, or YAML that recipes do not allow.
        """
        if len(text) > LARGEST:
            raise SyntaxProblem(1, f"is longer than {size_text(LARGEST)}")
        loader = None
        try:
            loader = _Loader(text)
            node = loader.get_single_node()  # type: ignore[no-untyped-call]
            return None if node is None else self._convert(node, path)
        except yaml.MarkedYAMLError as error:
            raise _in_plain_words(error) from None
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise SyntaxProblem(line, f"not valid YAML: control character #x{error.character:02x}") from None
        except RecursionError:
            raise SyntaxProblem(1, "not valid YAML: nested too deeply") from None
        except (ValueError, OverflowError):  # escapes and versions that PyYAML takes for any number
            line = loader.line + 1 if loader else 1
            raise SyntaxProblem(line, "not valid YAML: a number or a character that does not exist") from None

    def _convert(self, node: yaml.Node, path: Keys) -> Any:
        line, kind = node.start_mark.line + 1, node.tag.removeprefix(TAG)
        if kind not in (CONVERT if isinstance(node, yaml.ScalarNode) else ("map", "seq")):
            raise SyntaxProblem(line, f"tags (`!{kind.lstrip('!')}`) are not allowed")
        if isinstance(node, yaml.MappingNode):
            return dict(self._items(node, path))
        if isinstance(node, yaml.SequenceNode):
            return [self._entry(item, (*path, index)) for index, item in enumerate(node.value)]
        if kind in ("int", "float") and len(node.value) > MOST_DIGITS:
            raise SyntaxProblem(line, f"`{shown(node.value, 20)}` is too long for a number")
        try:
            return CONVERT[kind](node.value)
        except ValueError:
            raise SyntaxProblem(line, f"`{shown(node.value)}` is no {kind}") from None

    def _entry(self, node: yaml.Node, path: Keys) -> Any:
        self.places[path] = self.place_of(node.start_mark.line + 1)
        return self._convert(node, path)

    def _items(self, node: yaml.MappingNode, path: Keys) -> Iterator[tuple[str, Any]]:
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise SyntaxProblem(line, "a field name must be a word")
            here = (*path, key_node.value)
            if key_node.value in first_lines:
                first = f", first on line {first_lines[key_node.value]}" if self.place_of(line).line else ""
                self.findings.append(Finding(self.place_of(line), f"`{dotted(here)}` is set twice{first}"))
                continue
            first_lines[key_node.value] = line
            self.places[here] = self.place_of(line)
            yield key_node.value, self._convert(value_node, here)


def overridden(overrides: Sequence[str]) -> set[str]:
    """Returns the fields that overrides set, by the names that they have there."""
    return {override.partition("=")[0].strip() for override in overrides}


def _apply(tree: dict[str, Any], override: str, place: Place, source: _Source) -> None:
    """Sets in `tree` what `override` says, and notes `place` for it."""
    field, equals, text = override.partition("=")
    if not equals or not field.strip():
        raise SyntaxProblem(0, "must read `section.field=value`")
    *parents, last = field.strip().split(".")
    if len(parents) >= DEEPEST:
        raise SyntaxProblem(0, "names a field too deep in others")
    target: Any = tree
    path: Keys = ()
    for key in parents:
        step = _step(target, key, path)
        path = (*path, step)
        if isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
            source.places.setdefault(path, place)
        target = target[step]
    step = _step(target, last, path)
    path = (*path, step)
    for known in [known for known in source.places if known[: len(path)] == path]:
        del source.places[known]
    source.places[path] = place
    target[step] = _Source(lambda line: place, source.places, source.findings).read(text, path)


def _step(target: Any, key: str, path: Keys) -> str | int:
    """The key or index that `key` means in `target`, which stands at `path`."""
    if isinstance(target, dict):
        return key
    if not isinstance(target, list):
        raise SyntaxProblem(0, f"`{dotted(path)}` has no fields")
    if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(target):
        raise SyntaxProblem(
            0, f"`{dotted(path)}` has no entry `{shown(key)}`: it has {len(target)}, counted from 0"
        )
    return int(key)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would misread, and keeps short lists on one line."""


_Dumper.add_implicit_resolver(TAG + "float", re.compile(EXPONENT), list("-+.0123456789"))
_Dumper.add_implicit_resolver(TAG + "int", re.compile(r"0o[0-7]+\Z"), ["0"])


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    short = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence(TAG + "seq", values, flow_style=short)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    lines = text.split("\n")
    style = None if all(line.isprintable() for line in lines) else '"'  # PyYAML loses \x85 elsewhere
    if style is None and len(lines) > 1 and all(line == line.rstrip() for line in lines):
        style = "|" if not text[:1].isspace() and not text.endswith("\n\n") else None
    return dumper.represent_scalar(TAG + "str", text, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def dump(values: dict[str, Any]) -> str:
    """YAML text of `values`, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
