"""Answers, merges and exports on a card: what the host gives, one wait for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

TRAIN = ["train", "run", "model.dtype=float32"]
ANSWER = ["answer", "answer", "run"]


def test_answers_and_conversations(run_jobs: Callable[..., Any]) -> None:
    """With recorded steps and, where these go wrong, without them: the host's answers."""
    wrong = ["answer", "wrong", "run", "wrong"]
    card = run_jobs("4090", TRAIN, ANSWER, wrong)
    host = run_jobs("cpu", TRAIN, ANSWER)["answer"]
    for found in (card["answer"], card["wrong"]):
        for name in ("answers", "turns", "tokens"):
            assert found[name] == host[name]
        assert not found["batch"]["mixed"]
        assert not found["chat"]["mixed"]
    recorded = card["answer"]
    assert recorded["said"] == []
    assert recorded["replays"] >= 3 * 8  # a batch and two turns of 12 tokens, from the fourth on
    assert card["wrong"]["replays"] == 1  # tried, found to be wrong, not used and not tried again
    assert card["wrong"]["said"] == [
        "tokens are computed launch by launch, not as one CUDA graph: it does not give what the model gives"
    ]
    written = max(recorded["tokens"])  # a batch writes its answers together
    for part, tokens, starts in (("batch", written, 1), ("chat", sum(recorded["turn_tokens"]), 2)):
        lines = recorded[part]["ours"].items()
        uploads = sum(n for line, n in lines if "copy to the card" in line)
        assert uploads <= 2 * starts, lines  # what is asked, not what is answered
        assert sum(n for _, n in lines) - uploads <= tokens + 2 * starts, lines  # a stop token, a comparison
        assert not recorded[part]["others"], part


def test_a_step_that_waits_is_not_recorded(run_jobs: Callable[..., Any]) -> None:
    """bitsandbytes looks for outliers at every int8 product, which no capture permits."""
    run = ["train", "run", "model.quantization=int8"]
    found = run_jobs("h100", run, ["answer", "answer", "run"])["answer"]
    assert found["replays"] == 0
    assert len(found["said"]) == 1
    assert "operation not permitted when stream is capturing" in found["said"][0]
    assert [len(text) > 0 for text in found["answers"]] == [True] * 3


def test_merging_exporting_and_the_verbs(run_jobs: Callable[..., Any]) -> None:
    jobs = [
        TRAIN,
        ["cli", "merge", "merge", "run"],
        ["cli", "export", "export", "run", "--format", "hf"],
        ["answer", "merged", "run/merged"],
        ["cli", "generate", "generate", "run", "--prompt", "What is 7 plus 5?", "--temperature", "0.7",
         "--seed", "1", "--max-new-tokens", "6"],
        ["cli", "doctor", "doctor"],
        ["cli", "plan", "plan", "quickstart"],
    ]  # fmt: skip
    card = run_jobs("t4", *jobs)
    host = run_jobs("cpu", *(job for job in jobs if job[1] in ("run", "merge", "merged")))
    for name, found in card.items():
        if "exit_code" in found:
            assert found["exit_code"] == 0, (name, found["out"], found["err"])
        assert not found.get("mixed"), name
    assert card["merged"]["answers"] == host["merged"]["answers"]
    assert "Tesla T4" in card["doctor"]["out"]
    assert "logits differ from base + adapter by" in card["merge"]["err"]


@pytest.mark.slow
def test_the_kernel_benchmark(run_jobs: Callable[..., Any]) -> None:
    found = run_jobs("h100", ["cli", "bench", "bench", "kernels", "--device", "cuda", "--quick"])["bench"]
    assert found["exit_code"] == 0, found["err"]
    assert "scan, backend triton, bfloat16" in found["out"]
    assert not found["mixed"]
