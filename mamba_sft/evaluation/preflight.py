"""All that would keep an evaluation from being run, told at once and before weights are read.

An evaluation takes hours, and some of what it needs is asked for only at its end: nltk's data when answers
are scored, a gated data set when its turn comes. So everything is looked for first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mamba_sft.disk import check_writable
from mamba_sft.errors import MambaSFTError, UsageError
from mamba_sft.evaluation.harness import Harness
from mamba_sft.evaluation.settings import Settings
from mamba_sft.evaluation.suites import Problem, Suite
from mamba_sft.inference.model_places import ModelPlace
from mamba_sft.model.checkpoint import base_fingerprint, resolve_base
from mamba_sft.recipe.builtin import find_path
from mamba_sft.run import TASKS
from mamba_sft.wording import count_text

LM_EVAL = "0.4.13"
"""The version that the suites were read and tried with."""
_NEEDED = ("lm_eval", "accelerate", "langdetect", "immutabledict", "nltk", "sympy", "math_verify", "antlr4")
_INSTALL = 'pip install "mamba-sft[eval]"'


class PreflightError(UsageError):
    """What stands in the way of an evaluation; the message holds all of it, one a line."""


def check_asked(suites: Sequence[Suite], settings: Settings, *, resume: bool, overwrite: bool) -> None:
    """Checks that what is asked for makes sense together, without looking at any file.

    Args:
        suites: What is to be run.
        settings: How.
        resume: Go on with results that are there.
        overwrite: Replace them.

    Raises:
        UsageError: None of the suites reads one of the settings, or results are to be kept and replaced.
    """
    template = None if settings.chat_template == "auto" else settings.chat_template
    metric = None if settings.math_metric == "original" else settings.math_metric
    more = "data sets of leaderboards and tasks lie under `--data-dir`"
    for option, value, readers, hint in (
        ("--data", settings.rows, ("heldout", "instructions"), more),
        ("--data-dir", settings.data_dir, ("leaderboard-v2", "leaderboard-v1", TASKS), None),
        ("--include-path", settings.include_path, (TASKS,), None),
        ("--math-metric", metric, ("leaderboard-v2",), None),
        ("--chat-template", template, ("leaderboard-v2", "leaderboard-v1", "instructions", TASKS), None),
    ):
        if value is not None and not any(suite.name.startswith(readers) for suite in suites):
            whose = " and ".join("`--tasks`" if one == TASKS else f"`{one}`" for one in readers)
            raise UsageError(f"nothing reads `{option} {value}`, which is for {whose}", hint=hint)
    if resume and overwrite:
        raise UsageError("`--resume` goes on with results, `--overwrite` replaces them", hint="give one")


def problems_of(
    suites: Sequence[Suite], places: Sequence[ModelPlace], settings: Settings, output: Path
) -> list[Problem]:
    """Returns everything that can be told before weights are read.

    Args:
        suites: What is to be run.
        places: The models, the one that is asked about last; none where that is one of the problems.
        settings: How.
        output: The directory of the results.
    """
    found = list(_extra_problems(suites))
    has_extra = not found
    for place in places:
        found += _base_problems(place)
        if settings.chat_template == "on" and not has_template(place):
            found.append(
                Problem(
                    f"`{place.name}` has no chat template, and `--chat-template on` asks for it",
                    "leave `--chat-template` at `auto`, or `off`",
                )
            )
    found += _place_problems(settings, output)
    asked = places[-1] if places else None
    for suite in suites:
        if isinstance(suite, Harness):  # whose data have nothing to do with the model
            found += suite.problems(asked, settings) if has_extra else []
        elif asked is not None:
            found += suite.problems(asked, settings)
    return list(dict.fromkeys(found))


def refuse(problems: Sequence[Problem]) -> None:
    """Raises what `problems_of` found.

    Raises:
        PreflightError: There is something.
    """
    if len(problems) == 1:
        raise PreflightError(problems[0].message, problems[0].hint)
    if problems:
        lines = [f"  - {each.message}" + (f"\n    {each.hint}" if each.hint else "") for each in problems]
        things = count_text(len(problems), "thing")
        raise PreflightError(f"{things} stand in the way of this evaluation:\n" + "\n".join(lines))


def has_template(place: ModelPlace) -> bool:
    """Whether a model comes with a chat template, as its files say."""
    if place.adapter is not None and place.facts is None and place.recipe is not None:
        return True  # a checkpoint of a training, which had one
    directory = place.adapter or resolve_base(place.section.base, place.section.revision, weights=False)
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _extra_problems(suites: Sequence[Suite]) -> Iterator[Problem]:
    names = [f"`{suite.name}`" for suite in suites if isinstance(suite, Harness)]
    if not names:
        return
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        packages = ", ".join(f"`{name}`" for name in missing)
        yield Problem(f"packages are missing that run {', '.join(names)}: {packages}", _INSTALL)
        return
    try:
        here = version("lm-eval")
    except PackageNotFoundError:
        here = "an unknown version"
    if here != LM_EVAL:
        yield Problem(f"lm-eval {here} is installed; the suites are those of {LM_EVAL}", _INSTALL)


def _base_problems(place: ModelPlace) -> Iterator[Problem]:
    """Whether the base is whole and, under an adapter, the one it was trained on; of files that are here."""
    directory = find_path(place.section.base)
    if not directory.is_dir():
        return
    try:
        fingerprint = base_fingerprint(directory)
    except MambaSFTError as error:
        yield Problem(error.message, error.hint)
        return
    if place.facts is not None and place.facts.fingerprint != fingerprint:
        yield Problem(
            f"`{place.section.base}` is not the base that `{place.adapter}` was trained on",
            "restore the base, or give the revision it had then as `model.revision` in the run's recipe",
        )


def _place_problems(settings: Settings, output: Path) -> Iterator[Problem]:
    for option, directory in (("--data-dir", settings.data_dir), ("--include-path", settings.include_path)):
        if directory is not None and not directory.is_dir():
            yield Problem(f"`{option} {directory}`: no such directory", None)
    try:
        check_writable(output, UsageError)
    except UsageError as error:
        yield Problem(error.message, error.hint)
