"""Chat templates that are not ours, each rendered in a process of its own under limits of time and memory."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from mamba_sft.errors import DataError
from mamba_sft.model import template_rendering
from mamba_sft.model.portable import marked_template
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


Outcome = tuple[str, Marks] | RefusedError
"""A rendered conversation with its marks, or why there is none."""


class TemplateProcess:
    """Renders with one template. It is not for several threads at once.

    Args:
        template: Its text.
    """

    def __init__(self, template: str):
        self.template = template
        self.endless: str | None = None
        self._process: Any = None

    def render(self, conversations: Sequence[dict[str, Any]]) -> list[Outcome]:
        """Renders conversations, each as `template_rendering.rendered` does.

        Raises:
            EndlessTemplateError: One of them takes too long, now or before.
        """
        requests = [_request(variables) for variables in conversations]
        sent = [request for request in requests if isinstance(request, bytes)]
        answers = self._exchange(sent) if len(sent) > 1 else []
        for request in sent[len(answers) :]:  # it died of one of these: they are asked one by one
            answers += self._exchange([request]) or self._exchange([request], last=True)
        left = iter(answers)
        return [next(left) if isinstance(request, bytes) else request for request in requests]

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _exchange(self, requests: list[bytes], last: bool = False) -> list[Outcome]:
        """The answers; fewer where the process has died.

        Args:
            requests: What is asked, all at once: answers wait for each other, and so take half the time.
            last: Give up if it dies.

        Raises:
            EndlessTemplateError: The only request takes too long.
        """
        if self.endless is not None:
            raise EndlessTemplateError(self.endless)
        if self._process is None:
            self._process = _start()
            requests = [marshal.dumps(self.template), *requests]
            return self._exchange(requests, last)[1:]
        whole = b"".join(len(each).to_bytes(4, "big") + each for each in [*requests, b""])
        writer = threading.Thread(target=_write, args=(self._process.stdin, whole))
        writer.start()
        answers: list[Outcome] = []
        while len(answers) < len(requests) and (answer := _read(self._process.stdout)) is not None:
            answers.append(answer)
        writer.join()
        if len(answers) == len(requests):
            return answers
        ended = self._process.wait()
        self.close()
        if len(requests) <= 2 and ended == -getattr(signal, "SIGPROF", signal.SIGTERM):
            self.endless = f"the chat template takes more than {SECONDS} s of computing"
            raise EndlessTemplateError(self.endless)
        dead = RefusedError("the process that renders it dies")
        return [*answers, dead, dead][: len(requests)] if last else answers


def _request(variables: dict[str, Any]) -> bytes | RefusedError:
    try:
        return marshal.dumps(variables)
    except ValueError:  # something that is no JSON, or holds itself
        with contextlib.suppress(ValueError, RecursionError):
            plain = json.dumps(variables, default=lambda value: f"<{type(value).__name__}>")
            return marshal.dumps(json.loads(plain))
    return RefusedError("what it is given is no JSON, or nested too deeply")


def _read(pipe: BinaryIO) -> Outcome | None:
    """The next answer; None where it is not whole."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        return None
    answer = json.loads(line)
    if "refused" in answer:
        return RefusedError(answer["refused"])
    text = pipe.read(answer["size"])
    whole = len(text) == answer["size"]
    return (text.decode("utf-8"), [(first, last) for first, last in answer["marks"]]) if whole else None


def _write(pipe: BinaryIO, requests: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # who reads has died, which the answers show
        pipe.write(requests)
        pipe.flush()


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


def render_template(template: Any, conversations: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Renders conversations; only one thread may do so at a time.

    Raises:
        RefusedError: The template is none.
        EndlessTemplateError: It takes too long.
    """
    check_template(template)
    template = marked_template(template)
    if template == built_in_template():
        return [_rendered_here(template, variables) for variables in conversations]
    key = os.getpid(), template  # a process that was forked off needs its own
    if key not in _processes:
        _processes[key] = TemplateProcess(template)
        while len(_processes) > _MOST:
            _, oldest = _processes.popitem(last=False)
            oldest.close()
    _processes.move_to_end(key)
    return _processes[key].render(conversations)


def _rendered_here(template: str, variables: dict[str, Any]) -> Outcome:
    try:
        return rendered(template, variables)
    except RefusedError as error:
        return error


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
