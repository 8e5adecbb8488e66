"""Answers that were given before something ended the work: found again, and gone on with. Imports no torch.

`answers.unfinished.jsonl` holds the answers, in the order they came. The file with `.record` behind its
name holds in its first line what they depend on (model, sampling, ...), then the number of each one's prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mamba_sft.disk import reason
from mamba_sft.errors import UsageError
from mamba_sft.inference.answer import Answer, row_line
from mamba_sft.inference.fingerprints import fingerprint
from mamba_sft.inference.model_places import ModelPlace
from mamba_sft.inference.prompt_rows import PromptRow
from mamba_sft.inference.request import Running
from mamba_sft.inference.sampling import Sampling
from mamba_sft.json_lines import parse_json
from mamba_sft.wording import shown

Asked = Mapping[str, Any]
"""What answers depend on besides their prompts."""


@dataclass(frozen=True)
class Unfinished:
    """A file that was not finished.

    Args:
        path: The answers.
        found: The answers in it, by the numbers of their prompts, in the order they came.
        size: Bytes of them: what is behind is half of a row.
        record_size: The same of the record.
    """

    path: Path
    found: dict[int, Answer]
    size: int
    record_size: int


def name_of(output: Path, number: int) -> Path:
    """Returns the name of an unfinished file: the first, or a later one where earlier ones are kept."""
    return output.with_name(f"{output.stem}.unfinished{number if number > 1 else ''}{output.suffix}")


def record_of(unfinished: Path) -> Path:
    """Returns the file that says of what model and prompts the answers in a file are."""
    return unfinished.with_name(unfinished.name + ".record")


def find_unfinished(output: Path, rows: Sequence[PromptRow], asked: Asked) -> Unfinished | None:
    """Returns the last file that was begun for `output`; None where none was.

    Args:
        output: Where the answers are to be.
        rows: All prompts.
        asked: From `asked_of`.

    Raises:
        UsageError: It was begun with another model, sampling or prompt, or cannot be read.
    """
    last = None
    for number in count(1):
        if not name_of(output, number).exists():
            break
        if record_of(name_of(output, number)).exists():
            last = name_of(output, number)
    if last is None:
        return None
    try:
        return _read(last, rows, asked)
    except OSError as error:
        raise UsageError(f"cannot read `{last}`: {reason(error, last)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"`{last}` cannot be gone on with: it is damaged", hint=f"move it away, or {_ANEW}"
        ) from error


_ANEW = "leave `--resume` out to begin anew"


def _read(path: Path, rows: Sequence[PromptRow], asked: Asked) -> Unfinished:
    begun, *numbers = _whole_lines(record_of(path))
    _compare(path, parse_json(begun), asked)
    found: dict[int, Answer] = {}
    size, record_size = 0, len(begun)
    for line, number_line in zip(_whole_lines(path), numbers, strict=False):
        number, value = int(number_line), parse_json(line)
        answer = Answer(value["answer"], value["finish_reason"], value["tokens"])
        if number >= len(rows):
            raise UsageError(
                f"`{path}` answers prompt {number + 1}, and there are {len(rows)}",
                hint=f"give all, or {_ANEW}",
            )
        if line != row_line(rows[number], answer):
            raise UsageError(
                f"{rows[number].where} is not the prompt that `{path}` has an answer to",
                hint=f"give the same prompts, or {_ANEW}",
            )
        found[number] = answer
        size, record_size = size + len(line), record_size + len(number_line)
    return Unfinished(path, found, size, record_size)


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _compare(path: Path, before: Asked, now: Asked) -> None:
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differ:
        changes = ", ".join(
            f"`{name}` {shown(str(before.get(name)))} (now {shown(str(now.get(name)))})" for name in differ
        )
        raise UsageError(f"`{path}` was begun with {changes}", hint=f"give the same, or {_ANEW}")


def asked_of(identity: Asked, sampling: Sampling, system: str | None, raw: bool) -> dict[str, Any]:
    """Returns all that the answer to a prompt depends on, as JSON has it.

    Args:
        identity: Of the model, from `identity_of`.
        sampling: How tokens are chosen.
        system: The system message that was asked for, or None.
        raw: Whether texts are continued as they are.
    """
    asked = {**identity, **asdict(sampling), "system": system, "raw": raw}
    return dict(json.loads(json.dumps(asked)))


def identity_of(place: ModelPlace, running: Running) -> dict[str, Any]:
    """Returns what tells a model from others, and how it is held.

    Args:
        place: Where it is.
        running: How it is to be run.

    Raises:
        ModelError: The model is not there, or not complete.
    """
    held = {
        name: getattr(running, name) or getattr(place.section, name) for name in ("dtype", "quantization")
    }
    return {"model": place.name, "fingerprint": fingerprint(place), **held}
