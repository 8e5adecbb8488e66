"""Prompts with a check: answered before and after training, scored where it is known what is right.

What is right is one answer, or whatever meets constraints (`checks`), or both. The same files serve as
sample prompts (`eval.prompts`), as what `eval --suite instructions` asks, and, where the answers are in them,
as rows to train on (`data.sources`) or to score (`eval --suite heldout`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError
from mamba_sft.evaluation.checks import Check, read_checks
from mamba_sft.json_lines import Row, read_json_lines, read_prompt_file
from mamba_sft.run import write_atomically

logger = logging.getLogger(__name__)

_TEXTS, _OTHERS = ("prompt", "answer", "expected", "system"), ("checks", "small")
_WITH_ANSWER = 'for example {"prompt": "What is the capital of France?", "answer": "Paris"}'
_WITH_CHECKS = 'for example {"prompt": "Name a fruit.", "checks": {"words": {"exactly": 1}}}'
_NEEDED = "a sample prompt needs `prompt` and may have `answer` and `system`, all strings, and `checks`"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        prompt: What the user says.
        answer: The only right answer, when there is one; such prompts are scored by exact match.
        system: The system message, or None.
        checks: What an answer has to be, as far as code can tell.
        small: Whether a model of a few million weights can be asked it.
    """

    prompt: str
    answer: str | None = None
    system: str | None = None
    checks: tuple[Check, ...] = ()
    small: bool = False

    @classmethod
    def from_json(cls, value: Any) -> Prompt:
        """Returns the prompt of a line of a file; `expected` is another name of `answer`.

        Raises:
            ValueError: It is none, or `checks` are not to be understood.
        """
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise ValueError(_NEEDED)
        known = set(value) <= {*_TEXTS, *_OTHERS, "id"}
        if not known or not all(isinstance(value.get(name), str | None) for name in _TEXTS):
            raise ValueError(_NEEDED)
        if value.get("answer") is not None and value.get("expected") is not None:
            raise ValueError("`answer` and `expected` are two names of one thing")
        answer = value["answer"] if value.get("answer") is not None else value.get("expected")
        checks = read_checks(value["checks"]) if value.get("checks") is not None else ()
        return cls(value["prompt"], answer, value.get("system"), checks, value.get("small") is True)

    @classmethod
    def from_sample(cls, value: dict[str, Any]) -> Prompt:
        """Returns the prompt of a sample, which holds answers to it besides.

        Raises:
            ValueError: There is none.
        """
        return cls.from_json({name: value[name] for name in (*_TEXTS, *_OTHERS) if name in value})

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        given: dict[str, Any] = {"prompt": self.prompt, "answer": self.answer, "system": self.system}
        if self.checks:
            given["checks"] = {check.kind: check.wanted for check in self.checks}
        return given | ({"small": True} if self.small else {})

    @property
    def is_scored(self) -> bool:
        """Whether it is known what is right."""
        return self.answer is not None or bool(self.checks)

    def messages(self, default_system: str | None = None) -> list[dict[str, str]]:
        """Returns the chat that asks this prompt."""
        system = self.system or default_system
        head = [{"role": "system", "content": system}] if system else []
        return [*head, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Sample:
    """A prompt with the answers of the base (`before`) and of the tuned model (`after`)."""

    prompt: Prompt
    before: str
    after: str


@dataclass(frozen=True)
class StepSample:
    """What the model answered to a prompt after a step of training; after step 0 it is the base's answer."""

    step: int
    prompt: Prompt
    given: str


def load_prompts(path: Path, named_by: str = "eval.prompts") -> list[Prompt]:
    """Reads prompts: JSON Lines of `{"prompt": ..., "answer": ..., "system": ..., "checks": ...}`, or text.

    Args:
        path: The file.
        named_by: What names it, for the message where it cannot be read.

    Raises:
        DataError: The file is missing or a line is not such an object; the message has file and line.
    """
    return [_parse(row) for row in read_prompt_file(path, "sample prompts", hint=f"see `{named_by}`")]


def _parse(row: Row) -> Prompt:
    try:
        return Prompt.from_json(row.value)
    except ValueError as error:
        asked = isinstance(row.value, dict) and "checks" in row.value
        raise DataError(f"{row.where}: {error}", hint=_WITH_CHECKS if asked else _WITH_ANSWER) from error


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of prompts, the same for the same prompts in the same order."""
    text = json.dumps([prompt.to_json() for prompt in prompts], sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def is_right(prompt: Prompt, answer: str) -> bool | None:
    """Returns whether an answer is right: the one it has to be, stripped, and as the checks say.

    None where neither is known.
    """
    if not prompt.is_scored:
        return None
    exact = prompt.answer is None or prompt.answer.strip() == answer.strip()
    return exact and all(check.holds(answer) for check in prompt.checks)


def exact_match(prompts: Sequence[Prompt], answers: Sequence[str]) -> float | None:
    """Returns the share of scored prompts whose answer `is_right`, None when none is scored."""
    marks = [is_right(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    scored = [mark for mark in marks if mark is not None]
    return sum(scored) / len(scored) if scored else None


def score_name(prompts: Sequence[Prompt]) -> str:
    """Returns what `exact_match` of these prompts is called, which with checks is more than that."""
    return "right answers" if any(prompt.checks for prompt in prompts) else "exact match"


def pair(prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]) -> list[Sample]:
    """Returns the samples of two rounds of answers to the same prompts."""
    return [Sample(*parts) for parts in zip(prompts, before, after, strict=True)]


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes samples as JSON Lines, atomically."""
    rows = [sample.prompt.to_json() | {"before": sample.before, "after": sample.after} for sample in samples]
    write_atomically(path, _lines(rows))


def write_step_samples(path: Path, samples: Sequence[StepSample]) -> None:
    """Writes answers given while training went on as JSON Lines, atomically."""
    rows = [{"step": one.step} | one.prompt.to_json() | {"given": one.given} for one in samples]
    write_atomically(path, _lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair, as JSON escapes it


def read_samples(path: Path) -> list[Sample]:
    """Returns what `write_samples` wrote and can still be read; nothing where there is no file."""
    rows = _rows(path, ("before", "after"))
    return [Sample(prompt, row["before"], row["after"]) for prompt, row in rows]


def read_step_samples(path: Path) -> list[StepSample]:
    """Returns what `write_step_samples` wrote and can still be read; nothing where there is no file."""
    rows = [(prompt, row) for prompt, row in _rows(path, ("given",)) if type(row.get("step")) is int]
    return [StepSample(row["step"], prompt, row["given"]) for prompt, row in rows]


def _rows(path: Path, given: Sequence[str]) -> Iterator[tuple[Prompt, dict[str, Any]]]:
    """The rows of a file of samples whose texts are texts; one that is damaged is told and left out."""
    for row in read_json_lines(path) if path.exists() else ():
        value = row.value if row.problem is None and isinstance(row.value, dict) else {}
        try:
            prompt = Prompt.from_sample(value)
            if not all(isinstance(value.get(name), str) for name in given):
                raise ValueError("texts are missing")
        except ValueError as error:
            why = row.problem or error
            logger.warning("`%s` is no sample and is left out: %s", row.where, why)
        else:
            yield prompt, value
