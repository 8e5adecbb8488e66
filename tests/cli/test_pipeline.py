"""The verbs one after the other, as a user types them, and what a user sees when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mamba_sft import Run
from mamba_sft.cli import app
from mamba_sft.cli.progress import TrainingBar


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
Command = Callable[..., Outcome]


@pytest.fixture
def mamba_sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line in this process."""

    def call(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mamba-sft", *words])
        capsys.readouterr()
        try:
            app.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a few steps, in a directory of its own that is the current one."""
    monkeypatch.chdir(tmp_path)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"hello {i}"},
                {"role": "assistant", "content": f"quick fox {i}"},
            ]
        }
        for i in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello 3", "answer": "quick fox 3"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""output_dir: runs/tiny
model: {{base: {tiny_base}, dtype: float32}}
data: {{sources: [{{path: chats.jsonl}}], validation: 4, max_length: 64}}
adapter: {{r: 4}}
train: {{max_steps: 4, gradient_accumulation_steps: 1, learning_rate: 1e-2, checkpointing: none}}
eval: {{eval_steps: 2, prompts: prompts.jsonl, max_new_tokens: 4}}
"""
    )
    return path


def test_train_merge_generate_chat(
    mamba_sft: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = mamba_sft("train", str(recipe), "train.logging_steps=2")
    assert trained.code == 0, trained.err
    assert "step 4/4" in trained.err
    assert "tokens/s" in trained.err
    assert "sample answers" in trained.err
    assert "exact match on 1 held-out prompts" in trained.out
    assert "next:    mamba-sft chat runs/tiny   or   mamba-sft merge runs/tiny" in trained.out
    assert "<svg" in Run(Path("runs/tiny")).report.read_text()

    merged = mamba_sft("merge")
    assert merged.code == 0, merged.err
    assert "using the newest run: runs/tiny" in merged.err
    assert "logits differ" in merged.err
    assert json.loads(Path("runs/tiny/merged/merge.json").read_text())["check"]["same_next_token"]

    words = ("--prompt", "hello 3", "--max-new-tokens", "6")
    from_run = mamba_sft("generate", "runs/tiny", *words)
    from_merged = mamba_sft("generate", "runs/tiny/merged", *words)
    assert from_run.code == from_merged.code == 0, from_run.err + from_merged.err
    assert from_run.out == from_merged.out
    assert from_run.out.strip()

    (tmp_path / "in.jsonl").write_text('{"prompt": "hello 3"}\n')
    written = mamba_sft("generate", "--input", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", "6")
    assert written.code == 0, written.err
    assert json.loads(Path("out.jsonl").read_text())["answer"] == from_run.out.rstrip("\n")

    as_json = mamba_sft("generate", "--input", "in.jsonl", "--json", "--max-new-tokens", "6")
    assert as_json.code == 0, as_json.err
    assert json.loads(as_json.out) == json.loads(Path("out.jsonl").read_text())
    os.mkfifo("pipe.jsonl")  # which can be read once
    writer = threading.Thread(target=lambda: Path("pipe.jsonl").write_text('{"prompt": "hello 3"}\n'))
    writer.start()
    piped = mamba_sft("generate", "--input", "pipe.jsonl", "--json", "--max-new-tokens", "6")
    writer.join()
    assert (piped.code, piped.out) == (0, as_json.out), piped.err
    both = mamba_sft("generate", "--json", *words, *words)
    assert [json.loads(line)["prompt"] for line in both.out.split("\n")[:-1]] == ["hello 3"] * 2
    assert mamba_sft("generate", "--json", "--output", "x.jsonl", *words).code == 2

    lines = iter(["hello 3\n", ""])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines))
    talked = mamba_sft("chat", "--max-new-tokens", "6")
    assert talked.code == 0, talked.err
    assert talked.out.strip() == CONTROL.sub("", from_run.out).strip()


def test_the_merged_model_is_what_transformers_loads(mamba_sft: Command, recipe: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert mamba_sft("train", str(recipe)).code == 0
    assert mamba_sft("merge").code == 0
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/merged")
    model = AutoModelForCausalLM.from_pretrained("runs/tiny/merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello 3"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    ours = mamba_sft("generate", "--prompt", "hello 3", "--max-new-tokens", "6").out.strip()
    assert tokenizer.decode(generated, skip_special_tokens=True).strip() == ours
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in torch.tensor(model.generation_config.eos_token_id).reshape(-1).tolist()


def test_data_shows_tokens_and_json(mamba_sft: Command, recipe: Path) -> None:
    shown = mamba_sft("data", str(recipe), "--rows", "1")
    assert shown.code == 0, shown.err
    assert "<|im_start|>" in shown.out
    assert "trained tokens" in shown.out
    assert not Path("runs").exists(), "looking at the data writes nothing"
    content = json.loads(mamba_sft("data", str(recipe), "--json").out)
    assert content["train_rows"] == 20
    assert content["rows"][0]["trained_text"].endswith("<|im_end|>")


def test_dry_run(mamba_sft: Command, recipe: Path) -> None:
    checked = mamba_sft("train", str(recipe), "--dry-run")
    assert checked.code == 0, checked.err
    assert "4 steps" in checked.out
    assert not Path("runs").exists()


def test_recipes(mamba_sft: Command) -> None:
    listed = mamba_sft("recipes")
    assert listed.code == 0
    assert {line.split()[0] for line in listed.out.splitlines()} >= {"quickstart", "instruct", "instruct-t4"}
    assert mamba_sft("recipes", "show", "quickstart").out.startswith("# ")
    assert json.loads(mamba_sft("recipes", "schema").out)["properties"]["train"]
    assert mamba_sft("recipes", "show", "nope").code == 2
    told = {one["name"]: one["for"] for one in json.loads(mamba_sft("recipes", "--json").out)}
    width = max(map(len, told)) + 2
    assert [f"{name:<{width}}{about}" for name, about in told.items()] == listed.out.splitlines()
    assert mamba_sft("recipes", "--json", "schema").code == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("train", "nope.yaml"), 2, "error: no recipe `nope.yaml`"),
        (("train", "{recipe}", "train.learning_rte=1"), 2, "did you mean `learning_rate`?"),
        (("train", "{recipe}", "data.sources.0.path=chat.jsonl"), 1, "chat.jsonl"),
        (("train", "{recipe}", "model.base=missing"), 1, "`missing` is not a directory here"),
        (("train", "{recipe}", "adapter.target_modules=[q_proj]"), 2, "q_proj"),
        (("train", "{recipe}", "--resume"), 2, "no run at `runs/tiny`"),
        (("merge",), 2, "no run under `runs/`"),
        (("merge", "elsewhere"), 2, "no run at `elsewhere`"),
        (("chat", "elsewhere"), 1, "elsewhere"),
        (("generate", "elsewhere"), 2, "give either `--prompt` or `--input`"),
        (("generate", "elsewhere", "--prompt", "x", "--top-p", "7"), 2, "`top_p` must be"),
    ],
)
def test_expected_failures_are_one_message(
    mamba_sft: Command, recipe: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    failed = mamba_sft(*(str(recipe) if word == "{recipe}" else word for word in words))
    assert message in failed.err
    assert failed.err.count("error: ") == 1
    assert "Traceback" not in failed.err
    assert failed.code == code
    assert not list(Path().rglob("*.partial"))


def test_what_the_user_asked_for_is_no_error(
    mamba_sft: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = TrainingBar.on_step_begin
    monkeypatch.setattr(TrainingBar, "on_step_begin", lambda self, args, state, control, **kwargs: (
        signal.raise_signal(signal.SIGINT) if state.global_step == 2 else draw(self, args, state, control)
    ))  # fmt: skip
    stopped = mamba_sft("train", str(recipe))
    assert stopped.code == 130
    assert "stopped: at step 3 of 4; saved `runs/tiny/checkpoints/checkpoint-3`" in stopped.err
    assert "hint: continue with `mamba-sft train runs/tiny/recipe.yaml --resume`" in stopped.err
    assert "error:" not in stopped.err
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    went_on = mamba_sft("train", "runs/tiny/recipe.yaml", "--resume")
    assert went_on.code == 0, went_on.err
    assert "going on from step 3 of 4" in went_on.err


def test_a_bug_keeps_its_traceback(mamba_sft: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.recipe.recipe.Recipe.load", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mamba_sft("train", str(recipe))


def test_messages_work_without_colour(mamba_sft: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    failed = mamba_sft("train", "nope.yaml")
    assert "\x1b[" not in failed.err
