"""A step that is far off is told with its rows, left out, or stopped at, as the recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mamba_sft import Run
from mamba_sft.errors import TrainingError
from mamba_sft.training import spikes
from mamba_sft.training.fine_tuning import RunInterruptedError, train, train_prepared
from mamba_sft.training.preparation import prepare
from mamba_sft.training.spikes import FAR, FLOOR, LEAST, WINDOW, SpikeWatch, named
from tests.training.test_fine_tuning import SignalAt, adapter

ROWS = [(1.0, [("a.jsonl:1", "a.jsonl:2")]), (3.0, [("b.jsonl:7",)])]


def watch(tmp_path: Path, on_spike: Any = "warn") -> SpikeWatch:
    (tmp_path / "run").mkdir(exist_ok=True)
    return SpikeWatch(Run(tmp_path / "run"), on_spike)


def feed(one: SpikeWatch, *losses: float, norm: float = 1.0) -> list[bool]:
    return [one.skips(n + 1, {"loss": x, "gradient norm": norm}, ROWS) for n, x in enumerate(losses)]


def test_a_step_far_above_the_usual_is_a_spike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quiet = [1.0, 1.1, 0.9, 1.05] * 5
    one = watch(tmp_path)
    assert feed(one, *quiet, 9.0) == [False] * 21  # a warning changes nothing
    (spike,) = one.found
    assert (spike.step, spike.what, spike.value, spike.skipped) == (21, "loss", 9.0, False)
    assert spike.usual == pytest.approx(1.025)
    assert spike.rows == ["b.jsonl:7", "a.jsonl:1", "a.jsonl:2"], "the highest loss first"
    assert "the loss of step 21 is 9, where 1.02 is usual; its rows: `b.jsonl:7`, `a.jsonl:1`" in caplog.text
    assert json.loads(one.run.spikes.read_text()) == {
        "step": 21, "what": "loss", "value": 9.0, "usual": spike.usual, "skipped": False, "rows": spike.rows
    }  # fmt: skip


def test_the_norm_is_watched_as_well(tmp_path: Path) -> None:
    one = watch(tmp_path)
    feed(one, *[1.0] * LEAST)
    feed(one, 1.0, norm=50.0)
    assert [spike.what for spike in one.found] == ["gradient norm"]


@pytest.mark.parametrize("losses", [
    [1.0, 50.0, 1.0, 50.0],  # too few to know what is usual
    [*[2.0 - n / 100 for n in range(150)]],  # a course that falls
    [*[1.0] * 20, 1.0 + FAR * FLOOR],  # steps that are all alike, and one a little above
    [*[1.0] * 20, 0.01],  # far below is no harm
    [*[1.0, 4.0, 0.5, 7.0, 2.0] * 6, 12.0],  # noise
    [*[1.0] * 20, float("nan"), float("inf")],  # others stop at those
])  # fmt: skip
def test_what_is_no_spike(tmp_path: Path, losses: list[float]) -> None:
    one = watch(tmp_path)
    feed(one, *losses)
    assert not one.found


def test_a_course_that_has_changed_is_usual_again(tmp_path: Path) -> None:
    one = watch(tmp_path, "skip")
    skipped = feed(one, *[1.0] * WINDOW, *[5.0] * (WINDOW + 10))
    assert 0 < sum(skipped) <= WINDOW // 2 + 1


def test_stop_says_how_to_go_on(tmp_path: Path) -> None:
    one = watch(tmp_path, "stop")
    with pytest.raises(TrainingError, match="the loss of step 21 is 9") as caught:
        feed(one, *[1.0] * 20, 9.0)
    assert "--resume train.on_spike=skip" in (caught.value.hint or "")
    assert one.run.spikes.is_file()


def test_many_rows_are_counted() -> None:
    assert named([f"a:{n}" for n in range(8)]).endswith("`a:2` and 5 more rows")
    assert named([f"{Path.cwd()}/b.jsonl:1"]).endswith(": `b.jsonl:1`")
    assert "not known" in named([])


def test_where_many_rows_are_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = watch(tmp_path)
    feed(one, *[1.0] * 20)
    one.skips(21, {"loss": 9.0}, [(9.0, [[f"a.jsonl:{n}" for n in range(8)]])])
    assert caplog.messages[-1].endswith(f"and 5 more rows; all of them are in `{tmp_path}/run/spikes.jsonl`")


class Far(TrainerCallback):
    """Makes the gradients of some steps large."""

    def __init__(self, *steps: int):
        self.steps, self.now = steps, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda g: g * (1e4 if self.now in self.steps else 1.0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = state.global_step + 1


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps say what is usual, and only a thousandfold is far from it."""
    monkeypatch.setattr(spikes, "LEAST", 3)
    monkeypatch.setattr(spikes, "FAR", 1000.0)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("more", [(), ("train.stream_tokens=16",), ("data.packing=false",)])
def test_a_step_that_is_left_out_changes_no_weight(
    recipe: Any, tmp_path: Path, more: tuple[str, ...]
) -> None:
    seen: dict[int, torch.Tensor] = {}

    class Weights(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen[state.global_step] = torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    options = ("train.max_steps=6", "train.on_spike=skip", "train.logging_steps=1", *more)
    run = train_prepared(prepare(recipe(*options)), callbacks=[Far(5), Weights()])
    assert torch.equal(seen[5], seen[4])
    assert not torch.equal(seen[6], seen[5])
    (spike,) = map(json.loads, run.spikes.read_text().splitlines())
    assert (spike["step"], spike["what"], spike["skipped"]) == (5, "gradient norm", True)
    assert all("/chats.jsonl:" in row for row in spike["rows"])
    assert spike["rows"]


@pytest.mark.usefixtures("early")
def test_a_run_that_was_stopped_at_a_spike_goes_on_without_it(
    recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("train.max_steps=6", "train.save_steps=2")
    with pytest.raises(TrainingError, match="gradient norm of step 5"):
        train_prepared(prepare(recipe(*options, "train.on_spike=stop")), callbacks=[Far(5)])
    goes_on = prepare(recipe(*options, "train.on_spike=skip"), resume=True)
    run = train_prepared(goes_on, callbacks=[Far(5)])
    assert "the step is left out" in caplog.text
    whole = train_prepared(prepare(recipe(*options, "train.on_spike=skip", name="whole")), callbacks=[Far(5)])
    assert adapter(run).keys() == adapter(whole).keys()
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(run).items())
    assert run.spikes.read_text() == whole.spikes.read_text(), "what was usual is taken up"


@pytest.mark.usefixtures("early")
def test_spikes_after_the_resume_point_are_forgotten(recipe: Any) -> None:
    options = ("train.max_steps=8", "train.save_steps=2", "train.save_total_limit=9", "train.logging_steps=1")
    far = Far(5)
    with pytest.raises(RunInterruptedError):
        train_prepared(prepare(recipe(*options)), callbacks=[far, SignalAt(6)])
    run = Run(Path(recipe(*options).output_dir))
    assert run.spikes.is_file()
    for path in run.checkpoints.glob("checkpoint-6*"):
        (path / "counts.json").write_text("{")  # damaged: it goes on from step 4
    train(recipe(*options), resume=True)
    assert run.spikes.read_text() == ""
