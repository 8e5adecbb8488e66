"""What a merge settles before it writes a byte: the adapter fits, the files are laid out, there is room."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mamba_sft.disk import check_writable, require_space
from mamba_sft.errors import MergeError, ModelError, UsageError
from mamba_sft.json_lines import parse_json
from mamba_sft.merging.request import DTYPE_NAMES
from mamba_sft.merging.saved_adapter import EMBEDDINGS, HEAD, SavedAdapter, read_adapter
from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.model.checkpoint import base_fingerprint, read_config, read_tensors
from mamba_sft.model.checksums import file_checksum
from mamba_sft.model.loading import resolve_base
from mamba_sft.model.tensor_files import DTYPES, Layout, StoredTensors
from mamba_sft.model.tensor_headers import TensorEntry
from mamba_sft.run import (
    ADAPTER_WEIGHTS,
    BASE_FACTS,
    MERGE_REPORT,
    Run,
    check_output,
)
from mamba_sft.run_contents import check_replaceable, refuse_strangers

VOCABULARY = (EMBEDDINGS, HEAD)


@dataclass(frozen=True)
class PreparedMerge:
    """A merge that can be done.

    Args:
        run: The run it belongs to.
        output: Where the merged model goes.
        dtype: The dtype asked for, or None where every tensor keeps its own.
        facts: What training recorded of the base.
        adapter: The adapter.
        base: The base's directory.
        entries: The base's tensors.
        config: `config.json` of the merged model.
        shards: What each file of the merged model will hold, by file name.
    """

    run: Run
    output: Path
    dtype: str | None
    facts: BaseFacts
    adapter: SavedAdapter
    base: Path
    entries: dict[str, TensorEntry]
    config: dict[str, Any]
    shards: dict[str, list[Layout]]

    @property
    def source(self) -> StoredTensors:
        """The base's tensors, checked as they are read."""
        return StoredTensors(self.entries, self.facts.checksums)

    @cached_property
    def layouts(self) -> list[Layout]:
        """All tensors of the merged model."""
        return [layout for shard in self.shards.values() for layout in shard]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors of the merged model; asked for with every block that is written."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file of the merged model."""
        return [sum(layout.nbytes for layout in shard) for shard in self.shards.values()]

    @property
    def changed(self) -> int:
        """How many tensors the adapter changes."""
        return sum(self.adapter.touches(name) for name in self.entries)


def prepare_merge(run: Run, output: Path, dtype: str | None) -> PreparedMerge:
    """Checks a merge from end to end, on headers alone.

    Args:
        run: A finished run.
        output: Where the merged model goes.
        dtype: `float32`, `bfloat16`, `float16`, or None to keep every tensor's own.

    Raises:
        MergeError: The adapter is missing, is not of this base, or holds what cannot be merged; the output
            directory is someone else's; or the disk is too full.
        ModelError: The base is missing or incomplete.
    """
    prepared = match_adapter(run, output, dtype)
    _check_output(output, prepared.base, [run.adapter, run.path])
    require_space(prepared.output, prepared.sizes, "the merged model takes", MergeError)
    return prepared


def match_adapter(run: Run, output: Path, dtype: str | None) -> PreparedMerge:
    """Checks that a run's adapter and its base make one model, and lays it out; see `prepare_merge`."""
    adapter = read_adapter(run.adapter)
    facts = BaseFacts.read(run.adapter)
    base = resolve_base(facts.base, facts.revision)
    entries = read_tensors(base)
    if base_fingerprint(base) != facts.fingerprint:
        raise MergeError(
            f"`{base}` is not the base this adapter was trained on: its config or weights have changed since",
            hint=f"restore the model that `{facts.base}` was when the run started",
        )
    config = _merged_config(read_config(base), run.adapter, facts, dtype)
    if config.get("tie_word_embeddings", True) and EMBEDDINGS in adapter.rows and HEAD in entries:
        adapter.rows.setdefault(HEAD, adapter.rows[EMBEDDINGS])  # one matrix, stored under both its names
    _check_fit(adapter, entries, facts)
    _check_undamaged(run.adapter / ADAPTER_WEIGHTS, facts)
    shards = _lay_out(entries, facts, dtype)
    _check_complete(config, shards, base)
    return PreparedMerge(run, output, dtype, facts, adapter, base, entries, config, shards)


def _check_output(output: Path, base: Path, sources: Iterable[Path]) -> None:
    check_output(output, [base, *sources], "merged")
    check_writable(output, MergeError)
    if not output.name:
        raise UsageError(f"`{output}` cannot be made anew", hint="give `--output` a directory by its name")
    ours = (output / MERGE_REPORT).is_file()
    check_replaceable(output, ours, "an earlier merge", f"it has no `{MERGE_REPORT}`")
    refuse_strangers(output, [path.name for path in base.iterdir()])


def _check_undamaged(path: Path, facts: BaseFacts) -> None:
    if facts.adapter_checksum not in (None, file_checksum(path)):
        raise MergeError(
            f"`{path}` is not the file that training wrote: its checksum is another",
            hint="a disk or a copy damaged it, or it is another run's; copy the run again. If you changed it "
            f"yourself, take `adapter_checksum` out of the `{BASE_FACTS}` beside it",
        )


def _check_fit(adapter: SavedAdapter, entries: dict[str, TensorEntry], facts: BaseFacts) -> None:
    problems = []
    for module in adapter.modules:
        factors = adapter.low_rank(module)
        entry = entries.get(f"{module}.weight")
        shape = (factors.b.shape[0], factors.a.shape[1])
        if entry is None:
            problems.append(f"`{module}` has LoRA but no weight in the base")
        elif entry.shape != shape:
            problems.append(f"`{module}` is {entry.shape} in the base, {shape} in the adapter")
        if factors.bias is not None and f"{module}.bias" not in entries:
            problems.append(f"`{module}` has a LoRA bias but no bias in the base")
    modules = [name.removesuffix(".weight") for name in entries if name.endswith(".weight")]
    problems += [
        f"`{module}` is a target but has no LoRA in the adapter"
        for module in modules
        if adapter.targets(module) and module not in adapter.modules
    ]
    for name, value in adapter.whole.items():
        if name not in entries or entries[name].shape[1:] != tuple(value.shape[1:]):
            problems.append(f"`{name}` in the adapter has no tensor of its shape in the base")
    for name in VOCABULARY:
        if name in entries:
            problems += _check_rows(adapter, name, entries[name], facts)
    problems += [
        f"`{name}` has trained rows but is not in the base" for name in adapter.rows if name not in entries
    ]
    if problems:
        more = f"\n... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MergeError(
            f"the adapter in `{adapter.path}` does not fit its base:\n" + "\n".join(problems[:5]) + more,
            hint="adapter and base must be those of one training",
        )


def _check_rows(adapter: SavedAdapter, name: str, entry: TensorEntry, facts: BaseFacts) -> list[str]:
    """Rows must exist in the base or come from the adapter: where training started them is not known here."""
    if name in adapter.whole:
        return []
    ids, values = adapter.rows.get(
        name, (torch.tensor([], dtype=torch.long), torch.empty(0, *entry.shape[1:]))
    )
    size = facts.resize_to or entry.shape[0]
    if tuple(values.shape[1:]) != entry.shape[1:] or bool((ids >= size).any()):
        return [
            f"`{name}` has {size} rows of {entry.shape[1:]}; the adapter's trained rows do not fit: "
            f"{tuple(values.shape)}"
        ]
    lacking = sorted(set(range(entry.shape[0], size)) - set(ids.tolist()))
    return [f"rows {lacking} of `{name}` are neither in the base nor in the adapter"] if lacking else []


def _merged_config(config: dict[str, Any], own: Path, facts: BaseFacts, dtype: str | None) -> dict[str, Any]:
    """The base's config with what changed: stop and padding ids, the vocabulary, the dtype asked for."""
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    if (own / "generation_config.json").is_file():
        generation = _read_generation(own / "generation_config.json")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        config |= {key: generation[key] for key in ids if key in generation}
    if facts.resize_to is not None:
        config["vocab_size"] = facts.resize_to
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config


def _read_generation(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise MergeError(f"`{path}` cannot be read: {error!s:.200}", hint="copy the adapter again") from error
    if not isinstance(found, dict):
        raise MergeError(f"`{path}` is not a JSON object", hint="copy the adapter again")
    return found


def _lay_out(entries: dict[str, TensorEntry], facts: BaseFacts, dtype: str | None) -> dict[str, list[Layout]]:
    """The base's own files and order; only dtypes and the vocabulary's rows can differ."""
    shards: dict[str, list[Layout]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
        if entry.dtype not in DTYPES:
            raise MergeError(f"`{name}` is stored as {entry.dtype}; merge handles {', '.join(DTYPES)}")
        kind = DTYPE_NAMES[dtype] if dtype else entry.dtype
        rows = facts.resize_to if name in VOCABULARY and facts.resize_to else None
        shape = (rows, *entry.shape[1:]) if rows else entry.shape
        shards.setdefault(entry.file.name, []).append(Layout(name, kind, shape))
    return shards


def _check_complete(config: dict[str, Any], shards: dict[str, list[Layout]], base: Path) -> None:
    """Compares names and shapes with those of the model that `transformers` will build from the config."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    with torch.device("meta"):
        model = FalconMambaForCausalLM(FalconMambaConfig.from_dict(config))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {layout.name: layout.shape for shard in shards.values() for layout in shard}
    if model.config.tie_word_embeddings:
        expected.pop(HEAD)
        found.pop(HEAD, None)
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise ModelError(
            f"`{base}` does not hold the model of its config: {len(odd)} tensors, the first `{odd[0]}` "
            f"({found.get(odd[0], 'absent')}, the config says {expected.get(odd[0], 'absent')})",
            hint="the download or copy is not complete; fetch the model again",
        )
