from __future__ import annotations

from pathlib import Path

import pytest

from mamba_sft.wording import GIB, count_text, first_line, path_text, size_text, time_text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"), (1000, "1,000 bytes"), (1024, "1.00 KiB"), (4_200_000, "4.01 MiB"),
        (1023 << 20, "1,023 MiB"), ((1 << 30) - 1, "1.00 GiB"), (14_545_330_176, "13.5 GiB"),
        (99_960 * GIB // 1000, "100 GiB"),
        (1234 * GIB, "1,234 GiB"), (-5 * GIB // 2, "-2.50 GiB"),
    ],
)  # fmt: skip
def test_sizes_have_three_figures_and_one_unit(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (1.25, "1.2 s"), (85, "85 s"), (119, "119 s"), (120, "2 min"), (1692, "28 min"),
        (7199, "120 min"), (7200, "2.0 h"), (42_480, "11.8 h"), (172_800, "2.0 days"),
    ],
)  # fmt: skip
def test_times_use_the_unit_that_says_enough(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_paths_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_text(tmp_path / "runs" / "x") == "runs/x"
    assert path_text(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")
    assert path_text(Path("runs/x")) == "runs/x"


def test_one_thing_has_no_s() -> None:
    assert [count_text(count, "step") for count in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("disk full\nand more"), "disk full"), (ValueError(" \n first "), "first"),
        (MemoryError(), "MemoryError"), (RuntimeError("\n"), "RuntimeError"),
    ],
)  # fmt: skip
def test_an_exception_that_says_nothing_is_called_by_its_name(error: Exception, text: str) -> None:
    assert first_line(error) == text
