"""What is done to pages when the site is built: links to the repository, and the public names.

A page links to files beside `docs/` as GitHub needs it: `../benchmarks/LOG.md`. The site has no such files,
so these links go to the repository, where its address is known, and are plain text elsewhere.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

NAMES = "<!-- public names: put here from the docstrings when the pages are built -->"
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, page: Any, files: Any) -> str:
    """Returns a page as it is built; called by mkdocs for every page."""
    del page, files
    if NAMES in markdown:
        markdown = markdown.replace(NAMES, public_names())
    return with_outside_links(markdown, config.get("repo_url"))


def with_outside_links(markdown: str, repository: str | None) -> str:
    """Returns a page whose links out of `docs/` lead to the repository, or are their words alone."""

    def link(found: re.Match[str]) -> str:
        text, path = found.groups()
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})" if repository else text

    return OUTSIDE.sub(link, markdown)


def public_names() -> str:
    """Returns what mkdocstrings is asked for: every public name of the package, where it is defined."""
    package = importlib.import_module("mamba_sft")
    homes: dict[str, str] = package._HOMES  # of the verbs: `notebook.verbs`
    names = sorted(package.__all__)
    return "\n\n".join(f"::: mamba_sft.{homes.get(name, 'notebook.verbs')}.{name}" for name in names)
