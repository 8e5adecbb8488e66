"""Who speaks in a turn: the names that data sets give to the four roles."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from mamba_sft.data.values import BadRowError
from mamba_sft.recipe.yaml_text import flow_text

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "ai": "assistant", "model": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
"""Names known without asking: OpenAI's, ShareGPT's, OpenAssistant's, Llama's and Gemma's."""

CALLING = frozenset(("function_call", "tool_call"))
"""Names of assistant turns that hold nothing but a call."""


def fold_role(name: str) -> str:
    """A role's name as names are compared: without case and outer blanks, `_` for inner ones."""
    return "_".join(name.casefold().replace("-", " ").split())


def known_roles(mapped: Mapping[str, str]) -> dict[str, str]:
    """Folded name -> role, what the recipe says first."""
    return ROLES | {fold_role(name): role for name, role in mapped.items()}


def read_role(number: int, name: Any, roles: Mapping[str, str]) -> str:
    """The role that a turn's `name` means.

    Raises:
        BadRowError: Nobody said what it means.
    """
    role = roles.get(fold_role(name)) if isinstance(name, str) else None
    if role is None:
        close = get_close_matches(str(name).casefold(), roles, n=1, cutoff=0.7)
        mapped = f"say who it is: `roles: {{{flow_text(str(name))}: user}}` on the source"
        suggestion = f"did you mean `{close[0]}`?" if close else mapped
        raise BadRowError(f"turn {number}: unknown role {name!r:.60}; {suggestion}")
    return role
