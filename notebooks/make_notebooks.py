"""Makes the notebooks here, so that they stay alike: `python notebooks/make_notebooks.py [--run]`.

What is written here is what the notebooks hold; change it here and run it. With `--run`, the quickstart is
executed from start to end and keeps its outputs. A test compares the files with what this file makes.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat

HERE = Path(__file__).parent
REPOSITORY = "_OWNER_/mamba-sft"
"""Owner and name on GitHub. None is settled yet, and nobody can take this one: GitHub's names have no `_`."""
COLAB = "https://colab.research.google.com/github"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


@dataclass(frozen=True)
class Kind:
    """What sets a notebook apart from the others.

    Args:
        file: Its name, without the ending.
        title: Its heading.
        about: What it does, where, and how long that takes.
        recipe: The built-in recipe.
        changes: What it changes of the recipe, each with a comment.
        prompts: What the model is asked before and after.
        quantization: Of the GGUF file.
        gpu: What Colab offers to switch to, or None.
        kaggle: What is to be known on Kaggle.
    """

    file: str
    title: str
    about: str
    recipe: str
    changes: tuple[str, ...]
    prompts: tuple[str, ...]
    quantization: str
    gpu: str | None = None
    kaggle: str = ""


QUESTIONS = (
    "Name three things that float on water, and say why.",
    "Write two polite sentences that decline an invitation.",
    "What is 17 + 25? Answer with the number only.",
)
KINDS = (
    Kind(
        file="falcon_mamba_instruct_t4",
        title="Falcon-Mamba-7B to an instruct model on a free T4",
        about="""4-bit base, float16, LoRA: fits the 16 GB of Colab's free T4 by plan, and the `plan` cell
says how much is left. *Runtime → Change runtime type → T4 GPU*, then *Runtime → Run all*. The base is
a download of 13.5 GiB. The training is 60 steps, about half an hour by plan; nobody has measured it on a T4
yet.""",
        recipe="instruct-t4",
        changes=('"train.max_steps=60"',),
        prompts=QUESTIONS,
        quantization="Q4_K_M",
        gpu="T4",
        kaggle="""**Kaggle:** choose the accelerator *GPU T4 x2* and switch *Internet* on. A notebook trains
on the first of the two. Both train with `!mamba-sft train instruct-t4 --processes 2`, each of them with a
whole 4-bit base.""",
    ),
    Kind(
        file="falcon_mamba_instruct_gpu",
        title="Falcon-Mamba-7B to an instruct model on an A100 or H100",
        about="""bfloat16 base, LoRA: about 35 GiB by plan, so a GPU with 40 GB or more; the `plan` cell says
how much is left. *Runtime → Change runtime type → A100 or H100*, then *Runtime → Run all*. This is a short
run of 200 steps; with `CHANGES = []` it is the whole recipe, a night on an H100 by estimate.""",
        recipe="instruct",
        changes=('"train.max_steps=200"', '"data.sources.0.limit=20000"', '"data.validation=200"'),
        prompts=QUESTIONS,
        quantization="Q4_K_M",
        gpu="A100",
        kaggle="**Kaggle** has no such GPU; take `falcon_mamba_instruct_t4.ipynb` there.",
    ),
    Kind(
        file="quickstart_cpu",
        title="The whole way in a few minutes, on any CPU",
        about="""A tiny Mamba of 1.6 million parameters, which comes with the package, becomes one that
answers. No GPU and no download: the same functions and files as for the 7B, to look at before you pay for
one.""",
        recipe="quickstart",
        changes=(),
        prompts=(
            "What is the opposite of hot?",
            "Name the capital of Dosor.",
            "Turn the list around: tray, ring.",
        ),
        quantization="Q8_0",
    ),
)


def cells_of(kind: Kind) -> list[Any]:
    """Returns the cells of a notebook, in order; code that a test replaces carries a tag."""
    return [
        _words("title", _title(kind)),
        _code("install", INSTALL),
        _words("machine", "## This machine\nWhat will run here, and what would make it faster."),
        _code("doctor", "from mamba_sft import doctor\n\ndoctor()"),
        _words("settings-words", SETTINGS_WORDS),
        _code("settings", _settings(kind)),
        _code("recipe", "from mamba_sft import Recipe\n\nrecipe = Recipe.load(RECIPE, CHANGES)\nrecipe"),
        _words("plan-words", "## Does it fit?\nMemory, time and disk, before anything is downloaded."),
        _code("plan", "from mamba_sft import plan\n\nplan(recipe)"),
        _words("data-words", DATA_WORDS),
        _code("preview", "from mamba_sft import preview\n\npreview(recipe, rows=2)"),
        _words(
            "before-words",
            "## Answers before training\nA base continues text; it does not stop.",
        ),
        _code("before", BEFORE),
        _words("train-words", TRAIN_WORDS),
        _code("memory-before", "from mamba_sft import memory\n\nmemory()"),
        _code("train", "from mamba_sft import train\n\nrun = train(recipe, overwrite=True)"),
        _words("course-words", "## What it took\nTime and memory, and the loss."),
        _code("run", "run"),
        _code("memory-after", "memory()"),
        _code("metrics", METRICS),
        _words("after-words", "## Answers side by side\nThe same prompts, before and after."),
        _code("after", AFTER),
        *(_sample_cells() if kind.recipe == "quickstart" else ()),
        _words(
            "merge-words", "## One checkpoint\nThe adapter summed into the base, and checked against both."
        ),
        _code("merge", "from mamba_sft import merge\n\nmerge(run)"),
        _words(
            "gguf-words",
            "## A file for llama.cpp and Ollama\nWritten, loaded and measured.",
        ),
        _code("gguf", GGUF),
        _words("take-words", TAKE_WORDS),
        _code("download", DOWNLOAD),
        _code("push", PUSH),
        _words(
            "report-words",
            "## The report\nAll of it on one page: `report.html` of the run.",
        ),
        _code("report", "from mamba_sft import report\n\nreport(run)"),
        _words("chat-words", "## Talk to it\nThe base and the tuned model answer side by side."),
        _code("chat", "from mamba_sft import chat\n\nchat(run, compare=True)"),
    ]


def _title(kind: Kind) -> str:
    link = f"{COLAB}/{REPOSITORY}/blob/main/notebooks/{kind.file}.ipynb"
    parts = [f"# {kind.title}", f"[![Open in Colab]({BADGE})]({link})", kind.about]
    return "\n\n".join([*parts, *([kind.kaggle] if kind.kaggle else [])])


INSTALL = f'''# Keeps the torch, numpy, pandas and matplotlib that are here: nothing is pinned.
# `_OWNER_` stands for the account that this project is under: put it in.
%pip install -q "mamba-sft[gguf,notebook] @ git+https://github.com/{REPOSITORY}"'''
SETTINGS_WORDS = """## Settings
A built-in recipe and what to change of it. Every field: `!mamba-sft recipes schema`; your own data:
`"data.sources=[{path: chats.jsonl}]"`."""
DATA_WORDS = """## What it learns from
Rows as tokens. What is coloured is trained: the assistant's words and the mark that ends them, nothing
else."""
BEFORE = """from mamba_sft import Sampling, generate

short = Sampling(max_new_tokens=LONGEST)
before = generate(recipe, PROMPTS, sampling=short)
before"""
TRAIN_WORDS = """## Training
First the memory as it is now. The bar and the curve below it move while it trains; *Stop* saves a checkpoint,
and `train(recipe, resume=True)` goes on from there. `overwrite=True` replaces an earlier run of this name.
After a restart of the runtime, run the cells above anew and, in place of the training,
`from mamba_sft import Run; run = Run.newest()`."""
METRICS = """figures = ["loss", "eval_loss", "grad_norm", "tokens_per_second", "peak_memory"]
run.metrics.reindex(columns=figures).tail()"""
AFTER = """after = generate(run, PROMPTS, sampling=short)
before.beside(after)"""
GGUF = """from mamba_sft import export

files = export(run, quantization=QUANTIZATION)
files"""
TAKE_WORDS = """## Take it with you
On Colab this downloads the GGUF file. With a repository's name in `PUSH_TO` the checkpoint goes to the
Hugging Face hub, by the secret `HF_TOKEN` (the key in Colab's left bar)."""
DOWNLOAD = """try:
    from google.colab import files as browser
except ImportError:
    print("here it is:", files.paths[0])
else:
    browser.download(str(files.paths[0]))"""
PUSH = """import os

from mamba_sft import HubOptions

if PUSH_TO:
    try:
        from google.colab import userdata
    except ImportError:
        pass  # the token is in the environment
    else:
        os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")
    print(export(run, format="hf", options=HubOptions(push_to_hub=PUSH_TO)).url)"""


def _settings(kind: Kind) -> str:
    changes = "".join(f"    {change},\n" for change in kind.changes)
    prompts = "".join(f'    "{prompt}",\n' for prompt in kind.prompts)
    longest = 32 if kind.recipe == "quickstart" else 128
    return "\n".join(
        [
            f'RECIPE = "{kind.recipe}"',
            f"CHANGES = [\n{changes}]" if changes else 'CHANGES = []  # such as "train.max_steps=20"',
            f"PROMPTS = [\n{prompts}]",
            f"LONGEST = {longest}  # tokens of an answer",
            f'QUANTIZATION = "{kind.quantization}"  # of the GGUF file',
            'PUSH_TO = ""  # "you/your-model" pushes there',
        ]
    )


def _sample_cells() -> list[Any]:
    words = "The recipe asks held-out questions too, whose answers are known; the wrong ones come first."
    return [_words("samples-words", words), _code("samples", "run.samples()")]


def tiny_settings(kind: Kind, place: Path) -> str:
    """Returns the cell that tests put in the place of `settings`: the tiny base, a few short steps.

    Everything else of the notebook runs as it stands. To try a notebook without a GPU, paste what it returns.

    Args:
        kind: Which notebook.
        place: Where the run goes.
    """
    changes = [
        "model.base=data/tiny-base", "model.dtype=float32", "model.quantization=none",
        "data.sources=[{path: data/quickstart.jsonl, format: messages, limit: 200}]",
        "data.validation=8", "data.max_length=128",
        "train.max_steps=3", "train.gradient_accumulation_steps=1",
        "train.per_device_train_batch_size=2", "train.warmup_steps=1", "train.optim=adamw_torch_fused",
        "train.logging_steps=1", "eval.eval_steps=2", f"output_dir={place}",
    ]  # fmt: skip
    if kind.recipe == "quickstart":
        changes += ["eval.prompts=data/prompts.jsonl", "eval.max_new_tokens=4", "eval.sample_steps=null"]
    listed = "".join(f"    {change!r},\n" for change in changes)
    return "\n".join(
        [
            f'RECIPE = "{kind.recipe}"',
            f"CHANGES = [\n{listed}]",
            'PROMPTS = ["What is the opposite of hot?"]',
            "LONGEST = 4",
            'QUANTIZATION = "Q8_0"',
            'PUSH_TO = ""',
        ]
    )


def _words(name: str, text: str) -> Any:
    cell = nbformat.v4.new_markdown_cell(text)
    cell["id"] = name
    return cell


def _code(name: str, text: str) -> Any:
    cell = nbformat.v4.new_code_cell(text, metadata={"tags": [name]})
    cell["id"] = name
    return cell


def notebook_of(kind: Kind) -> Any:
    """Returns a notebook without outputs."""
    made = nbformat.v4.new_notebook(cells=cells_of(kind))
    made.metadata = {
        "colab": {"name": f"{kind.file}.ipynb", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if kind.gpu is not None:
        made.metadata |= {"accelerator": "GPU"}
        made.metadata["colab"] |= {"gpuType": kind.gpu}
    return made


def executed(notebook: Any, place: Path) -> Any:
    """Runs a notebook from start to end in a directory, all but `install`, and returns it with outputs.

    Args:
        notebook: From `notebook_of`, or with its settings replaced.
        place: Where its files go.
    """
    from nbclient import NotebookClient

    install = next(cell for cell in notebook.cells if "install" in cell.metadata.get("tags", ()))
    kept, install.source = install.source, "# nothing to install"
    try:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(place)}}).execute()
    finally:
        install.source = kept
    install.outputs, install.execution_count = [], None
    return notebook


def without_places(notebook: Any, place: Path) -> Any:
    """Returns an executed notebook without the places and clock times of the machine that ran it.

    Args:
        notebook: From `executed`.
        place: Where that was.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                output["data"]["text/plain"] = "(a widget, where the notebook runs)"
    notebook.metadata["language_info"] = {"name": "python"}
    text = nbformat.writes(notebook)
    for directory in (HERE.parent, place):
        text = text.replace(f"{directory}{os.sep}", "").replace(str(directory), ".")
    return nbformat.reads(text.replace(str(Path.home()), "~"), as_version=4)


def main() -> None:
    """Writes the notebooks; with `--run` executes the quickstart first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="execute the quickstart, and keep its outputs")
    asked = parser.parse_args()
    for kind in KINDS:
        made, path = notebook_of(kind), HERE / f"{kind.file}.ipynb"
        if kind.recipe == "quickstart" and asked.run:
            with TemporaryDirectory() as place:
                made = without_places(executed(made, Path(place)), Path(place))
        elif kind.recipe == "quickstart" and path.exists():
            made = with_outputs(made, nbformat.read(path, as_version=4))
        path.write_text(nbformat.writes(made) + "\n", encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(HERE.parent)}\n")


def with_outputs(made: Any, before: Any) -> Any:
    """Returns a notebook with the outputs of an earlier one, cell by cell, where the code is the same."""
    kept = {cell["id"]: cell for cell in before.cells if cell.cell_type == "code"}
    for cell in made.cells:
        old = kept.get(cell["id"])
        if cell.cell_type == "code" and old is not None and old.source == cell.source:
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    if "widgets" in before.metadata:
        made.metadata["widgets"] = before.metadata["widgets"]
    return made


if __name__ == "__main__":
    main()
