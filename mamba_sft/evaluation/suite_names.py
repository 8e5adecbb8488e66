"""Which suite a name on the command line means.

The leaderboards and single tasks are run by lm-eval (`harness`) and differ in tasks and columns only;
`heldout` and `instructions` are our own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from mamba_sft.errors import UsageError
from mamba_sft.evaluation import heldout, instructions
from mamba_sft.evaluation.harness import Asked, Harness
from mamba_sft.evaluation.leaderboards import LEADERBOARDS
from mamba_sft.evaluation.suites import Suite
from mamba_sft.run import SUITES, TASKS


def asked_suites(names: str | Sequence[str] | None, tasks: str | None) -> list[Suite]:
    """Returns what is to be scored on, each suite once; they are not prepared yet.

    Args:
        names: Suites, as a list or with commas; None for none.
        tasks: Single tasks, as `find_tasks` takes them; None for none.

    Raises:
        UsageError: There is no such suite or task, or nothing was asked for.
    """
    listed = [names] if isinstance(names, str) else (names or [])
    words = [word.strip() for entry in listed for word in entry.split(",")]
    found = [find_suite(word) for word in dict.fromkeys(filter(None, words))]
    if tasks is not None:
        found.append(find_tasks(tasks))
    if not found:
        raise UsageError(
            "say what to score on with `--suite` or `--tasks`",
            hint=f"suites are {', '.join(SUITES)}; for example `--suite {SUITES[0]}`",
        )
    return found


def find_suite(name: str) -> Suite:
    """Returns the suite of a name; it is not prepared yet.

    Raises:
        UsageError: There is none.
    """
    if name in LEADERBOARDS:
        board = LEADERBOARDS[name]
        return Harness(name, [Asked(each) for each in board.loads], board)
    if name == heldout.NAME:
        return heldout.Heldout()
    if name == instructions.NAME:
        return instructions.Instructions()
    near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.5)
    raise UsageError(
        f"no suite `{name}`; there are {', '.join(f'`{each}`' for each in SUITES)}",
        hint=f"did you mean `{near[0]}`?" if near else "single tasks of lm-eval are named with `--tasks`",
    )


def find_tasks(text: str) -> Suite:
    """Returns a suite of tasks that are named one by one: `arc_easy,gsm8k:8,mine.yaml`.

    Raises:
        UsageError: None is named, or shots are no number.
    """
    asked = []
    for word in filter(None, (each.strip() for each in text.split(","))):
        name, colon, shots = word.rpartition(":")
        if colon and not shots.isdecimal():
            raise UsageError(f"`{word}`: `{shots}` is no number of shots", hint="for example `gsm8k:8`")
        path = Path(name if colon else word).expanduser()
        whole = str(path.resolve()) if path.suffix in (".yaml", ".yml") else str(path)
        asked.append(Asked(whole, int(shots) if colon else None))
    if not asked:
        raise UsageError("`--tasks` names no task", hint="for example `--tasks arc_easy,gsm8k:8`")
    if len({one.name for one in asked}) < len(asked):
        raise UsageError("`--tasks` names a task twice", hint="a task is scored with one number of shots")
    words = [one.title if one.shots is None else f"{one.title}-{one.shots}" for one in asked]
    return Harness(TASKS + re.sub(r"[^A-Za-z0-9._+-]+", "-", "+".join(words))[:80], asked)
