"""What `-h` prints, and what is answered to options that are fields of the recipe."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.errors import UsageError
from mamba_sft.recipe.options import answers, fields
from mamba_sft.recipe.other_tools import FOREIGN_KEYS, UNWANTED_KEYS
from mamba_sft.recipe.recipe import Recipe

ROWS, COLUMNS = 24, 80
DOCS = Path(__file__).parents[2] / "docs"


def verbs(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every page of help: its words, and the command it is of."""
    command = command or get_command(app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, (*path, name))


PAGES = dict(verbs())


def test_the_verbs_are_all_there() -> None:
    assert {"", "train", "bench kernels", "recipes show", "recipes schema"} <= set(map(" ".join, PAGES))


@pytest.fixture(params=PAGES, ids=lambda words: "-".join(words) or "mamba-sft")
def words(request: pytest.FixtureRequest) -> Any:
    return request.param


def page(words: tuple[str, ...]) -> str:
    shown = CliRunner().invoke(app, [*words, "-h"], prog_name="mamba-sft", env={"COLUMNS": str(COLUMNS)})
    assert shown.exit_code == 0
    return shown.stdout


def test_a_page_fits_a_terminal(words: tuple[str, ...]) -> None:
    lines = page(words).splitlines()
    assert len(lines) < ROWS  # and the prompt below it
    assert max(map(len, lines)) <= COLUMNS


def test_a_page_has_an_example_that_is_understood(words: tuple[str, ...]) -> None:
    (example,) = re.findall(r"^Example: mamba-sft (.+)$", page(words), re.MULTILINE)
    asked = shlex.split(example.partition(" > ")[0])
    path = max((known for known in PAGES if tuple(asked[: len(known)]) == known), key=len)
    assert path[: len(words)] == words
    context = PAGES[path].make_context(path[-1], asked[len(path) :])
    for name, value in context.params.items():
        if name == "recipe":
            Recipe.load(value, overrides=context.params["overrides"] or [])


def test_a_page_has_every_option_with_its_value(words: tuple[str, ...]) -> None:
    text = page(words)
    for param in PAGES[words].params:
        if param.param_type_name == "option" and not param.is_flag:
            assert param.metavar, param.name
            assert f"{max(param.opts, key=len)} {param.metavar}" in text
        elif param.param_type_name == "option":
            assert any(name in text for name in (*param.opts, *param.secondary_opts))
        assert param.help, param.name


def test_help_loads_no_heavy_library() -> None:
    code = """
import sys
from mamba_sft.cli.app import app
try:
    app(["export", "-h"], prog_name="mamba-sft")
except SystemExit:
    pass
print(sorted({"torch", "transformers", "numpy", "jinja2", "gguf"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("--max-steps 20", "train.max_steps=20"),
        ("--max-steps=20", "train.max_steps=20"),
        ("--max_steps -1", "train.max_steps=-1"),
        ("--learning_rate=1e-4", "train.learning_rate=1e-4"),
        ("--lr 1e-4 --epochs 3", "train.learning_rate=1e-4 train.num_train_epochs=3"),
        ("--batch-size 4", "train.per_device_train_batch_size=4"),
        ("--output-dir x", "output_dir=x"),
        ("--base X", "model.base=X"),
        ("--r 8", "adapter.r=8"),
        ("-r 8", "adapter.r=8"),
        ("--training.seed 3", "seed=3"),
        ("--train.max_steps=3", "train.max_steps=3"),
        ("--bf16 True", "model.dtype=bfloat16"),
        ("--dtype fp16", "model.dtype=float16"),
        ("--load-in-4bit", "model.quantization=nf4"),
        ("--quantization 4bit --resume", "model.quantization=nf4"),
        ("--gradient_checkpointing true", "train.checkpointing=block"),
        ("--train_on_inputs false", "data.assistant_only_loss=true"),
        ("--dataset a.jsonl", "data.sources.0.path=a.jsonl"),
        ("--use-dora", "adapter.use_dora=true"),
        ("--target-modules in_proj,x_proj", "'adapter.target_modules=[in_proj, x_proj]'"),
        ("--system 'be kind'", "'chat.system=be kind'"),
        ("--adam-beta2 0.95", "train.trainer_arguments.adam_beta2=0.95"),
        ("--learning-rte 1e-4", "train.learning_rate=1e-4"),
        ("--max-steps", "train.max_steps=..."),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan", "data"])
def test_a_field_as_an_option_is_told_how_it_is_written(verb: str, typed: str, written: str) -> None:
    options = shlex.split(typed)
    if verb != "train" and "--resume" in options:
        options.remove("--resume")
    for asked in ([verb, "quickstart", *options], [verb, *options, "quickstart"]):
        if asked[-2] in ("--use-dora", "--load-in-4bit", "--max-steps") and asked[-1] == "quickstart":
            continue  # which may be its value as well
        shown = CliRunner().invoke(app, asked)
        assert isinstance(shown.exception, UsageError)
        assert shown.exception.exit_code == 2
        assert shown.exception.hint is not None
        assert shown.exception.hint.partition(";")[0] == f"write `{written}`"
        assert options[0].partition("=")[0] in shown.exception.message


def test_what_has_no_field_is_told_why() -> None:
    shown = CliRunner().invoke(app, ["train", "quickstart", "--bf16", "False", "--trust-remote-code"])
    assert isinstance(shown.exception, UsageError)
    assert shown.exception.message == "`--bf16`, `--trust-remote-code` are no options"
    assert shown.exception.hint == (
        "`--bf16`: what is not wanted is left out; `--trust-remote-code`: code from a model repository is "
        "never run; leave it out"
    )


@pytest.mark.parametrize("typed", [["--resum"], ["--nonsense"], ["--dry-rum"], ["--", "--max-steps"]])
def test_other_options_are_left_to_the_parser(typed: list[str]) -> None:
    shown = CliRunner().invoke(app, ["train", "quickstart", *typed])
    assert not isinstance(shown.exception, UsageError) or "no option" not in shown.exception.message
    assert shown.exit_code != 0


def test_what_other_tools_have_is_understood_as_an_option() -> None:
    known = {field.name for field in fields()}
    for name in (*FOREIGN_KEYS, *UNWANTED_KEYS):
        for found in answers([f"--{name.replace('_', '-')}", "7"], set()):
            assert found.reason or found.override
            if found.override:
                assert found.override.partition("=")[0] in known
    assert not answers(["--nonsense", "7"], set())


def test_the_fields_are_those_of_the_recipe() -> None:
    known = {field.name: field for field in fields()}
    assert {"seed", "output_dir", "data.sources.0.path", "train.max_steps", "eval.prompts"} <= set(known)
    assert known["model.dtype"].choices == ["auto", "bfloat16", "float16", "float32"]
    assert known["data.packing"].choices == ["true", "false"]
    assert known["adapter.target_modules"].takes_list
    assert all(field.about for field in known.values())


@pytest.mark.parametrize("page", ["verbs.md"])
def test_the_pages_show_an_answer(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    shown = r"^\$ mamba-sft (train .* --max-steps .*)\nerror: (.*)\nhint: (.*)$"
    found = re.search(shown, text, re.MULTILINE)
    assert found
    error = CliRunner().invoke(app, shlex.split(found[1])).exception
    assert isinstance(error, UsageError)
    assert (error.message, error.hint) == (found[2], found[3])


def test_the_page_of_verbs_names_each_and_its_options() -> None:
    page = (DOCS / "verbs.md").read_text(encoding="utf-8")
    section = page.partition("# Verbs\n\n```\n")[2].partition("```")[0]
    named = set()
    for line in section.splitlines():
        words = line.split()[1:]
        path = max((known for known in PAGES if tuple(words[: len(known)]) == known), key=len)
        known = {name for param in PAGES[path].params for name in (*param.opts, *param.secondary_opts)}
        assert set(re.findall(r"(?<!\w)--?[a-z][a-z-]*", line.partition(" ")[2])) <= known, line
        named.add(path[0])
    assert named == {path[0] for path in PAGES if path}
