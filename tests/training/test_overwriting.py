"""`--overwrite` removes an earlier run and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import RecipeError, TrainingError, UsageError
from mamba_sft.run import Run
from mamba_sft.run_contents import is_marked, remove, strangers
from mamba_sft.training.fine_tuning import train
from mamba_sft.training.overwriting import start_anew
from mamba_sft.training.preparation import prepare

HALF = "0123abcd-4567-89abcdef"  # a process of some host


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run as all verbs leave it, in names alone."""
    run = Run(tmp_path / "run")
    start_anew(run)
    for name in (
        "recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl", "rejected.jsonl",
        "report.html", "nan-batch-step-7.json", "adapter/adapter_model.safetensors", "adapter/base.json",
        "checkpoints/README.md", "checkpoints/checkpoint-20/optimizer.pt",
        "checkpoints/checkpoint-20/rng_state_1.pth", "checkpoints/checkpoint-20/trainer_state.json",
        "merged/model-00001-of-00003.safetensors", "merged/merge.json", "export/hf/README.md",
        "export/run.Q4_K_M.gguf", "export/Modelfile.Q4_K_M", f"adapter.{HALF}.partial/adapter_config.json",
        f"merged.{HALF}.old/config.json", f"export/hf.{HALF}.partial/config.json",
    ):  # fmt: skip
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    run.quality.write_text(json.dumps({"files": {"run.Q4_K_M.gguf": {}}}))
    return run


def test_all_that_verbs_write_is_known_and_goes(run: Run) -> None:
    assert strangers(run) == []
    assert remove(run) == []
    assert tree(run.path).keys() == {"run.json"}  # so that a removal that is cut off can go on
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex", "notes/ideas.md", "empty/", "recipe.yaml.old.txt", "notes.partial",
        "merged.old/config.json", "adapter/notes.md",
        "checkpoints/thesis.tex", "checkpoints/checkpoint-20/notes.txt", "merged/notes.md",
        "checkpoints/checkpoint-20/mine/x.json", "merged/mine/config.json", "export/another.gguf",
        "export/hf/paper.pdf", "export/notes.txt", "eval/results.json", ".git/config", "recipe.yaml/",
        "adapter",
    ],
)  # fmt: skip
def test_what_no_verb_writes_is_named_and_stays(run: Run, name: str) -> None:
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if name.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work")
    before = tree(run.path)
    with pytest.raises(TrainingError, match=r"holds what no run writes: `") as caught:
        start_anew(run)
    assert any(f"`{part}" in str(caught.value) for part in (name, name.split("/", maxsplit=1)[0]))
    assert tree(run.path) == before
    remove(run)
    assert path.exists(), "what comes while the removal is at work stays too"


@pytest.mark.parametrize(
    "name", ["thesis", "merged", "adapter/tokenizer.json", "recipe.yaml", "checkpoints", "run.json"]
)
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_link_in_a_run_is_never_followed(run: Run, tmp_path: Path, name: str, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "merge.json").write_text("years of work")
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere if kind == "directory" else elsewhere / "merge.json")
    (run.path / "environment.json").write_text('{"packages": {"mamba-sft": "0.1.0", "torch": "2.13.0"}}')
    if name != "recipe.yaml":  # still known as a run
        assert is_marked(run)
    remove(run)
    assert path.is_symlink()
    assert (elsewhere / "merge.json").read_text() == "years of work"
    with pytest.raises(TrainingError, match=f"holds what no run writes: `{name}`"):
        start_anew(run)


SYSTEMS = (".DS_Store", "Thumbs.db", "adapter/desktop.ini", "checkpoints/checkpoint-2/.nfs000000001")
NOTEBOOKS = (".ipynb_checkpoints/recipe-checkpoint.yaml", "export/.ipynb_checkpoints/a-checkpoint")


def test_what_systems_write_by_themselves_is_in_no_ones_way(run: Run) -> None:
    for name in (*SYSTEMS, *NOTEBOOKS):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(b"x")
    assert strangers(run) == []
    start_anew(run)
    assert list(tree(run.path)) == ["run.json"]
    assert not (run.path / "adapter").exists()


def test_what_only_looks_like_it_stays(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("years of work")
    (run.path / ".DS_Store").symlink_to(tmp_path / "mine")
    for name in (".ipynb_checkpoints/thesis.tex", "DS_Store", "notes/Thumbs.db", "Thumbs.db.txt"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("years of work")
    found = [".DS_Store", ".ipynb_checkpoints/thesis.tex", "DS_Store", "Thumbs.db.txt", "notes/"]
    assert strangers(run) == found
    assert remove(run) == found


def test_a_directory_that_a_system_has_looked_at_is_empty(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").write_bytes(b"x")
    run = train(recipe("train.max_steps=1"))
    assert not (run.path / ".DS_Store").exists()


def test_a_run_directory_that_is_a_link_is_not_followed(recipe: Any, tmp_path: Path) -> None:
    run = train(recipe("train.max_steps=1"))
    run.path.rename(tmp_path / "elsewhere")
    run.path.symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match=r"is a link to `.*elsewhere`, and `--overwrite` follows none"):
        prepare(recipe("train.max_steps=1"), overwrite=True)
    assert tree(tmp_path / "elsewhere") == before


def test_a_recipe_does_not_make_a_directory_a_run(recipe: Any, tmp_path: Path) -> None:
    mine = tmp_path / "run"
    mine.mkdir()
    for name in ("recipe.yaml", "notes.md", "thesis.tex"):
        (mine / name).write_text("output_dir: .\n")
    (mine / "environment.json").write_text('{"python": "3.12"}')
    before = tree(mine)
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match=r"exists and is not a run: it holds `environ"):
            train(recipe("train.max_steps=1"), overwrite=overwrite)
    assert tree(mine) == before


def test_a_run_from_before_the_mark_is_still_one(recipe: Any) -> None:
    run = train(recipe("train.max_steps=1"))
    run.mark.unlink()
    (run.path / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingError, match=r"holds what no run writes: `thesis\.tex`"):
        train(recipe("train.max_steps=1"), overwrite=True)
    (run.path / "thesis.tex").unlink()
    train(recipe("train.max_steps=2"), overwrite=True)
    assert len([line for line in run.read_metrics() if "loss" in line]) == 2
    assert run.mark.is_file()
    for name in ("environment.json", "recipe.yaml"):
        run.mark.unlink(missing_ok=True)
        (run.path / name).unlink()
        assert not is_marked(run)


def test_what_is_read_is_not_what_goes(recipe: Any, chats: Path) -> None:
    run = train(recipe("train.max_steps=1"))
    run.rejected.write_text(chats.read_text())
    before = tree(run.path)
    link = chats.with_name("link.jsonl")
    link.symlink_to(run.rejected)
    for field, value in (
        ("data.sources.0.path", run.rejected), ("data.sources.0.path", run.path / "*.jsonl"),
        ("data.sources.0.path", link), ("model.base", run.merged), ("eval.prompts", run.samples_file),
        ("chat.template", run.adapter / "chat_template.jinja"),
    ):  # fmt: skip
        if not value.exists() and "*" not in value.name:
            value.mkdir() if field == "model.base" else value.write_text('{"prompt": "hello"}\n')
            before = tree(run.path)
        with pytest.raises(RecipeError, match=rf"^`{field}: .*` is inside `output_dir: "):
            prepare(recipe(f"{field}={value}"), overwrite=True)
    assert tree(run.path) == before


def test_resume_and_overwrite_are_not_both_meant(recipe: Any) -> None:
    with pytest.raises(UsageError, match="both cannot be meant"):
        prepare(recipe(), resume=True, overwrite=True)
