"""Log-likelihoods of continuations, where what several texts begin with is read once.

A benchmark asks for the likelihood of every choice of every document, behind the same examples. Laid out
as a tree of token ids, each text is a path from the root, and what texts share is one edge. An edge is read
once, the state behind it is kept while anything below it is left to read, and all texts that go on from there
start from a copy of the state. Nothing is approximated: a state is exactly what the model has after reading.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from mamba_sft.errors import UsageError
from mamba_sft.inference.evaluating import evaluation_mode
from mamba_sft.inference.generation import PREFILL_CHUNK
from mamba_sft.inference.prefixes import common_length
from mamba_sft.inference.state_rows import rows_of, stacked
from mamba_sft.model.full_weights import without_wrapper

logger = logging.getLogger(__name__)

MAX_STATES = 64
"""States kept at a time besides those of the batch that is read: 2.3 GiB of a 7B, which has 36 MiB each."""
WORTH = 32
"""Tokens that must be saved for an edge to be read by itself: a forward more costs as much as some tokens."""
_POSITIONS = 1024
"""Positions projected at a time: 65,024 float32 logits each make 0.25 GB, however long the texts."""

Pair = tuple[Sequence[int], Sequence[int]]
"""A context and its continuation, as token ids."""


class Likelihood(NamedTuple):
    """The sum of the log-probabilities of a continuation's tokens, and whether each was the likeliest."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Scored:
    """The likelihoods of continuations, and what they cost.

    Args:
        likelihoods: One a continuation, in order.
        tokens_read: Tokens given to the model, padding included.
        tokens_in_all: Tokens of all texts, one by one.
    """

    likelihoods: list[Likelihood]
    tokens_read: int
    tokens_in_all: int


def score_continuations(
    model: Any,
    pairs: Sequence[Pair],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    max_states: int = MAX_STATES,
    on_score: Callable[[int, Likelihood], None] | None = None,
) -> Scored:
    """Returns the log-likelihood of every continuation behind its context.

    Args:
        model: A causal FalconMamba with our mixer, bare or PEFT-wrapped; its training mode is restored.
        pairs: Context and continuation of each, both at least one token.
        max_length: Tokens that a text may have in front of its last; longer ones lose their beginning.
        batch_size: Texts read together; neighbours change no score.
        max_states: States kept at a time; beyond it, texts are read from the nearest state that is.
        on_score: Called with a pair's number and its score as each is known, in any order.

    Raises:
        UsageError: A context or a continuation is empty, or a continuation is longer than `max_length`.
    """
    texts = _Texts.of(pairs, max_length)
    reader = _Reader(model, texts, batch_size, max_states, on_score)
    with torch.no_grad(), evaluation_mode(model):
        reader.read(_tree(texts))
    found = [
        Likelihood(float(total), bool(greedy))
        for total, greedy in zip(reader.totals, reader.greedy, strict=True)
    ]
    return Scored(found, reader.tokens_read, sum(map(len, texts.read)))


@dataclass(frozen=True)
class _Texts:
    """What is read of each pair, and what is scored: `targets[i]` behind the last tokens of `read[i]`."""

    read: list[np.ndarray]
    targets: list[np.ndarray]

    @classmethod
    def of(cls, pairs: Sequence[Pair], max_length: int | None) -> _Texts:
        read, targets, cut = [], [], 0
        for number, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                which = "continuation" if len(context) else "context"
                raise UsageError(f"request {number}: the {which} is empty: there is nothing to score")
            if max_length is not None and len(continuation) > max_length:
                raise UsageError(
                    f"request {number}: a continuation of {len(continuation)} tokens, more than "
                    f"`max_length` {max_length}",
                    hint="a larger `max_length` takes it",
                )
            whole = np.array([*context, *continuation], dtype=np.int64)
            if max_length is not None and len(whole) > max_length + 1:
                whole, cut = whole[-(max_length + 1) :], cut + 1
            read.append(whole[:-1])  # behind the last token nothing is asked
            targets.append(np.array(continuation, dtype=np.int64))
        if cut:
            logger.warning(
                "%d of %d texts are longer than %d tokens and lose their beginning",
                cut,
                len(read),
                max_length,
            )
        return cls(read, targets)

    def first_scored(self, number: int) -> int:
        """The position whose prediction is the first one scored."""
        return len(self.read[number]) - len(self.targets[number])


@dataclass(eq=False)
class _Node:
    """A place in the tree: everything up to `end` of `ids` has been read there.

    Args:
        ids: A text that leads through here.
        end: How many tokens of it.
        children: The places behind.
        own: The texts that end here.
        scored: The texts of which something is scored on the edge to here.
        texts: How many texts end here or behind.
    """

    ids: np.ndarray
    end: int
    children: list[_Node] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    texts: int = 0


def _tree(texts: _Texts) -> _Node:
    """The tree of all texts: its root has read nothing."""
    root = _Node(np.empty(0, dtype=np.int64), 0)
    path, before = [root], root.ids
    in_order = sorted(range(len(texts.read)), key=lambda number: texts.read[number].astype(">u4").tobytes())
    for number in in_order:
        ids = texts.read[number]
        shared = common_length(before, ids)
        below = None
        while path[-1].end > shared:
            below = path.pop()
        if path[-1].end < shared and below is not None:  # the edge to `below` forks in the middle
            fork = _Node(ids, shared, [below])
            path[-1].children[-1] = fork
            path.append(fork)
        if len(ids) > shared:
            path[-1].children.append(_Node(ids, len(ids)))
            path.append(path[-1].children[-1])
        path[-1].own.append(number)
        before = ids
    for node in reversed(_nodes(root)):
        node.children = [kept for child in node.children for kept in _worth_reading(child, node)]
    _note_what_is_scored(root, texts)
    return root


def _nodes(root: _Node) -> list[_Node]:
    """All nodes, each behind its parent. No recursion: a chain may be as long as a text."""
    found = [root]
    for node in found:  # grows meanwhile
        found.extend(node.children)
    return found


def _worth_reading(node: _Node, parent: _Node) -> list[_Node]:
    """The node, or what is behind it where reading the edge to it by itself saves next to nothing."""
    readers = len(node.children) + bool(node.own)
    if not node.children or (node.end - parent.end) * (readers - 1) >= WORTH:
        return [node]
    own = [_Node(node.ids, node.end, own=node.own)] if node.own else []
    return [*node.children, *own]


def _note_what_is_scored(root: _Node, texts: _Texts) -> None:
    nodes = _nodes(root)
    above = {id(child): node for node in nodes for child in node.children}
    for node in reversed(nodes):
        node.texts = len(node.own) + sum(child.texts for child in node.children)
        for number in node.own:
            place = node
            while place is not root and place.end > texts.first_scored(number):
                place.scored.append(number)
                place = above[id(place)]


class _Edge(NamedTuple):
    """What is to be read on top of a row of a cache: `node.ids` from `start` to `node.end`.

    Args:
        row: The row, whose state has read what is before `start`.
        start: Where to go on.
        node: Where it ends.
        scored: The texts of which something is scored here.
    """

    row: int
    start: int
    node: _Node
    scored: list[int]

    @property
    def length(self) -> int:
        return self.node.end - self.start

    @property
    def ids(self) -> np.ndarray:
        return self.node.ids[self.start : self.node.end]


class _Kept(NamedTuple):
    """States that are kept, the rows of a cache, and the batches of edges that are left to read from them."""

    cache: Any
    states: int
    batches: list[list[_Edge]]


class _Reader:
    """Reads a tree, deepest first, so that few states are kept."""

    def __init__(
        self,
        model: Any,
        texts: _Texts,
        batch_size: int,
        max_states: int,
        on_score: Callable[[int, Likelihood], None] | None,
    ):
        base = without_wrapper(model)
        self._backbone, self._head = base.backbone, base.get_output_embeddings()
        self._device = base.get_input_embeddings().weight.device
        self._texts, self._batch_size, self._max_states = texts, batch_size, max_states
        self._on_score = on_score
        self.totals = np.zeros(len(texts.read))
        self.greedy = np.ones(len(texts.read), dtype=bool)
        self.tokens_read = 0

    def read(self, root: _Node) -> None:
        """Reads everything behind the root, which has read nothing."""
        kept: list[_Kept] = []
        self._go_on(kept, None, [root])
        while kept:
            cache, states, batches = kept.pop()
            batch, *left = batches
            room = self._max_states - sum(one.states for one in kept)
            room -= states if left or len(batch) > room else 0
            if room <= 0:
                self._read_ends(cache, [end for edge in batch for end in _ends(edge)])
            if len(batch) > room > 0:
                batch, left = batch[:room], [batch[room:], *left]
            if left:
                kept.append(_Kept(cache, states, left))
            if room > 0:
                cache = self._read_whole(cache, batch)
                self._go_on(kept, cache, [edge.node for edge in batch])

    def _go_on(self, kept: list[_Kept], cache: Any, nodes: list[_Node]) -> None:
        """Reads the ends of texts behind `nodes`, whose states `cache` has as rows; keeps it for the rest."""
        edges = [
            _Edge(row, node.end, child, child.scored)
            for row, node in enumerate(nodes)
            for child in node.children
        ]
        self._read_ends(cache, [edge for edge in edges if not edge.node.children])
        forks = [edge for edge in edges if edge.node.children]
        if not forks:
            return
        batches = list(self._batches(forks))
        # the largest last: nothing is kept for it, so that what is kept halves the rest each time
        batches.sort(key=lambda batch: sum(edge.node.texts for edge in batch))
        kept.append(_Kept(cache, 0 if cache is None else len(nodes), batches))

    def _batches(self, edges: list[_Edge]) -> Iterator[list[_Edge]]:
        """Edges of like length together."""
        by_length = sorted(edges, key=lambda edge: edge.length)
        for first in range(0, len(by_length), self._batch_size):
            yield by_length[first : first + self._batch_size]

    def _read_ends(self, cache: Any, edges: list[_Edge]) -> None:
        """Reads edges behind which nothing comes, padded on the right: the states are not used again."""
        for batch in self._batches(edges):
            rows = rows_of(cache, [edge.row for edge in batch])
            self._read_chunks(rows, batch, 0, max(edge.length for edge in batch))
            self._tell(batch)

    def _read_whole(self, cache: Any, batch: list[_Edge]) -> Any:
        """Reads edges without padding; returns their states, one a row, in the order of `batch`.

        All are read as far as the shortest goes, whose state is then set aside, and so on.
        """
        rows, at = rows_of(cache, [edge.row for edge in batch]), 0
        going, done = list(batch), []  # shortest first
        while going:
            stop = going[0].length
            rows = self._read_chunks(rows, going, at, stop)
            ended = sum(edge.length == stop for edge in going)
            if ended == len(going):
                done.append(rows)
            else:
                done.append(rows_of(rows, range(ended)))
                rows = rows_of(rows, range(ended, len(going)))
            going, at = going[ended:], stop
        self._tell(batch)
        return stacked(done)

    def _read_chunks(self, cache: Any, edges: list[_Edge], first: int, stop: int) -> Any:
        """Reads tokens `first` to `stop` of edges on top of the rows of `cache`; returns it, moved on."""
        for start in range(first, stop, PREFILL_CHUNK):
            width = min(PREFILL_CHUNK, stop - start)
            ids = np.zeros((len(edges), width), dtype=np.int64)
            for row, edge in enumerate(edges):
                piece = edge.ids[start : start + width]
                ids[row, : len(piece)] = piece
            self.tokens_read += ids.size
            hidden, cache = self._backbone(
                input_ids=torch.from_numpy(ids).to(self._device),
                cache_params=cache,
                use_cache=True,
                return_dict=False,
            )[:2]
            self._score(hidden, edges, start)
        return cache

    def _score(self, hidden: Any, edges: list[_Edge], first: int) -> None:
        """Adds to the texts what is scored of them at these positions, `(B, L, hidden)`, from `first` on."""
        wanted = [
            found
            for row, edge in enumerate(edges)
            for number in edge.scored
            if (found := self._scored_at(number, row, edge.start + first, hidden.shape[1]))
        ]
        if not wanted:
            return
        places, targets, texts = (np.concatenate(parts) for parts in zip(*wanted, strict=True))
        places, which = np.unique(places, return_inverse=True)  # many texts may ask at one place
        chosen = hidden.flatten(0, 1)[torch.from_numpy(places).to(self._device)]
        for begin in range(0, len(places), _POSITIONS):
            here = (which >= begin) & (which < begin + _POSITIONS)
            values, greedy = self._look_up(
                chosen[begin : begin + _POSITIONS], which[here] - begin, targets[here]
            )
            np.add.at(self.totals, texts[here], values)
            np.logical_and.at(self.greedy, texts[here], greedy)

    def _scored_at(
        self, number: int, row: int, first: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What is scored of a text here: its places in `(B, L)` flattened, its targets, and its number."""
        begin = self._texts.first_scored(number)
        low, high = max(first, begin), min(first + width, len(self._texts.read[number]))
        if low >= high:
            return None
        places = row * width + np.arange(low - first, high - first)
        return places, self._texts.targets[number][low - begin : high - begin], np.full(high - low, number)

    def _look_up(self, hidden: Any, which: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The log-probability of each target at place `which` of `hidden`; whether it is the likeliest."""
        logits = self._head(hidden.to(next(self._head.parameters()).dtype)).float()
        log_probabilities, likeliest = logits.log_softmax(-1), logits.argmax(-1)
        at, wanted = torch.from_numpy(which).to(self._device), torch.from_numpy(targets).to(self._device)
        found = torch.stack([log_probabilities[at, wanted].double(), (likeliest[at] == wanted).double()])
        both = found.cpu().numpy()  # one wait
        return both[0], both[1].astype(bool)

    def _tell(self, batch: list[_Edge]) -> None:
        if self._on_score is None:
            return
        for edge in batch:
            for number in edge.node.own:
                self._on_score(number, Likelihood(float(self.totals[number]), bool(self.greedy[number])))


def _ends(edge: _Edge) -> Iterator[_Edge]:
    """Every text at and behind an edge as one edge of its own, for when no more states may be kept."""
    waiting = [edge.node]
    for node in waiting:  # grows meanwhile
        waiting.extend(node.children)
        if node.own:
            yield _Edge(edge.row, edge.start, node, node.own)
