"""A conversation in a notebook: a widget where there are any, and lines of input where not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from mamba_sft.errors import MambaSFTError
from mamba_sft.inference.sessions import ChatSession, CompareSession
from mamba_sft.notebook.cell import in_notebook
from mamba_sft.notebook.markup import Block, Cell, Table, Text, View

Session = ChatSession | CompareSession


def hold(session: Session) -> Any:
    """Holds a conversation.

    Args:
        session: Who to talk to.

    Returns:
        A widget, for the notebook to show; None where the conversation was held line by line.
    """
    if in_notebook() and find_spec("ipywidgets") is not None:
        return ChatWidget(session).box
    talk(session, input, sys.stdout.write)
    return None


def talk(session: Session, read: Callable[[str], str], write: Callable[[str], Any]) -> None:
    """Reads lines and writes answers as they come, until there are no more lines, or a blank one.

    Args:
        session: Who to talk to.
        read: Shows a prompt and returns a line; anything it raises ends the conversation.
        write: Takes text.
    """
    write("a blank line ends the conversation\n")
    while True:
        try:
            line = read("> ")
        except (EOFError, KeyboardInterrupt):
            return
        except Exception as error:  # a kernel that nobody can answer has an error of its own for it
            if type(error).__name__ != "StdinNotImplementedError":
                raise
            write("nobody can type here; `generate` answers a list of prompts\n")
            return
        if not line.strip():
            return
        exchange = Exchange(session, line)
        for piece in exchange.pieces():
            write(piece)
        write("\n")


class Exchange:
    """A message and the answers to it as they grow, one of each model.

    Args:
        session: Who answers.
        message: What was said.
    """

    def __init__(self, session: Session, message: str):
        self.session = session
        self.message = message
        self.answers = [""] * (2 if isinstance(session, CompareSession) else 1)

    def grow(self) -> Iterator[None]:
        """Asks, and comes back after every piece that was written."""
        for piece in self.session.send(self.message):
            side, text = piece if isinstance(piece, tuple) else (0, piece)
            self.answers[side] += text
            yield

    def pieces(self) -> Iterator[str]:
        """Asks, and yields text as it comes; of two models one whole answer after the other."""
        shown = ""
        for _ in self.grow():
            if len(self.answers) == 1:
                yield self.answers[0][len(shown) :]
                shown = self.answers[0]
        if isinstance(self.session, CompareSession):
            names = (side.chat_model.name for side in self.session.sides)
            yield "\n".join(f"{name}: {text}" for name, text in zip(names, self.answers, strict=True))


class ChatWidget:
    """A line to type in, three buttons, and the conversation above them; of two models, side by side.

    Args:
        session: Who to talk to.
    """

    def __init__(self, session: Session):
        import ipywidgets

        self.session = session
        self.exchanges: list[Exchange] = []
        self.problem = ""
        self.conversation = ipywidgets.HTML()
        wide = ipywidgets.Layout(width="60%")
        self.line = ipywidgets.Text(placeholder="say something", continuous_update=False, layout=wide)
        self.line.observe(self._said, names="value")
        buttons = []
        for name, does in (("Send", self._send), ("Retry", self._retry), ("Reset", self._reset)):
            button = ipywidgets.Button(description=name, layout=ipywidgets.Layout(width="5.5em"))
            button.on_click(does)
            buttons.append(button)
        self.box = ipywidgets.VBox([self.conversation, ipywidgets.HBox([self.line, *buttons])])
        self._show()

    def _said(self, change: Any) -> None:
        """Enter was pressed, or the line was left."""
        if change["new"].strip():
            self.line.value = ""
            self._answer(change["new"])

    def _send(self, button: Any) -> None:
        if self.line.value.strip():  # else leaving the line has sent it already
            self.line.value = ""

    def _retry(self, button: Any) -> None:
        if self.exchanges:
            self._tried(lambda: self._answer(self.session.undo(), again=True))

    def _reset(self, button: Any) -> None:
        self.session.reset()
        self.exchanges.clear()
        self._show()

    def _answer(self, message: str, *, again: bool = False) -> None:
        if again:
            self.exchanges.pop()
        exchange = Exchange(self.session, message)
        self.exchanges.append(exchange)
        self._show()

        def ask() -> None:
            for _ in exchange.grow():
                self._show()

        if not self._tried(ask):
            self.exchanges.pop()
        self._show()

    def _tried(self, does: Callable[[], None]) -> bool:
        """Does it; an error that a user can cause is shown below the conversation."""
        self.problem = ""
        try:
            does()
        except MambaSFTError as error:
            self.problem = str(error)
        return not self.problem

    def _show(self) -> None:
        sides = [self.session] if isinstance(self.session, ChatSession) else list(self.session.sides)
        names = [side.chat_model.name for side in sides]
        blocks: list[Block] = []
        if self.exchanges:
            rows = [[Cell(one.message), *one.answers] for one in self.exchanges]
            blocks.append(Table(["you", *names], rows))
        if self.problem:
            blocks.append(Text(self.problem, "note"))
        self.conversation.value = View(f"chat with {' and '.join(names)}", blocks).html()
