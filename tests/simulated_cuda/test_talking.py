"""Answers, merges and exports on a card: what the host gives, one wait for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TRAIN = ["train", "run", "model.dtype=float32"]
ANSWER = ["answer", "answer", "run"]


def test_answers_and_conversations(run_jobs: Callable[..., Any]) -> None:
    card, host = (run_jobs(name, TRAIN, ANSWER)["answer"] for name in ("4090", "cpu"))
    for name in ("answers", "turns", "tokens"):
        assert card[name] == host[name]
    assert not card["batch"]["mixed"]
    assert not card["chat"]["mixed"]
    written = max(card["tokens"])  # a batch writes its answers together
    for part, tokens, prompts in (("batch", written, 1), ("chat", sum(card["turn_tokens"]), 2)):
        waits = [(line, n) for line, n in card[part]["ours"].items() if "copy to the card" not in line]
        assert sum(n for _, n in waits) <= tokens + prompts, (part, waits)  # a stop token is read, too
        assert not card[part]["others"], part
        uploads = sum(n for line, n in card[part]["ours"].items() if "copy to the card" in line)
        assert uploads <= 3 * prompts, (part, card[part]["ours"])  # what is asked, not what is answered


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
        ["cli", "bench", "bench", "kernels", "--help"],
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
