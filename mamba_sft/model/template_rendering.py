"""A chat template as `transformers` compiles one, with its generation marks; and the loop that serves one.

Templates come with models and from files, and a few words of Jinja can compute forever or fill the memory
(`{% for %}` in `{% for %}`, `10 ** 10 ** 10`, lists of lists that are one list), in C code that nothing in
the same process can stop. So what is not ours is rendered in a process that runs this module
(`template_process` starts it), under limits that the system holds it to. It needs Jinja only, which is there
in a tenth of a second.

What templates see and can do is what `transformers` gives them; the tests hold one against the other.
"""

from __future__ import annotations

import contextlib
import io
import json
import marshal
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Marks = list[tuple[int, int]]
"""Where the stretches that the assistant writes begin and end."""

SECONDS = 3
"""Of computing, for one conversation; a long one takes some milliseconds."""
MEMORY = 1 << 30
"""Bytes that the process may take."""
LONGEST = 32_000_000
"""Characters that one conversation may become, some eight million tokens."""


class RefusedError(Exception):
    """A template that cannot be compiled, or does not render what it is given; its text is the reason."""


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: notes where its body stands in the rendered text."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: Any):
        super().__init__(environment)
        environment.generation = self
        self.length = 0
        self.marks: Marks = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _note(self, context: Any, caller: Callable[[], str]) -> str:
        body = caller()
        self.marks.append((self.length, self.length + len(body)))
        return body

    @contextmanager
    def noting(self) -> Iterator[Marks]:
        """Yields the marks of what is rendered meanwhile."""
        self.length, self.marks = 0, []
        try:
            yield self.marks
        finally:
            self.length, self.marks = 0, []


class _Dict:
    """`dict(...)`, and none of what hangs on the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Refuses names with an underscore in front, behind which Python keeps its internals."""

    def __init__(*args: Any, **values: Any) -> None:
        own, rest = args[0], args[1:]
        attributes = dict(*rest, **values)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(own, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """Returns a template, compiled.

    Raises:
        RefusedError: It is no template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    with _refusals():
        return environment.from_string(template)


def rendered(template: str, variables: dict[str, Any]) -> tuple[str, Marks]:
    """Renders one conversation; only one thread may do so at a time.

    Args:
        template: The text of a chat template.
        variables: What it sees: `messages`, `tools`, `add_generation_prompt` and the special tokens.

    Returns:
        The text, and where the generation marks stand in it.

    Raises:
        RefusedError: The template does not render this.
    """
    ready = compiled(template)
    generation = ready.environment.generation  # type: ignore[attr-defined]
    pieces: list[str] = []
    with _refusals(), generation.noting() as marks:
        for piece in ready.generate(variables):
            pieces.append(piece)
            generation.length += len(piece)
            if generation.length > LONGEST:
                raise RefusedError(f"it writes more than {LONGEST:,} characters")
    return "".join(pieces), marks


@contextmanager
def _refusals() -> Iterator[None]:
    """Whatever a template's own code raises is what is wrong with it."""
    try:
        yield
    except RefusedError:
        raise
    except TemplateSyntaxError as error:
        raise RefusedError(f"line {error.lineno}: {error.message}") from error
    except TemplateError as error:
        raise RefusedError(error.message or type(error).__name__) from error
    except RecursionError as error:
        raise RefusedError("it is nested too deeply, or calls itself without end") from error
    except MemoryError as error:
        raise RefusedError(f"it takes more than {MEMORY >> 30} GiB of memory") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        where = f"line {lines[-1]}: " if lines else ""
        raise RefusedError(f"{where}{error or type(error).__name__}") from error


def serve() -> None:
    """Answers requests until its input ends: the template first, then conversations.

    A request is its length in four bytes and then what `marshal` made of it. An answer is a line of JSON and
    then the text: what comes from here is not trusted, and JSON runs no code. Answers are sent when a request
    is empty, or when there are many.
    The process is ended by the system when it computes too long, as it cannot be trusted to end itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    _limit_memory()
    template = ""
    output = io.BufferedWriter(sys.stdout.buffer.raw, 1 << 16)  # type: ignore[union-attr]
    while len(head := sys.stdin.buffer.read(4)) == 4:
        line = sys.stdin.buffer.read(int.from_bytes(head, "big"))
        if not line:
            output.flush()
            continue
        _limit_time(SECONDS)
        answer: dict[str, Any]
        written = b""
        try:
            with _refusals():
                request = marshal.loads(line)
                if isinstance(request, str):
                    template = request
                    compiled(template)
                    answer = {"size": 0, "marks": []}
                else:
                    text, marks = rendered(template, request)
                    written = text.encode("utf-8")
                    answer = {"size": len(written), "marks": marks}
        except RefusedError as error:
            answer = {"refused": str(error)}
        _limit_time(0)
        output.write(json.dumps(answer).encode() + b"\n" + written)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system can
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _limit_time(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return
    import faulthandler

    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    serve()
