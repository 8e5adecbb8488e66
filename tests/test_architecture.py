"""The layering, the owners of outside libraries and the size budgets, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mamba_sft"
EXPORTING = sorted((PACKAGE / "exporting").glob("*.py"))
MODULES = sorted(PACKAGE.glob("*.py")) + EXPORTING
KERNELS = sorted((PACKAGE / "kernels").glob("*.py"))

GROUND = {"errors", "kernels"}
CONTRACT = {"recipe", "recipe_checks", "recipe_files", "recipe_foreign", "recipe_problems", "recipe_sections",
            "recipe_yaml", "run"}  # fmt: skip
TOP = {"training", "merging", "exporting", "evaluation", "conversation", "planning", "doctor",
       "benchmarking"}  # fmt: skip

OWNERS = {
    "trl": {"trainer"},
    "peft": {"adapter", "lora", "merging"},
    "bitsandbytes": {"model", "merging"},
    "gguf": {"exporting"},
    "lm_eval": {"evaluation"},
    "typer": {"cli", "cli_export", "cli_plan", "cli_system", "cli_talk"},
    "yaml": {"recipe_yaml"},
    "pydantic": {"recipe", "recipe_checks", "recipe_problems", "recipe_sections", "recipe_yaml"},
    "triton": {"kernels"},
    "numba": {"bench_cpu", "kernels"},
}
MAX_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 500, 50, 8


def imports(path: Path) -> list[tuple[ast.AST, str]]:
    """Every imported module of a file with its node, `from mamba_sft import x` as `mamba_sft.x`."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "mamba_sft":
            found += [(node, f"mamba_sft.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node, node.module))
    return found


def module_name(path: Path) -> str:
    """The name a file goes by in the tables: its own, or its package's."""
    return path.parent.name if path.parent.name == "exporting" else path.stem


def layer(name: str) -> int:
    """Height of a module: imports may only point to a lower layer, or within the middle one or the verbs."""
    if name in GROUND:
        return 0
    if name in CONTRACT:
        return 1
    if name in TOP:
        return 3
    if name.startswith("cli_"):
        return 4
    return {"cli": 5, "__init__": 5, "__main__": 6}.get(name, 2)


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_only_go_down(path: Path) -> None:
    own = layer(module_name(path))
    for node, module in imports(path):
        if not module.startswith("mamba_sft."):
            continue
        other = module.split(".")[1]
        if other == module_name(path) == "exporting":
            continue
        where = f"{path.name}:{node.lineno} imports {module}"  # type: ignore[attr-defined]
        if own in {2, 4} or (own == 1 and path.stem in CONTRACT):
            assert layer(other) <= own, where
        elif own > 0:
            assert layer(other) < own, where
        else:
            pytest.fail(where)


def _inside(path: Path, module: str) -> bool:
    """Whether a module is one of those beside `path`."""
    return module.startswith("mamba_sft.exporting.export_run." if path in EXPORTING else "mamba_sft.")


def test_the_middle_layer_has_no_cycles() -> None:
    edges = {
        path.stem: {
            m.split(".")[-1 if path in EXPORTING else 1] for _, m in imports(path) if _inside(path, m)
        }
        for path in MODULES
    }

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges.get(start, ()))
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += edges.get(name, ())
        return seen

    assert not [name for name in edges if name != "__init__" and name in reachable(name)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_know_nothing_of_the_package(path: Path) -> None:
    for node, module in imports(path):
        inside = not module.startswith("mamba_sft") or module.startswith("mamba_sft.kernels")
        assert inside, f"{path.name}:{node.lineno} imports {module}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_each_outside_library_has_one_owner(path: Path) -> None:
    for node, module in imports(path):
        owners = OWNERS.get(module.split(".")[0])
        allowed = owners is None or module_name(path) in owners or _only_for_types(path, node)
        assert allowed, f"{path.name}:{node.lineno} imports {module}"  # type: ignore[attr-defined]


def _only_for_types(path: Path, node: ast.AST) -> bool:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    blocks = [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    lines = {getattr(child, "lineno", -1) for block in blocks for child in ast.walk(block)}
    return node.lineno in lines  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", MODULES + KERNELS, ids=lambda path: path.stem)
def test_size_budgets(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    kernel = path.parent.name == "kernels"
    assert lines <= (MAX_KERNEL_LINES if kernel else MAX_LINES), f"{path.name} has {lines} lines"
    if kernel:
        return
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, (
            f"{path.name}:{function.lineno} {function.name} has {length} lines"
        )
        if path.stem.startswith("cli"):
            continue  # a verb's parameters are its options
        parameters = function.args.args + function.args.kwonlyargs
        count = len([a for a in parameters if a.arg not in {"self", "cls"}])
        assert count <= MAX_PARAMETERS, (
            f"{path.name}:{function.lineno} {function.name} takes {count} parameters"
        )


def test_no_catch_all_modules() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "misc", "constants"}


def test_only_the_command_line_prints_or_exits() -> None:
    for path in MODULES + KERNELS:
        if path.stem.startswith("cli"):
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        ]
        for call in calls:
            name = ast.unparse(call.func)
            assert name not in {"print", "exit", "sys.exit"}, f"{path.name}:{call.lineno} calls {name}"


def test_no_public_function_shares_its_modules_name() -> None:
    for path in MODULES:
        assert path.stem not in {function.name for function in functions(path)}, path.name


def test_import_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, mamba_sft, mamba_sft.cli.app; from mamba_sft import Recipe, Run, MambaSFTError;"
        "heavy = {'torch', 'transformers', 'datasets', 'numba', 'peft', 'trl'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_help_takes_under_half_a_second() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mamba_sft", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5, times
