"""The recipe's fields, their bounds and help, what clashes, and what its messages say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import BaseModel

from mamba_sft.errors import RecipeError, UsageError
from mamba_sft.recipe.builtin import builtin_recipes, bundled_root, find_path
from mamba_sft.recipe.conflicts import NOT_OF_TRL, WHOLE_ROW_ARGUMENTS
from mamba_sft.recipe.fields import AdapterSection, EvalSection, ModelSection, TrainSection
from mamba_sft.recipe.messages import section_at
from mamba_sft.recipe.other_tools import ALL_WEIGHTS, FOREIGN_KEYS, FOREIGN_VALUES, UNWANTED_KEYS
from mamba_sft.recipe.recipe import Recipe, recipe_schema
from mamba_sft.recipe.trainer_arguments import ALLOWED, FIXED, OWNED

MINIMAL = """\
output_dir: runs/x
model:
  base: some/base
data:
  sources:
    - path: rows.jsonl
"""


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the error that `text` gives, as the file `r.yaml`."""
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(text, "r.yaml", overrides)
    return caught.value.message.split("\n")


def minimal(more: str) -> str:
    """The least recipe and `more`, which starts on line 7."""
    return MINIMAL + more


def sections(model: type[BaseModel] = Recipe) -> list[type[BaseModel]]:
    return [model] + [
        inner
        for field in model.model_fields.values()
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for inner in sections(kind)
    ]


def test_minimal_recipe_has_every_default() -> None:
    recipe = Recipe.from_text(MINIMAL)
    assert recipe.seed == 42
    assert (recipe.model.dtype, recipe.model.quantization, recipe.model.kernels) == (
        "bfloat16",
        "none",
        "auto",
    )
    assert recipe.chat.template == "chatml"
    assert recipe.data.sources[0].weight == 1.0
    assert (recipe.data.validation, recipe.data.max_length, recipe.data.packing) == (0.02, 2048, True)
    assert recipe.adapter.target_modules == ["in_proj", "x_proj", "out_proj"]
    assert recipe.train.learning_rate == 2e-4
    assert (recipe.train.save_steps, recipe.eval.eval_steps) == (0.2, 0.2)
    assert recipe.eval.load_best_model_at_end is True


def test_a_run_in_the_home_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Recipe.from_text(MINIMAL, "r.yaml", ["output_dir=~/runs/x"])
    assert made.output_dir == str(tmp_path / "runs" / "x")
    assert f"output_dir: {tmp_path}/runs/x\n" in made.to_yaml()
    assert Recipe.from_text(MINIMAL, "r.yaml", ["output_dir=./~/x"]).output_dir == "./~/x"
    (line,) = problems(MINIMAL.replace("runs/x", "~nosuchuser/x"))
    assert line.startswith("r.yaml:1: `output_dir` must not begin with `~nosuchuser`: there is no user")


def test_field_count_stays_small() -> None:
    found = sections()
    holders = len(found) - 1  # fields that hold a section are not fields that anyone sets
    # 8 of them are the procedure that Falcon-Mamba was pre-trained by: a decay, its end, the lengths of the
    # schedule's parts, and a batch that grows; each is in the model card, and no other field can say it.
    # 10 more are its stages and mixtures: 3 of a mixture, 4 of a stage, a source's id and its most passes
    assert sum(len(section.model_fields) for section in found) - holders <= 87


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_has_help_and_every_number_bounds(section: type[BaseModel]) -> None:
    schema = section.model_json_schema()
    for name, field in schema["properties"].items():
        target = schema["$defs"][field["$ref"].split("/")[-1]] if "$ref" in field else field
        assert target.get("description"), name
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & kind.keys(), name
                assert {"maximum", "exclusiveMaximum"} & kind.keys(), name


def test_recipe_is_frozen() -> None:
    recipe = Recipe.from_text(MINIMAL)
    with pytest.raises(RecipeError, match="`learning_rate` stays as it is"):
        recipe.train.learning_rate = 1.0
    with pytest.raises(RecipeError, match="`seed` stays as it is"):
        recipe.seed = 1
    assert recipe == Recipe.from_text(MINIMAL)


def test_overrides_are_texts() -> None:
    """A text alone is one override, not a list of its letters."""
    assert Recipe.from_text(MINIMAL, overrides="seed=3").seed == 3
    assert Recipe.from_text(MINIMAL, overrides=("seed=3", "seed=4")).seed == 4
    for wrong in ({"seed": 3}, [3], 3, None):
        with pytest.raises(RecipeError, match="overrides are a list of texts"):
            Recipe.from_text(MINIMAL, overrides=wrong)  # type: ignore[arg-type]


def test_paths_may_be_paths() -> None:
    built = Recipe.build(
        output_dir=Path("runs/x"), model={"base": Path("b")}, data={"sources": [{"path": Path("c.jsonl")}]}
    )
    assert (built.output_dir, built.model.base, built.data.sources[0].path) == ("runs/x", "b", "c.jsonl")


def test_import_is_light() -> None:
    code = (
        "import sys, mamba_sft.recipe.recipe; "
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'rich', 'typer'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_defaults_that_follow_from_another_field() -> None:
    assert Recipe.from_text(minimal("eval: {eval_steps: 50}")).train.save_steps == 50
    assert (
        Recipe.from_text(minimal("eval: {eval_steps: 50}\ntrain: {save_steps: 100}")).train.save_steps == 100
    )
    assert Recipe.from_text(MINIMAL, overrides=["data.validation=0"]).eval.load_best_model_at_end is False


def test_build_from_python() -> None:
    recipe = Recipe.build(
        output_dir="runs/x",
        model=ModelSection(base="some/base"),
        data={"sources": [{"path": "rows.jsonl"}]},
        adapter=AdapterSection(r=8),
        train=TrainSection(max_steps=5),
        eval=EvalSection(eval_steps=2),
    )
    assert (recipe.adapter.r, recipe.train.max_steps, recipe.train.save_steps) == (8, 5, 2)


def test_build_reports_all_problems() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.build(output_dir="runs/x", model={"base": "b", "bse": 1}, data={"sources": []})
    assert caught.value.message.split("\n") == [
        "recipe: `data.sources` must have at least one entry",
        "recipe: unknown field `model.bse`; did you mean `base`?",
    ]


def test_all_problems_at_once_by_line() -> None:
    text = """\
output_dir: runs/x
model:
  base: some/base
  dtype: bf16
train:
  learning_rte: 1e-5
  max_steps: 0
  learning_rate: -1
data:
  sources:
    - path: rows.jsonl
  max_length: null
adapter:
  r: 0
"""
    assert problems(text, "train.lr=3") == [
        "r.yaml:4: `model.dtype` must be one of `auto`, `bfloat16`, `float16`, `float32`, got `bf16`; "
        "did you mean `bfloat16`?",
        "r.yaml:6: unknown field `train.learning_rte`; did you mean `learning_rate`?",
        "r.yaml:7: `train.max_steps` must be -1 (no limit) or at least 1, got 0",
        "r.yaml:8: `train.learning_rate` must be greater than 0, got -1",
        "r.yaml:12: `data.max_length` must be a number when `data.packing` is true: packing fills rows up to "
        "it; set it, or set `data.packing: false`",
        "r.yaml:14: `adapter.r` must be at least 1, got 0",
        "override `train.lr=3`: unknown field `train.lr`; here it is `train.learning_rate`",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("train: {learning_rate: 2}", "`train.learning_rate` must be at most 1, got 2"),
        ("train: {learning_rate: .nan}", "`train.learning_rate` must be a finite number, got nan"),
        ("train: {learning_rate: -.inf}", "`train.learning_rate` must be a finite number, got -inf"),
        ("train: {learning_rate: fast}", "`train.learning_rate` must be a number, got the text `fast`"),
        ("train: {learning_rate: true}", "`train.learning_rate` must be a number, got true"),
        (
            'train: {learning_rate: "1e-5"}',
            "`train.learning_rate` must be a number, got the text `1e-5`; write 1e-5 without quotes",
        ),
        ("train: {max_steps: 1.5}", "`train.max_steps` must be a whole number, got 1.5"),
        ("train: {max_steps: 1e3}", "`train.max_steps` must be a whole number, got 1000.0; write 1000"),
        ("train: {max_steps: -2}", "`train.max_steps` must be at least -1, got -2"),
        ("train: {max_steps: null}", "`train.max_steps` must be a whole number, got null"),
        (
            'adapter: {r: "16"}',
            "`adapter.r` must be a whole number, got the text `16`; write 16 without quotes",
        ),
        (
            "train: {max_steps: 1_000}",
            "`train.max_steps` must be a whole number, got the text `1_000`; write 1000 without quotes",
        ),
        ("adapter: {r: true}", "`adapter.r` must be a whole number, got true"),
        ("adapter: {r: 99999}", "`adapter.r` must be at most 1024, got 99999"),
        ("adapter: {lora_dropout: 1}", "`adapter.lora_dropout` must be less than 1, got 1"),
        (
            "adapter: {use_dora: yes}",
            "`adapter.use_dora` must be true or false, got the text `yes`; write true",
        ),
        (
            "adapter: {use_dora: Off}",
            "`adapter.use_dora` must be true or false, got the text `Off`; write false",
        ),
        ("adapter: {use_dora: 1}", "`adapter.use_dora` must be true or false, got 1; write true"),
        ("adapter: {use_dora: maybe}", "`adapter.use_dora` must be true or false, got the text `maybe`"),
        (
            "adapter: {target_modules: 'in_proj,x_proj'}",
            "`adapter.target_modules` must be a list, got the text `in_proj,x_proj`; write [in_proj, x_proj]",
        ),
        ("adapter: {target_modules: []}", "`adapter.target_modules` must have at least one entry"),
        (
            "adapter: {target_modules: [1]}",
            "`adapter.target_modules.0` must be text, got 1; put it in quotes",
        ),
        ("adapter: {target_modules: ['']}", "`adapter.target_modules.0` must not be empty"),
        (
            "adapter: lora",
            "`adapter` must be a section with fields of its own, or the word `none`, got the text `lora`; "
            "leave the line out for LoRA with its defaults",
        ),
        (
            "adapter: [r, 3]",
            "`adapter` must be a section with fields of its own, or the word `none`, got a list",
        ),
        ("train: {report_to: none}", "`train.report_to` must be a list, got the text `none`; write []"),
        (
            "train: {report_to: [mlflow]}",
            "`train.report_to.0` must be one of `tensorboard`, `wandb`, `trackio`, got `mlflow`",
        ),
        (
            "train: {optim: adamw_bnb_8bit}",
            "`train.optim` must be one of `adamw_torch_fused`, `adamw_8bit`, `paged_adamw_8bit`, got "
            "`adamw_bnb_8bit`; did you mean `adamw_8bit`?",
        ),
        (
            "train: {checkpointing: true}",
            "`train.checkpointing` must be one of `none`, `block`, `mamba`, got true; did you mean `block`?",
        ),
        (
            "train: {trainer_arguments: [a]}",
            "`train.trainer_arguments` must be a section with fields of its own, got a list",
        ),
        (
            "eval: {eval_steps: 1.5}",
            "`eval.eval_steps` must be a whole number from 1 up, or a share below 1, got 1.5",
        ),
        ("eval: {eval_steps: 0}", "`eval.eval_steps` must be greater than 0, got 0"),
        ("seed: -1", "`seed` must be at least 0, got -1"),
        ("seed: 4294967296", "`seed` must be at most 4294967295, got 4294967296"),
    ],
)
def test_a_wrong_value_is_one_clear_line(more: str, message: str) -> None:
    assert problems(minimal(more)) == [f"r.yaml:7: {message}"]


def test_text_that_yaml_reads_as_a_number() -> None:
    assert problems(MINIMAL.replace("base: some/base", "base: b\n  revision: 1e10")) == [
        "r.yaml:4: `model.revision` must be text, got 10000000000.0; put it in quotes"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1",
            ["`data` is missing; it needs `data.sources`", "`model` is missing; it needs `model.base`"],
        ),
        ("output_dir: x\nmodel:\ndata: {sources: [{path: x}]}", ["`model.base` is missing"]),
        ("output_dir: x\nmodel: {base: b}\ndata: {packing: true}", ["`data.sources` is missing"]),
    ],
)
def test_missing_fields_say_what_is_needed(text: str, message: list[str]) -> None:
    found = [line.split(": ", 1)[1] for line in problems(text)]
    assert [line for line in found if "output_dir" not in line] == message


def test_an_empty_required_section_does_not_hide_clashes() -> None:
    text = "output_dir: x\nmodel:\ndata:\n  sources: [{path: x}]\n  max_length:\n"
    assert [line[:30] for line in problems(text)] == [
        "r.yaml:2: `model.base` is miss",
        "r.yaml:5: `data.max_length` mu",
    ]


def test_a_missing_field_is_told_at_its_section() -> None:
    assert problems("output_dir: x\n\nmodel:\n  dtype: auto\ndata:\n  sources:\n    - split: test\n") == [
        "r.yaml:3: `model.base` is missing",
        "r.yaml:7: `data.sources.0.path` is missing",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sede: 3", "unknown field `sede`; did you mean `seed`?"),
        ("lora_alpha: 3", "unknown field `lora_alpha`; it goes under `adapter`"),
        ("learning_rte: 3", "unknown field `learning_rte`; did you mean `train.learning_rate`?"),
        ("adapter: {learning_rate: 3}", "unknown field `adapter.learning_rate`; it goes under `train`"),
        ("train: {seed: 3}", "unknown field `train.seed`; it goes at the top level"),
        ("train: {split: test}", "unknown field `train.split`; it goes into an entry of `data.sources`"),
        ("train: {Learning-Rate: 3}", "unknown field `train.Learning-Rate`; did you mean `learning_rate`?"),
        (
            "train: {adam_beta2: 0.9}",
            "unknown field `train.adam_beta2`; other fields of SFTConfig go under `train.trainer_arguments`",
        ),
        ("qqq: 3", "unknown field `qqq`"),
        ("<<: {seed: 3}", "unknown field `<<`"),
        (
            "micro_batch_size: 2",
            "unknown field `micro_batch_size`; here it is `train.per_device_train_batch_size`",
        ),
        ("lora_r: 2", "unknown field `lora_r`; here it is `adapter.r`"),
        ("sequence_len: 2", "unknown field `sequence_len`; here it is `data.max_length`"),
        ("max_seq_length: 2", "unknown field `max_seq_length`; here it is `data.max_length`"),
        ("cutoff_len: 2", "unknown field `cutoff_len`; here it is `data.max_length`"),
        ("model_name_or_path: b", "unknown field `model_name_or_path`; here it is `model.base`"),
        ("base_model: b", "unknown field `base_model`; here it is `model.base`"),
        ("num_epochs: 2", "unknown field `num_epochs`; here it is `train.num_train_epochs`"),
        ("load_in_4bit: true", "unknown field `load_in_4bit`; here it is `model.quantization: nf4`"),
        ("sample_packing: true", "unknown field `sample_packing`; here it is `data.packing`"),
        ("packing: true", "unknown field `packing`; it goes under `data`"),
        (
            "train_on_inputs: false",
            "unknown field `train_on_inputs`; here it is `data.assistant_only_loss` "
            "(which means the opposite)",
        ),
        ("datasets: []", "unknown field `datasets`; here it is `data.sources`"),
        ("val_set_size: 0.1", "unknown field `val_set_size`; here it is `data.validation`"),
        ("lora_target: all", "unknown field `lora_target`; here it is `adapter.target_modules`"),
        (
            "gradient_checkpointing: true",
            "unknown field `gradient_checkpointing`; here it is `train.checkpointing`",
        ),
        ("train: {bf16: true}", "unknown field `train.bf16`; here it is `model.dtype: bfloat16`"),
        ("train: {fp16: true}", "unknown field `train.fp16`; here it is `model.dtype: float16`"),
        (
            "trust_remote_code: true",
            "unknown field `trust_remote_code`; code from a model repository is never run; leave it out",
        ),
    ],
)
def test_an_unknown_field_gets_the_right_hint(more: str, message: str) -> None:
    assert problems(minimal(more)) == [f"r.yaml:7: {message}"]


def dotted_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        section = section_at(model, (name,))
        if section is not None:
            found |= dotted_fields(section, f"{prefix}{name}.")
    return found


def test_hints_name_fields_that_exist() -> None:
    known = dotted_fields()
    for foreign, ours in FOREIGN_KEYS.items():
        field, _, value = ours.partition(" (")[0].partition(": ")
        assert field in known, foreign
        assert not value or value in known[field].annotation.__args__, foreign
    for name, words in OWNED.items():
        field = words.split("`")[1].partition(": ")[0]
        assert field in known or field.startswith("mamba-sft "), name
    assert not set(UNWANTED_KEYS) & set(FOREIGN_KEYS)


def test_hinted_values_are_choices() -> None:
    schema = json.dumps(recipe_schema())
    for foreign, ours in FOREIGN_VALUES.items():
        assert f'"{ours}"' in schema, foreign


def test_packing_needs_a_length() -> None:
    assert problems(MINIMAL + "  max_length: null\n") == [
        "r.yaml:7: `data.max_length` must be a number when `data.packing` is true: packing fills rows up to "
        "it; set it, or set `data.packing: false`"
    ]
    assert Recipe.from_text(MINIMAL + "  max_length: null\n  packing: false\n").data.max_length is None


def test_text_goes_with_chats_that_are_trained_on_assistant_turns() -> None:
    recipe = Recipe.from_text(MINIMAL + "    - path: b.txt\n      format: text\n")
    assert recipe.data.sources[1].format == "text"
    assert recipe.data.assistant_only_loss


def test_early_stopping_and_best_model_need_validation() -> None:
    text = MINIMAL + "  validation: 0\neval:\n  early_stopping_patience: 3\n  load_best_model_at_end: true\n"
    assert problems(text) == [
        "r.yaml:9: `eval.early_stopping_patience` needs a validation loss, and `data.validation` is 0; "
        "hold rows out, or set it to null",
        "r.yaml:10: `eval.load_best_model_at_end` needs a validation loss to tell which is best, and "
        "`data.validation` is 0; hold rows out, or set it to false",
    ]


@pytest.mark.parametrize(
    ("save", "evaluate", "relation"),
    [
        ("30", "20", "a multiple of"),
        ("10", "20", "a multiple of"),
        ("0.5", "20", "a multiple of"),
        ("0.3", "0.2", "the same as"),
        ("0.4", "0.2", "the same as"),  # rounded to steps, 0.4 of a run may fall between evaluations
        ("40", "0.2", "the same as"),
    ],
)
def test_the_best_checkpoint_must_have_been_evaluated(save: str, evaluate: str, relation: str) -> None:
    text = minimal(f"train: {{save_steps: {save}}}\neval: {{eval_steps: {evaluate}}}\n")
    assert problems(text) == [
        f"r.yaml:7: `train.save_steps` must be {relation} `eval.eval_steps` ({evaluate}) when "
        f"`eval.load_best_model_at_end` is true, got {save}: only a checkpoint that was evaluated can be the "
        "best; leave it out to save at every evaluation"
    ]
    assert Recipe.from_text(text, overrides=["eval.load_best_model_at_end=false"])
    assert Recipe.from_text(text, overrides=["data.validation=0"])


def test_repeated_entries() -> None:
    text = minimal(
        "adapter: {target_modules: [in_proj, x_proj, in_proj]}\ntrain: {report_to: [wandb, wandb]}"
    )
    assert problems(text) == [
        "r.yaml:7: `adapter.target_modules` must not repeat `in_proj`",
        "r.yaml:8: `train.report_to` must not repeat `wandb`",
    ]


def test_trainer_arguments_do_not_replace_fields() -> None:
    text = minimal(
        "train:\n  trainer_arguments:\n    adam_beta2: 0.99\n    learning_rate: 1e-4\n    bf16: true\n"
        "    remove_unused_columns: true\n"
    )
    assert problems(text) == [
        "r.yaml:10: `train.trainer_arguments.learning_rate` must not be set here; use `train.learning_rate`",
        "r.yaml:11: `train.trainer_arguments.bf16` must not be set here; use `model.dtype: bfloat16`",
        "r.yaml:12: `train.trainer_arguments.remove_unused_columns` must not be set: packed rows need all "
        "their columns",
    ]


@pytest.mark.parametrize("field", ["stream_tokens: 64", "carry_state: true", "auto_batch: true"])
def test_own_steps_do_not_go_with_every_argument(field: str) -> None:
    text = minimal(
        f"train:\n  {field}\n  trainer_arguments: {{neftune_noise_alpha: 5, loss_type: nll}}\n"
        "eval: {eval_steps: 2}\n"
    )
    assert problems(text) == [
        "r.yaml:9: `train.trainer_arguments.neftune_noise_alpha` does not go with "
        f"`train.{field.partition(':')[0]}`: the size of that noise depends on the length that is run at "
        "once; leave one out"
    ]
    assert Recipe.from_text(text.replace("neftune_noise_alpha: 5, ", ""))
    assert Recipe.from_text(text.replace(f"  {field}\n", ""))


def test_trls_own_search_for_a_batch_size_is_ours() -> None:
    assert problems(minimal("train: {trainer_arguments: {auto_find_batch_size: true}}")) == [
        "r.yaml:7: `train.trainer_arguments.auto_find_batch_size` must not be set here; use "
        "`train.auto_batch`"
    ]


def test_every_field_of_sft_config_is_settled_one_way() -> None:
    trl = pytest.importorskip("trl")
    known = {field.name for field in fields(trl.SFTConfig)}
    own = set(TrainSection.model_fields) - {"trainer_arguments", *NOT_OF_TRL}
    tables = [own, set(ALLOWED), set(OWNED), set(FIXED)]
    # activation_checkpointing came after the oldest supported transformers
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set().union(*tables) - newer <= known, "no table names what is not there"
    assert known <= set().union(*tables), "and each field is in one"
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(WHOLE_ROW_ARGUMENTS) <= set(ALLOWED)


GOOD_ARGUMENTS: dict[str, list[Any]] = {
    "adam_beta1": [0, 0.5], "adam_beta2": [0.95], "adam_epsilon": [1e-8], "ddp_backend": ["gloo"],
    "average_tokens_across_devices": [False], "dataloader_num_workers": [0, 2], "ddp_timeout": [60],
    "dataloader_persistent_workers": [False], "ddp_bucket_cap_mb": [25],
    "dataloader_prefetch_factor": [2], "full_determinism": [False], "label_smoothing_factor": [0.1],
    "logging_first_step": [False], "loss_type": ["nll", "dft"], "neftune_noise_alpha": [5], "tf32": [False],
    "project": ["mine"], "run_name": ["one"], "torch_empty_cache_steps": [10],
}  # fmt: skip


def test_allowed_arguments_have_the_types_of_sft_config() -> None:
    trl = pytest.importorskip("trl")
    assert GOOD_ARGUMENTS.keys() == ALLOWED.keys()
    hints = get_type_hints(trl.SFTConfig)
    for name, kind in ALLOWED.items():
        (bare,) = {*(get_args(hints[name]) or [hints[name]])} - {type(None)}
        for value in GOOD_ARGUMENTS[name]:
            assert kind.accepts(value)
            assert isinstance(value, (int, float) if bare is float else bare), name
        wrong = ["yes", [], {}, None, -1, float("inf")] + ([1] if bare in (bool, str) else [True])
        for value in wrong:
            if not (bare is str and value == "yes"):
                assert not kind.accepts(value), (name, value)


def test_allowed_arguments_reach_sft_config() -> None:
    trl = pytest.importorskip("trl")
    for name, values in GOOD_ARGUMENTS.items():
        for value in values if name != "ddp_backend" else []:  # that one wants several processes
            workers = {"dataloader_num_workers": 1} if name == "dataloader_prefetch_factor" else {}
            config = trl.SFTConfig(output_dir="x", use_cpu=True, bf16=False, **{name: value} | workers)
            assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("push_to_hub: true", "must not be set here; use `mamba-sft export RUN --format hf --push-to-hub"),
        ("hub_token: hf_secret", "must not be set: a token would stand in the recipe and the report"),
        ("save_only_model: true", "must not be set: a run could no longer be resumed exactly"),
        ("ignore_data_skip: true", "must not be set: a run could no longer be resumed exactly"),
        ("trackio_space_id: a/b", "must not be set: nothing is published while training"),
        ("use_liger_kernel: true", "must not be set here; use `model.kernels`"),
        (
            "fsdp: full_shard",
            "must not be set: `train.parallel: ddp | fsdp | zero2` says how several GPUs share",
        ),
        ("deepspeed: zero.json", "must not be set: `train.parallel: ddp | fsdp | zero2` says how"),
        ("adam_beta2: high", "must be a number from 0 to below 1, got the text `high`"),
        ("adam_beta2: true", "must be a number from 0 to below 1, got true"),
        ("adam_beta2: null", "must be a number from 0 to below 1, got null"),
        ("dataloader_num_workers: 2.0", "must be a whole number from 0 to 256, got 2.0"),
        ("loss_type: [nll]", "must be one of `nll`, `dft`, got a list"),
        ("tf32: 1", "must be true or false, got 1"),
        ("adam_beta3: 0.9", "is not a field of SFTConfig; did you mean `adam_beta"),
        ("dataloader_prefetch_factor: 2", "needs `train.trainer_arguments.dataloader_num_workers` to be at"),
        ("run_name: mine", "needs `train.report_to`: nothing else shows it"),
    ],
)
def test_trainer_arguments_are_refused_with_line_and_reason(argument: str, text: str) -> None:
    found = problems(minimal(f"train:\n  trainer_arguments:\n    {argument}\n"))
    name = argument.partition(":")[0]
    assert len(found) == 1
    assert found[0].startswith(f"r.yaml:9: `train.trainer_arguments.{name}` {text}")
    assert "secret" not in found[0]


@pytest.mark.parametrize(
    ("parallel", "setting", "why"),
    [
        ("fsdp", "stream_tokens: 64", "go through it together"),
        ("zero2", "carry_state: true", "go through it together"),
        ("fsdp", "auto_batch: true", "go through it together"),
        ("zero2", "optim: adamw_8bit", "know no parts of parameters"),
        ("fsdp", "trainer_arguments: {loss_type: dft}", "only the loss `nll`"),
    ],
)
def test_what_needs_the_whole_model_in_each_process(parallel: str, setting: str, why: str) -> None:
    found = problems(minimal(f"train:\n  parallel: {parallel}\n  {setting}\n"))
    assert len(found) == 1
    assert f"does not go with `train.parallel: {parallel}`" in found[0]
    assert why in found[0]
    Recipe.from_text(minimal(f"train:\n  parallel: ddp\n  {setting}\n"), "r.yaml")


def test_dora_reads_no_packed_weights() -> None:
    more = "train:\n  parallel: fsdp\n  checkpointing: mamba\nadapter:\n  use_dora: true\n"
    text = minimal(more).replace("base: some/base", "base: some/base\n  quantization: nf4")
    assert "`train.checkpointing` does not go with `train.parallel: fsdp`: DoRA" in "".join(problems(text))
    Recipe.from_text(text.replace("mamba", "block"), "r.yaml")


def test_int8_is_not_cut_in_parts() -> None:
    text = minimal("train:\n  parallel: fsdp\n").replace(
        "base: some/base", "base: some/base\n  quantization: int8"
    )
    assert "`model.quantization` does not go with `train.parallel: fsdp`" in "".join(problems(text))


def test_zero3_is_refused_with_the_reason() -> None:
    (found,) = problems(minimal("train:\n  parallel: zero3\n"))
    assert "`train.parallel` must not be `zero3`: it fetches a module's weights when" in found
    assert "use `fsdp`" in found


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_every_dtype_goes_with_every_quantization(dtype: str, quantization: str) -> None:
    overrides = [f"model.dtype={dtype}", f"model.quantization={quantization}", "adapter.use_dora=true"]
    assert Recipe.from_text(MINIMAL, overrides=overrides).model.dtype == dtype


def test_wrong_list_entries_do_not_hide_clashes() -> None:
    text = minimal("adapter: {target_modules: [1, 2]}\ntrain: {report_to: [wandb, wandb]}\n")
    assert problems(text) == [
        "r.yaml:7: `adapter.target_modules.0` must be text, got 1; put it in quotes",
        "r.yaml:7: `adapter.target_modules.1` must be text, got 2; put it in quotes",
        "r.yaml:8: `train.report_to` must not repeat `wandb`",
    ]


def test_a_clash_with_a_wrong_value_waits() -> None:
    """Otherwise the default that stands in for the wrong value would be blamed."""
    text = minimal("train: {save_steps: 0.5}\neval: {eval_steps: -1}\n")
    assert problems(text) == ["r.yaml:8: `eval.eval_steps` must be greater than 0, got -1"]


def test_builtin_recipe_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("instruct-t4", overrides=["train.max_steps=3"])
    assert (recipe.output_dir, recipe.train.max_steps) == ("runs/instruct-t4", 3)
    assert Recipe.load("recipes/instruct-t4.yaml") == Recipe.load(builtin_recipes()["instruct-t4"])
    (tmp_path / "instruct-t4").mkdir()
    assert Recipe.load("instruct-t4").output_dir == "runs/instruct-t4"


def test_own_file_wins_over_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "instruct").write_text(MINIMAL)
    assert Recipe.load("instruct").output_dir == "runs/x"


def test_unknown_recipe_lists_the_builtin_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        Recipe.load("instrct-t4")
    assert caught.value.message == (
        "no recipe `instrct-t4`: neither a file nor a built-in recipe; did you mean `instruct-t4`?"
    )
    assert caught.value.hint == "built-in recipes: " + ", ".join(builtin_recipes())
    assert caught.value.exit_code == 2


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory"):
        Recipe.load(tmp_path)


def test_find_path_looks_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_path("recipes/instruct.yaml") == bundled_root() / "recipes" / "instruct.yaml"
    assert find_path("recipes/inst*.yaml") == bundled_root() / "recipes" / "inst*.yaml"
    assert find_path("some/hub-id") == Path("some/hub-id")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "instruct.yaml").touch()
    assert find_path("recipes/instruct.yaml") == Path("recipes/instruct.yaml")
    (tmp_path / "odd[1].jsonl").touch()
    assert find_path("odd[1].jsonl") == Path("odd[1].jsonl")
    with pytest.raises(UsageError, match="no file can be called"):
        find_path("{{ messages }}" * 1000)


def test_schema_describes_the_fields() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    train = schema["$defs"]["TrainSection"]
    rate = train["properties"]["learning_rate"]
    assert rate["description"].startswith("Peak step size.")
    assert (rate["exclusiveMinimum"], rate["maximum"], rate["default"]) == (0, 1, 2e-4)
    assert rate["type"] == ["number", "string"]
    assert train["properties"]["checkpointing"]["enum"] == ["none", "block", "mamba"]
    assert train["additionalProperties"] is False
    assert schema["required"] == ["output_dir", "model", "data"]


def source(text: str) -> str:
    return MINIMAL.replace("- path: rows.jsonl", "- {path: rows.jsonl, " + text + "}")


def test_columns_roles_and_preference_of_a_source() -> None:
    recipe = Recipe.from_text(
        source("columns: {prompt: task, response: reply}, roles: {Customer: user}, preference: chosen")
    )
    found = recipe.data.sources[0]
    assert found.columns == {"prompt": "task", "response": "reply"}
    assert (found.roles, found.preference) == ({"Customer": "user"}, "chosen")
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.from_text(MINIMAL, overrides=["data.sources.0.columns={prompt: q}"]).data.sources[
        0
    ].columns == {"prompt": "q"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "columns: {promt: a}",
            "names in `data.sources.0.columns` must be one of `messages`, `prompt`, `input`, `response`,"
            " `system`, `history`, `tools`, `text`,"
            " `chosen`, `rejected`, `difficulty`, got `promt`; did you mean `prompt`?",
        ),
        ("columns: {prompt: 3}", "`data.sources.0.columns.prompt` must be text, got 3; put it in quotes"),
        (
            "roles: {agent: usr}",
            "`data.sources.0.roles.agent` must be one of `system`, `user`, `assistant`, `tool`, got `usr`;"
            " did you mean `user`?",
        ),
        (
            "columns: {messages: a, prompt: b}",
            "`data.sources.0.columns` must not have both `messages` and `prompt`: rows have one format",
        ),
        ("columns: {prompt: a, response: a}", "`data.sources.0.columns` must not give `a` two parts"),
        (
            "columns: {prompt: a}, format: sharegpt",
            "`data.sources.0.columns` must not have `prompt` with `format: sharegpt`; leave the format out",
        ),
    ],
)
def test_what_columns_and_roles_cannot_be(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(source(text))
    assert [line.partition(": ")[2] for line in caught.value.message.splitlines()] == [problem]


def test_adapter_none_is_full_fine_tuning() -> None:
    for recipe in (
        Recipe.from_text(MINIMAL + "adapter: none\n"),
        Recipe.from_text(MINIMAL, overrides=["adapter=none"]),
        Recipe.from_text(MINIMAL + "adapter: {r: 8}\n", overrides=["adapter=none"]),
        Recipe.build(output_dir="x", model={"base": "b"}, data={"sources": [{"path": "p"}]}, adapter="none"),
    ):
        assert recipe.adapter is None
        assert recipe.train.learning_rate == 2e-5
        assert Recipe.from_text(recipe.to_yaml()) == recipe
        assert Recipe.model_validate(recipe.model_dump()) == recipe
        assert "adapter: none\n" in recipe.to_yaml()
    assert Recipe.from_text(MINIMAL + "adapter: none\n", overrides=["adapter={r: 8}"]).adapter.r == 8
    chosen = Recipe.from_text(MINIMAL + "adapter: none\ntrain: {learning_rate: 1e-3}\n")
    assert chosen.train.learning_rate == 1e-3
    assert Recipe.from_text(MINIMAL).train.learning_rate == 2e-4
    assert {"const": "none"} in recipe_schema()["properties"]["adapter"]["anyOf"]


@pytest.mark.parametrize("word", [*sorted({*ALL_WEIGHTS} - {"none", "null"}), "None", "full-finetuning"])
def test_what_others_call_full_fine_tuning_is_not_lora(word: str) -> None:
    (problem,) = problems(MINIMAL + f"adapter: {word}\n")
    assert problem.endswith("did you mean `none`, which trains all weights?")


@pytest.mark.parametrize("text", ["adapter: null\n", "adapter:\n"])
def test_an_empty_adapter_is_not_guessed_at(text: str) -> None:
    (problem,) = problems(MINIMAL + text)
    assert problem.startswith("r.yaml:7: `adapter` must be a section")
    assert problem.endswith(
        "leave the line out for LoRA with its defaults, or write `none` to train all weights"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.adapter=runs/x", "`model.adapter` does not go with `adapter: none`"),
        ("model.quantization=nf4", "`model.quantization` must be `none` with `adapter: none`"),
        ("model.quantization=int8", "`model.quantization` must be `none` with `adapter: none`"),
        ("model.dtype=float16", "`model.dtype` must not be `float16` with `adapter: none`"),
        ("train.checkpointing=mamba", "`train.checkpointing` must not be `mamba` with `adapter: none`"),
    ],
)
def test_what_needs_frozen_weights_does_not_go_without_an_adapter(override: str, message: str) -> None:
    assert Recipe.from_text(MINIMAL, overrides=[override])
    (problem,) = problems(MINIMAL + "adapter: none\n", override)
    assert problem.startswith(f"override `{override}`: {message}")
