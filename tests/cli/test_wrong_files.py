"""Files given where something else is needed: each is told what it is, and what to type instead."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.errors import MambaSFTError
from mamba_sft.evaluation.prompts import load_prompts
from mamba_sft.inference.answering import generate
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str) -> MambaSFTError:
    error = CliRunner().invoke(app, list(words)).exception
    assert isinstance(error, MambaSFTError), error
    return error


DATA = {
    "chats.jsonl": '{"messages": []}\n',
    "chats.json": '[{"messages": []}]',
    "rows.json": '{"instruction": "a", "output": "b"}',
    "a b.ndjson": "{}",
    "rows.csv": "prompt,response\n",
    "rows.parquet": "PAR1",
    "packed.jsonl.gz": "no matter",
    "text.txt": "Once upon a time: there was an owl.\n",
}


@pytest.mark.parametrize("verb", ["train", "data", "plan"])
@pytest.mark.parametrize("name", DATA)
def test_data_as_a_recipe(verb: str, name: str) -> None:
    Path(name).write_text(DATA[name])
    error = refused(verb, name)
    assert error.exit_code == 2
    assert error.message == f"`{name}` is a file of data, not a recipe"
    assert error.hint is not None
    _, _, command = error.hint.partition("for example: ")
    program, said, recipe, override = shlex.split(command)
    assert (program, said) == ("mamba-sft", "train")
    assert Recipe.load(recipe, overrides=[override]).data.sources[0].path == name


@pytest.mark.parametrize("name", ["mine.json", "mine.txt", "mine"])
def test_a_recipe_by_another_name(name: str) -> None:
    values = {"output_dir": "runs/x", "model": {"base": "b"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    text = json.dumps(values) if name.endswith("json") else "# mine\n" + Recipe.build(**values).to_yaml()
    Path(name).write_text(text)
    assert Recipe.load(name) == Recipe.build(**values)


def test_a_model_or_a_run_as_a_recipe() -> None:
    Path("x.gguf").write_bytes(b"GGUF")
    assert refused("train", "x.gguf").message == "`x.gguf` is a model's file, not a recipe"
    Path("runs/a").mkdir(parents=True)
    assert "built-in" in str(refused("train", "runs/a").hint)
    Path("runs/a/recipe.yaml").write_text("a: 1")
    assert refused("train", "runs/a").hint == "its recipe is `runs/a/recipe.yaml`"


@pytest.mark.parametrize("words", ["merge", "export", "export --format hf", "report"])
def test_a_gguf_file_where_a_model_is_needed(words: str) -> None:
    verb, *options = words.split()
    error = refused(verb, "my model.GGUF", *options)
    assert error.message.startswith("`my model.GGUF` is a GGUF file, for llama.cpp")
    assert "`mamba-sft chat 'my model.GGUF'` talks to the file" in str(error.hint)
    assert "the run or checkpoint that it was made from" in str(error.hint)


def test_the_run_that_a_gguf_file_is_of() -> None:
    Path("runs/a/export").mkdir(parents=True)
    Path("runs/a/recipe.yaml").write_text("a: 1")
    assert str(refused("merge", "runs/a/export/a.Q4_0.gguf").hint).startswith("give `runs/a`;")
    assert "was made from" in str(refused("merge", "runs/a/adapter/a.gguf").hint)


def test_a_gguf_file_as_a_base() -> None:
    assert "is a GGUF file" in refused("plan", "quickstart", "model.base=x.gguf").message


PROMPTS: list[tuple[str, str, str, str]] = [
    ("asked.md", "What is a haiku?\n", "asked.md:1: plain text", "mv asked.md asked.txt"),
    ("asked", "What is a haiku?\n", "asked:1: plain text", "mv asked asked.txt"),
    ("asked.jsonl", "\nWhat?\n", "asked.jsonl:2: plain text", "mv asked.jsonl asked.txt"),
    ("asked.txt", '{"prompt": "What?"}\n', "asked.txt:1: JSON", "mv asked.txt asked.jsonl"),
    ("asked.csv", "prompt\nWhat?\n", "`asked.csv` is a table", 'read_csv("asked.csv").to_json("asked.jsonl"'),
    ("asked.parquet", "PAR1", "`asked.parquet` is a table", 'read_parquet("asked.parquet").to_json('),
    ("asked.jsonl", '{"prompt": "What?\n', "asked.jsonl:1: not JSON", "one a line, as JSON: "),
]


READERS = {"eval.prompts": load_prompts, "--input": lambda path: generate("nothing", path)}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("name", "text", "message", "hint"), PROMPTS)
def test_prompts_in_another_form(read: Any, name: str, text: str, message: str, hint: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(MambaSFTError) as caught:
        read(Path(name))
    assert caught.value.message.startswith(message)
    assert hint in str(caught.value.hint)


def test_lines_of_text_are_prompts() -> None:
    Path("asked.txt").write_text('What is a haiku?\n"quoted"\n[1]\n{"a": 1}\n')
    assert [one.prompt for one in load_prompts(Path("asked.txt"))][1:] == ['"quoted"', "[1]", '{"a": 1}']


def test_a_file_as_a_prompt() -> None:
    Path("asked.txt").write_text("What?")
    error = refused("generate", "runs/a", "-p", "asked.txt")
    assert error.hint == "`--input asked.txt` answers the prompts in it"
    assert "no run" in refused("merge", "runs/a").message  # other texts are no files
    assert Run(Path("runs/a")).path.exists() is False


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("half", "float16"),
        ("float", "float32"), ("f16", "float16"), ("FP16", "float16"), ("bfloat", "bfloat16"),
    ],
)  # fmt: skip
def test_dtypes_by_other_names(word: str, meant: str) -> None:
    assert f"did you mean `{meant}`?" in refused("plan", "quickstart", f"model.dtype={word}").message


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("4bit", "nf4"), ("int4", "nf4"), ("fp4", "nf4"), ("Q4_K_M", "nf4"), ("8bit", "int8"),
        ("8-bit", "int8"), ("gptq", "nf4"), ("nf8", "nf4"), ("false", "none"), ("4", "nf4"),
    ],
)  # fmt: skip
def test_quantizations_by_other_names(word: str, meant: str) -> None:
    assert f"did you mean `{meant}`?" in refused("plan", "quickstart", f"model.quantization={word}").message


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("q4", "Q4_K_M"), ("nf4", "Q4_K_M"), ("int8", "Q8_0"), ("fp16", "F16"), ("bfloat16", "BF16"),
        ("Q4KM", "Q4_K_M"), ("q4-k-m", "Q4_K_M"), ("Q8", "Q8_0"), ("Q5_K_L", "Q5_K"), ("Q8_K", "Q8_0"),
        ("Q9", None), ("best", None), ("Q4_K_XL", "Q4_K"),
    ],
)  # fmt: skip
def test_methods_by_other_names(word: str, meant: str | None) -> None:
    message = refused("export", "runs/a", "-q", "Q8_0", "-q", word).message
    assert message == f"no quantization `{word}`" + (f"; did you mean `{meant}`?" if meant else "")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("a100", "`a100-40` or `a100-80`"), ("A100", "`a100-40` or `a100-80`"),
        ("a100x", "`a100-40` or `a100-80`"), ("a100-8", "`a100-80`"), ("v100", "`v100-16` or `v100-32`"),
        ("4090ti", "`4090`"), ("RTX 4090 Ti", "`4090`"), ("l40", "`l40s`"),
        ("409", "`4090`"), ("40900", "`4090`"), ("h100-94", "`h100`"), ("a30", None), ("4080", None),
        ("a5000", None), ("gh200", None), ("mi300", None)
    ],
)  # fmt: skip
def test_cards_by_other_names(word: str, meant: str | None) -> None:
    message = refused("plan", "instruct", "--card", word).message
    assert message == f"no GPU `{word}` is known" + (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("rtx4090", "GeForce RTX 4090"), ("RTX-4090", "GeForce RTX 4090"), ("h100-80", "H100 80GB"),
        ("H100 80GB", "H100 80GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("a100 40gb", "A100 40GB"),
        ("Tesla T4", "Tesla T4"), ("H100 PCIe", "H100 80GB"), ("a10", "A10"),
    ],
)  # fmt: skip
def test_cards_as_people_write_them(word: str, name: str) -> None:
    shown = CliRunner().invoke(app, ["plan", "instruct", "--card", word, "--json"]).stdout
    assert json.loads(shown)["device"]["name"] == name
