"""Whether a merged checkpoint is what base and adapter are together, in the memory of one layer.

Two checks in one walk over the layers. Rows of every tensor are recomputed in float64 and compared with the
bytes in the file. And a prompt goes through both models, layer by layer: once through the base with the
adapter attached by PEFT, once through the merged weights, both in float32, so that the only difference left
is the rounding of the merged weights.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaBlock, FalconMambaRMSNorm

from mamba_sft.errors import MergeError
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.merging.saved_adapter import EMBEDDINGS, HEAD, SavedAdapter
from mamba_sft.model.tensor_files import DTYPES, StoredTensors, read_rows
from mamba_sft.showing import Showing

# Largest relative difference of the logits that rounding the merged weights to a dtype explains.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CHECKED_ROWS = 8

Attach = Callable[[torch.nn.Module, int], None]


@dataclass(frozen=True)
class CheckResult:
    """What the check of a merged checkpoint saw.

    Args:
        rows: Rows recomputed in float64 and found in the file.
        prompt_tokens: Length of the prompt.
        difference: Root mean square of the logits' difference, relative to that of the logits.
        largest_difference: The largest difference of any logit.
        tolerance: What `difference` was held against.
        same_next_token: Whether both models continue the prompt with the same token.
    """

    rows: int
    prompt_tokens: int
    difference: float
    largest_difference: float
    tolerance: float
    same_next_token: bool


@dataclass(frozen=True)
class MergeResult(Showing):
    """What a merge did and what its check found; stored in `merge.json`.

    Args:
        path: The merged model.
        base: The base, as the recipe names it.
        onto: `base`, or `dequantized` for the weights a quantized run was trained on.
        dtype: The dtype asked for, or None where every tensor kept its own.
        tensors: Tensors written.
        changed: How many of them the adapter changed.
        nbytes: Bytes written.
        overflowed: Values beyond float16's range, stored as infinity.
        seconds: Time to write.
        check_seconds: Time to check.
        peak_rss: The process's largest resident set so far, in bytes.
        check: What the check found.
        losses: Held-out loss of the merged model, by what was merged onto; empty where not measured.
        losses_note: Why they were not measured, or None.
        checksums: Of every tensor as it was written, by name.
    """

    path: Path
    base: str
    onto: str
    dtype: str | None
    tensors: int
    changed: int
    nbytes: int
    overflowed: int
    seconds: float
    check_seconds: float
    peak_rss: int
    check: CheckResult
    losses: dict[str, float]
    losses_note: str | None
    checksums: dict[str, str]

    def to_json(self) -> str:
        """Returns the report as JSON."""
        return json.dumps(asdict(self) | {"path": str(self.path)}, indent=2)


def stock_block(config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Returns one block of `transformers`, for inference, with the given tensors as its own."""
    with torch.device("meta"):
        block = FalconMambaBlock(config, layer_idx=0)
    block.load_state_dict(tensors, assign=True)
    for module in block.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones(buffer.shape))  # the weightless norms' place holders
    return block.eval()


class MergeCheck:
    """Compares a merged checkpoint with its base and adapter.

    Args:
        base: The base's tensors, as the merge took them.
        merged: The tensors in the written files.
        adapter: What was merged.
        config: The merged model's `FalconMambaConfig`.
        attach: Puts the adapter on one block, given the block and its number.
    """

    def __init__(
        self, base: StoredTensors, merged: StoredTensors, adapter: SavedAdapter, config: Any, attach: Attach
    ):
        self.base, self.merged, self.adapter, self.config, self.attach = base, merged, adapter, config, attach
        self.rows = 0
        self._memory: dict[str, torch.Tensor] = {}
        self._random = random.Random(0)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def run(
        self, prompt: Sequence[int], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> CheckResult:
        """Walks the layers.

        Args:
            prompt: Token ids.
            progress: Called after each layer with the number done and the total.

        Raises:
            MergeError: A row is not what it should be, or the logits differ by more than rounding explains.
        """
        ids = torch.tensor(list(prompt))
        expected, actual = self._embed(ids)
        for layer in range(self.config.num_hidden_layers):
            expected, actual = self._layer(layer, expected, actual)
            progress(layer + 1, self.config.num_hidden_layers)
        norm = "backbone.norm_f.weight"
        self._compare(norm, self.base.whole(norm).double(), self.merged.whole(norm))
        logits = self._head(self._norm(self.base, expected), self._norm(self.merged, actual))
        return self._judge(logits, len(ids))

    def _embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_vocabulary(EMBEDDINGS)
        entry, rows = self.merged.entries[EMBEDDINGS], ids.tolist()
        expected = [self._expected_rows(EMBEDDINGS, row, row + 1, torch.float32) for row in rows]
        actual = [read_rows(entry, row, row + 1).float() for row in rows]
        return torch.cat(expected)[None], torch.cat(actual)[None]

    def _layer(
        self, layer: int, expected: torch.Tensor, actual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = f"backbone.layers.{layer}."
        tensors = self.base.layer(prefix, self._memory)
        samples = {name: self._sample(prefix + name, tensor) for name, tensor in tensors.items()}
        whole = self.adapter.whole
        tensors |= {name: whole[prefix + name] for name in tensors if prefix + name in whole}
        block = install(stock_block(self.config, tensors), "reference")
        self.attach(block, layer)
        expected = block(expected)
        tensors = self.merged.layer(prefix, self._memory)
        for name, (start, rows, size) in samples.items():
            self._compare(prefix + name, rows, tensors[name][start : start + len(rows)], size)
        return expected, install(stock_block(self.config, tensors), "reference")(actual)

    def _norm(self, source: StoredTensors, hidden: torch.Tensor) -> torch.Tensor:
        norm = FalconMambaRMSNorm(self.config.hidden_size, eps=self.config.layer_norm_epsilon)
        norm.weight.data = source.whole("backbone.norm_f.weight")
        return norm(hidden)[0]

    def _head(
        self, expected: torch.Tensor, actual: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yields both models' logits for a block of tokens at a time: the first token, and (L, n) of each."""
        name = HEAD if HEAD in self.merged.entries else EMBEDDINGS
        if name == HEAD:
            self._check_vocabulary(name)
        for start, rows in self.merged.blocks(name):
            right = self._expected_rows(name, start, start + len(rows), torch.float32)
            yield start, expected @ right.T, actual @ rows.float().T

    def _expected_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the embedding or the head as they should be; past the base's end they are the adapter's."""
        entry = self.base.entries[name]
        rows = torch.zeros((stop - start, *entry.shape[1:]), dtype=dtype)
        inside = max(0, min(stop, entry.shape[0]) - start)
        if inside:
            rows[:inside] = read_rows(entry, start, start + inside)
        return self.adapter.merge(name, rows, start)

    def _check_vocabulary(self, name: str) -> None:
        entry = self.merged.entries[name]
        last = entry.shape[0]
        picks = {self._random.randrange(last) for _ in range(_CHECKED_ROWS)}
        picks.update(int(i) for i in self.adapter.rows.get(name, (torch.tensor([]),))[0])
        for row in sorted(picks):
            expected = self._expected_rows(name, row, row + 1, torch.float64)
            self._compare(name, expected, read_rows(entry, row, row + 1))

    def _sample(self, name: str, tensor: torch.Tensor) -> tuple[int, torch.Tensor, float]:
        """A few rows of the base, merged in float64: first row, rows, and the largest value before."""
        start = self._random.randrange(max(1, len(tensor) - _CHECKED_ROWS + 1))
        rows = tensor[start : start + _CHECKED_ROWS].double()
        size = rows.abs().max().item()
        return start, self.adapter.merge(name, rows, start), size

    def _compare(self, name: str, expected: torch.Tensor, found: torch.Tensor, size: float = 0.0) -> None:
        """Raises unless `found` is `expected` (float64) rounded once to the dtype in the file.

        Args:
            name: The tensor's name.
            expected: Rows in float64.
            found: The same rows from the file.
            size: The largest value that went into the sum, which was rounded to float32 once.
        """
        stored = torch.finfo(DTYPES[self.merged.entries[name].dtype])
        off = (found.double() - expected).abs()
        # half a unit in the last place, or of the smallest numbers; and the rounding of the float32 sum
        summed = 2e-6 * max(size, expected.abs().max().item())
        allowed = expected.abs() * (stored.eps / 2) + stored.tiny * stored.eps + summed
        wrong = ~(off <= allowed) & (expected.abs() < stored.max)
        if wrong.any():
            raise MergeError(
                f"`{name}` in the merged files is not base + adapter: {int(wrong.sum())} of {wrong.numel()} "
                f"sampled values are off, by up to {off.max():.3g}",
                hint="the disk or memory may be faulty, or a file changed while it was merged; merge again",
            )
        self.rows += len(expected)

    def _judge(self, logits: Iterator[tuple[int, torch.Tensor, torch.Tensor]], tokens: int) -> CheckResult:
        error = size = largest = 0.0
        next_tokens: list[list[tuple[float, int]]] = [[], []]
        for start, expected, actual in logits:
            delta = actual - expected
            error += delta.square().sum(dtype=torch.float64).item()
            size += expected.square().sum(dtype=torch.float64).item()
            largest = max(largest, delta.abs().max().item())
            for best, values in zip(next_tokens, (expected[-1], actual[-1]), strict=True):
                best.append((values.max().item(), start + int(values.argmax())))
        if not math.isfinite(error + size):
            raise MergeError(
                "the merged model's logits are not finite",
                hint="values may have overflowed float16; merge with `--dtype bfloat16`",
            )
        result = CheckResult(
            rows=self.rows,
            prompt_tokens=tokens,
            difference=(error / size) ** 0.5,
            largest_difference=largest,
            tolerance=max(TOLERANCES[DTYPES[entry.dtype]] for entry in self.merged.entries.values()),
            same_next_token=max(next_tokens[0])[1] == max(next_tokens[1])[1],
        )
        if result.difference > result.tolerance:
            raise MergeError(
                f"the merged model's logits differ from base + adapter by {result.difference:.2%} of their "
                f"size; rounding explains {result.tolerance:.2%}",
                hint="this adapter is of a kind that merge does not understand; please report it",
            )
        return result
