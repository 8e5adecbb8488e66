"""What the pages take from the code: computed here, put between marks, and held current by a test.

    python docs/computed/pages.py                # write them anew, after a change of fields, hints or plans

Between `<!-- computed: docs/computed/NAME.py -->` and `<!-- until here -->` stands what `text()` of that file
returns; README.md has such blocks too. `many_gpus.py` in `benchmarks/` does the same for its page.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # the files beside this one, also where it is loaded by its path
BLOCK = re.compile(r"<!-- computed: docs/computed/(\w+)\.py -->\n(.*?)<!-- until here -->", re.DOTALL)


def computed_pages() -> list[Path]:
    """Returns the pages that have something computed."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if BLOCK.search(page.read_text(encoding="utf-8"))]


def with_computed(page: str) -> str:
    """Returns a page's text with everything computed anew."""

    def block(found: re.Match[str]) -> str:
        text = importlib.import_module(found[1]).text()
        return f"<!-- computed: docs/computed/{found[1]}.py -->\n\n{text.strip()}\n\n<!-- until here -->"

    return BLOCK.sub(block, page)


def main() -> None:
    """Writes the pages anew and says which have changed."""
    for page in computed_pages():
        before = page.read_text(encoding="utf-8")
        after = with_computed(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
