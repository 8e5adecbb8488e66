"""What travels in a wheel: the package with its templates, the recipes, and of data/ what recipes use."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_the_data_that_recipes_use_and_no_more() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    data = {path for path in included if path.startswith("data/")}
    assert all(included[path] == f"mamba_sft/bundled/{path}" for path in included)
    assert data == {"data/tiny-base", *(f"data/{path.name}" for path in (ROOT / "data").glob("*.jsonl"))}
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        used = set(re.findall(r"\bdata/[\w.-]+", recipe.read_text(encoding="utf-8")))
        assert used <= data, recipe.name


@pytest.mark.slow
def test_a_built_wheel_trains_in_an_empty_directory(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    for needed in ("model/chatml.jinja", "exporting/hub/card.md.jinja", "evaluation/report.html.jinja",
                   "exporting/passage.txt", "notebook/style.css", "py.typed",
                   "bundled/recipes/quickstart.yaml"):  # fmt: skip
        assert f"mamba_sft/{needed}" in names
    assert not [name for name in names if name.startswith("mamba_sft/bundled/data") and name.endswith(".py")]
    words = ["train", "quickstart", "train.max_steps=2", "eval.prompts=null", "data.validation=0"]
    command = [sys.executable, "-m", "mamba_sft", *words]
    (tmp_path / "empty").mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run(command, check=True, cwd=tmp_path / "empty", env=environment)
    assert (tmp_path / "empty" / "runs" / "quickstart" / "adapter").is_dir()
