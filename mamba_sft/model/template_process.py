"""Chat templates that are not ours, each rendered in a process of its own under limits of time and memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError
from mamba_sft.model import template_rendering
from mamba_sft.model.template_rendering import SECONDS, Marks, RefusedError, rendered
from mamba_sft.wording import shown

BUILT_IN_TEMPLATE = Path(__file__).with_name("chatml.jinja")
LONGEST_TEMPLATE = 1_000_000
"""Characters. The longest that models come with have some 20,000."""
_KEPT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "SYSTEMROOT")
"""What the process sees of the environment, which may hold tokens."""
_MOST = 4
"""Templates that have a process at the same time."""


class EndlessTemplateError(DataError):
    """A template that computed too long: it is not asked again."""


class TemplateProcess:
    """Renders with one template. It is not for several threads at once.

    Args:
        template: Its text.
    """

    def __init__(self, template: str):
        self.template = template
        self.endless: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, variables: dict[str, Any]) -> tuple[str, Marks]:
        """Renders one conversation, as `template_rendering.rendered` does.

        Raises:
            RefusedError: The template does not render this.
            EndlessTemplateError: It takes too long, now or before.
        """
        try:
            request = json.dumps(variables, default=lambda value: f"<{type(value).__name__}>")
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"what it is given is no JSON: {error}") from error
        answer = self._ask(request) or self._ask(request)  # the first may have died of what others died of
        if answer is None:
            raise RefusedError("the process that renders it dies")
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return answer["text"], [(first, last) for first, last in answer["marks"]]

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, request: str) -> dict[str, Any] | None:
        """The answer; None if the process has died, for no fault of the template that is known."""
        if self.endless is not None:
            raise EndlessTemplateError(self.endless)
        if self._process is None:
            self._process = _start()
            answer = self._exchange(json.dumps(self.template))
            if answer is None or answer:
                self.close()
                return answer
        return self._exchange(request)

    def _exchange(self, line: str) -> dict[str, Any] | None:
        process: Any = self._process
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(reply)
            return answer
        ended = process.wait()
        self.close()
        if ended == -getattr(signal, "SIGPROF", signal.SIGTERM):
            self.endless = f"the chat template takes more than {SECONDS} s of computing"
            raise EndlessTemplateError(self.endless)
        return None


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", template_rendering.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


@cache
def built_in_template() -> str:
    """Returns the text of the template that comes with the package."""
    return BUILT_IN_TEMPLATE.read_text(encoding="utf-8")


_processes: OrderedDict[tuple[int, str], TemplateProcess] = OrderedDict()


def render_template(template: Any, variables: dict[str, Any]) -> tuple[str, Marks]:
    """Renders one conversation; only one thread may do so at a time.

    Raises:
        RefusedError: The template does not render this, or is none.
        EndlessTemplateError: It takes too long.
    """
    check_template(template)
    if template == built_in_template():
        return rendered(template, variables)
    key = os.getpid(), template  # a process that was forked off needs its own
    if key not in _processes:
        _processes[key] = TemplateProcess(template)
        while len(_processes) > _MOST:
            _, oldest = _processes.popitem(last=False)
            oldest.close()
    _processes.move_to_end(key)
    return _processes[key].render(variables)


def check_template(template: Any) -> None:
    """Checks that a chat template is a text that a tokenizer can keep.

    Raises:
        RefusedError: It is not.
    """
    if not isinstance(template, str):
        raise RefusedError(f"it is no text but {shown(repr(template))}")
    if len(template) > LONGEST_TEMPLATE:
        raise RefusedError(f"it has more than {LONGEST_TEMPLATE:,} characters")
    try:
        template.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError(f"it holds half of a surrogate pair, at character {error.start:,}") from error
