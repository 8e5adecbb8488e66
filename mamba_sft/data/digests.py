"""What the rows of a source are, as one number: whether they still are what a run was started with.

Of the prepared rows, not of the file: a file that was moved, compressed or written anew with the same rows is
the same, and other tokens are not, whatever changed them.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from mamba_sft.data.tokenizing import Tokens


class RowsDigest:
    """A digest of rows, their tokens and what of them is trained, in their order."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=16)

    def add(self, row: Iterable[Tokens]) -> None:
        """Takes the next row, by its pieces."""
        for piece in row:
            self._digest.update(len(piece.ids).to_bytes(8, "little"))
            self._digest.update(piece.ids.tobytes())
            self._digest.update(piece.trained.tobytes())
        self._digest.update(b"row")

    def text(self) -> str:
        """Returns it in hexadecimal."""
        return self._digest.hexdigest()
