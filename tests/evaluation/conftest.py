"""Data sets made on the spot, where lm-eval finds them, and a run to be scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from mamba_sft.run import Run
from tests.conftest import build_model, build_tokenizer
from tests.evaluation import fixture_data
from tests.inference.conftest import make_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MuSR, IFEval and MATH, with nltk's data beside them."""
    root = tmp_path_factory.mktemp("data")
    fixture_data.write_musr(root)
    fixture_data.write_ifeval(root)
    fixture_data.write_math(root)
    fixture_data.write_sentence_data(root / "nltk")
    return root


@pytest.fixture
def reachable(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with caches of the test's own; what is not there cannot be had."""
    pytest.importorskip("lm_eval")
    import datasets
    import nltk

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(nltk.data, "path", [str(data / "nltk")])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    return data


@pytest.fixture(scope="module")
def scored_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes no special tokens but the one that ends a text, and that one often."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    model = build_model()
    model.lm_head.weight.data[:11] = 0
    model.lm_head.weight.data[11] *= 2
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory: pytest.TempPathFactory, scored_base: Path) -> Run:
    """A run with an adapter that changes the answers."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", scored_base)
