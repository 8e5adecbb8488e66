"""Plans of all recipes, what fits, what is refused, and what to change instead."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.errors import TrainingError, UsageError
from mamba_sft.planning import fitting
from mamba_sft.planning.fitting import fixes, refuse_what_cannot_fit
from mamba_sft.planning.gpus import GPUS, Accelerator, find_gpu, recognized
from mamba_sft.planning.memory import peak, planned_parts
from mamba_sft.planning.plan import make_plan
from mamba_sft.planning.speed import estimate, flops, measured
from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.training.preparation import prepare

CARDS_OF = {
    "instruct": "a100-80", "instruct-qlora": "4090", "instruct-t4": "t4", "long-context": "4090",
    "instruct-multi-gpu": "h100", "instruct-2x24gb": "3090", "falcon-mamba-procedure": "h100",
    "continue-pretraining": "4090",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 7B is known by name; nothing is downloaded, or found by accident."""
    monkeypatch.setattr("mamba_sft.model.shape._cached_config", lambda section: None)


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_fits_the_card_it_is_for(name: str) -> None:
    plan = make_plan(Recipe.load(name), CARDS_OF.get(name))
    assert plan.fits, plan.to_json()
    assert plan.largest_rows >= plan.work.rows
    assert plan.largest_length >= plan.work.length
    assert plan.rate is not None
    assert not plan.fixes


def test_changes_leave_a_ramp_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = ["train.gradient_accumulation_steps=null", "train.batch_ramp={from: 8, to: 64, tokens: 9}"]
    plan = make_plan(Recipe.load("instruct", overrides=ramp), "4090")
    words = [fix.overrides for fix in plan.fixes]
    assert any("train.per_device_train_batch_size" in word for fix in words for word in fix)
    for fix in words:
        assert make_plan(Recipe.load("instruct", overrides=[*ramp, *fix]), "4090").fits
    assert (plan.accumulation, plan.tokens_per_step) == (None, 64 * 2048)
    monkeypatch.setattr(fitting, "describe_device", lambda: None)
    monkeypatch.setattr(fitting, "recognized", lambda facts: find_gpu("t4"))
    with pytest.raises(TrainingError) as caught:
        refuse_what_cannot_fit(Recipe.load("instruct", overrides=ramp), longest=2048, trained_rows=2)
    assert "accumulation" not in str(caught.value.hint)


@pytest.mark.parametrize("card", ["t4", "4090", "a100-40"])
@pytest.mark.parametrize("name", ["instruct", "long-context", "instruct-qlora"])
def test_what_does_not_fit_comes_with_changes_that_do(name: str, card: str) -> None:
    plan = make_plan(Recipe.load(name), card)
    if plan.fits:
        return
    assert plan.fixes
    for fix in plan.fixes:
        changed = make_plan(Recipe.load(name, overrides=list(fix.overrides)), card)
        assert changed.fits
        assert changed.peak == fix.peak
        assert changed.tokens_per_step == plan.tokens_per_step
    slowdowns = [round(fix.slowdown, 2) for fix in plan.fixes]
    assert slowdowns == sorted(slowdowns)


def test_the_largest_that_fits_is_the_largest() -> None:
    recipe = Recipe.load("instruct")
    plan = make_plan(recipe, "a100-80")
    for change, fits in ((0, True), (1, False)):
        rows = f"train.per_device_train_batch_size={plan.largest_rows + change}"
        length = f"data.max_length={plan.largest_length + change}"
        assert make_plan(Recipe.load("instruct", overrides=[rows]), "a100-80").fits is fits
        assert make_plan(Recipe.load("instruct", overrides=[length]), "a100-80").fits is fits


def test_steps_and_tokens_are_counted_where_the_data_is_here() -> None:
    plan = make_plan(Recipe.load("quickstart", overrides=["train.max_steps=-1"]))
    assert plan.steps is not None
    assert plan.most_tokens is not None
    assert 0.95 * plan.steps * plan.tokens_per_step < plan.most_tokens <= plan.steps * plan.tokens_per_step
    assert make_plan(Recipe.load("instruct"), "h100").steps is None


def test_operations_are_those_of_the_benchmark_table() -> None:
    """28.0 GFLOP per token are needed; `block` makes 41.4 of them, and three things come on top.

    The chunked loss computes its logits again, trained rows take the head's whole gradient (0.53 each), and
    the adapter has its own (0.25).
    """
    plan = make_plan(Recipe.load("instruct"), "h200")
    assert flops(plan.work) == pytest.approx(41.4e9 + 2 * 0.533e9 + 0.25e9, rel=0.005)


def test_faster_cards_are_planned_faster() -> None:
    work = make_plan(Recipe.load("instruct"), "h200").work
    rates = [estimate(work, GPUS[name]) for name in ("t4", "a100-80", "h100", "h200")]
    speeds = [rate.tokens_per_second for rate in rates if rate]
    assert speeds == sorted(speeds)
    assert len(speeds) == 4


def test_an_earlier_run_here_gives_the_rate(recipe: Any) -> None:
    settings = recipe(name="new")
    run = Run(Path(settings.output_dir).parent / "old")
    run.path.mkdir()
    run.recipe.write_text(settings.to_yaml())
    run.environment.write_text(json.dumps({"device": {"name": "this one"}}))
    lines = [{"step": 1, "num_tokens": 500}, {"step": 2, "num_tokens": 1000, "train_runtime": 4.0}]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rate = measured(settings, "this one")
    assert rate is not None
    assert rate.tokens_per_second == 250
    assert rate.source.endswith("old")
    assert measured(settings, "another one") is None
    assert measured(recipe("train.checkpointing=none", name="new"), "this one") is None


def test_the_sessions_of_a_run_give_the_rate_of_their_own_device(recipe: Any) -> None:
    settings = recipe(name="new")
    run = Run(Path(settings.output_dir).parent / "old")
    run.path.mkdir()
    run.recipe.write_text(settings.to_yaml())
    took = (("slow", 300, 3.0), ("fast", 1000, 2.0), ("slow", 500, 5.0), ("slow", 0, 0.1))
    sessions = [dict(zip(("device", "tokens", "train_seconds"), values, strict=True)) for values in took]
    run.environment.write_text(json.dumps({"device": {"name": "fast"}, "sessions": sessions}))
    run.metrics_file.write_text(json.dumps({"step": 9, "num_tokens": 1800, "train_runtime": 10.0}) + "\n")
    rates = {device: measured(settings, device) for device in ("slow", "fast", "another")}
    assert {device: rate and round(rate.tokens_per_second) for device, rate in rates.items()} == {
        "slow": 100, "fast": 500, "another": None,
    }  # fmt: skip


def small_device(monkeypatch: pytest.MonkeyPatch, usable: int) -> None:
    device = Accelerator("a small one", usable, usable, multiprocessors=2, type="cpu")
    monkeypatch.setattr(fitting, "recognized", lambda facts: device)


def test_train_refuses_what_cannot_fit_and_names_the_fix(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe("train.per_device_train_batch_size=64", "data.max_length=4096")
    small_device(monkeypatch, 10**9)
    with pytest.raises(TrainingError, match="GiB by plan, and a small one has") as caught:
        refuse_what_cannot_fit(settings, longest=4096, trained_rows=2)
    assert "train.per_device_train_batch_size=" in (caught.value.hint or "")


def test_train_runs_the_check_before_weights_are_loaded(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_device(monkeypatch, 10**8)
    with pytest.raises(TrainingError, match="by plan"):
        prepare(recipe())


def test_auto_batch_needs_one_row_to_fit(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train.per_device_train_batch_size=64", "data.max_length=4096")
    small_device(monkeypatch, 2 * 10**9)
    with pytest.raises(TrainingError):
        refuse_what_cannot_fit(recipe(*words), longest=4096, trained_rows=2)
    refuse_what_cannot_fit(recipe(*words, "train.auto_batch=true"), longest=4096, trained_rows=2)


@pytest.mark.parametrize("mode", ["fsdp", "zero2"])
def test_what_would_fit_is_what_the_recipe_takes_beside_parallel(mode: str) -> None:
    """No 8-bit optimizer and no streaming, which are refused beside it."""
    for words in (["adapter=none"], ["data.max_length=24000"]):
        overrides = [*words, f"train.parallel={mode}"]
        found = make_plan(Recipe.load("instruct", overrides=overrides), "a100-80").fixes
        assert found
        for fix in found:
            assert Recipe.load("instruct", overrides=[*overrides, *fix.overrides])


def test_processes_that_cut_the_model_in_parts_are_told_what_fits_all_of_them() -> None:
    work = make_plan(Recipe.load("instruct", overrides=["adapter=none"]), "a100-80").work
    card = recognized_card("a100-80")
    alone, four = (fixes(work, 4, card, mode="fsdp", processes=count) for count in (1, 4))
    assert all("adapter={}" in fix.overrides for fix in alone)
    assert four
    assert not any("adapter={}" in fix.overrides for fix in four)


def recognized_card(name: str) -> Accelerator:
    return make_plan(Recipe.load("instruct"), name).accelerator


def test_a_model_too_large_for_a_device_has_no_fix() -> None:
    work = make_plan(Recipe.load("instruct"), "h100").work
    assert fixes(work, 1, Accelerator("tiny", 4 * 10**9, 4 * 10**9)) == []
    assert peak(planned_parts(work)) > 4e9


def test_cards_by_name() -> None:
    assert find_gpu("RTX 4090").name == "GeForce RTX 4090"
    with pytest.raises(UsageError, match="did you mean `a100-80`"):
        find_gpu("a100-8")
    facts = {
        "type": "cuda", "name": "NVIDIA L40S", "memory_bytes": 47_600_000_000, "bfloat16": True,
        "compute_capability": "8.9", "multiprocessors": 142, "l2_bytes": 0,
    }  # fmt: skip
    assert recognized(facts).card == GPUS["l40s"].card
    assert recognized(facts).flops == GPUS["l40s"].flops
    assert recognized(facts | {"name": "NVIDIA A100-SXM4-80GB"}).flops == GPUS["a100-80"].flops
    assert recognized(facts | {"name": "Something new"}).flops == 0
    assert all(card.usable_bytes < card.nominal_bytes for card in GPUS.values())


def test_rows_that_a_glob_names_are_counted_as_those_of_a_file(recipe: Any, chats: Path) -> None:
    changes = "train.max_steps=-1", "train.num_train_epochs=2"
    named, globbed = (make_plan(recipe(f"data.sources.0.path={path}", *changes)) for path in (
        chats, f"{chats.parent}/{chats.stem[:-1]}?{chats.suffix}",
    ))  # fmt: skip
    assert named.steps is not None
    assert (globbed.steps, globbed.most_tokens) == (named.steps, named.most_tokens)


def test_rows_of_unknown_length_are_asked_for() -> None:
    words = ["data.packing=false", "data.max_length=null"]
    with pytest.raises(UsageError, match="max_length"):
        make_plan(Recipe.load("instruct", overrides=words), "h100")
    streamed = Recipe.load("instruct", overrides=[*words, "train.stream_tokens=1024"])
    assert make_plan(streamed, "h100").fits


@pytest.mark.parametrize("width", [80, 120])
def test_the_verb_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.cli.plan.out.width", width, raising=False)
    for words in (["long-context", "--card", "4090"], ["instruct", "--card", "t4"]):
        result = CliRunner().invoke(app, ["plan", *words])
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= width
    assert "change" in result.stdout


def test_what_would_fit_is_a_command_to_paste() -> None:
    asked = ["instruct", "train.per_device_train_batch_size=16", "chat.system=be kind"]
    shown = CliRunner().invoke(app, ["plan", *asked, "--card", "t4"]).stdout
    _, *ways = shown.partition("\nchange ")[2].split("times the time\n")
    assert len(ways) == 3
    for way in ways:
        words = shlex.split(way.replace("\\\n", " ").partition("\n   ")[0])  # as a shell joins the lines
        assert words[:3] == ["mamba-sft", "train", "instruct"]
        assert "chat.system=be kind" in words
        assert asked[1] not in words  # which the change is instead of
        changed = CliRunner().invoke(app, ["plan", *words[2:], "--card", "t4", "--json"])
        assert json.loads(changed.stdout)["fits"]


@pytest.mark.parametrize(
    ("card", "shown"),
    [("4090", "GeForce RTX 4090 (24 GB), 23.5 GiB usable: "), ("a100-80", "A100 80GB, 79.1 GiB usable: "),
     ("t4", "Tesla T4 (16 GB), 14.6 GiB usable: ")],
)  # fmt: skip
def test_a_card_has_the_memory_it_is_sold_with(card: str, shown: str) -> None:
    assert shown in CliRunner().invoke(app, ["plan", "instruct-t4", "--card", card]).stdout


def test_the_verb_says_what_its_shape_keeps_out_of_4_bits() -> None:
    words = ["plan", "quickstart", "model.quantization=nf4", "model.dtype=float32"]
    shown = CliRunner().invoke(app, words).stdout
    assert "nf4 and 32-bit\n           `x_proj` stays 32-bit: its 44 rows are not a multiple of 32\n" in shown
    made = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert made["quantized"] == ["in_proj", "out_proj"]
    assert "stays" not in CliRunner().invoke(app, ["plan", "instruct-qlora", "--card", "4090"]).stdout
    assert "stays" not in CliRunner().invoke(app, ["plan", "quickstart"]).stdout


def test_the_verb_prints_json() -> None:
    result = CliRunner().invoke(app, ["plan", "instruct", "--card", "h200", "--json"])
    plan = json.loads(result.stdout)
    assert plan["fits"] is True
    assert plan["parameters"] == 7_272_665_088
    assert plan["peak_bytes"] < plan["device"]["usable_bytes"]


@pytest.mark.parametrize("words", [["instruct-t4", "--card", "t4"], ["long-context", "--card", "4090"]])
def test_the_page_shows_the_plans(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.cli.plan.out.width", 90, raising=False)
    shown = CliRunner().invoke(app, ["plan", *words]).stdout
    page = (Path(__file__).parents[2] / "docs/choosing-a-card.md").read_text(encoding="utf-8")
    command = f"$ mamba-sft plan {' '.join(words)}"
    assert "\n".join([command, *(line.rstrip() for line in shown.splitlines())]) in page


def test_all_weights_of_the_7b_do_not_fit_80_gb_and_what_does_is_named() -> None:
    words = ["adapter=none", "train.per_device_train_batch_size=1"]
    plan = make_plan(Recipe.load("instruct", words), "h100")
    assert plan.work.trained == plan.work.shape.parameters
    static = sum(plan.parts[name] for name in ("weights", "adapter", "gradients", "optimizer"))  # type: ignore[index]
    assert static == 16 * plan.work.shape.parameters
    assert not plan.fits
    first = [fix.overrides[0] for fix in plan.fixes]
    assert first == ["train.optim=adamw_8bit", "adapter={}", "adapter={}"]
    for fix in plan.fixes:
        changed = make_plan(Recipe.load("instruct", [*words, *fix.overrides]), "h100")
        assert changed.fits
        assert changed.peak == fix.peak
    assert make_plan(Recipe.load("instruct", words), "h200").fits


def test_train_refuses_all_weights_with_the_change_to_make(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(find_gpu("h100"), usable_bytes=10**9, name="a small one")
    monkeypatch.setattr(fitting, "recognized", lambda facts: gpu)
    settings = recipe("adapter=none", "model.base=tiiuae/falcon-mamba-7b")
    with pytest.raises(TrainingError, match="GiB by plan, and a small one has") as caught:
        refuse_what_cannot_fit(settings, longest=96, trained_rows=2)
    assert "needs a device with more memory" in (caught.value.hint or "")
    gpu = find_gpu("h100")
    with pytest.raises(TrainingError, match=r"this run needs 11.* GiB by plan, and H100") as caught:
        refuse_what_cannot_fit(
            recipe("adapter=none", "model.base=tiiuae/falcon-mamba-7b", "model.dtype=bfloat16"),
            longest=2048, trained_rows=2,
        )  # fmt: skip
    hint = caught.value.hint or ""
    assert "adapter={}" in hint


def test_the_disk_of_a_full_run_holds_a_model_and_no_merge(recipe: Any) -> None:
    plan = make_plan(Recipe.load("instruct", ["adapter=none"]), "h200")
    weights = plan.work.shape.parameters
    assert plan.disk["model"] == 2 * weights
    assert plan.disk["merged"] == 0
    assert plan.disk["checkpoints"] == 2 * (4 + 8) * weights
    assert "adapter" not in plan.disk


def test_plan_prints_a_full_run(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from mamba_sft.cli.app import app

    words = ["plan", "instruct", "adapter=none", "train.per_device_train_batch_size=1", "--card", "h100"]
    told = CliRunner().invoke(app, words).output
    for text in (
        "weights, float32",
        "optimizer state",
        "adapter={}",
        "(100.00%)",
    ):
        assert text in told, told
    assert "base weights" not in told
    assert "merged" not in told
