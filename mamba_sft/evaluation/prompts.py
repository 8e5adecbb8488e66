"""Sample prompts: answered before and after training, scored where the right answer is known."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError
from mamba_sft.json_lines import Row, read_json_lines, read_prompt_file
from mamba_sft.run import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One sample prompt.

    Args:
        prompt: What the user says.
        answer: The only right answer, when there is one; such prompts are scored by exact match.
        system: The system message, or None.
    """

    prompt: str
    answer: str | None = None
    system: str | None = None

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


def load_prompts(path: Path) -> list[Prompt]:
    """Reads sample prompts: JSON Lines of `{"prompt": ..., "answer": ..., "system": ...}`, or lines of text.

    Raises:
        DataError: The file is missing or a line is not such an object; the message has file and line.
    """
    return [_parse(row) for row in read_prompt_file(path, "sample prompts", hint="see `eval.prompts`")]


def _parse(row: Row) -> Prompt:
    value, known = row.value, {"prompt", "answer", "system"}
    wrong = not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not set(value) <= known
    if wrong or not all(text is None or isinstance(text, str) for text in value.values()):
        raise DataError(
            f"{row.where}: a sample prompt needs `prompt` and may have `answer` and `system`, all strings",
            hint='for example {"prompt": "What is the capital of France?", "answer": "Paris"}',
        )
    return Prompt(**value)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of prompts, the same for the same prompts in the same order."""
    text = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def is_right(prompt: Prompt, answer: str) -> bool | None:
    """Returns whether an answer is the prompt's right one (after stripping), None where it has none."""
    return None if prompt.answer is None else prompt.answer.strip() == answer.strip()


def exact_match(prompts: Sequence[Prompt], answers: Sequence[str]) -> float | None:
    """Returns the share of scored prompts answered exactly (after stripping), None when none is scored."""
    marks = [is_right(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    scored = [mark for mark in marks if mark is not None]
    return sum(scored) / len(scored) if scored else None


def pair(prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]) -> list[Sample]:
    """Returns the samples of two rounds of answers to the same prompts."""
    return [Sample(*parts) for parts in zip(prompts, before, after, strict=True)]


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes samples as JSON Lines, atomically."""
    rows = [asdict(sample.prompt) | {"before": sample.before, "after": sample.after} for sample in samples]
    write_atomically(path, _lines(rows))


def write_step_samples(path: Path, samples: Sequence[StepSample]) -> None:
    """Writes answers given while training went on as JSON Lines, atomically."""
    rows = [{"step": one.step} | asdict(one.prompt) | {"given": one.given} for one in samples]
    write_atomically(path, _lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair, as JSON escapes it


def read_samples(path: Path) -> list[Sample]:
    """Returns what `write_samples` wrote and can still be read; nothing where there is no file."""
    return [Sample(_prompt(row), row["before"], row["after"]) for row in _rows(path, ("before", "after"))]


def read_step_samples(path: Path) -> list[StepSample]:
    """Returns what `write_step_samples` wrote and can still be read; nothing where there is no file."""
    rows = [row for row in _rows(path, ("given",)) if type(row.get("step")) is int]
    return [StepSample(row["step"], _prompt(row), row["given"]) for row in rows]


def _prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(row["prompt"], row.get("answer"), row.get("system"))


def _rows(path: Path, given: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file of samples whose texts are texts; one that is damaged is told and left out."""
    for row in read_json_lines(path) if path.exists() else ():
        value = row.value if row.problem is None and isinstance(row.value, dict) else {}
        needed = [value.get(name) for name in ("prompt", *given)]
        if all(isinstance(text, str) for text in needed) and all(
            isinstance(value.get(name), str | None) for name in ("answer", "system")
        ):
            yield value
        else:
            why = row.problem or "texts are missing"
            logger.warning("`%s` is no sample and is left out: %s", row.where, why)
