"""llama.cpp's own code, as the xllamacpp wheel carries it: nothing to compile, nothing copied.

The wheel's Python API serves chats. The things needed here, quantizing rows, reading raw logits and keeping
states, are functions of llama.cpp's C interface, which the wheel's library exports. Every structure that
crosses that interface is either opaque or left as the library made it, with one exception, `llama_batch`,
whose seven fields are declared below. So no other layout is assumed, and none can change unnoticed: `load`
tries the library on known values first.

This module imports no torch: the process that loads a finished file runs on it alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from mamba_sft.errors import MambaSFTError
from mamba_sft.llama_cpp.installed import INSTALL_HINT, require_gguf

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class _Opaque(ctypes.Structure):
    """A structure passed by value whose fields are the library's business."""

    _fields_ = [("bytes", ctypes.c_ubyte * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_LOG: list[str] = []


def _keep_log(level: int, text: bytes, data: Any) -> None:
    del data
    if level >= 3:  # warnings and errors
        _LOG.append(text.decode("utf-8", "replace"))
        del _LOG[:-50]


_KEEP_LOG = _LOG_CALLBACK(_keep_log)
"""Kept here because the library goes on calling it."""


@cache
def load(*, mapped: bool = True) -> ctypes.CDLL:
    """Returns the library, checked on a row whose quantized form is known.

    Args:
        mapped: Use 4-bit weights as they lie in the file. False lets llama.cpp rearrange a copy: faster.

    Raises:
        MambaSFTError: xllamacpp is not installed, or its library is not what this code was written for.
    """
    require_gguf()
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise MambaSFTError("the installed xllamacpp has no library", hint=f"{INSTALL_HINT} again")
    try:
        library = ctypes.CDLL(spec.origin)
        _declare(library)
    except (OSError, AttributeError) as error:
        raise MambaSFTError(
            f"`{spec.origin}` lacks what exporting needs of llama.cpp: {error}", hint=INSTALL_HINT
        ) from error
    library.llama_log_set(_KEEP_LOG, None)
    library.llama_backend_init()
    if mapped:
        _keep_weights_mapped(library)
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    packed = _quantize(library, GGMLQuantizationType.Q8_0, rows, None)
    if packed.nbytes != 68 or np.abs(dequantize(packed, GGMLQuantizationType.Q8_0) - rows).max() > 0.005:
        raise MambaSFTError("xllamacpp's library does not quantize as llama.cpp does", hint=INSTALL_HINT)
    return library


def _keep_weights_mapped(library: ctypes.CDLL) -> None:
    """Has 4-bit weights used as they lie in the mapped file, not in a rearranged copy of 4 GB for the 7B.

    The switch for it is a field of a structure whose layout changes from build to build. The list of
    arrangements to choose from is a plain vector, first and last pointer, and empty without harm.
    """
    find = getattr(library, "_Z39ggml_backend_cpu_get_extra_buffer_typesv", None)
    if find is not None:  # where it goes by another name, a check takes more memory, and that is all
        find.restype = ctypes.POINTER(ctypes.c_void_p * 2)
        bounds = find().contents
        bounds[1] = bounds[0]


def _declare(library: ctypes.CDLL) -> None:
    i32, i64, size, pointer, string = (
        ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p,
    )  # fmt: skip
    floats = ctypes.POINTER(ctypes.c_float)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (size, [ctypes.c_int, floats, pointer, i64, i64, i64, floats]),
        "ggml_row_size": (size, [ctypes.c_int, i64]),
        "llama_log_set": (None, [_LOG_CALLBACK, pointer]),
        "llama_backend_init": (None, []),
        "llama_version": (string, []),
        "llama_model_default_params": (_Opaque, []),
        "llama_context_default_params": (_Opaque, []),
        "llama_model_load_from_file": (pointer, [string, _Opaque]),
        "llama_init_from_model": (pointer, [pointer, _Opaque]),
        "llama_model_free": (None, [pointer]),
        "llama_free": (None, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (i32, [pointer]),
        "llama_vocab_is_eog": (ctypes.c_bool, [pointer, i32]),
        "llama_tokenize": (
            i32, [pointer, string, i32, ctypes.POINTER(i32), i32, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_n_ctx": (ctypes.c_uint32, [pointer]),
        "llama_set_n_threads": (None, [pointer, i32, i32]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_state_seq_get_size": (size, [pointer, i32]),
        "llama_state_seq_get_data": (size, [pointer, pointer, size, i32]),
        "llama_state_seq_set_data": (size, [pointer, pointer, size, i32]),
        "llama_batch_init": (_Batch, [i32, i32, i32]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (i32, [pointer, _Batch]),
        "llama_get_logits_ith": (floats, [pointer, i32]),
        "llama_adapter_lora_init": (pointer, [pointer, string]),
        "llama_set_adapters_lora": (i32, [pointer, ctypes.POINTER(pointer), size, floats]),
    }  # fmt: skip
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def quantize(kind: GGMLQuantizationType, rows: Floats, importance: Floats | None = None) -> Bytes:
    """Quantizes rows with llama.cpp's own code; the interpreter's lock is free meanwhile.

    Args:
        kind: A quantized type.
        rows: (n, columns), a whole number of blocks a row.
        importance: How much each column matters, (columns,), or None for all the same.

    Returns:
        (n, bytes per row).

    Raises:
        MambaSFTError: llama.cpp did not write all of it.
    """
    return _quantize(load(), kind, rows, importance)


def _quantize(
    library: ctypes.CDLL, kind: GGMLQuantizationType, rows: Floats, importance: Floats | None
) -> Bytes:
    count, columns = rows.shape
    rows = np.ascontiguousarray(rows, np.float32)
    packed = np.empty((count, library.ggml_row_size(int(kind), columns)), np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = library.ggml_quantize_chunk(
        int(kind),
        rows.ctypes.data_as(floats),
        packed.ctypes.data,
        0,
        count,
        columns,
        None if weights is None else weights.ctypes.data_as(floats),
    )
    if written != packed.nbytes:  # what is left of `packed` was never initialized
        raise MambaSFTError(
            f"llama.cpp wrote {written:,} bytes of {kind.name} where {packed.nbytes:,} belong",
            hint=INSTALL_HINT,
        )
    return packed


class LoadedModel:
    """A GGUF file as llama.cpp loads it.

    Args:
        library: From `load`.
        path: The file.
        threads: Threads to compute with.
        adapter: A GGUF LoRA to put on it, or None.

    Raises:
        MambaSFTError: llama.cpp does not load it; the message has its reasons.
    """

    def __init__(self, library: ctypes.CDLL, path: Path, threads: int, adapter: Path | None = None):
        self.library = library
        _LOG.clear()
        self.model = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        if not self.model:
            raise MambaSFTError(f"llama.cpp does not load `{path}`: {''.join(_LOG).strip()}")
        self.vocabulary = library.llama_model_get_vocab(self.model)
        self.n_tokens = library.llama_vocab_n_tokens(self.vocabulary)
        self.context = library.llama_init_from_model(self.model, library.llama_context_default_params())
        if not self.context:
            raise MambaSFTError(f"llama.cpp cannot run `{path}`: {''.join(_LOG).strip()}")
        self.n_ctx = library.llama_n_ctx(self.context)
        library.llama_set_n_threads(self.context, threads, threads)
        if adapter is not None:
            self._attach(adapter)

    def close(self) -> None:
        """Frees what the library holds."""
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text; special tokens written in it count as such."""
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = self.library.llama_tokenize(
            self.vocabulary, data, len(data), buffer, len(buffer), False, True
        )
        return list(buffer[:count])

    def logits(self, ids: Sequence[int]) -> Floats:
        """Returns the logits after every token of a fresh sequence, (L, vocabulary)."""
        self.clear()
        return self._decode(ids, 0, every=True)

    def greedy(self, prompt: Sequence[int], limit: int) -> list[int]:
        """Returns the likeliest continuation of a prompt: to its stop token, or `limit` tokens."""
        self.clear()
        answer: list[int] = []
        logits, at = self._decode(prompt, 0, every=False), len(prompt)
        while len(answer) < min(limit, self.n_ctx - len(prompt)):
            token = int(logits[-1].argmax())
            answer.append(token)
            if self.library.llama_vocab_is_eog(self.vocabulary, token):
                break
            logits, at = self._decode([token], at, every=False), at + 1
        return answer

    def read(self, ids: Sequence[int], start: int) -> Floats:
        """Reads tokens on top of the state, chunk by chunk; returns the scores of the next, (vocabulary,).

        Args:
            ids: At least one.
            start: How many tokens the state has read.
        """
        for at in range(0, len(ids), self.n_ctx):
            scores = self._decode(ids[at : at + self.n_ctx], start + at, every=False)
        return np.array(scores[-1])

    def clear(self) -> None:
        """Forgets what was read."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def state(self) -> Bytes:
        """Returns a copy of the state, as `restore` takes it."""
        kept = np.empty(self.library.llama_state_seq_get_size(self.context, 0), np.uint8)
        written = self.library.llama_state_seq_get_data(self.context, kept.ctypes.data, kept.nbytes, 0)
        return kept[:written]

    def restore(self, kept: Bytes) -> None:
        """Goes back to a state.

        Raises:
            MambaSFTError: llama.cpp does not take it.
        """
        self.clear()
        if not self.library.llama_state_seq_set_data(self.context, kept.ctypes.data, kept.nbytes, 0):
            raise MambaSFTError(f"llama.cpp does not take a state of {kept.nbytes:,} bytes: {''.join(_LOG)}")

    def end_tokens(self) -> list[int]:
        """Returns the tokens that end an answer."""
        is_end = self.library.llama_vocab_is_eog
        return [token for token in range(self.n_tokens) if is_end(self.vocabulary, token)]

    def _decode(self, ids: Sequence[int], start: int, *, every: bool) -> Floats:
        wanted = range(len(ids)) if every else [len(ids) - 1]
        with self._batch(ids, start, set(wanted)) as batch:
            code = self.library.llama_decode(self.context, batch)
            if code:
                raise MambaSFTError(f"llama.cpp stopped with code {code}: {''.join(_LOG).strip()}")
        found = [self.library.llama_get_logits_ith(self.context, i) for i in wanted]
        return np.stack([np.ctypeslib.as_array(row, (self.n_tokens,)) for row in found])

    @contextmanager
    def _batch(self, ids: Sequence[int], start: int, wanted: set[int]) -> Iterator[_Batch]:
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i in wanted
            yield batch
        finally:
            self.library.llama_batch_free(batch)

    def _attach(self, adapter: Path) -> None:
        handle = self.library.llama_adapter_lora_init(self.model, str(adapter).encode())
        if not handle:
            raise MambaSFTError(f"llama.cpp does not load the adapter `{adapter}`: {''.join(_LOG).strip()}")
        handles, scales = (ctypes.c_void_p * 1)(handle), (ctypes.c_float * 1)(1.0)
        code = self.library.llama_set_adapters_lora(self.context, handles, 1, scales)
        if code:
            raise MambaSFTError(f"llama.cpp does not apply the adapter `{adapter}` (code {code})")
