"""A run's adapter and its base, summed into one checkpoint that needs neither.

The base is read and the result written a few rows at a time, so that a model of any size merges in the memory
of one layer. What is on disk is then checked against base and adapter, before the directory gets its name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mamba_sft.data.packing import Collator
from mamba_sft.data.preparing import read_corpus
from mamba_sft.disk import disk_errors_explained
from mamba_sft.errors import MambaSFTError, MergeError
from mamba_sft.inference.scoring import heldout_loss
from mamba_sft.merging.check import CheckResult, MergeCheck, MergeResult
from mamba_sft.merging.preparing import PreparedMerge, prepare_merge
from mamba_sft.merging.request import check_request
from mamba_sft.merging.saved_adapter import SavedAdapter
from mamba_sft.merging.summed import MergedTensors, write_companions
from mamba_sft.model.chat_template import render
from mamba_sft.model.checkpoint import read_tensors
from mamba_sft.model.loading import load_model
from mamba_sft.model.quantization import quantizes
from mamba_sft.model.tensor_files import StoredTensors, one_thread, write_shard
from mamba_sft.model.tensor_headers import TensorEntry
from mamba_sft.processes import peak_rss
from mamba_sft.recipe.fields import ModelSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import MERGE_REPORT, Run, atomic_directory
from mamba_sft.run_lock import hold_output
from mamba_sft.wording import size_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the stage (`merging`, `checking`), how much of it is done, and its total: bytes, layers."""

_QUESTION = "Name three things that float on water, and say why they do."


def merge(
    run: Run | str | Path,
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    onto: str = "base",
    progress: Progress | None = None,
) -> MergeResult:
    """Merges a run's adapter into its base and writes a checkpoint that `transformers` loads by itself.

    Every tensor is base + scale * B A (scaled to the trained lengths for DoRA), summed in float32 and rounded
    once. Files, index and tokenizer are laid out as the base's.

    Args:
        run: A finished run.
        output: Where to; by default the run's `merged/`. An earlier merge there is replaced at the end.
        dtype: `float32`, `bfloat16`, `float16`, or None to keep every tensor's own.
        onto: For a run on a quantized base: `base` merges into the full-precision base, `dequantized` into
            the rounded weights that the adapter was trained on. Both held-out losses are in the report.
        progress: Told how far it is.

    Raises:
        MergeError: The merge cannot be done, or its check failed; nothing is left under the final name.
        LockedError: Another process is writing there.
        MambaSFTError: The run or its base is missing or broken.
    """
    asked = check_request(run, output=output, dtype=dtype, onto=onto)
    place = asked.output
    with hold_output(place, "merge", asked.run):
        prepared = prepare_merge(asked.run, place, dtype)
        source = _source(prepared, onto)
        need = f"the merged model takes {size_text(prepared.nbytes)}"
        with disk_errors_explained(place, need, MergeError), atomic_directory(place) as directory:
            report = _merge_into(directory, prepared, source, progress or (lambda stage, done, total: None))
            (directory / MERGE_REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def _merge_into(
    directory: Path, prepared: PreparedMerge, source: StoredTensors, progress: Progress
) -> MergeResult:
    started = time.monotonic()
    tensors = MergedTensors(prepared, source, lambda done: progress("merging", done, prepared.nbytes))
    with one_thread():
        for file, layouts in prepared.shards.items():
            write_shard(directory / file, layouts, tensors.blocks)
        write_companions(prepared, directory)
        written = time.monotonic()
        if tensors.overflowed:
            logger.warning("%d values are beyond float16's range and became infinite", tensors.overflowed)
        check = _check(prepared, source, directory, tensors.checksums, progress)
    checked = time.monotonic()
    onto = "dequantized" if isinstance(source, DequantizedTensors) else "base"
    losses, note = _heldout_losses(prepared, onto, directory)
    return MergeResult(
        path=prepared.output,
        base=prepared.facts.base,
        onto=onto,
        dtype=prepared.dtype,
        tensors=len(prepared.entries),
        changed=prepared.changed,
        nbytes=prepared.nbytes,
        overflowed=tensors.overflowed,
        seconds=round(written - started, 3),
        check_seconds=round(checked - written, 3),
        peak_rss=peak_rss(),
        check=check,
        losses=losses,
        losses_note=note,
        checksums=tensors.checksums,
    )


class DequantizedTensors(StoredTensors):
    """A base's tensors as a quantized run computes with them: projections quantized, then dequantized.

    Args:
        entries: The full-precision base's tensors.
        quantization: `nf4` or `int8`.
        dtype: What the weights were loaded as before they were quantized.
        checksums: What was recorded of the stored tensors, by name.
    """

    def __init__(
        self,
        entries: dict[str, TensorEntry],
        quantization: str,
        dtype: torch.dtype,
        checksums: dict[str, str] | None = None,
    ):
        super().__init__(entries, checksums)
        self.quantization, self.dtype = quantization, dtype

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields a tensor from its first row to its last, as (row number, rows)."""
        # Shapes decide, as in `load_model`; the run recorded nothing of it. So a run of the tiny base from
        # before they did, with `x_proj` in 4 bits too, is merged as it is loaded now, with `x_proj`
        # unrounded: not quite the weights its adapter was trained on. No shape of the 7B is affected.
        if not quantizes(name, self.entries[name].shape, self.quantization):
            return super().blocks(name)
        return self._nf4(name) if self.quantization == "nf4" else self._int8(name)

    def _nf4(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        # Whole tensors would take eight times their size on the way. Blocks of 64 rows are whole NF4 blocks;
        # only the second quantization, that of the blocks' largest values, looks at the tensor as a whole.
        import bitsandbytes.functional as bnb

        pieces = [
            (start, *bnb.quantize_4bit(rows.to(self.dtype), blocksize=64, quant_type="nf4"))
            for start, rows in super().blocks(name)
        ]
        largest = torch.cat([state.absmax for _, _, state in pieces])
        offset = largest.mean()
        codes, second = bnb.quantize_blockwise(largest - offset, blocksize=256)
        largest = bnb.dequantize_blockwise(codes, second) + offset
        for start, packed, state in pieces:
            state.absmax, largest = largest[: len(state.absmax)], largest[len(state.absmax) :]
            yield start, bnb.dequantize_4bit(packed, state)

    def _int8(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        import bitsandbytes.functional as bnb

        for start, rows in super().blocks(name):
            codes, largest, _ = bnb.int8_vectorwise_quant(rows.to(self.dtype).to(torch.float16))
            yield start, bnb.int8_vectorwise_dequant(codes, largest)


def _source(prepared: PreparedMerge, onto: str) -> StoredTensors:
    if onto == "base":
        return prepared.source
    facts = prepared.facts
    return DequantizedTensors(
        prepared.entries, facts.quantization, getattr(torch, facts.dtype), facts.checksums
    )


def _check(
    prepared: PreparedMerge,
    source: StoredTensors,
    directory: Path,
    checksums: dict[str, str],
    progress: Progress,
) -> CheckResult:
    from transformers import AutoTokenizer, FalconMambaConfig

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if tokenizer.chat_template:
        prompt = render(tokenizer, [{"role": "user", "content": _QUESTION}], add_generation_prompt=True)[0]
    else:
        prompt = tokenizer.encode(_QUESTION, add_special_tokens=False)
    if not prompt:
        raise MergeError(f"the tokenizer of `{prepared.facts.base}` turns a question into no tokens at all")
    check = MergeCheck(
        base=source,
        merged=StoredTensors(read_tensors(directory), checksums),
        adapter=prepared.adapter,
        config=FalconMambaConfig.from_pretrained(directory),
        attach=partial(_attach, prepared.adapter),
    )
    result: CheckResult = check.run(prompt, lambda done, total: progress("checking", done, total))
    return result


def _attach(adapter: SavedAdapter, block: torch.nn.Module, layer: int) -> None:
    """Puts the adapter on one block through PEFT itself, so that its formulas are held against ours."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    weights = adapter.stored(f"backbone.layers.{layer}.")
    if not weights:
        return
    config = LoraConfig.from_pretrained(str(adapter.path))
    config.trainable_token_indices = None
    holder = torch.nn.ModuleDict({str(layer): block})
    for name in ("layers", "backbone"):
        holder = torch.nn.ModuleDict({name: holder})
    inject_adapter_in_model(config, holder, low_cpu_mem_usage=True)  # no start values: DoRA's are costly
    result = set_peft_model_state_dict(holder, weights, low_cpu_mem_usage=True)
    if result.unexpected_keys:
        raise MergeError(f"PEFT does not know the adapter's tensor `{result.unexpected_keys[0]}`")


def _heldout_losses(
    prepared: PreparedMerge, onto: str, directory: Path
) -> tuple[dict[str, float], str | None]:
    """Held-out loss of a quantized run merged either way, with the reason if there is none.

    One model is loaded and its projections are exchanged: the other merge needs no disk and no second model.
    """
    if prepared.facts.quantization == "none":
        return {}, None
    try:
        recipe = Recipe.load(str(prepared.run.recipe))
        rows, collator = _validation(recipe)
        if rows is None:
            return {}, "the recipe holds no validation rows back"
        _require_memory(prepared)
        section = {"base": str(directory), "dtype": prepared.dtype or prepared.facts.dtype}
        model = load_model(ModelSection.model_validate(section | {"kernels": recipe.model.kernels}))
        batch_size = recipe.eval.per_device_eval_batch_size
        losses = {onto: heldout_loss(model, rows, collator, batch_size)}
        other = "dequantized" if onto == "base" else "base"
        tensors = MergedTensors(prepared, _source(prepared, other))
        for layout in prepared.layouts:
            if quantizes(layout.name, layout.shape, prepared.facts.quantization):
                model.get_parameter(layout.name).data.copy_(torch.cat(list(tensors.blocks(layout))))
        losses[other] = heldout_loss(model, rows, collator, batch_size)
    except (MambaSFTError, torch.OutOfMemoryError) as error:  # the merge is good without them
        return {}, error.message if isinstance(error, MambaSFTError) else str(error)
    return losses, None


def _validation(recipe: Recipe) -> tuple[Dataset | None, Collator]:
    """The rows that training measured its validation loss on, in the form it had them."""
    setup, data = read_corpus(recipe)
    return data.validation_rows, Collator(setup.tokenizer.pad_token_id)


def _require_memory(prepared: PreparedMerge) -> None:
    import psutil  # type: ignore[import-untyped]

    on_card = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_card else psutil.virtual_memory().available
    needed = prepared.nbytes + (2 << 30)
    if needed > free:
        raise MergeError(f"the merged model needs {size_text(needed)} of memory, {size_text(free)} are free")
