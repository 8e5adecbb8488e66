"""Sample prompts: read, scored, kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from mamba_sft.errors import DataError
from mamba_sft.evaluation.prompts import Prompt, exact_match, load_prompts, pair, read_samples, write_samples


def test_prompts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "system": "s"}\n')
    assert load_prompts(path) == [Prompt("a", "b"), Prompt("c", system="s")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"p\.jsonl:2: not JSON"),
        ('{"answer": "b"}', r"p\.jsonl:2: a sample prompt needs `prompt`"),
        ('{"prompt": "a", "answr": "b"}', r"p\.jsonl:2: a sample prompt needs `prompt`"),
        ('{"prompt": "a", "answer": 7}', "all strings"),
        ('["a"]', "needs `prompt`"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        load_prompts(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the sample prompts"):
        load_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no prompts"):
        load_prompts(tmp_path / "empty.jsonl")


def test_exact_match_counts_scored_prompts_only() -> None:
    prompts = [Prompt("a", "x"), Prompt("b"), Prompt("c", "y"), Prompt("d", "z")]
    assert exact_match(prompts, [" x\n", "?", "y.", "z"]) == pytest.approx(2 / 3)
    assert exact_match([Prompt("a")], ["x"]) is None


def test_the_system_message_of_a_prompt_wins() -> None:
    assert Prompt("a", system="own").messages("default")[0] == {"role": "system", "content": "own"}
    assert Prompt("a").messages("default")[0]["content"] == "default"
    assert Prompt("a").messages() == [{"role": "user", "content": "a"}]


def test_samples_round_trip(tmp_path: Path) -> None:
    samples = pair([Prompt("ä", "b", "s"), Prompt("c")], ["1", "2\n"], ["3", '"4"'])
    write_samples(tmp_path / "samples.jsonl", samples)
    assert read_samples(tmp_path / "samples.jsonl") == samples
