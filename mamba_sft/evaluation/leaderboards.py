"""What the two Open LLM Leaderboards ask: tasks, shots, metrics, chance levels, columns, published rows.

The second is lm-eval's own tasks under the leaderboard's normalisation. The first is run through lm-eval too,
with the shots of the leaderboard in `task_files/`: lighteval 0.13.0 (read 2026-11-27) no longer computes its
metrics (HellaSwag and MMLU by exact match, ARC without length normalisation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mamba_sft.evaluation.normalisation import Column, Pool
from mamba_sft.evaluation.settings import MathMetric

TASK_FILES = Path(__file__).with_name("task_files")
"""Our own files for lm-eval."""

BBH_CHOICES = {
    "boolean_expressions": 2, "causal_judgement": 2, "date_understanding": 6, "disambiguation_qa": 3,
    "formal_fallacies": 2, "geometric_shapes": 11, "hyperbaton": 2, "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7, "logical_deduction_three_objects": 3, "movie_recommendation": 6,
    "navigate": 2, "object_counting": 19, "penguins_in_a_table": 5, "reasoning_about_colored_objects": 18,
    "ruin_names": 6, "salient_translation_error_detection": 6, "snarks": 2, "sports_understanding": 2,
    "temporal_sequences": 4, "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7, "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}  # fmt: skip
"""How many answers each of the 24 parts of BBH offers, as its file in lm-eval lists them."""
MATH_PARTS = (
    "algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
MUSR_CHOICES = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
MMLU_SUBJECTS = 57
MATH_METRICS: Mapping[MathMetric, str] = {
    "original": "exact_match_original,none",
    "verify": "exact_match,none",
}
IFEVAL = "leaderboard_ifeval"
GPQA = tuple(f"leaderboard_gpqa_{part}" for part in ("diamond", "extended", "main"))


@dataclass(frozen=True)
class Leaderboard:
    """A suite that lm-eval runs.

    Args:
        name: What it is called on the command line.
        loads: What is asked of lm-eval: its names of tasks and groups.
        directories: Where lm-eval has them, below its `tasks/`; scanning all takes ten seconds.
        template: Whether a model with a chat template was asked through it.
        published: Rows of published values, a value a column and the average last.
    """

    name: str
    loads: tuple[str, ...]
    directories: tuple[str, ...]
    template: bool
    published: Mapping[str, Sequence[float]] = field(default_factory=dict)


V2 = Leaderboard(
    name="leaderboard-v2",
    loads=(
        IFEVAL,
        *(f"leaderboard_bbh_{part}" for part in BBH_CHOICES),
        *(f"leaderboard_math_{part}_hard" for part in MATH_PARTS),
        *GPQA,
        *(f"leaderboard_musr_{part}" for part in MUSR_CHOICES),
        "leaderboard_mmlu_pro",
    ),
    directories=("leaderboard",),
    template=True,
    published={"Falcon-Mamba-7B": (33.36, 19.88, 3.63, 8.05, 10.86, 14.47, 15.04)},
)
V1 = Leaderboard(
    name="leaderboard-v1",
    loads=("mamba_sft_leaderboard_v1",),
    directories=("arc", "hellaswag", "mmlu/default", "winogrande", "truthfulqa", "gsm8k"),
    template=False,
    published={"Falcon-Mamba-7B": (62.03, 80.82, 62.11, 73.64, 53.42, 52.54, 64.09)},
)
LEADERBOARDS = {board.name: board for board in (V2, V1)}


def columns_of(board: Leaderboard, math_metric: MathMetric, tasks: Sequence[str]) -> list[Column]:
    """Returns a leaderboard's columns.

    Args:
        board: Which.
        math_metric: How answers of MATH are compared.
        tasks: The names of the tasks that were loaded, of which MMLU's are taken.
    """
    return _columns_v2(math_metric) if board is V2 else _columns_v1(tasks)


def _columns_v2(math_metric: MathMetric) -> list[Column]:
    return [
        Column(
            "IFEval",
            tuple(Pool((IFEVAL,), f"{level}_level_strict_acc,none") for level in ("prompt", "inst")),
        ),
        Column("BBH", _each("leaderboard_bbh_", BBH_CHOICES)),
        Column(
            "MATH Lvl 5",
            (Pool(tuple(f"leaderboard_math_{part}_hard" for part in MATH_PARTS), MATH_METRICS[math_metric]),),
        ),
        Column("GPQA", (Pool(GPQA, "acc_norm,none", 1 / 4),)),
        Column("MuSR", _each("leaderboard_musr_", MUSR_CHOICES)),
        Column("MMLU-Pro", (Pool(("leaderboard_mmlu_pro",), "acc,none", 1 / 10),)),
    ]


def _each(prefix: str, choices: Mapping[str, int]) -> tuple[Pool, ...]:
    """Parts that are rescaled one by one, each by its own number of answers."""
    return tuple(Pool((prefix + part,), "acc_norm,none", 1 / count) for part, count in choices.items())


def _columns_v1(tasks: Sequence[str]) -> list[Column]:
    subjects = sorted(task for task in tasks if task.startswith("mmlu_"))
    if len(subjects) != MMLU_SUBJECTS:
        raise RuntimeError(f"lm-eval has {len(subjects)} subjects of MMLU, not {MMLU_SUBJECTS}")
    return [
        Column("ARC", (Pool(("arc_challenge",), "acc_norm,none"),)),
        Column("HellaSwag", (Pool(("hellaswag",), "acc_norm,none"),)),
        Column("MMLU", tuple(Pool((subject,), "acc,none") for subject in subjects)),
        Column("Winogrande", (Pool(("winogrande",), "acc,none"),)),
        Column("TruthfulQA", (Pool(("truthfulqa_mc2",), "acc,none"),)),
        Column("GSM8K", (Pool(("gsm8k",), "exact_match,strict-match"),)),
    ]
