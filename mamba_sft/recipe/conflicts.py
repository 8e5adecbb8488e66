"""What the fields of a recipe owe each other: defaults that follow from another field, settings that clash.

Everything here can be decided from the recipe alone. What needs the data, the model or the trainer is checked
where those are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from mamba_sft.recipe.fields import (
    TARGETS,
    AdapterSection,
    DataSection,
    EvalSection,
    ModelSection,
    SourceSection,
    TrainSection,
)
from mamba_sft.recipe.mixtures import mixture_conflicts
from mamba_sft.recipe.schedule_conflicts import Keys, Problem, ramp_conflicts, rate_conflicts
from mamba_sft.recipe.trainer_arguments import find_fault, find_idle

__all__ = ["ConflictError", "Keys", "Problem", "derive_defaults", "refuse_conflicts"]

NOT_OF_TRL = (
    "checkpointing", "stream_tokens", "carry_state", "auto_batch", "log_activations", "grace_seconds",
    "on_spike", "decay", "min_lr_ratio", "stable_steps", "decay_steps", "batch_ramp", "batch_scaling",
    "stages", "parallel",
)  # fmt: skip
"""Fields of `train` that SFTConfig does not have."""

FULL_LEARNING_RATE = 2e-5
"""`train.learning_rate` by default where all weights are trained: a tenth of LoRA's."""

WHOLE_ROW_ARGUMENTS = {
    "loss_type": "its own steps compute TRL's `nll` loss",
    "label_smoothing_factor": "its own steps compute TRL's `nll` loss",
    "neftune_noise_alpha": "the size of that noise depends on the length that is run at once",
}
"""Fields of SFTConfig that do not go with rows taken in chunks or parts, and why."""


class ConflictError(ValueError):
    """Fields that are fine each by itself and cannot go together."""

    def __init__(self, problems: list[Problem]):
        super().__init__("; ".join(f"{'.'.join(map(str, each.path))} {each.text}" for each in problems))
        self.problems = problems


def derive_defaults(values: Any) -> Any:
    """Fills in the defaults that follow from another field.

    `train.save_steps` is `eval.eval_steps`; `eval.load_best_model_at_end` is false without validation rows;
    `data.mixture` is there where there are `train.stages`; `train.learning_rate` is lower where all weights
    are trained.
    """
    if not isinstance(values, dict):
        return values
    data, train, eval_ = (_as_dict(values.get(name)) for name in ("data", "train", "eval"))
    if data is None or train is None or eval_ is None:
        return values
    interval = eval_.get("eval_steps")
    if isinstance(interval, int | float) and interval > 0:
        train.setdefault("save_steps", interval)
    if data.get("validation") == 0:
        eval_.setdefault("load_best_model_at_end", False)
    if values.get("adapter") == "none":
        train.setdefault("learning_rate", FULL_LEARNING_RATE)
    derived = {"train": train, "eval": eval_}
    if train.get("stages") and data and data.get("mixture") is None:
        derived["data"] = data | {"mixture": {}}
    return values | derived


def _as_dict(section: Any) -> dict[str, Any] | None:
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    if section is None:
        return {}
    return dict(section) if isinstance(section, dict) else None


def refuse_conflicts(
    model: ModelSection,
    data: DataSection,
    adapter: AdapterSection | None,
    train: TrainSection,
    eval_: EvalSection,
) -> None:
    """Raises ConflictError with every clash between these sections, if there is one."""
    problems = [
        *(_full_conflicts(model, train) if adapter is None else ()),
        *_data_conflicts(data),
        *mixture_conflicts(data, train),
        *_validation_conflicts(data, train, eval_),
        *_argument_conflicts(train),
        *rate_conflicts(train),
        *ramp_conflicts(train),
        *_parallel_conflicts(model, adapter, train),
        *(_target_conflicts(adapter.target_modules) if adapter is not None else ()),
        *_duplicates(("train", "report_to"), train.report_to),
    ]
    if problems:
        raise ConflictError(problems)


def _full_conflicts(model: ModelSection, train: TrainSection) -> Iterator[Problem]:
    """What does not go with `adapter: none`."""
    full = (("adapter",),)
    if model.adapter is not None:
        yield Problem(
            ("model", "adapter"),
            "does not go with `adapter: none`: there is no adapter to go on with; start from the model that "
            "`mamba-sft merge` makes of that run, as `model.base`",
            full,
        )
    if model.quantization != "none":
        yield Problem(
            ("model", "quantization"),
            f"must be `none` with `adapter: none`: weights that are stored in {model.quantization} cannot be "
            "trained, they are rounded too coarsely for a step; leave one out",
            full,
        )
    if model.dtype == "float16":
        yield Problem(
            ("model", "dtype"),
            "must not be `float16` with `adapter: none`: the residual stream passes its largest number, "
            "65,504, and gradients of all weights its smallest; take `bfloat16` or `float32`, or leave "
            "`adapter: none` out",
            full,
        )
    if train.checkpointing == "mamba":
        yield Problem(
            ("train", "checkpointing"),
            "must not be `mamba` with `adapter: none`: it keeps the products of frozen weights, and none is "
            "frozen; take `block` or `none`",
            full,
        )


def _data_conflicts(data: DataSection) -> Iterator[Problem]:
    if data.packing and data.max_length is None:
        yield Problem(
            ("data", "max_length"),
            "must be a number when `data.packing` is true: packing fills rows up to it; "
            "set it, or set `data.packing: false`",
            (("data", "packing"),),
        )
    for index, source in enumerate(data.sources):
        yield from _column_conflicts(("data", "sources", index), source)


_STRUCTURES = {
    "messages": ("messages", "sharegpt"),
    "prompt": ("alpaca", "prompt_completion", "plain_completion"),
    "response": ("alpaca", "prompt_completion", "plain_completion"),
    "text": ("text",),
}
"""Parts that a format is made of, and the formats."""


def _column_conflicts(path: Keys, source: SourceSection) -> Iterator[Problem]:
    columns = (*path, "columns")
    made_of = {_STRUCTURES[part]: part for part in _STRUCTURES if part in source.columns}
    if len(made_of) > 1:
        first, second, *_ = made_of.values()
        yield Problem(columns, f"must not have both `{first}` and `{second}`: rows have one format")
    repeated = [f"`{column}`" for column, count in Counter(source.columns.values()).items() if count > 1]
    if repeated:
        yield Problem(columns, f"must not give {', '.join(repeated)} two parts")
    for formats, part in made_of.items():
        if source.format not in ("auto", *formats):
            yield Problem(
                columns,
                f"must not have `{part}` with `format: {source.format}`; leave the format out",
                ((*path, "format"),),
            )


def _target_conflicts(targets: Sequence[str]) -> Iterator[Problem]:
    path = ("adapter", "target_modules")
    yield from _duplicates(path, targets)
    if other := [f"`{target}`" for target in targets if target.rpartition(".")[2] not in TARGETS]:
        names = ", ".join(f"`{name}`" for name in TARGETS)
        yield Problem(path, f"names {', '.join(other)}; the linear layers of this model are {names}")


def _duplicates(path: Keys, values: Sequence[str]) -> Iterator[Problem]:
    repeated = [f"`{value}`" for value, count in Counter(values).items() if count > 1]
    if repeated:
        yield Problem(path, "must not repeat " + ", ".join(repeated))


def _validation_conflicts(data: DataSection, train: TrainSection, eval_: EvalSection) -> Iterator[Problem]:
    save_steps = train.save_steps
    if data.validation == 0:
        if eval_.early_stopping_patience is not None:
            yield Problem(
                ("eval", "early_stopping_patience"),
                "needs a validation loss, and `data.validation` is 0; hold rows out, or set it to null",
                (("data", "validation"),),
            )
        if eval_.load_best_model_at_end:
            yield Problem(
                ("eval", "load_best_model_at_end"),
                "needs a validation loss to tell which is best, and `data.validation` is 0; "
                "hold rows out, or set it to false",
                (("data", "validation"),),
            )
    elif eval_.load_best_model_at_end and not _meet(save_steps, eval_.eval_steps):
        relation = "a multiple of" if eval_.eval_steps >= 1 else "the same as"
        yield Problem(
            ("train", "save_steps"),
            f"must be {relation} `eval.eval_steps` ({eval_.eval_steps:g}) when "
            f"`eval.load_best_model_at_end` is true, got {save_steps:g}: only a checkpoint that was "
            "evaluated can be the best; leave it out to save at every evaluation",
            (("eval", "eval_steps"), ("eval", "load_best_model_at_end"), ("data", "validation")),
        )


def _meet(save_steps: float, eval_steps: float) -> bool:
    """Whether every save falls on an evaluation. Shares are rounded to steps one by one, so must be equal."""
    return save_steps == eval_steps or (min(save_steps, eval_steps) >= 1 and save_steps % eval_steps == 0)


def _argument_conflicts(train: TrainSection) -> Iterator[Problem]:
    own = set(TrainSection.model_fields) - {"trainer_arguments", *NOT_OF_TRL}
    for name, value in train.trainer_arguments.items():
        fault = find_fault(name, value, own)
        if fault is not None:
            yield Problem(("train", "trainer_arguments", name), fault)
    for name, fault in find_idle(train.trainer_arguments, reports=bool(train.report_to)):
        yield Problem(("train", "trainer_arguments", name), fault, (("train", "report_to"),))
    own_steps = [name for name in ("stream_tokens", "carry_state", "auto_batch") if getattr(train, name)]
    for name in WHOLE_ROW_ARGUMENTS.keys() & train.trainer_arguments.keys():
        value = train.trainer_arguments[name]
        if own_steps and value and value != "nll":
            yield Problem(
                ("train", "trainer_arguments", name),
                f"does not go with `train.{own_steps[0]}`: {WHOLE_ROW_ARGUMENTS[name]}; leave one out",
                (("train", own_steps[0]),),
            )


_IN_STEP = "processes that share the model out go through it together, and here each takes its own way"


def _parallel_conflicts(
    model: ModelSection, adapter: AdapterSection | None, train: TrainSection
) -> Iterator[Problem]:
    if train.parallel == "ddp":
        return
    found: dict[tuple[str, ...], str] = {}
    whole_model = ("stream_tokens", "carry_state", "auto_batch")
    found |= {("train", name): _IN_STEP for name in whole_model if getattr(train, name)}
    if train.optim != "adamw_torch_fused":
        found["train", "optim"] = "the 8-bit optimizers of bitsandbytes know no parts of parameters"
    found |= _fsdp_faults(model, adapter, train) if train.parallel == "fsdp" else _zero2_faults(model, train)
    for path, why in found.items():
        text = f"does not go with `train.parallel: {train.parallel}`: {why}; change one of them"
        yield Problem(path, text, (("train", "parallel"),))


def _fsdp_faults(
    model: ModelSection, adapter: AdapterSection | None, train: TrainSection
) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    if model.quantization == "int8":
        found["model", "quantization"] = "bitsandbytes keeps the scales of int8 weights beside them"
    dora = adapter is not None and adapter.use_dora
    if model.quantization == "nf4" and dora and train.checkpointing == "mamba":
        found["train", "checkpointing"] = "DoRA would read a 4-bit weight that nobody has unpacked"
    for name in ("loss_type", "label_smoothing_factor"):
        value = train.trainer_arguments.get(name)
        if value and value != "nll":
            found["train", "trainer_arguments", name] = "only the loss `nll` fetches the weights of the head"
    return found


def _zero2_faults(model: ModelSection, train: TrainSection) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    if train.on_spike == "skip":
        found["train", "on_spike"] = "DeepSpeed has no way to leave a step out"
    if model.dtype == "float16":
        found["model", "dtype"] = "DeepSpeed would train the adapter in float16 too"
    return found
