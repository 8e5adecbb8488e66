"""Traffic and time against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.errors import UsageError
from mamba_sft.planning.communication import (
    HOP_BETWEEN,
    HOP_INSIDE,
    Cluster,
    Links,
    Traffic,
    gathered,
    reduced,
    step_traffic,
)
from mamba_sft.planning.gpus import GPUS
from mamba_sft.planning.many import plan_many
from mamba_sft.planning.memory import peak, weights
from mamba_sft.planning.plan import make_plan
from mamba_sft.planning.sharing import shared_parts
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run

LORA = 64 * 16 * ((4096 + 16384) + (8192 + 288) + (8192 + 4096))
"""Values of r=16 on in_proj, x_proj and out_proj of the 7B's 64 layers: 42.2M, 84 MB in 16 bits."""
TRAINED = LORA + 2 * 2 * 4096
"""With two rows of the embeddings and of the head, which the chat template adds."""


@pytest.fixture(autouse=True)
def _no_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.model.shape._cached_config", lambda section: None)


@pytest.fixture
def plan() -> Any:
    return make_plan(Recipe.load("instruct"), "h100")


def test_a_ring_of_four() -> None:
    """Three quarters of 400 bytes to the next in three hops; both ways for an all-reduce."""
    assert gathered(400, 4) == Traffic(300.0, 3)
    assert gathered(400, 4, messages=5) == Traffic(300.0, 15)
    assert reduced(400, 4) == Traffic(600.0, 6)
    assert reduced(400, 1) == Traffic(0.0, 0)


def test_ddp_sends_the_gradients_of_the_adapter(plan: Any) -> None:
    assert pytest.approx(84.5e6, rel=1e-3) == LORA * 2
    assert plan.work.trained == TRAINED
    eight = step_traffic("ddp", plan.work, 8, accumulation=4)
    assert eight.sent == pytest.approx(2 * 7 / 8 * 4 * TRAINED)
    assert eight.sent == pytest.approx(295.8e6, rel=1e-3)
    assert eight.hops == 2 * 7 * 7  # 169 MB in buckets of 25 MiB are 7
    assert step_traffic("ddp", plan.work, 8, accumulation=1) == eight


def test_fsdp_gathers_the_weights_twice_in_a_micro_batch(plan: Any) -> None:
    whole = 7_272_665_088 * 2 + 4 * TRAINED
    eight = step_traffic("fsdp", plan.work, 8, accumulation=4)
    assert eight.sent == pytest.approx(7 / 8 * (4 * 2 * whole + 4 * TRAINED))
    assert eight.sent == pytest.approx(103.1e9, rel=1e-3)
    assert eight.hops == 65 * 7 * (4 * 2 + 1)


def test_zero2_sends_gradients_in_every_micro_batch(plan: Any) -> None:
    four = step_traffic("zero2", plan.work, 8, accumulation=4)
    assert four.sent == pytest.approx(7 / 8 * 4 * TRAINED * (4 + 1))
    once = step_traffic("zero2", plan.work, 8, accumulation=1)
    assert once == step_traffic("ddp", plan.work, 8, accumulation=1)  # as much as an all-reduce


def test_the_slowest_edge_sets_the_pace() -> None:
    h100 = GPUS["h100"]
    alone, slow, fast = (
        Links.of(h100, cluster)
        for cluster in (Cluster(8), Cluster(8, 2, link=100.0), Cluster(8, 2, link=8000.0))
    )
    assert (alone.inside, alone.name, alone.between) == (450e9, "NVLink 4", None)
    sent = Traffic(45e9, 10)
    assert alone.seconds(sent) == pytest.approx(45 / 450 / 0.8 + 10 * HOP_INSIDE)
    assert slow.seconds(sent) == pytest.approx(45 / 12.5 / 0.8 + 10 * HOP_BETWEEN)
    assert fast.seconds(sent) == pytest.approx(45 / 450 / 0.8 + 10 * HOP_BETWEEN)
    names = {key: Links.of(GPUS[key], Cluster(2)).name for key in ("4090", "t4", "b200", "a100-40")}
    assert names == {
        "4090": "PCIe 4 x16", "t4": "PCIe 3 x16", "b200": "NVLink 5", "a100-40": "NVLink 3",
    }  # fmt: skip


def test_what_each_process_holds(plan: Any) -> None:
    """Of 16 bits and r=16: 14.5 GB of weights, of which embeddings and head are 1.07 GB."""
    parts, work = plan.parts, plan.work
    assert all(shared_parts(mode, parts, work, 1) == parts for mode in ("ddp", "fsdp", "zero2"))
    ddp, fsdp, zero2 = (shared_parts(mode, parts, work, 8) for mode in ("ddp", "fsdp", "zero2"))
    assert peak(ddp) == plan.peak + 4 * TRAINED
    outside = 2 * 65024 * 4096 * 2
    layer = (weights(work) - outside) // 64
    assert fsdp["weights"] == -(-weights(work) // 8) + outside + 2 * layer
    assert fsdp["weights"] == pytest.approx(3.3e9, rel=0.02)
    assert fsdp["adapter"] == fsdp["gradients"] == TRAINED / 2
    assert fsdp["optimizer"] == TRAINED
    assert (zero2["weights"], zero2["adapter"]) == (parts["weights"], parts["adapter"])
    assert zero2["gradients"] == TRAINED / 2 + 4 * TRAINED
    assert zero2["optimizer"] == TRAINED
    for name in ("kept", "block", "loss", "overhead"):
        assert ddp[name] == fsdp[name] == zero2[name] == parts[name]


def test_two_processes_share_no_more_than_there_is(plan: Any) -> None:
    """Of a model with few layers what is held whole would be more than all of it."""
    small = replace(plan.work, shape=replace(plan.work.shape, layers=2))
    assert shared_parts("fsdp", plan.parts, small, 2)["weights"] <= weights(small)


def test_a_step_is_the_work_of_one_and_what_they_send(plan: Any) -> None:
    recipe = Recipe.load("instruct", overrides=["train.max_steps=1000"])
    many = plan_many(recipe, make_plan(recipe, "h100"), Cluster(8, 4, link=100.0))
    assert many.tokens_per_step == 32 * 8 * 2048 * 4
    ddp, fsdp, zero2 = many.shared
    computing = 8 * 2048 * 4 / plan.rate.tokens_per_second
    assert ddp.step == pytest.approx(computing + ddp.communication)
    assert ddp.communication == pytest.approx(327.5e6 / (12.5e9 * 0.8) + 2 * 31 * 7 * HOP_BETWEEN, rel=1e-3)
    assert ddp.seconds == pytest.approx(1000 * (computing + ddp.communication))
    assert ddp.communication < zero2.communication < fsdp.communication
    assert ddp.peak > zero2.peak > fsdp.peak


def test_rows_that_are_here_make_fewer_steps() -> None:
    recipe = Recipe.load("quickstart", overrides=["train.max_steps=-1", "train.num_train_epochs=2"])
    made = make_plan(recipe, "t4")
    many = plan_many(recipe, made, Cluster(4))
    assert made.steps is not None
    assert many.steps == pytest.approx(made.steps / 4, rel=0.1)
    assert many.shared[0].seconds == pytest.approx(
        made.most_tokens / made.rate.tokens_per_second / 4  # type: ignore[operator, union-attr]
        + many.steps * many.shared[0].communication,  # type: ignore[operator]
        rel=0.05,
    )


@pytest.mark.parametrize(
    ("name", "alone", "card", "processes"),
    [("instruct-multi-gpu", "instruct", "h100", 8), ("instruct-2x24gb", "instruct-qlora", "3090", 2)],
)
def test_the_recipes_take_the_steps_of_their_model(name: str, alone: str, card: str, processes: int) -> None:
    recipe = Recipe.load(name)
    many = plan_many(recipe, make_plan(recipe, card), Cluster(processes))
    assert many.shared[0].fits
    assert many.tokens_per_step == make_plan(Recipe.load(alone), "h100").tokens_per_step == 65_536
    assert recipe.train.learning_rate == Recipe.load(alone).train.learning_rate


def test_the_verb_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.cli.plan.out.width", 80, raising=False)
    words = ["plan", "instruct", "--card", "h100", "--processes", "8", "--nodes", "4", "--link", "25"]
    shown = CliRunner().invoke(app, words).stdout
    assert "32 processes on 4 machines of 8; estimated, not measured" in shown
    assert "450 GB/s within (NVLink 4), 3.125 GB/s between (25 Gb/s)" in shown
    assert max(map(len, shown.splitlines())) <= 80
    made = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [one["mode"] for one in made["many"]["shared"]] == ["ddp", "fsdp", "zero2"]
    assert made["many"]["processes"] == 32
    too_much = CliRunner().invoke(app, ["plan", "instruct", "--card", "4090", "--processes", "2"]).stdout
    assert "too much" in too_much


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "2"], "`--nodes` goes with `--processes`"),
        (["--link", "2"], "`--link` goes with `--processes`"),
        (["--processes", "0"], "`--processes` takes more than zero, not 0"),
        (["--processes", "2", "--link", "nan"], "`--link` takes more than zero, not nan"),
    ],
)
def test_what_the_verb_refuses(words: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["plan", "instruct", "--card", "h100", *words])
    assert isinstance(result.exception, UsageError)
    assert told in result.exception.message


def test_processes_on_a_cpu_are_not_planned() -> None:
    recipe = Recipe.load("quickstart")
    with pytest.raises(UsageError, match="plans for GPUs"):
        plan_many(
            recipe, replace(make_plan(recipe, "t4"), accelerator=replace(GPUS["t4"], type="cpu")), Cluster(2)
        )


def test_the_rate_of_several_processes_is_not_that_of_one(recipe: Any, tmp_path: Any) -> None:
    from mamba_sft.planning.speed import measured

    settings, run = recipe(name="new"), Run(tmp_path / "old")
    run.path.mkdir()
    run.recipe.write_text(settings.to_yaml())
    run.metrics.write_text(json.dumps({"step": 2, "num_tokens": 1000, "train_runtime": 4.0}) + "\n")
    for processes, known in ((1, True), (2, False)):
        run.environment.write_text(json.dumps({"device": {"name": "this one"}, "processes": processes}))
        assert (measured(settings, "this one") is not None) is known
