"""The functions of the package: examples are true, mistakes are told before torch, models are let go."""

from __future__ import annotations

import doctest
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mamba_sft
from mamba_sft import Recipe, Run, Sampling, evaluate, generate, train
from mamba_sft.errors import TrainingError, UsageError
from mamba_sft.notebook import verbs
from tests.notebook.conftest import Kernel

ROOT = Path(__file__).parents[2]


def test_each_has_an_example_and_those_that_are_cheap_are_true() -> None:
    functions = [name for name in mamba_sft.__all__ if name.islower()]
    for name in functions:
        text = getattr(mamba_sft, name).__doc__
        assert "Example:" in text, name
        assert f">>> {name}(" in text or f"= {name}(" in text, name
    kinds = [getattr(mamba_sft, name) for name in mamba_sft.__all__ if not name.islower()]
    methods = (Recipe.load, Recipe.from_text, Recipe.build, Recipe.to_yaml, Run.open, Run.newest, Run.plot)
    for one in (*kinds, *methods, Run.samples):
        assert "Example: `" in (one.__doc__ or ""), one
    found = doctest.testmod(verbs, extraglobs={name: getattr(mamba_sft, name) for name in mamba_sft.__all__})
    assert found.attempted >= 3
    assert found.failed == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ('train("nonsuch")', "no recipe `nonsuch`"),
        ('plan("nonsuch")', "no recipe `nonsuch`"),
        ('preview("quickstart.yml")', "no recipe"),
        ('merge("runs/none")', "no run at"),
        ('export("runs/none")', "no run at"),
        ('export("runs/none", quantization="Q9")', "Q9"),
        ('report("runs/none")', "no run at"),
        ('generate("runs/none", "hello", output=".")', "is a directory"),
        ('evaluate("runs/none", "leaderbord")', "no suite `leaderbord`"),
        ('evaluate("runs/none")', "is not a directory here"),
        ('evaluate("runs/none", dtype="bf16")', "`--dtype bf16`: there is `bfloat16`"),
        ('evaluate("runs/none", resume=True, overwrite=True)', "`--resume` goes on with results"),
        ('evaluate("runs/none", settings=Settings(math_metric="verify"))', "is for `leaderboard-v2`"),
        ('evaluate("runs/none", settings=Settings(limit=0))', "`--limit 0` is not 1 or more"),
        ('chat("data/tiny-base", compare=True)', "no adapter"),
        ('Recipe.load("quickstart", ["train.learning_rte=1"])', "did you mean `learning_rate`"),
        ('Recipe.load("quickstart", {"train.max_steps": 5})', "overrides are a list of texts"),
        ('Recipe.load("quickstart", [5])', "each `section.field=value`, not `[5]`"),
        ('Recipe.load("quickstart").seed = 1', "does not change once it is made"),
        ('merge(Recipe.load("quickstart"))', "and this is a `Recipe`\nhint: `train` returns the run"),
        ("report([Run(Path('a'))])", "and this is a `list`"),
        ('preview("quickstart", rows=-1)', "`rows` must be a whole number from 0, not -1"),
        ('preview("quickstart", rows="2")', "`rows` must be a whole number from 0, not '2'"),
        ('generate("data/tiny-base", "a", batch_size=0)', "`batch_size` must be at least 1, not 0"),
        ('generate("data/tiny-base", "a", sampling={"top_k": 5})', "`sampling=Sampling(top_k=5)`"),
        ('generate("data/tiny-base", 5)', "and this is a `int`"),
        ('generate("data/tiny-base", {"role": "user", "content": "a"})', "and this is a `dict`"),
        ('generate("data/tiny-base", ["a", float("nan")])', "prompt 2: a prompt is a text or a list"),
        ('chat("data/tiny-base", sampling=5)', "`sampling` is a `Sampling`, not a `int`"),
        ('evaluate("runs/none", settings={"limit": 4})', "`settings=Settings(limit=4)`"),
        ('evaluate("runs/none", [])', "say what to score on"),
        ('export("runs/none", format="hf", options={"private": True})', "`options=HubOptions(private=True)`"),
        ('export("runs/none", options=5)', "`options` is a `GGUFOptions` or a `HubOptions`, not a `int`"),
    ],
)
def test_a_mistake_is_told_before_torch_is_loaded(call: str, message: str) -> None:
    code = f"""
import sys
from pathlib import Path
from mamba_sft import *
from mamba_sft.evaluation.settings import Settings
try:
    {call}
except MambaSFTError as error:
    print("torch" in sys.modules, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.startswith("False ")
    assert message in done.stdout


def test_a_recipe_answers_as_its_base_does(tiny_recipe: Recipe, tiny_run: Run) -> None:
    short = Sampling(max_new_tokens=2)
    prompts = [sample.prompt.prompt for sample in tiny_run.samples()]
    before, after = (generate(model, prompts, sampling=short) for model in (tiny_recipe, tiny_run))
    assert [answer.text for answer in before] == [sample.before for sample in tiny_run.samples()]
    assert [answer.text for answer in after] == [sample.after for sample in tiny_run.samples()]
    assert before.name == "base"


def models_held() -> int:
    from transformers import FalconMambaForCausalLM

    gc.collect()
    return sum(issubclass(type(one), FalconMambaForCausalLM) for one in gc.get_objects())


def test_nothing_holds_a_model_when_a_verb_is_done(
    tiny_recipe: Recipe, tiny_run: Run, tmp_path: Path
) -> None:
    """The next cell may need the memory: a 7B does not fit a T4 twice."""
    before = models_held()
    seen: list[int] = []
    answers = generate(
        tiny_run,
        "hello",
        sampling=Sampling(max_new_tokens=2),
        on_answer=lambda *_: seen.append(models_held()),
    )
    assert seen == [before + 1], "or nothing is counted here"
    assert models_held() <= before
    run = train(tiny_recipe.model_copy(update={"output_dir": str(tmp_path / "run")}))
    assert models_held() <= before
    assert len(answers) == 1
    assert run.adapter.is_dir()


def stopped(number: int, answer: object) -> None:
    raise KeyboardInterrupt


def refused(number: int, answer: object) -> None:
    raise UsageError("no") from TrainingError("first")


@pytest.mark.parametrize(("end", "kind"), [(stopped, KeyboardInterrupt), (refused, UsageError)])
def test_nothing_holds_a_model_after_a_stop(
    end: Any, kind: type[BaseException], tiny_run: Run, kernel: Kernel
) -> None:
    """A notebook keeps the last error and, by its traceback, all that the functions held."""
    before = models_held()
    with pytest.raises(kind) as kept:
        generate(tiny_run, "hello", sampling=Sampling(max_new_tokens=2), on_answer=end)
    assert models_held() <= before
    assert kept.value.__traceback__ is not None, "the lines of the cell are still told"


def test_training_twice_needs_a_word(tiny_recipe: Recipe, tiny_run: Run) -> None:
    with pytest.raises(TrainingError, match="holds a finished run"):
        train(tiny_recipe)


def test_in_a_notebook_the_trainers_own_bar_is_gone(
    tiny_recipe: Recipe, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path
) -> None:
    recipe = tiny_recipe.model_copy(update={"output_dir": str(tmp_path / "run")})
    train(recipe)
    captured = capfd.readouterr()
    assert "it/s" not in captured.err
    assert "loading `" in captured.out
    assert "too few to learn much" in kernel.shown[-1][2]
    assert len({number for number, _, _ in kernel.shown}) == 1


def test_the_names_of_the_package_are_listed() -> None:
    assert set(mamba_sft.__all__) <= set(dir(mamba_sft))
    with pytest.raises(AttributeError, match="no attribute 'nonsuch'"):
        _ = mamba_sft.nonsuch
    with pytest.raises(UsageError):
        mamba_sft.report("runs/none")


def test_an_evaluation_shows_the_tables_that_the_command_prints(tiny_run: Run) -> None:
    before = tiny_run.report.read_text(encoding="utf-8")
    scored = evaluate(tiny_run, "heldout", base="auto")
    assert "heldout" not in before
    assert "heldout" in tiny_run.report.read_text(encoding="utf-8")
    found, base = scored.results["heldout"], scored.base_results["heldout"]
    assert {column.title for column, _ in found.figures} >= {"loss", "perplexity"}
    assert [figure for _, figure in found.figures] != [figure for _, figure in base.figures]
    html, text = scored._repr_html_(), str(scored)
    assert "95 % interval" in html
    assert all(row.split(" | ")[-1] for row in text.splitlines() if row.startswith("  loss"))
    assert (tiny_run.eval / "heldout.json").is_file()
    with pytest.raises(UsageError, match="has results of the same model and settings"):
        evaluate(tiny_run, "heldout", base="auto")
    twice = evaluate(tiny_run, ["heldout", "heldout,heldout"], base="auto", resume=True)
    assert len(twice.works) == 1, "a suite that is named twice is scored once"
