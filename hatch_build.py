"""What a package index shows: the README with links that work there, and the project's addresses.

On an index's page a link to `docs/chat.md` leads nowhere. The environment variable `REPOSITORY_URL` says
where the repository is, as for `mkdocs build`; the workflows know theirs, so no address is written down in
the tree. Links then lead to the files of this version's tag. Without it the README goes along as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LOCAL_LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)\)")
PICTURES = (".svg", ".png")
ADDRESS_SENTENCE = " `REPOSITORY` is the address of this page."
"""True where the repository is read, and false on an index's page."""


class IndexPage(MetadataHookInterface):
    """Fills in what pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the text of the page, and the links beside it where the address is known."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        if address:
            tag = f"v{metadata['version']}"
            text = page(text, address, tag)
            metadata["urls"] = addresses(address, tag)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def page(readme: str, address: str, tag: str) -> str:
    """Returns the README as an index shows it: every file it names is a link into the repository."""

    def whole(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith(PICTURES) else "blob"
        file = (
            f"README.md{link[1]}" if link[1].startswith("#") else link[1]
        )  # headings have other names there
        return f"]({address}/{kind}/{tag}/{file})"

    text = readme.replace(ADDRESS_SENTENCE, "").replace("git clone REPOSITORY ", f"git clone {address} ")
    return LOCAL_LINK.sub(whole, text)


def addresses(address: str, tag: str) -> dict[str, str]:
    """Returns what an index shows beside the page, under the names that PyPI knows."""
    return {
        "Source": address,
        "Documentation": f"{address}/blob/{tag}/docs/index.md",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
