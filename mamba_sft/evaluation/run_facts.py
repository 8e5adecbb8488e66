"""Everything a run left behind, read for a report: what cannot be read is named, and the rest is kept.

A report is most wanted of a run that went wrong, so no damaged file may be the end of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_sft.errors import MambaSFTError
from mamba_sft.evaluation.prompts import Prompt, Sample, StepSample
from mamba_sft.evaluation.results import Results, finished
from mamba_sft.json_lines import Row, read_json_lines
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.run_contents import is_finished
from mamba_sft.wording import first_line

_MOST_STEPS = 2**53


@dataclass
class RunFacts:
    """What could be read of a run.

    Args:
        run: The run.
        problems: What could not be read, a sentence for each file or line.
        recipe_text: `recipe.yaml` as it stands.
        recipe: The same, read; None where it cannot be.
        environment: Versions, hardware, date, and the figures of a finished run.
        metrics: The logged lines: `step`, and numbers by their names.
        data: What was seen of the rows.
        samples: The sample prompts with the answers before and after.
        step_samples: The answers to some of them in between.
        files: The exported GGUF files by name.
        evaluations: What `eval` measured, a suite each: of the model, and of its base.
    """

    run: Run
    problems: list[str] = field(default_factory=list)
    recipe_text: str = ""
    recipe: Recipe | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    step_samples: list[StepSample] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    evaluations: list[list[Results]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the run is called: its directory."""
        return self.run.path.name or str(self.run.path)

    @property
    def is_finished(self) -> bool:
        """Whether training ended and all that it leaves was saved."""
        return is_finished(self.run, self.environment)

    @property
    def last_step(self) -> int:
        """The last step that was logged, 0 before the first."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def steps(self) -> int | None:
        """The optimizer steps of the whole run, where they are known."""
        length = self.data.get("length")
        steps = length.get("steps") if isinstance(length, dict) else None
        return steps if isinstance(steps, int) else None

    def series(self, name: str) -> list[tuple[float, float]]:
        """Returns (step, value) of everything logged under a name."""
        return [(line["step"], line[name]) for line in self.metrics if name in line]

    def number(self, name: str) -> float | None:
        """Returns a number of `environment.json`; None where it is missing or no number."""
        value = self.environment.get(name)
        return float(value) if value is not None and _is_number(value) else None

    def told(self, make: Callable[[], Iterator[Any]], where: Path) -> list[Any]:
        """Returns the texts or rows of texts that `make` yields of a file; if it cannot, names the file."""
        try:
            return [one if isinstance(one, str) else [str(cell) for cell in one] for one in make()]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            self.problems.append(f"`{where.name}` is not what a run writes: {type(error).__name__} {error}")
            return []


def read_facts(run: Run) -> RunFacts:
    """Reads a run directory; nothing in it has to be there, or whole."""
    facts = RunFacts(run)
    _read_recipe(facts)
    facts.environment = _json_object(facts, run.environment, needed=True)
    facts.data = _json_object(facts, run.data)
    facts.files = _json_object(facts, run.quality).get("files") or {}
    facts.metrics = list(_lines(facts, run.metrics_file, _metrics_line))
    facts.samples = list(_lines(facts, run.samples_file, _sample))
    facts.step_samples = list(_lines(facts, run.step_samples, _step_sample))
    facts.evaluations = finished(run.eval, facts.problems)
    return facts


def _read_recipe(facts: RunFacts) -> None:
    path = facts.run.recipe
    try:
        facts.recipe_text = path.read_bytes().decode("utf-8", errors="backslashreplace")
        facts.recipe = Recipe.load(path)
    except OSError as error:
        facts.problems.append(f"`{path.name}` cannot be read: {error.strerror or error}")
    except (MambaSFTError, RecursionError) as error:
        facts.problems.append(f"`{path.name}` cannot be read as a recipe: {_reason(error)}")


def _json_object(facts: RunFacts, path: Path, *, needed: bool = False) -> dict[str, Any]:
    if not path.exists() and not needed:
        return {}
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        facts.problems.append(f"`{path.name}` cannot be read: {error.strerror or error}")
    except (ValueError, RecursionError) as error:
        facts.problems.append(f"`{path.name}` cannot be read: {_reason(error)}")
    else:
        if isinstance(value, dict):
            return value
        facts.problems.append(f"`{path.name}` cannot be read: it holds no JSON object")
    return {}


def _lines(facts: RunFacts, path: Path, parse: Callable[[Any], Any]) -> Iterator[Any]:
    """What the lines of a file hold; the bad ones are one sentence, with the first of them."""
    if not path.exists():
        return
    bad: list[str] = []
    try:
        for row in read_json_lines(path):
            try:
                yield parse(_value(row))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                bad.append(f"line {row.where.rsplit(':', 1)[-1]}: {_reason(error)}")
    except OSError as error:
        bad.append(str(error.strerror or error))
    if bad:
        more = f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        facts.problems.append(f"`{path.name}` cannot be read in full: {bad[0]}{more}")


def _value(row: Row) -> Any:
    if row.problem is not None:
        raise ValueError(row.problem)
    if not isinstance(row.value, dict):
        raise TypeError("no JSON object")
    return row.value


def _metrics_line(value: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: float(number) for name, number in value.items() if _is_number(number)}
    strange = [name for name, number in value.items() if name not in numbers and number is not None]
    if strange:
        raise ValueError(f"`{strange[0]}` is no number")
    return numbers | {"step": _step(value)}


def _sample(value: dict[str, Any]) -> Sample:
    return Sample(_prompt(value), _text(value["before"], "before"), _text(value["after"], "after"))


def _step_sample(value: dict[str, Any]) -> StepSample:
    return StepSample(_step(value), _prompt(value), _text(value["given"], "given"))


def _prompt(value: dict[str, Any]) -> Prompt:
    for name in ("answer", "system"):
        if value.get(name) is not None:
            _text(value[name], name)
    _text(value["prompt"], "prompt")
    return Prompt.from_sample(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` is no text")
    return value


def _step(value: dict[str, Any]) -> int:
    step = value["step"]
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MOST_STEPS:
        raise ValueError("`step` is no whole number")
    return step


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return isinstance(value, float) or abs(value) < _MOST_STEPS**4


def _reason(error: BaseException) -> str:
    return f"no {error}" if isinstance(error, KeyError) else first_line(error)
