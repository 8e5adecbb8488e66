"""Records a terminal as an SVG that moves: real commands, seen through a pseudo-terminal.

    python docs/computed/recording.py                                        # the quickstart, minutes
    python docs/computed/recording.py --output plan.svg mamba-sft plan instruct-t4 --card t4

They run where there is nothing but a copy of `recipes/` and `data/`. A screen is kept every few seconds
and whenever half of it has scrolled away; the last one is shown longer, and alone to whoever asks
for less motion. Nothing is drawn that was not on the screen.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pyte

QUICKSTART = (
    ("mamba-sft", "train", "recipes/quickstart.yaml"),
    ("mamba-sft", "generate", "runs/quickstart", "--prompt", "Name the capital of Dosor."),
)
ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs/quickstart.svg"
COLUMNS, ROWS = 100, 30
SHOWN_S, READ_S, LAST_S, MOST = 0.6, 3.0, 8.0, 24
"""Seconds that a screen is shown, one with much to read, and the last one; the most of the first kind."""
WIDTH, HEIGHT, MARGIN, TOP = 8.4, 19, 18, 44
"""Of a character and of a line, around the text, and above it, in pixels."""
COLOURS = {
    "default": "#d8dee9", "black": "#4c566a", "red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341",
    "blue": "#79c0ff", "magenta": "#d2a8ff", "cyan": "#76e3ea", "white": "#ffffff",
    "brightblack": "#8b949e", "brightred": "#ffa198", "brightgreen": "#aff5b4", "brightbrown": "#f2cc60",
    "brightblue": "#a5d6ff", "brightmagenta": "#e2c5ff", "brightcyan": "#b3f0ff", "brightwhite": "#ffffff",
}  # fmt: skip

Line = tuple[tuple[int, str, str, bool], ...]
"""What stands in a line of a screen: column, text, colour and whether it is bold, piece by piece."""


@dataclass(frozen=True)
class Shot:
    """A screen that was kept.

    Args:
        lines: What stood on it.
        seconds: How long it is shown.
    """

    lines: tuple[Line, ...]
    seconds: float = SHOWN_S


@dataclass(frozen=True)
class Recording:
    """What a command showed.

    Args:
        shots: The screens that were kept, the last one as the command left it.
        seconds: How long the command took.
    """

    shots: list[Shot]
    seconds: float


class CountingScreen(pyte.Screen):
    """A terminal's screen that counts the lines which scroll out of it."""

    scrolled = 0

    def index(self) -> None:
        """Moves down a line, or everything up."""
        self.scrolled += self.cursor.y == self.lines - 1
        super().index()


def record(
    commands: Sequence[Sequence[str]], columns: int = COLUMNS, rows: int = ROWS, every: float = 0.0
) -> Recording:
    """Runs commands one after the other in a terminal of their own and keeps its screens.

    Args:
        commands: What to run; they are found beside this Python.
        columns: Width of the terminal.
        rows: Its height.
        every: Seconds between two screens that are kept; 0 keeps each one that differs.
    """
    screen = CountingScreen(columns, rows)
    stream = pyte.ByteStream(screen)
    shots: list[Shot] = []
    started = kept = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for name in ("recipes", "data"):
            shutil.copytree(ROOT / name, Path(place, "mamba-sft", name))
        for command in commands:
            stream.feed(f"$ {shlex.join(command)}\r\n".encode())
            shots.append(Shot(lines_of(screen), READ_S if shots else SHOWN_S))
            for chunk in output_of(command, Path(place), columns, rows):
                for line in chunk.splitlines(keepends=True):
                    stream.feed(line)
                    if screen.scrolled >= rows // 2:
                        screen.scrolled = 0
                        shots.append(Shot(lines_of(screen), READ_S))
                if time.monotonic() - kept >= every and (seen := lines_of(screen)) != shots[-1].lines:
                    shots.append(Shot(seen))
                    kept = time.monotonic()
    seconds = time.monotonic() - started
    last = lines_of(screen)
    return Recording([*(one for one in shots if one.lines != last), Shot(last, LAST_S)], seconds)


def output_of(command: Sequence[str], place: Path, columns: int, rows: int) -> Iterator[bytes]:
    """Yields what a command writes to its terminal, until it ends.

    Args:
        command: What to run.
        place: Where `mamba-sft/` is, in which it runs; what it caches goes there too.
        columns: Width of the terminal.
        rows: Its height.

    Raises:
        SystemExit: The command failed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
    own |= {"MAMBA_SFT_CACHE": f"{place}/cache", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=place / "mamba-sft", env=os.environ | own, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        while select.select([ours], [], []):
            yield os.read(ours, 1 << 16)
    except OSError:  # what reading from a terminal that nobody writes to any more comes to
        pass
    finally:
        os.close(ours)
        code = process.wait()
    if code:
        sys.exit(f"`{shlex.join(command)}` ended with exit code {code}")


def lines_of(screen: pyte.Screen) -> tuple[Line, ...]:
    """Returns the lines of a screen, those below the last written one left out."""
    lines = [tuple(pieces(screen.buffer[row], screen.columns)) for row in range(screen.lines)]
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def pieces(row: Any, columns: int) -> Iterator[tuple[int, str, str, bool]]:
    """Yields the stretches of a line that look alike, blank ones left out."""
    start, text, look = 0, "", ("default", False)
    for column in range(columns + 1):
        cell = row[column] if column < columns else None
        own = (cell.fg, cell.bold) if cell else None
        if own != look or not cell:
            if text.strip():
                lead = len(text) - len(text.lstrip())
                yield start + lead, text.strip(), *look
            start, text, look = column, "", own or look
        text += cell.data if cell else ""


def chosen(shots: list[Shot], most: int = MOST) -> list[Shot]:
    """Returns the screens with much to read, and of the others at most so many, evenly from all."""
    brief = [at for at, shot in enumerate(shots) if shot.seconds == SHOWN_S]
    step = max(1.0, len(brief) / most)
    kept = {brief[int(at * step)] for at in range(min(most, len(brief)))}
    return [shot for at, shot in enumerate(shots) if at in kept or shot.seconds != SHOWN_S]


def drawn(recording: Recording, title: str) -> str:
    """Returns a recording as SVG; lines that several screens share are in it once."""
    shots = chosen(recording.shots)
    known: dict[Line, str] = {}
    for line in (line for shot in shots for line in shot.lines if line):
        known.setdefault(line, f"l{len(known)}")
    height = TOP + max(len(shot.lines) for shot in shots) * HEIGHT + MARGIN
    width = round(COLUMNS * WIDTH + 2 * MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{style([shot.seconds for shot in shots])}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>',
        *(f'<circle cx="{20 + 18 * at}" cy="20" r="6" fill="{colour}"/>'
          for at, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))),
        f'<text x="{width / 2}" y="25" text-anchor="middle" fill="#8b949e">{escape(title)}</text>',
        "<defs>",
        *(f'<g id="{name}">{"".join(map(piece, line))}</g>' for line, name in known.items()),
        "</defs>",
    ]  # fmt: skip
    for at, shot in enumerate(shots):
        uses = "".join(
            f'<use href="#{known[line]}" x="{MARGIN}" y="{TOP + row * HEIGHT + 14}"/>'
            for row, line in enumerate(shot.lines)
            if line
        )
        parts.append(f'<g class="s s{at}">{uses}</g>')
    return "\n".join([*parts, "</svg>", ""])


def style(seconds: Sequence[float]) -> str:
    """Returns the style sheet: which screen is seen when, given how long each is."""
    last, total = len(seconds) - 1, sum(seconds)
    rules = [
        "text{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}",
        f".s{{visibility:hidden}}.s{last}{{visibility:visible}}",
        "@media (prefers-reduced-motion:no-preference){",
    ]
    for at in range(len(seconds)):
        begin, end = (100 * sum(seconds[:until]) / total for until in (at, at + 1))
        seen = f"{begin:.2f}%,{end:.2f}%{{visibility:visible}}"
        before = f"0%,{begin - 0.01:.2f}%{{visibility:hidden}}" if at else ""
        after = f"{end + 0.01:.2f}%,100%{{visibility:hidden}}" if at < last else ""
        rules.append(f"@keyframes k{at}{{{before}{seen}{after}}}")
        rules.append(f".s{at}{{animation:k{at} {total:.1f}s step-end infinite}}")
    return "".join([*rules, "}"])


def piece(one: tuple[int, str, str, bool]) -> str:
    """Returns the text of a stretch, as wide as its characters are on the screen."""
    column, text, colour, bold = one
    fill = COLOURS.get(colour) or (f"#{colour}" if len(colour) == 6 else COLOURS["default"])
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{column * WIDTH:.1f}" textLength="{len(text) * WIDTH:.1f}" fill="{fill}"{weight}>'
        f"{escape(text)}</text>"
    )


def main() -> None:
    """Records the commands and writes the SVG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to")
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two screens")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the quickstart, if none is given")
    asked = parser.parse_args()
    commands = (tuple(asked.command),) if asked.command else QUICKSTART
    recording = record(commands, every=asked.every)
    asked.output.write_text(drawn(recording, shlex.join(commands[0])), encoding="utf-8")
    print(f"{asked.output}: {recording.seconds:.0f} s, {len(recording.shots)} screens")


if __name__ == "__main__":
    main()
