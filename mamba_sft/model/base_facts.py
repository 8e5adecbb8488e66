"""`base.json` beside an adapter: which base it was trained on, and what was done to that base.

Written when training saves the adapter; read by everything that puts the two together again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mamba_sft.errors import AdapterError
from mamba_sft.run import BASE_FACTS

_MOST_ROWS = 1 << 20
"""More than a vocabulary has."""


@dataclass(frozen=True)
class BaseFacts:
    """What training recorded of the base.

    Args:
        base: As the recipe names it.
        revision: The hub revision, or None.
        fingerprint: From `checkpoint.base_fingerprint`.
        quantization: How its weights were held: `none`, `nf4` or `int8`.
        dtype: What they were computed in, e.g. `bfloat16`.
        resize_to: Rows its vocabulary was grown to, or None.
        trained_token_ids: Rows of the vocabulary that were trained.
        checksums: Digest of every tensor of the base, by name; empty in runs from before they were recorded.
        adapter_checksum: Digest of the adapter's own file, or None likewise.
    """

    base: str
    revision: str | None
    fingerprint: str
    quantization: str
    dtype: str
    resize_to: int | None
    trained_token_ids: list[int] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    adapter_checksum: str | None = None

    def write(self, adapter: Path) -> None:
        """Writes `base.json` into an adapter's directory."""
        (adapter / BASE_FACTS).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, adapter: Path) -> BaseFacts:
        """Reads `base.json` of an adapter's directory.

        Raises:
            AdapterError: It is missing or says too little.
        """
        path = adapter / BASE_FACTS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {name: value for name, value in found.items() if name in cls.__dataclass_fields__}
            facts = cls(**known)
            facts._check()
            return facts
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            said = getattr(error, "strerror", None) or error
            raise AdapterError(
                f"`{path}` does not say which base the adapter was trained on: {said}",
                hint="training writes it beside the adapter: copy the whole directory, or give the run",
            ) from None

    def _check(self) -> None:
        """Refuses what training never records: the file may be anybody's."""
        right = {
            "base": isinstance(self.base, str) and self.base.strip() != "",
            "revision": self.revision is None or isinstance(self.revision, str),
            "fingerprint": isinstance(self.fingerprint, str),
            "quantization": self.quantization in ("none", "nf4", "int8"),
            "dtype": self.dtype in ("auto", "bfloat16", "float16", "float32"),
            "resize_to": self.resize_to is None or _is_row(self.resize_to),
            "trained_token_ids": isinstance(self.trained_token_ids, list)
            and all(map(_is_row, self.trained_token_ids)),
            "checksums": isinstance(self.checksums, dict)
            and all(isinstance(checksum, str) for checksum in self.checksums.values()),
            "adapter_checksum": self.adapter_checksum is None or isinstance(self.adapter_checksum, str),
        }
        for name, is_right in right.items():
            if not is_right:
                raise ValueError(f"`{name}` is {getattr(self, name)!r:.80}")


def _is_row(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_ROWS
