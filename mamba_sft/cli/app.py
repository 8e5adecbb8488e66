"""The command line: its verbs, and what becomes of errors.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 an expected failure,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mamba_sft import __version__
from mamba_sft.cli import (
    bench,
    chat,
    data,
    doctor,
    evaluate,
    export,
    generate,
    merge,
    plan,
    recipes,
    report,
    train,
)
from mamba_sft.cli.console import err, out
from mamba_sft.cli.help import Verb, Verbs
from mamba_sft.cli.launched import leave_report
from mamba_sft.cli.printable import ConsoleHandler, PrintableFormatter, printable
from mamba_sft.disk import FULL, reason
from mamba_sft.errors import MambaSFTError
from mamba_sft.noise import quiet_libraries
from mamba_sft.processes import is_first

app = typer.Typer(
    name="mamba-sft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Turn Falcon-Mamba into an instruct model: train, merge, talk, export.

    Example: mamba-sft train quickstart
    """,
)


_NO_BUGS = (errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What a system answers, besides that there is no room, that no program is to blame for."""


def main() -> None:
    """Runs the command line; expected failures become one message and an exit code."""
    try:
        _run()
    except Exception as error:
        if leave_report(error):  # one of many processes: what started them shows the traceback
            sys.exit(1)
        raise


def _run() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started this process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as it runs
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: no character is a traceback
    try:
        app()
    except MambaSFTError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        if not leave_report(error):
            _print_after("stopped:", "bold yellow", "by Ctrl-C")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (*FULL, *_NO_BUGS):
            raise
        path = Path(str(error.filename or "."))
        what = f"`{path}`" if error.filename else "a file cannot be read or written"
        _print_error(MambaSFTError(f"{what}: {reason(error, path)}"))
        sys.exit(1)


def _print_error(error: MambaSFTError) -> None:
    if leave_report(error):
        return
    colour = "red" if error.heading == "error" else "yellow"
    _print_after(f"{error.heading}:", f"bold {colour}", error.message.removeprefix("stopped "))
    if error.hint:
        _print_after("hint:", "bold cyan", error.hint)


def _print_after(word: str, style: str, text: str) -> None:
    err.print(Text.assemble((word, style), " ", printable(text)), soft_wrap=True)


def _version(shown: bool) -> None:
    if shown:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the libraries' own messages too.")
    ] = False,
) -> None:
    """Sets up messages: ours always, those of the libraries on request."""
    speaks = is_first()  # one of several processes
    handler = ConsoleHandler(err) if speaks else logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logger = logging.getLogger("mamba_sft")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not speaks:
        out.quiet = err.quiet = True
        logger.setLevel(logging.WARNING)
    # Waiting threads sleep instead of spinning. Spinning gains nothing measurable on an idle machine; with
    # other programs about, it made a step of the quickstart five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not verbose:
        quiet_libraries()


app.command(cls=Verb)(train.train)
app.command(cls=Verb)(data.data)
app.command(cls=Verb)(merge.merge)
app.add_typer(recipes.recipes_app, name="recipes")
app.command(cls=Verb)(chat.chat)
app.command(cls=Verb)(generate.generate)
app.command(cls=Verb)(plan.plan)
app.command(cls=Verb)(doctor.doctor)
app.add_typer(bench.bench_app, name="bench")
app.command(cls=Verb)(export.export)
app.command("eval", cls=Verb)(evaluate.evaluate)
app.command(cls=Verb)(report.report)
