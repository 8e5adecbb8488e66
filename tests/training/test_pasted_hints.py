"""Commands in hints are pasted into a shell: what they name may hold blanks and quotes."""

from __future__ import annotations

import errno
import re
import shlex
import signal
from pathlib import Path

import pytest

from mamba_sft.errors import MambaSFTError, TrainingError, UsageError
from mamba_sft.merging.request import check_adapter_files, check_request
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.training.callbacks import Interruption
from mamba_sft.training.fine_tuning import _interrupted
from mamba_sft.training.keeping import Unsaved, _not_saved
from mamba_sft.training.launching import Launch, _Ended
from mamba_sft.training.overwriting import refuse_to_overwrite
from mamba_sft.training.resuming import find_resume_point
from mamba_sft.training.saving import file_errors_explained
from mamba_sft.training.starting import find_start

RECIPE = "model: {base: data/tiny-base}\ndata: {sources: [{path: data/quickstart.jsonl}]}\n"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that stopped at a checkpoint, in a directory whose name a shell would take apart."""
    made = Run(tmp_path / "my run's")
    point = made.checkpoints / "checkpoint-3"
    point.mkdir(parents=True)
    (point / "trainer_state.json").write_text('{"global_step": 3}')
    made.recipe.write_text(f"output_dir: {str(made.path)!r}\n{RECIPE}")
    return made


def commands(error: MambaSFTError) -> list[list[str]]:
    """What stands between backticks in a hint, as a shell takes it apart."""
    assert error.hint
    return [shlex.split(text) for text in re.findall("`([^`]+)`", error.hint)]


def resume_of(run: Run, *options: str) -> list[str]:
    return ["mamba-sft", "train", str(run.recipe), *options, "--resume"]


def test_how_to_go_on_is_one_command(run: Run, tmp_path: Path) -> None:
    assert commands(_interrupted(run, Interruption(60))) == [resume_of(run), [*resume_of(run), "--finish"]]
    unsaved = Unsaved(run.adapter, 1, 0, "full")
    assert commands(_not_saved(run, unsaved)) == [resume_of(run)]
    with pytest.raises(TrainingError) as stopped, file_errors_explained(run, lambda: 3):
        raise OSError(errno.ENOSPC, "full", str(run.path))
    assert commands(stopped.value) == [resume_of(run)]
    ended = _Ended(Launch(2), run, tmp_path).by_signal(signal.SIGTERM)
    assert commands(ended) == [resume_of(run, "--processes", "2")]
    with pytest.raises(MambaSFTError) as lacks:
        check_adapter_files(run.adapter)
    assert commands(lacks.value) == [resume_of(run), [*resume_of(run), "--finish"]]


def test_what_follows_a_run_names_it_as_one_word(run: Run) -> None:
    recipe = Recipe.load(run.recipe)
    with pytest.raises(MambaSFTError) as other:
        find_resume_point(run, recipe.model_copy(update={"seed": 7}))
    assert commands(other.value) == [resume_of(run), ["output_dir"]]
    run.adapter.mkdir()
    run.environment.write_text('{"seconds": 1.0, "steps": 3}')
    run.report.write_text("")
    with pytest.raises(TrainingError, match="is finished") as finished:
        find_resume_point(run, recipe)
    merge = ["mamba-sft", "merge", str(run.path)]
    new = "output_dir=runs/NAME"
    assert commands(finished.value) == [
        merge, [f"model.adapter={run.path}", new], merge, [f"model.base={run.merged}", new],
    ]  # fmt: skip
    run.model.mkdir()
    with pytest.raises(UsageError) as whole:
        check_request(run)
    assert commands(whole.value) == [["mamba-sft", verb, str(run.path)] for verb in ("chat", "export")]


def test_what_a_run_starts_from_is_one_word(run: Run, tmp_path: Path) -> None:
    recipe = Recipe.from_text(f"output_dir: {tmp_path}/new\nadapter: {{}}\n{RECIPE}", "recipe")
    section = recipe.model.model_copy(update={"adapter": str(run.path)})
    recipe = recipe.model_copy(update={"model": section})
    with pytest.raises(MambaSFTError, match="not finished") as unfinished:
        find_start(recipe)
    assert commands(unfinished.value) == [resume_of(run), [*resume_of(run), "--finish"]]
    run.model.mkdir()
    with pytest.raises(MambaSFTError, match="trained all weights") as whole:
        find_start(recipe)
    assert commands(whole.value) == [[f"model.base={run.model}"], ["model.adapter"]]
    link = tmp_path / "link"
    link.symlink_to(run.path)
    with pytest.raises(TrainingError, match="is a link") as linked:
        refuse_to_overwrite(Run(link), overwrite=True)
    assert commands(linked.value) == [[f"output_dir={run.path}"]]
