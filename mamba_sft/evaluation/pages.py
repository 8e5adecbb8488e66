"""How a page comes to be: templates that escape every text, and control characters in a form that is seen.

What a page shows came from data, models, recipes and file names, so none of it is trusted: text is escaped,
what would steer a reader's eye or a terminal is written out, and the page itself forbids scripts and the net.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mamba_sft.wording import printable


def _finalized(value: Any) -> Any:
    return printable(value) if type(value) is str else value  # markup of ours is of another type


def page_text(template: str, **facts: Any) -> str:
    """Returns a page of this room's templates.

    Args:
        template: The file, such as `report.html.jinja`.
        facts: What it shows; only what the template marks as safe comes in as markup.
    """
    environment = Environment(
        autoescape=True,
        finalize=_finalized,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**facts) + "\n"
