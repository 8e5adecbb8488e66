"""Tiny data sets with the columns of the real ones, as folders that `datasets` takes for them.

`datasets` looks for `owner/name` below the working directory before it asks the hub, so lm-eval's own tasks
run on them unchanged. Every question is our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mamba_sft.evaluation.leaderboards import BBH_CHOICES, MUSR_CHOICES

Rows = Sequence[Mapping[str, Any]]
MMLU = "cais/mmlu"


def write_dataset(root: Path, name: str, configs: Mapping[str, Mapping[str, Rows]]) -> None:
    """Writes a data set below `root`: rows by configuration and split, and the head that names them."""
    place = root / name
    head = ["---", "configs:"]
    for config, splits in configs.items():
        head += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = place / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            head += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (place / "README.md").write_text("\n".join([*head, "---", ""]), encoding="utf-8")


def write_v2(root: Path) -> None:
    """Writes all that the second leaderboard reads."""
    write_musr(root)
    write_ifeval(root)
    write_math(root)
    write_bbh(root)
    write_gpqa(root)
    write_mmlu_pro(root)


def write_musr(root: Path, count: int = 3) -> None:
    """Murders with two suspects, objects in five places, three ways to form a team."""
    splits = {}
    for split, choices in MUSR_CHOICES.items():
        answers = [f"the {['red', 'blue', 'green', 'white', 'black'][i]} one" for i in range(choices)]
        splits[split] = [
            {
                "narrative": f"A short story of {split.replace('_', ' ')}, number {i}.",
                "question": "Which one is it?",
                "choices": str(answers),
                "answer_index": i % choices,
                "answer_choice": answers[i % choices],
            }
            for i in range(count)
        ]
    write_dataset(root, "TAUR-Lab/MuSR", {"default": splits})


def write_ifeval(root: Path) -> None:
    """Prompts with one instruction or two; `number_sentences` needs nltk's data."""
    asked: list[tuple[str, dict[str, Any]]] = [
        ("punctuation:no_comma", {}),
        ("change_case:english_lowercase", {}),
        ("length_constraints:number_words", {"num_words": 2, "relation": "at least"}),
        ("length_constraints:number_sentences", {"num_sentences": 1, "relation": "at least"}),
    ]
    keys = {"num_words": None, "num_sentences": None, "relation": None}
    rows = []
    for number in range(4):
        chosen = [asked[number], asked[(number + 1) % 4]][: 1 + number % 2]
        rows.append(
            {
                "key": number,
                "prompt": f"Write about the number {number}.",
                "instruction_id_list": [name for name, _ in chosen],
                "kwargs": [keys | given for _, given in chosen],
            }
        )
    write_dataset(root, "wis-k/instruction-following-eval", {"default": {"train": rows}})


MATH_NAMES = {
    "algebra": "algebra", "counting_and_probability": "counting_and_prob", "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra", "number_theory": "num_theory",
    "prealgebra": "prealgebra", "precalculus": "precalculus",
}  # fmt: skip
"""The data set's parts, and what lm-eval calls them."""


def write_math(root: Path) -> None:
    """Two problems of the hardest level in each part, and one that is too easy to be asked."""

    def rows(part: str) -> list[dict[str, Any]]:
        return [
            {
                "problem": f"What is ${i} + {i}$ in {part}?",
                "level": level,
                "type": part,
                "solution": f"It is $\\boxed{{{2 * i}}}$.",
            }
            for i, level in enumerate(("Level 5", "Level 1", "Level 5"))
        ]

    configs = {part: {"train": rows(part), "test": rows(part)} for part in MATH_NAMES}
    write_dataset(root, "DigitalLearningGmbH/MATH-lighteval", configs)


def write_bbh(root: Path, count: int = 2) -> None:
    """The 24 parts; an answer is one of those that lm-eval's file of the part offers."""
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    place = Path(tasks.__file__).parent / "leaderboard/bbh_mc"
    configs = {}
    for part in BBH_CHOICES:
        choices = load_yaml(place / f"{part}.yaml", resolve_func=False)["doc_to_choice"]
        rows = [
            {"input": f"{part} {i}: which?", "target": str(choices[i % len(choices)])} for i in range(count)
        ]
        configs[part] = {"test": rows}
    write_dataset(root, "SaylorTwift/bbh", configs)


def write_gpqa(root: Path) -> None:
    """Four answers each, one of them right; lm-eval shuffles them as it reads."""
    rows = [
        {
            "Question": f"Which gas is number {i}?",
            "Correct Answer": f"helium {i}",
            "Incorrect Answer 1": "neon",
            "Incorrect Answer 2": "argon",
            "Incorrect Answer 3": "krypton",
        }
        for i in range(8)
    ]
    parts = {"gpqa_diamond": rows[:2], "gpqa_extended": rows, "gpqa_main": rows[:5]}
    write_dataset(root, "Idavidrein/gpqa", {part: {"train": kept} for part, kept in parts.items()})


def write_mmlu_pro(root: Path) -> None:
    """Questions with up to ten answers, and five that are shown as examples."""

    def rows(count: int, mark: str) -> list[dict[str, Any]]:
        return [
            {
                "question_id": i,
                "question": f"{mark} question {i}?",
                "options": [f"answer {j}" for j in range(10 if i % 2 else 4)],
                "answer": "ABCD"[i % 4],
                "answer_index": i % 4,
                "category": "math",
            }
            for i in range(count)
        ]

    write_dataset(
        root, "TIGER-Lab/MMLU-Pro", {"default": {"test": rows(4, "asked"), "validation": rows(6, "shown")}}
    )


def write_v1(root: Path) -> None:
    """Writes all that the first leaderboard reads: enough rows for every number of examples."""
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    arc = [
        {
            "id": str(i),
            "question": f"What is {i} plus one?",
            "choices": {"text": [str(i + 1), str(i + 2), "none", "all"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        }
        for i in range(30)
    ]
    arc_splits = {"train": arc[:27], "validation": arc[27:28], "test": arc[28:]}
    write_dataset(root, "allenai/ai2_arc", {"ARC-Challenge": arc_splits, "ARC-Easy": arc_splits})
    hellaswag = [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": f"Someone takes {i} eggs.",
            "ctx_b": "they",
            "ctx": "",
            "endings": ["break them.", "drive away.", "sing.", "sleep."],
            "label": str(i % 4),
        }
        for i in range(14)
    ]
    write_dataset(
        root, "Rowan/hellaswag", {"default": {"train": hellaswag[:12], "validation": hellaswag[12:]}}
    )
    winogrande = [
        {
            "sentence": f"The cup {i} did not fit the box because _ was too large.",
            "option1": "the cup",
            "option2": "the box",
            "answer": "12"[i % 2],
        }
        for i in range(9)
    ]
    write_dataset(
        root, "allenai/winogrande", {"winogrande_xl": {"train": winogrande[:7], "validation": winogrande[7:]}}
    )
    targets = {"choices": ["It is so.", "It is not so.", "Nobody knows."], "labels": [1, 0, 1]}
    truthful = [
        {"question": f"Is {i} even?", "mc1_targets": targets, "mc2_targets": targets} for i in range(2)
    ]
    write_dataset(root, "truthfulqa/truthful_qa", {"multiple_choice": {"validation": truthful}})
    gsm8k = [{"question": f"What is {i} + {i}?", "answer": f"Add.\n#### {2 * i}"} for i in range(9)]
    write_dataset(root, "openai/gsm8k", {"main": {"train": gsm8k[:7], "test": gsm8k[7:]}})
    place = Path(tasks.__file__).parent / "mmlu/default"
    subjects = [
        load_yaml(file, resolve_func=False)["dataset_name"] for file in sorted(place.glob("mmlu_*.yaml"))
    ]
    mmlu = [
        {"question": f"Which is {i}?", "choices": ["0", "1", "2", "3"], "answer": i % 4, "subject": "x"}
        for i in range(8)
    ]
    write_dataset(root, MMLU, {subject: {"test": mmlu[:2], "dev": mmlu[2:8]} for subject in subjects})


def write_sentence_data(root: Path) -> None:
    """Writes what nltk splits sentences by, with one abbreviation in it; NLTK_DATA is to name `root`."""
    place = root / "tokenizers/punkt_tab/english"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (place / name).write_text("", encoding="utf-8")
    (place / "abbrev_types.txt").write_text("dr\n", encoding="utf-8")
