"""`generate` as a user types it: files in and out, going on, how a model is run, what is refused first."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from mamba_sft.cli.answers import AnswerBar, InOrder
from mamba_sft.cli.app import app
from mamba_sft.errors import DataError, MambaSFTError, UsageError
from mamba_sft.exporting.export_run import export
from mamba_sft.exporting.request import GGUFOptions
from mamba_sft.inference.answer import Answer
from mamba_sft.run import Run

LENGTH = ("--max-new-tokens", "6")


def generate(*words: str) -> Result:
    return CliRunner().invoke(app, ["generate", *words])


def refusal(*words: str, verb: str = "generate") -> MambaSFTError:
    """The error that a command ends with, which loads no weights before."""
    error = CliRunner().invoke(app, [verb, *words]).exception
    assert isinstance(error, MambaSFTError), error
    return error


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    texts = ["the quick brown fox jumps over the lazy dog", "a", "hello world 12", "b"]
    path.write_text("".join(json.dumps({"prompt": text, "id": n}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture(autouse=True)
def _no_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "refused" in request.node.name:
        monkeypatch.setattr("mamba_sft.inference.chat_model.load_model", lambda *_, **__: pytest.fail("read"))


def test_json_lines_come_in_the_order_of_the_prompts(
    run: Run, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    import mamba_sft.cli.generate as verb

    real = verb.write_json_lines
    monkeypatch.setattr(
        verb, "write_json_lines", lambda rows: (events.append(f"out {rows[0].get('id')}"), real(rows))
    )
    counted = AnswerBar.count

    def count(self: AnswerBar, number: int, *rest: Any, **more: Any) -> None:
        events.append(f"given {number}")
        counted(self, number, *rest, **more)

    monkeypatch.setattr(AnswerBar, "count", count)
    shown = generate(str(run.path), "--input", str(prompts), "--json", "--batch-size", "1", *LENGTH)
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    assert events == [
        "given 1", "given 3", "given 2", "given 0", "out 0", "out 1", "out 2", "out 3",
    ]  # fmt: skip
    alone = generate(str(run.path), "--prompt", "hello world 12", "--json", *LENGTH)
    assert json.loads(alone.stdout)["answer"] == rows[2]["answer"]


def test_an_answer_is_out_when_the_next_is_asked_for(
    run: Run, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []

    class Pipe(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue().count("\n"))

    from mamba_sft.cli import console

    monkeypatch.setattr(sys, "stdout", Pipe())
    in_order = InOrder(lambda number, answer: console.write_json_lines([{"n": number}]))
    for number in (1, 0, 2):
        in_order(number, Answer("x", "stop", 1))
    assert flushed == [1, 2, 3]


def test_resume_keeps_what_is_there(run: Run, prompts: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = (str(run.path), "--input", str(prompts), *LENGTH)
    assert generate(*words, "--output", str(whole)).exit_code == 0
    begun = generate(*words, "--output", str(output), "--resume")
    assert "it begins with the first prompt" in begun.stderr
    assert output.read_bytes() == whole.read_bytes()
    error = refusal(*words, "--output", str(output), "--resume")
    assert error.message == f"`{output}` is there, and nothing of it is unfinished"


def test_where_it_was_left_is_refused_before_weights(run: Run, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out.unfinished.jsonl").write_text("")
    (tmp_path / "out.unfinished.jsonl.record").write_text('{"temperature": 1.0}\n')
    words = (str(run.path), "--input", str(prompts), "--output", str(tmp_path / "out.jsonl"), "--resume")
    error = refusal(*words)
    assert "`temperature` 1.0 (now 0.0)" in error.message
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("--device", "gpu"), "`device` is auto, cpu or cuda, not gpu", "did you mean `--device cuda`?"),
        (("--dtype", "bf16"), "not bf16", "did you mean `--dtype bfloat16`?"),
        (("--dtype", "flaot16"), "not flaot16", "did you mean `--dtype float16`?"),
        (("--quantization", "4bit"), "not 4bit", "did you mean `--quantization nf4`?"),
        (("--device", "npu1"), "not npu1", None),
        (("--min-p", "2"), "`min_p` must be from 0 (no limit) to 1, not 2.0", None),
        (("--repetition-penalty", "0"), "`repetition_penalty` must be above 0", None),
        (("--stop-strings", ""), "a stop string is empty", None),
        (("--batch-size", "0"), "`batch_size` must be at least 1, not 0", None),
        (("--resume",), "`--resume` goes on with an `--output`", "say which, or leave `--resume` out"),
    ],
)
def test_wrong_words_are_refused_first(
    run: Run, words: tuple[str, ...], message: str, hint: str | None
) -> None:
    error = refusal(str(run.path), "-p", "hello", *words)
    assert isinstance(error, UsageError)
    assert message in error.message
    assert error.hint == hint


def test_a_gpu_that_is_not_there_is_one_message(run: Run) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    for verb in ("generate", "chat"):
        words = ("-p", "hello") if verb == "generate" else ()
        error = CliRunner().invoke(app, [verb, str(run.path), *words, "--device", "cuda"]).exception
        assert isinstance(error, MambaSFTError)
        assert "this machine shows 0 CUDA devices" in error.message


def test_compiling_two_models_is_refused(run: Run) -> None:
    error = refusal(str(run.path), "--compare", "--compile", verb="chat")
    assert error.message == "`--compile` makes the step of one model, and `--compare` asks two"


@pytest.mark.parametrize("content", ["", "\n\n", '{"prompt": ""}\n', "[]\n"])
def test_prompts_are_refused_before_torch_is_loaded(run: Run, tmp_path: Path, content: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    code = f"""
import sys
from mamba_sft.cli.app import main
sys.argv = ["mamba-sft", "generate", {str(run.path)!r}, "--input", {str(path)!r}]
try:
    main()
except SystemExit as stop:
    print(stop.code, sorted({{"torch", "transformers", "peft"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 []"
    assert done.stderr.count("error: ") == 1
    assert str(path) in done.stderr
    with pytest.raises(DataError):
        raise refusal(str(run.path), "--input", str(path))


def test_how_a_model_is_run_reaches_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    from mamba_sft.inference import chat_model

    real = chat_model.load_model

    def load(section: Any, **how: Any) -> Any:
        seen.update(section.model_dump(), **how)
        return real(section, **how)

    monkeypatch.setattr(chat_model, "load_model", load)
    monkeypatch.setattr(chat_model, "compile_step", lambda model: seen.update(compiled=True))
    words = ("--device", "cpu", "--dtype", "bfloat16", "--quantization", "none", "--compile")
    shown = generate(str(run.path), "-p", "hello", *LENGTH, *words)
    assert shown.exit_code == 0, shown.output
    assert (seen["device"], seen["dtype"], seen["quantization"]) == ("cpu", "bfloat16", "none")
    assert seen["compiled"]


def test_stop_strings_and_penalty_of_the_command_line(run: Run) -> None:
    free = generate(str(run.path), "-p", "hello", "--max-new-tokens", "20").stdout.rstrip("\n")
    stop = free[8:12]
    cut = generate(str(run.path), "-p", "hello", "--max-new-tokens", "20", "--stop-strings", stop).stdout
    assert cut.rstrip("\n") == free[: free.index(stop)]
    words = ("-p", "hello", "--max-new-tokens", "60", "--json")
    texts = {generate(str(run.path), *words, "--repetition-penalty", value).stdout for value in ("1", "9")}
    assert len(texts) == 2


def test_prompts_that_begin_alike_are_told_of(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("hello\nthe quick brown fox\na\n")
    shown = generate(str(run.path), "--input", str(path), "--system", "the lazy dog " * 40, *LENGTH)
    assert "prompt tokens were not read: they begin prompts as they began earlier ones" in shown.stderr


@pytest.fixture(scope="module")
def gguf(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf")
    export(run, quantization="f32", output=output, options=GGUFOptions(verify=False))
    (path,) = output.glob("*.gguf")
    return path


def test_a_gguf_file_answers_and_talks(run: Run, gguf: Path) -> None:
    expected = generate(str(run.path), "-p", "hello", "--system", "be brief", *LENGTH)
    found = generate(str(gguf), "-p", "hello", "--system", "be brief", *LENGTH)
    assert found.exit_code == 0, found.output
    assert found.stdout == expected.stdout
    talked = CliRunner().invoke(app, ["chat", str(gguf), "--system", "be brief", *LENGTH], input="hello\n")
    assert talked.stdout == expected.stdout


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("chat", ("--compare",), "has no adapter to switch off"),
        ("chat", ("--merged",), "nothing to merge"),
        ("chat", ("--compile",), "llama.cpp is compiled already"),
        ("generate", ("-p", "hello", "--quantization", "nf4"), "stored as they are computed with"),
    ],
)
def test_what_a_gguf_file_cannot_do_is_refused(
    gguf: Path, verb: str, words: tuple[str, ...], message: str
) -> None:
    error = refusal(str(gguf), *words, verb=verb)
    assert message in error.message
    assert error.exit_code == 2


def test_the_bar_counts_and_says_nothing_to_a_file() -> None:
    for terminal, shown in ((True, True), (True, False), (False, True)):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=100, color_system=None)
        before = sys.stdout
        with AnswerBar(console, 3, shown=shown) as bar:
            assert sys.stdout is before  # what a pipe gets must not go to the terminal instead
            bar.count(0, Answer("x", "stop", 5), kept=True)
            bar.count(1, Answer("x", "stop", 5))
        assert ("2/3" in text.getvalue()) == ("tokens/s" in text.getvalue()) == (terminal and shown)
