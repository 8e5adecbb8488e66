"""The verb `doctor`."""

from __future__ import annotations

import logging
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mamba_sft.cli.console import Json, err, loading, out, quiet_loading, write_json

if TYPE_CHECKING:
    from mamba_sft.diagnostics.diagnosis import Diagnosis
    from mamba_sft.diagnostics.software import Finding
    from mamba_sft.diagnostics.stock_tools import Claim

MARKS = {"ok": ("✓", "ok", "green"), "note": ("!", "!!", "yellow"), "problem": ("✗", "XX", "bold red")}
NAME_WIDTH, LEAST_WIDTH = 17, 40


def doctor(
    why: Annotated[
        bool, typer.Option("--why", help="Show what stock tools get wrong on this model, here and now.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what will run here, and what would make it faster.

    Exit code 1 only if something makes training impossible.

    Example: mamba-sft doctor
    """
    if why:
        _show_why(as_json)
        return
    from mamba_sft.diagnostics.diagnosis import diagnose

    logging.getLogger("mamba_sft").setLevel(logging.ERROR)  # what the kernels would say is in the findings
    with err.status(
        "looking at this machine"
    ):  # seconds, most of them torch's start; shown on a terminal only
        diagnosis = diagnose()
    if as_json:
        sys.stdout.write(diagnosis.to_json() + "\n")
    else:
        _show_diagnosis(diagnosis)
    if diagnosis.status == "problem":
        raise typer.Exit(1)


def _show_why(as_json: bool) -> None:
    with loading("torch, transformers and peft"):
        from mamba_sft.diagnostics.stock_tools import claims

    quiet_loading()
    found = []
    with err.status("trying stock tools on the tiny base") as status:  # half a minute the first time
        for claim in claims():
            found.append(claim)
            if not as_json:
                status.stop()  # else what goes to stdout would stand in its line
                out.print(_claim(claim))
                status.start()
    if as_json:
        write_json([claim.to_dict() for claim in found])
    if not all(claim.kept for claim in found):
        raise typer.Exit(1)


def _claim(claim: Claim) -> Text:
    """A claim and what was seen of it: a cross where it goes wrong, a tick where it does not."""
    text = Text(f"{claim.title}\n", style="bold")
    seen = (("stock", claim.stock, "problem" if claim.shown else "ok"), ("here", claim.ours, "ok"))
    for name, words, status in seen:
        mark, plain, style = MARKS["problem" if name == "here" and not claim.kept else status]
        if not out.encoding.lower().startswith("utf"):
            mark = plain
        start = f"  {mark} {name:<6}"
        text.append(start, style=style)
        text.append(_wrapped(words, len(start)) + ("\n" if name == "stock" else ""), style="not bold")
    return text


def _show_diagnosis(diagnosis: Diagnosis) -> None:
    section = None
    for finding in diagnosis.findings:
        if finding.section != section:
            section = finding.section
            out.print(Text(section, style="bold"))
        out.print(_line(finding))
    counts = {status: sum(one.status == status for one in diagnosis.findings) for status in MARKS}
    if counts["problem"]:
        problems = _count(counts["problem"], "problem")
        out.print(Text.assemble((problems, "bold red"), f", {_count(counts['note'], 'note')}"))
    else:
        out.print(Text.assemble(("ready to train", "bold green"), f"; {_count(counts['note'], 'note')}"))


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _line(finding: Finding) -> Text:
    """A finding, wrapped beside its name on a terminal and on one line in a pipe; its fix on a line below."""
    mark, plain, style = MARKS[finding.status]
    if not out.encoding.lower().startswith("utf"):
        mark = plain
    line = Text(f"  {mark} ", style=style)
    line.append(f"{finding.name:<{NAME_WIDTH}}", style="default")
    indent = line.cell_len
    line.append(_wrapped(finding.text, indent), style="default")
    if finding.fix:
        line.append("\n" + " " * indent + _wrapped(f"-> {finding.fix}", indent + 3), style="cyan")
    return line


def _wrapped(text: str, indent: int) -> str:
    if not out.is_terminal:
        return text
    lines = textwrap.wrap(
        text, max(out.width - indent, LEAST_WIDTH), break_on_hyphens=False, break_long_words=False
    )
    return ("\n" + " " * indent).join(lines)
