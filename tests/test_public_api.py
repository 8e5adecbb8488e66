"""The names people import, and what they take: a change here is a change for every user."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mamba_sft
from mamba_sft import Recipe, Run, errors, kernels
from mamba_sft.kernels.falcon_mamba import install

SIGNATURES: dict[str, tuple[Any, str]] = {
    "train": (
        mamba_sft.train,
        "recipe, *, resume=False, overwrite=False, allow_changed_data=False, finish=False, callbacks=()",
    ),
    "merge": (mamba_sft.merge, "run, *, output=None, dtype=None, onto='base', progress=None"),
    "export": (
        mamba_sft.export,
        "run, *, format='gguf', quantization=None, output=None, name=None, adapter_only=False,"
        " options=None, progress=None",
    ),
    "generate": (
        mamba_sft.generate,
        "model, prompts, *, output=None, sampling=None, system=None, raw=False, batch_size=8, on_answer=None",
    ),
    "doctor": (mamba_sft.doctor, ""),
    "memory": (mamba_sft.memory, ""),
    "plan": (mamba_sft.plan, "recipe, *, card=None"),
    "preview": (mamba_sft.preview, "recipe, *, rows=3"),
    "chat": (mamba_sft.chat, "model, *, compare=False, merged=False, sampling=None, system=None"),
    "evaluate": (
        mamba_sft.evaluate,
        "model, suite='heldout', *, tasks=None, base=None, settings=None, dtype=None, quantization=None,"
        " output=None, resume=False, overwrite=False",
    ),
    "report": (mamba_sft.report, "*runs, output=None"),
    "Recipe.load": (Recipe.load, "path, overrides=()"),
    "Recipe.from_text": (Recipe.from_text, "text, name='recipe', overrides=()"),
    "Recipe.build": (Recipe.build, "**values"),
    "Recipe.to_yaml": (Recipe.to_yaml, "self"),
    "Run": (Run, "path"),
    "Run.open": (Run.open, "where"),
    "Run.newest": (Run.newest, "root=PosixPath('runs')"),
    "selective_scan": (
        kernels.selective_scan,
        "u, dt, A, B, C, D=None, z=None, *, dt_bias=None, dt_softplus=False, initial_state=None,"
        " seq_idx=None, return_final_state=False, backend='auto'",
    ),
    "causal_conv1d": (
        kernels.causal_conv1d,
        "x, weight, bias=None, *, activation='silu', initial_state=None, seq_idx=None,"
        " return_final_state=False, backend='auto'",
    ),
    "backends": (kernels.backends, ""),
    "install": (install, "model, backend='auto'"),
}


def test_the_public_names() -> None:
    assert set(mamba_sft.__all__) == {
        "GGUFOptions", "HubOptions", "MambaSFTError", "Recipe", "Run", "Sampling", "chat", "doctor",
        "evaluate", "export",
        "generate", "memory", "merge", "plan",
        "preview", "report", "train",
    }  # fmt: skip
    for name in mamba_sft.__all__:
        assert getattr(mamba_sft, name).__doc__


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_they_take(name: str) -> None:
    function, expected = SIGNATURES[name]
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    assert str(inspect.Signature(parameters)) == f"({expected})"


def test_the_parts_of_a_run_directory() -> None:
    run = Run(Path("runs/x"))
    names = {
        "recipe": "recipe.yaml", "environment": "environment.json", "adapter": "adapter",
        "checkpoints": "checkpoints", "metrics_file": "metrics.jsonl", "samples_file": "samples.jsonl",
        "rejected": "rejected.jsonl", "report": "report.html", "merged": "merged", "export": "export",
        "quality": "export/quality.json", "eval": "eval", "report_text": "report.md",
        "step_samples": "step-samples.jsonl",
    }  # fmt: skip
    for name, path in names.items():
        assert getattr(run, name).as_posix() == f"runs/x/{path}"


def test_errors_have_a_message_a_hint_and_an_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        error = kind("what", "the fix")
        assert isinstance(error, mamba_sft.MambaSFTError)
        assert (error.message, error.hint) == ("what", "the fix")
        assert error.exit_code == (2 if issubclass(kind, errors.UsageError) else 1)


def test_the_command_is_there_and_names_its_verbs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mamba_sft", "--help"], check=True, capture_output=True, text=True
    )
    verbs = ["train", "data", "merge", "recipes", "chat", "generate", "plan", "doctor", "bench", "export"]
    verbs.append("report")
    assert all(verb in done.stdout for verb in verbs)
