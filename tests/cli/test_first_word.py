"""What is wrong with a command is told before torch, transformers or peft are loaded, which takes seconds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_sft import Run
from mamba_sft.run_contents import mark

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "pandas", "bitsandbytes", "numba", "accelerate")

RUN_ALL = """
import io, json, sys
heavy = sys.argv[1:]
from mamba_sft.cli.app import main
for words in json.load(sys.stdin):
    sys.argv = ["mamba-sft", *words]
    said = io.StringIO()
    from mamba_sft.cli.console import err, out
    err.file = out.file = said
    try:
        main()
        code = 0
    except SystemExit as error:
        code = error.code
    print(json.dumps([code, said.getvalue(), [name for name in heavy if name in sys.modules]]))
"""


@pytest.fixture
def places(tmp_path: Path, run: Run) -> dict[str, str]:
    """Names that the commands below use, in a directory of their own."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "chats.png").write_bytes(b"\x89PNG")
    (tmp_path / "two.jsonl").write_bytes("{}".encode("utf-16"))
    bad = tmp_path / "prompts.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    own = Run(tmp_path / "trained")
    shutil.copytree(run.path, own.path)
    mark(own)
    return {"run": str(own.path), "tmp": str(tmp_path), "quickstart": "quickstart"}


COMMANDS = {  # `~` is a blank inside a word
    "train nosuch": (2, "no recipe `nosuch`"),
    "train {quickstart} train.learning_rat=1": (2, "learning_rat"),
    "train {quickstart} --resume --overwrite": (2, "both cannot be meant"),
    "train {quickstart} --allow-changed-data": (2, "goes with `--resume`"),
    "train {quickstart} data.sources=[{{path:~{tmp}/none.jsonl}}]": (1, "no file `{tmp}/none.jsonl`"),
    "train {quickstart} data.sources=[{{path:~{tmp}/*.csv}}]": (1, "no file matches"),
    "train {quickstart} data.sources=[{{path:~{tmp}/chats.png}}]": (1, "data files end in"),
    "train {quickstart} data.sources=[{{path:~{tmp}/two.jsonl}}]": (1, "is UTF-16"),
    "train {quickstart} data.sources=[{{path:~{tmp}/prompts.jsonl,split:~test}}]": (1, "means nothing"),
    "train {quickstart} output_dir={run}": (1, "holds a finished run"),
    "train {quickstart} output_dir={tmp}/file": (1, "{tmp}/file"),
    "train {quickstart} output_dir={tmp}": (1, "is not a run"),
    "train {quickstart} output_dir={tmp}/new eval.prompts={tmp}/none.jsonl": (1, "none.jsonl"),
    "train {quickstart} output_dir={tmp}/new eval.prompts={tmp}/prompts.jsonl": (1, "prompts.jsonl:2"),
    "train {quickstart} output_dir={tmp}/new model.base={tmp}/none/x/y": (1, "no model directory"),
    "train {quickstart} output_dir={tmp}/new model.base={tmp}": (1, "is not a model"),
    "train {quickstart} output_dir={tmp}/new model.adapter={tmp}": (1, "neither a run nor an adapter"),
    "train {quickstart} output_dir={tmp}/new chat.template={tmp}/none.jinja": (1, "none.jinja"),
    "train {quickstart} --resume output_dir={tmp}/none": (2, "no run at"),
    "train {quickstart} --resume output_dir={run}": (2, "was started with another recipe"),
    "data {quickstart} data.sources=[{{path:~{tmp}/none.jsonl}}]": (1, "no file"),
    "merge {tmp}/none": (2, "no run at"),
    "merge {tmp}": (2, "is not a run directory"),
    "merge {run} --dtype fp17": (2, "no such dtype"),
    "merge {run} --onto nothing": (2, "merge onto what?"),
    "merge {run} --onto dequantized": (2, "was not quantized"),
    "export {tmp}/none": (2, "no run at"),
    "export {run} --format bin": (2, "no format"),
    "export {run} --format hf -q Q8_0": (2, "leave `--format hf` out"),
    "chat {tmp}/none/x/y": (1, "no model directory"),
    "chat {tmp}": (1, "is not a model"),
    "chat {run} --merged": (2, "no merged checkpoint"),
    "generate {run}": (2, "give either"),
    "generate {run} --input {tmp}/none.jsonl": (1, "none.jsonl"),
    "generate {tmp}/none/x/y --prompt x": (1, "no model directory"),
    "report {tmp}/none": (2, "no run at"),
    "recipes show nosuch": (2, "nosuch"),
}


def test_what_is_wrong_is_told_before_libraries_are_loaded(places: dict[str, str]) -> None:
    commands = [[word.replace("~", " ").format(**places) for word in line.split()] for line in COMMANDS]
    python = [sys.executable, "-c", RUN_ALL, *HEAVY]
    empty = Path(places["tmp"]) / "empty"  # the clone may hold runs of the user's
    empty.mkdir()
    done = subprocess.run(
        python, input=json.dumps(commands), capture_output=True, text=True, check=True, cwd=empty
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(COMMANDS)
    for line, (code, text), (got, said, loaded) in zip(COMMANDS, COMMANDS.values(), answers, strict=True):
        assert (got, loaded) == (code, []), (line, said)
        assert text.format(**places) in said.replace("\n", " "), (line, said)
