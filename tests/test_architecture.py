"""The contract between the rooms: who imports whom, which library lives where, who prints."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "mamba_sft"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {
    "errors", "wording", "credentials", "packed_files", "other_files", "json_lines", "noise", "disk",
    "processes", "run", "run_contents", "run_lock", "run_reading", "framing", "showing",
}  # fmt: skip
"""Single files that every room but the kernels may import."""

MAY_IMPORT = {
    "kernels": set(),
    "llama_cpp": set(),
    "recipe": set(),
    "model": {"kernels", "recipe"},
    "data": {"model", "recipe"},
    "inference": {"llama_cpp", "model", "recipe"},
    "planning": {"data", "model", "kernels", "recipe"},
    "evaluation": {"inference", "data", "model", "recipe"},
    "merging": {"inference", "data", "model", "kernels", "recipe"},
    "training": {"planning", "evaluation", "inference", "data", "model", "kernels", "recipe"},
    "exporting": {"llama_cpp", "merging", "planning", "evaluation", "data", "model", "recipe"},
    "diagnostics": {
        "training", "evaluation", "planning", "inference", "data", "model", "kernels", "recipe",
    },
    "notebook": {
        "diagnostics", "exporting", "training", "merging", "evaluation", "planning", "inference", "data",
        "model", "recipe",
    },
}  # fmt: skip
"""The rooms, lowest first, and what each may import besides the ground. `cli` may import all of them."""

LIVES_IN = {
    "accelerate": {"training"},
    "bitsandbytes": {"model", "merging"},
    "IPython": {"notebook"},
    "datasets": {"data", "evaluation", "merging", "training", "diagnostics"},
    "deepspeed": {"training"},
    "gguf": {"llama_cpp", "exporting"},
    "huggingface_hub": {"model", "exporting", "diagnostics"},
    "ipywidgets": {"notebook"},
    "jinja2": {"model", "evaluation"},
    "llvmlite": {"kernels"},
    "lm_eval": {"evaluation"},
    "nltk": {"evaluation"},
    "numba": {"kernels", "diagnostics"},
    "packaging": {"diagnostics", "training"},
    "pandas": {"run"},
    "peft": {"model", "merging", "diagnostics"},
    "psutil": {"processes", "merging", "diagnostics"},
    "pyarrow": {"packed_files", "data"},
    "pydantic": {"recipe"},
    "rich": {"cli"},
    "safetensors": {"model", "merging", "training"},
    "tokenizers": {"inference", "model"},
    "triton": {"kernels"},
    "trl": {"training"},
    "typer": {"cli"},
    "xllamacpp": {"llama_cpp"},
    "xxhash": {"model"},
    "yaml": {"recipe"},
}
"""Outside libraries and the rooms that may import them. numpy, torch and transformers are common ground."""

CATCH_ALL = {"utils", "util", "helpers", "common", "misc", "constants", "core", "base", "tools"}


class Import(NamedTuple):
    """One import statement: the file and line it is in, and the module, `mamba_sft.x.y` for our own."""

    path: Path
    line: int
    module: str

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands; those under `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield Import(path, node.lineno, submodule if submodule in MODULES else node.module)


def test_every_file_is_in_a_room_that_the_table_knows() -> None:
    known = {*MAY_IMPORT, *GROUND, "cli", "__init__", "__main__"}
    assert {room_of(path) for path in FILES} == known


def test_rooms_import_what_the_table_allows() -> None:
    wrong = []
    for path in FILES:
        room = room_of(path)
        if room in {"cli", "__init__", "__main__"}:
            continue
        allowed = {room, *GROUND, "__init__"} if room in GROUND else {room, *GROUND, *MAY_IMPORT[room]}
        if room == "kernels":
            allowed = {"kernels"}
        for one in imports(path):
            parts = one.module.split(".")
            other = parts[1] if len(parts) > 1 else "__init__"  # `from mamba_sft import __version__`
            if parts[0] == "mamba_sft" and other not in {*allowed, "__init__"}:
                wrong.append(one.where)
    assert not wrong, "\n".join(wrong)


def test_the_table_goes_down_and_nothing_goes_round() -> None:
    seen: set[str] = set()
    for room, below in MAY_IMPORT.items():
        assert below <= seen, f"{room} is in the table before what it may import"
        seen.add(room)
    graph = {
        module_of(path): {one.module for one in imports(path) if one.module in MODULES}
        - {"mamba_sft", module_of(path)}
        for path in FILES
        if module_of(path) != "mamba_sft"
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_each_outside_library_lives_in_its_rooms() -> None:
    wrong = []
    for path in FILES:
        for one in imports(path):
            rooms = LIVES_IN.get(one.module.split(".")[0])
            if rooms is not None and room_of(path) not in rooms:
                wrong.append(one.where)
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_and_notebooks_print_ask_or_exit() -> None:
    wrong = []
    for path in FILES:
        if room_of(path) in {"cli", "notebook"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in {"print", "input", "exit", "sys.exit", "sys.stdout.write", "sys.stderr.write"}:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} calls {name}")
    assert not wrong, "\n".join(wrong)


def test_one_file_below_reaches_up_into_the_notebook_room() -> None:
    """Results show themselves through it; any other module named in a text would go round the table."""
    reaching = [
        path
        for path in FILES
        if re.search(r"mamba_sft\.\{|\"mamba_sft\.\w", path.read_text(encoding="utf-8"))
    ]
    assert {path.name for path in reaching if "import_module" in path.read_text(encoding="utf-8")} == {
        "__init__.py", "showing.py",
    }  # fmt: skip


def test_names_say_what_is_inside() -> None:
    assert not {path.stem for path in FILES} & CATCH_ALL
    for path in FILES:
        if room_of(path) in {"cli", "__init__", "__main__"}:
            continue  # the file of a verb is called as the verb is
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert path.stem not in names, f"{path}: a function and its module share a name"


def test_each_room_says_what_it_is_for_and_names_its_files() -> None:
    for init in sorted(PACKAGE.rglob("__init__.py")):
        if init.parent == PACKAGE:
            continue
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        inside = {path.stem for path in init.parent.glob("*.py")} - {"__init__"}
        inside |= {path.parent.name for path in init.parent.glob("*/__init__.py")}
        unnamed = {name for name in inside if not re.search(rf"\b{name}\b", text)}
        assert not unnamed, f"{init.parent.name} does not say what {sorted(unnamed)} are for"


def test_the_map_names_every_room_and_every_file_of_the_ground() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text.partition("```")[2].partition("```")[0]
    unnamed = {name for name in {*MAY_IMPORT, *GROUND} if not re.search(rf"^  .*\b{name}\b", shown, re.M)}
    assert not unnamed, f"the map in CONTRIBUTING.md lacks {sorted(unnamed)}"


def test_import_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, mamba_sft, mamba_sft.cli.app; from mamba_sft import Recipe, Run, MambaSFTError;"
        "heavy = {'torch', 'transformers', 'datasets', 'numba', 'peft', 'trl'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
