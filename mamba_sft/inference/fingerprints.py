"""What tells a model from others, so that work on one is not gone on with on another. No torch.

`generate --resume` and `eval --resume` ask it, and so does who compares two results.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from mamba_sft.inference.model_places import ModelPlace
from mamba_sft.model.checkpoint import base_fingerprint, resolve_base
from mamba_sft.run import ADAPTER_WEIGHTS

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What texts are made into tokens by."""


def fingerprint(place: ModelPlace, *, adapted: bool = True) -> str:
    """Returns a digest of a model: of its base by samples, of its adapter, tokenizer and template whole.

    Of a GGUF file it is of its size and age.

    Args:
        place: Where the model is.
        adapted: Whether the adapter counts; if not, this is the base, with the adapter's tokenizer and
            template.

    Raises:
        ModelError: The model is not there, or not complete.
    """
    found = blake2b(digest_size=16)
    for part in _parts(place, adapted):
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _parts(place: ModelPlace, adapted: bool) -> Iterator[bytes]:
    if place.gguf is not None:
        status = place.gguf.stat()
        yield f"{status.st_size} {status.st_mtime_ns}".encode()
        return
    base = resolve_base(place.section.base, place.section.revision)
    yield base_fingerprint(base).encode()
    if place.adapter is not None and adapted:
        yield (place.adapter / ADAPTER_WEIGHTS).read_bytes()
    texts = place.adapter or base
    yield from (file.read_bytes() for name in _TEXT_FILES if (file := texts / name).is_file())
