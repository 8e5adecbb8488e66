"""How the backward is cut up: the table of cards, the search and its cache, and bounded partial sums."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from mamba_sft.data.cache import cache_root
from mamba_sft.kernels import launching, selective_scan, triton_ops
from mamba_sft.kernels.launching import CARDS, Choice

from .cases import TOLERANCE, results, scan_inputs, sequences, worst

WAYS = [Choice(4, 2), Choice(2, 2), Choice(4, 1)]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA_SFT_CACHE", str(tmp_path))
    monkeypatch.setattr(launching, "_found", {})


@pytest.mark.parametrize("rate_wanted", [False, True])
@pytest.mark.parametrize("name", CARDS)
def test_the_scratch_of_all_programs_at_work_fits_the_cache(name, rate_wanted):
    card = CARDS[name]
    steps = launching.window(card.capability, 16, rate_wanted)
    stride = launching.stride(card, steps)
    # T4, A10, 3090 and A6000 have 4 and 6 MB: even 16 steps are too many for some where A is trained
    small = card.l2_bytes <= 6 * launching.MB and rate_wanted
    assert launching.scratch_bytes(card, steps, stride) <= card.l2_bytes * (2.0 if small else 0.9)
    assert 64 % stride == 0
    assert stride % steps == 0


def test_a_large_cache_keeps_states_rarely():
    strides = {name: launching.stride(CARDS[name], 4) for name in ("T4", "RTX 3090", "H100", "RTX 4090")}
    assert strides == {"T4": 16, "RTX 3090": 16, "H100": 64, "RTX 4090": 64}


def test_the_fastest_is_found_once_and_then_read():
    tried = []

    def seconds(way):
        tried.append(way)
        return {WAYS[0]: 3.0, WAYS[1]: 1.0, WAYS[2]: 2.0}[way]

    assert launching.fastest("card a", WAYS, seconds) == WAYS[1]
    assert launching.fastest("card a", WAYS, seconds) == WAYS[1]
    assert tried == WAYS
    launching._found.clear()  # as in another process
    assert launching.fastest("card a", WAYS, seconds) == WAYS[1]
    assert tried == WAYS
    launching.fastest("card b", WAYS, seconds)
    assert tried == WAYS * 2


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"key": "other", "choice": {"window": 2, "waves": 2}}',
        '{"key": "k", "choice": {"window": 8, "waves": 2}}', '{"key": "k", "choice": {"warps": 2}}',
    ],
)  # fmt: skip
def test_a_broken_or_foreign_entry_is_searched_again(text):
    path = launching._path("k")
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert launching.fastest("k", WAYS, lambda way: way.waves) == WAYS[2]
    assert json.loads(path.read_text(encoding="utf-8"))["choice"] == {"window": 4, "waves": 1}


def test_a_cache_that_cannot_be_written_fails_nothing(tmp_path):
    (tmp_path / "mamba-sft").write_text("a file where the directory should be", encoding="utf-8")
    assert launching.fastest("k", WAYS, lambda way: way.waves) == WAYS[2]


def test_a_full_disk_keeps_no_half_of_a_choice(monkeypatch):
    def full(self, *arguments, **more):
        self.touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", full)
    assert launching.fastest("k", WAYS, lambda way: way.waves) == WAYS[2]
    assert list(launching.cache_directory().iterdir()) == []


def test_a_way_without_memory_is_not_chosen():
    def seconds(way):
        if way == WAYS[2]:
            raise torch.OutOfMemoryError
        return way.window

    assert launching.fastest("k", WAYS, seconds) == WAYS[1]
    launching._found.clear()


def test_if_no_way_has_memory_the_first_stays_and_nothing_is_kept():
    def seconds(way):
        raise torch.OutOfMemoryError

    assert launching.fastest("k", WAYS, seconds) == WAYS[0]
    assert not launching._path("k").exists()


def test_choices_are_kept_beside_all_that_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "general"))
    assert launching.cache_directory() == cache_root().with_name("launches") == tmp_path / "launches"
    monkeypatch.delenv("MAMBA_SFT_CACHE")
    assert launching.cache_directory() == cache_root().with_name("launches")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert launching.cache_directory() == cache_root().with_name("launches")


def search(root, fast):
    os.environ["MAMBA_SFT_CACHE"] = root
    for n in range(200):
        launching._found.clear()
        launching._path("k").unlink(missing_ok=True)
        assert launching.fastest("k", WAYS, lambda way: way != WAYS[fast]) in WAYS, n


def test_two_processes_may_search_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=search, args=(str(tmp_path), fast)) for fast in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    left = os.listdir(launching.cache_directory())
    assert set(left) <= {launching._path("k").name}  # and no half of one


def test_candidates_are_a_handful_and_begin_with_the_table():
    for best in (Choice(4), Choice(2)):
        ways = launching.candidates(best)
        assert ways[0] == best
        assert len(ways) == len(set(ways)) <= 6
        assert all(way.window <= best.window for way in ways)  # a longer one spills registers


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("window", [2, 4])
def test_partial_sums_are_bounded_by_splitting(monkeypatch, packed, window):
    """Rows and segments by turns; nothing that is allocated for sums is larger than allowed."""
    inputs = scan_inputs(3, 20, 40, 4)
    options = {"dt_softplus": True, "seq_idx": sequences(3, 20) if packed else None}
    expected = results(selective_scan, inputs, torch.float64, **options)
    bound = 3 * 8 * triton_ops._partial_bytes(inputs["u"], 4) // 2  # half of what one chunk of 3 rows needs
    monkeypatch.setattr(triton_ops, "PARTIAL_BYTES", bound)
    monkeypatch.setattr(triton_ops, "MIN_SEGMENT", 8)
    monkeypatch.setattr(launching, "window", lambda *card: window)
    sizes = []
    empty = torch.empty

    def watched(*shape, **options):
        made = empty(*shape, **options)
        if made.dim() == 4 and made.shape[0] == 2 and made.shape[3] == 8:  # (blocks, B, span, 2 N)
            sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", watched)
    values = results(selective_scan, inputs, torch.float32, **options, backend="triton")
    assert worst(values, expected) <= (TOLERANCE["triton"], "")
    assert len(sizes) == 3
    assert max(sizes) <= bound


@pytest.fixture
def pretended_card(monkeypatch):
    """A card by name that times with a stand-in: the kernels stay in the interpreter."""
    card = SimpleNamespace(name="Pretended", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(triton_ops, "_may_search", lambda u: True)
    timed = []

    def seconds(run, way):
        timed.append(way)
        return 0.0 if way == Choice(2, 1) else 1.0

    monkeypatch.setattr(triton_ops, "_seconds", seconds)
    return card, timed


def gradients(length=11, dtype=torch.float32, **options):
    return results(
        selective_scan, scan_inputs(1, length, 8, 4), dtype, dt_softplus=True, backend="triton", **options
    )


def test_a_card_is_searched_once_per_shape(monkeypatch, pretended_card):
    card, timed = pretended_card
    ran = []
    backward = triton_ops._backward
    monkeypatch.setattr(triton_ops, "_backward", lambda *all: ran.append(all[-1]) or backward(*all))
    monkeypatch.setattr(launching, "window", lambda *card: 4)
    gradients()
    assert (len(timed), ran) == (6, [Choice(2, 1)])
    gradients(12)  # to the next power of two it is the same length
    launching._found.clear()
    gradients()
    assert (len(timed), ran) == (6, [Choice(2, 1)] * 3)
    for more, different in enumerate((17, torch.bfloat16, "name", "minor", "packed"), 2):
        card.name = "Other" if different == "name" else card.name
        card.minor = 6 if different == "minor" else card.minor
        length = different if isinstance(different, int) else 11
        dtype = different if isinstance(different, torch.dtype) else torch.float32
        gradients(length, dtype, seq_idx=sequences(1, 11) if different == "packed" else None)
        assert len(timed) == 6 * more, different


def test_there_is_no_search_without_a_card_or_where_bits_must_stay():
    cuda = SimpleNamespace(is_cuda=True)
    assert not triton_ops._may_search(torch.zeros(1))
    torch.use_deterministic_algorithms(True)
    try:
        assert not triton_ops._may_search(cuda)
    finally:
        torch.use_deterministic_algorithms(False)
