"""Recipes that nobody would write, and what has to hold of the answer; `benchmarks/fuzz.py` has more."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from mamba_sft.errors import UsageError
from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.recipe.recipe import Recipe

LONGEST_MESSAGE = 4_000
SECONDS = 1.0
TEXTS = [path.read_text(encoding="utf-8") for path in builtin_recipes().values()]

ODD_VALUES = [
    "",
    "null",
    "~",
    "true",
    "yes",
    "-1",
    "0",
    "0.5",
    "1e400",
    "-1e400",
    ".nan",
    "-.inf",
    "5e-324",
    "1e-13",
    "0x" + "f" * 9000,
    "9" * 5000,
    "-" + "9" * 90,
    "0." + "1" * 5000,
    "1e" + "9" * 300,
    "' '",
    "''",
    '"\\0"',
    '"a\\x1b[31mb"',
    '"\\ud800"',
    '"\\u202e"',
    '"\\n"',
    '"\\t"',
    '"\\U0010ffff"',
    '"\\UFFFFFFFF"',
    "'[bold]'",
    "[bold]x[/]",
    "a" * 5000,
    "é" * 700,
    "/" * 3000,
    "~nosuchuser/x",
    "/**/**/**/x",
    "[]",
    "{}",
    "[[[[[]]]]]",
    "[in_proj, '[bold]']",
    "[a, a, a]",
    "{a: {b: {c: 1}}}",
    "[1, x, null, {a: 1}]",
    "&a [*a, *a]",
    "*a",
    "!!python/name:os.system x",
    "!!binary aGk=",
    "!<" + "x" * 500 + "> y",
    "? x",
    "- - - -",
    "{? [a]: b}",
    "|\n  text\n   more\n",
    ">-\n  folded\n",
    "'open",
    '"open',
    "{open",
    "[" * 400,
    "{a: " * 400,
    "- " * 400,
    "%YAML 9" + "9" * 5000,
    "2024-01-01",
    "1:30",
    "0o17",
    "0b1",
    "1_000",
    "\u2028",
    "\x85",
    "\ufeff",
    "😀",
    "# note",
    "--- ",
    "...",
    "@x",
    "`x`",
    "\t",
]


def _fields(model: type[BaseModel] = Recipe, path: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        found.append(path + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                inside = f"{path}{name}." + ("0." if name == "sources" else "")
                found += _fields(kind, inside)
    return found


FIELDS = [*_fields(), "train.trainer_arguments.x", "data.sources.0.columns.prompt", "data.sources.0.roles.x"]
characters = st.characters(codec="utf-8")
texts = st.text(characters, max_size=40)
odd_values = st.sampled_from(ODD_VALUES) | texts | st.floats().map(repr) | st.integers().map(str)
odd_keys = texts | st.sampled_from(
    ["<<", "", "x" * 5000, "a.b", "\x1b[2J", "\ud800", "__class__", "0", "-1", "9" * 5000]
)


@st.composite
def overrides(draw: st.DrawFn) -> str:
    """`a.b=c`, or nearly."""
    keys = draw(st.sampled_from(FIELDS)).split(".")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(keys)))
        change = draw(st.sampled_from(["put", "drop", "misspell", "deep"]))
        if change == "put":
            keys.insert(at, draw(odd_keys))
        elif change == "drop":
            del keys[at : at + 1]
        elif change == "misspell":
            keys[at - 1 :] = [key[1:] for key in keys[at - 1 :]]
        else:
            keys += ["x"] * draw(st.sampled_from([3, 49, 60, 3000]))
    return ".".join(keys) + draw(st.sampled_from(["=", "=", "=", "==", " = ", ""])) + draw(odd_values)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A recipe of ours with a few things changed."""
    lines = draw(st.sampled_from(TEXTS)).splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(lines) - 1)) if lines else 0
        line = lines[at] if lines else ""
        change = draw(st.sampled_from(["value", "value", "key", "drop", "twice", "indent", "put", "many"]))
        if change == "value":
            lines[at : at + 1] = [line.partition(":")[0] + ": " + draw(odd_values)]
        elif change == "key":
            lines[at : at + 1] = [re.sub(r"\w+", lambda _: draw(odd_keys), line, count=1)]
        elif change == "drop":
            del lines[at : at + 1]
        elif change == "twice":
            lines[at:at] = [line] * draw(st.sampled_from([1, 40, 2000]))
        elif change == "indent":
            lines[at : at + 1] = [" " * draw(st.integers(0, 5)) + line.lstrip()]
        elif change == "put":
            cut = draw(st.integers(0, len(line)))
            lines[at : at + 1] = [line[:cut] + draw(odd_values) + line[cut:]]
        else:
            lines[at:at] = [
                f"{draw(texts)}{number}: {number}" for number in range(draw(st.integers(1, 3000)))
            ]
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 1))):
        cut = draw(st.integers(0, len(raw)))
        raw = raw[:cut] + draw(st.binary(max_size=8)) + raw[cut + draw(st.integers(0, 8)) :]
    return raw


recipes = mutated() | mutated() | st.binary(max_size=200) | st.text(characters, max_size=200).map(str.encode)
some_overrides = st.just([]) | st.lists(overrides(), max_size=3)


def strings(value: Any) -> list[str]:
    """Every text in a tree of values."""
    if isinstance(value, dict):
        return [text for key, entry in value.items() for text in (key, *strings(entry))]
    if isinstance(value, list):
        return [text for entry in value for text in strings(entry)]
    return [value] if isinstance(value, str) else []


def check_answer(raw: bytes, given: list[str], path: Path) -> str:
    """Loads `raw` as a recipe file and holds the answer against what is promised; returns what it was."""
    path.write_bytes(raw)
    started, answer = time.process_time(), "valid"
    try:
        recipe = Recipe.load(path, given)
    except UsageError as error:
        answer = error.message
    took = time.process_time() - started
    assert took < 10 * SECONDS, f"{took:.2f} s"  # the benchmark holds the second; a slow machine is no fault
    if answer != "valid":
        assert all(line.isprintable() for line in answer.split("\n")), repr(answer)
        assert len(answer) <= LONGEST_MESSAGE, len(answer)
        return answer
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    values = recipe.model_dump()
    del values["train"]["trainer_arguments"]
    for text in strings(values):
        assert text.strip(), repr(text)
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", text), repr(text)
    return answer
