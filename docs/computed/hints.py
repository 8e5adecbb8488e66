"""Every hint that an error of ours carries, with the message it follows, read from the source by rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mamba_sft"
ROOMS = {
    "recipe": "Recipes", "data": "Data", "model": "Base models and adapters", "planning": "Plans",
    "training": "Training", "evaluation": "Evaluation and reports", "inference": "Chat and answers",
    "merging": "Merging", "exporting": "Export", "llama_cpp": "GGUF files", "notebook": "Notebooks",
    "diagnostics": "Doctor and benchmarks", "cli": "Options and arguments", "": "Files, places and runs",
}  # fmt: skip
"""Rooms in the order in which a user meets them; the last is what all rooms share."""
KINDS = re.compile(r"Error$|^kind$|^error$")


COMMANDS = {
    "resume_command": "mamba-sft train ... --resume",
    "own_data": "'data.sources=[{path: ...}]'",
}
"""What is computed in one place for many hints: a property or a function, and what it gives."""


def text() -> str:
    """Returns a table of messages and hints for every room that has some."""
    rooms = [*ROOMS, *sorted({_room(path) for path in PACKAGE.rglob("*.py")} - {*ROOMS})]
    return "\n".join(line for room in rooms for line in _table(room))


def _table(room: str) -> Iterator[str]:
    found: dict[tuple[str, str], None] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if _room(path) == room:
            found |= dict.fromkeys(errors_with_hints(path.read_text(encoding="utf-8")))
    if found:
        yield f"## {ROOMS.get(room, room.capitalize())}\n"
        yield "| what it says | what to do |"
        yield "|---|---|"
        for message, hint in sorted(found):
            yield f"| {_cell(message)} | {_cell(hint)} |"
        yield ""


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def errors_with_hints(source: str) -> Iterator[tuple[str, str]]:
    """Yields message and hint of every error in a file whose two texts stand there.

    What is put into a text when it is raised is written as `...`. Hints that are computed elsewhere are left
    out: there is no text to show.
    """
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not KINDS.search(ast.unparse(node.func)):
            continue
        hints = [word.value for word in node.keywords if word.arg == "hint"]
        if not hints or not node.args:
            continue
        message = written(node.args[0], constants)
        for hint in _choices(hints[0]):
            said = written(hint, constants)
            if said.strip(" .") and message.strip(" ."):
                yield message, said


def _choices(node: ast.expr) -> list[ast.expr]:
    """The texts that a hint may be: both sides of a condition."""
    if isinstance(node, ast.IfExp):
        return [*_choices(node.body), *_choices(node.orelse)]
    return [node]


def written(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """Returns a text as the source has it, with `...` for every part that is computed."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return re.sub(r"(\.\.\.)+", "...", "".join(written(part, constants) for part in node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return re.sub(r"(\.\.\.)+", "...", written(node.left, constants) + written(node.right, constants))
    if isinstance(node, ast.Name) and node.id in constants:
        return written(constants[node.id], {})
    if isinstance(node, ast.FormattedValue) and (name := _name(node.value)) in COMMANDS:
        return COMMANDS[name]
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        value = constants.get(node.value.id)
        return written(value, {}) if isinstance(value, ast.Constant | ast.JoinedStr) else "..."
    return "..."


def _name(node: ast.expr) -> str:
    """What a property or a function is called."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _cell(text: str) -> str:
    """One line of Markdown, in which nothing but backticks means anything."""
    line = " ".join(text.split()).replace("|", "\\|")
    return "`".join(
        part if at % 2 else re.sub(r"([*_<>\[\]])", r"\\\1", part) for at, part in enumerate(line.split("`"))
    )
