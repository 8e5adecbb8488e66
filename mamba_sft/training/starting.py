"""The adapter that a run starts from, where `model.adapter` names one: found, and held against the recipe.

What a recipe says of the adapter, the base and the vocabulary has to be what that adapter was trained with.
All of it is checked on files, before weights are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import AdapterError, RecipeError
from mamba_sft.model.adapter_config import OTHERS, read_adapter_config
from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.model.checkpoint import base_fingerprint, resolve_base
from mamba_sft.model.checksums import file_checksum
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.fields import AdapterSection, ModelSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Run
from mamba_sft.wording import shown

if TYPE_CHECKING:
    from mamba_sft.model.chat_template import TemplateSetup

logger = logging.getLogger(__name__)

SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")
"""Fields of `adapter` that decide what an adapter's tensors are and mean; dropout is free to change."""
FOREIGN = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern",
    "exclude_modules", "fan_in_fan_out", "lora_bias", *OTHERS,
)  # fmt: skip
"""What PEFT can do and no recipe can say; an adapter that uses it cannot be trained on here."""


def find_start(recipe: Recipe) -> Path | None:
    """Returns the directory of the adapter that training starts from; None where it starts anew.

    Whether its vocabulary fits is left to `check_vocabulary`.

    Args:
        recipe: What is trained.

    Raises:
        RecipeError: It is inside `output_dir`.
        AdapterError: There is none, it is damaged, or it does not fit the recipe.
    """
    if recipe.model.adapter is None or recipe.adapter is None:  # both at once are no recipe
        return None
    path = _directory(recipe.model.adapter)
    if path.resolve().is_relative_to(Path(recipe.output_dir).resolve()):
        raise RecipeError(
            f"`model.adapter: {recipe.model.adapter}` is inside `output_dir: {recipe.output_dir}`, "
            "which this run would write anew",
            hint="give the new run a directory of its own: `output_dir=runs/NAME`",
        )
    facts = BaseFacts.read(path)
    _check_shape(path, recipe.adapter)
    if facts.adapter_checksum not in (None, file_checksum(path / ADAPTER_WEIGHTS)):
        raise AdapterError(
            f"`{path / ADAPTER_WEIGHTS}` is not the file that training wrote: its checksum is another",
            hint="a disk or a copy damaged it; copy the run again",
        )
    if find_path(recipe.model.base).is_dir():  # else it may not be downloaded yet
        check_base(path, recipe.model)
    if facts.quantization != recipe.model.quantization:
        logger.warning(
            "`%s` was trained on a base in `%s` and goes on with one in `%s`",
            path, facts.quantization, recipe.model.quantization,
        )  # fmt: skip
    return path


def check_base(path: Path, section: ModelSection) -> None:
    """Checks that the base is the one that an adapter was trained on.

    Raises:
        AdapterError: It is another.
    """
    facts = BaseFacts.read(path)
    if base_fingerprint(resolve_base(section.base, section.revision)) != facts.fingerprint:
        raise AdapterError(
            f"`{section.base}` is not the base that `{path}` was trained on, which was `{facts.base}`",
            hint=f"set `model.base={quote(facts.base)}`; an adapter that was merged needs no `model.adapter`",
        )


def _directory(where: str) -> Path:
    path = find_path(where)
    run = Run(path)
    if run.recipe.is_file():
        if run.model.is_dir():
            raise AdapterError(
                f"`model.adapter: {where}`: that run has no adapter, it trained all weights",
                hint=f"start from its model: `model.base={quote(str(run.model))}`, without `model.adapter`",
            )
        if not run.adapter.is_dir():
            raise AdapterError(
                f"`model.adapter: {where}`: that run has no adapter yet, its training has not finished",
                hint=f"go on with it first: `{run.resume_command}`, "
                f"or end it where it is: `{run.resume_command} --finish`",
            )
        return run.adapter
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise AdapterError(
                f"`model.adapter: {where}` is neither a run nor an adapter: `{path}` has no `{name}`",
                hint="give the directory of a run, or its `adapter/`",
            )
    return path


def _check_shape(path: Path, section: AdapterSection) -> None:
    config = read_adapter_config(path / ADAPTER_CONFIG)
    kind = config.get("peft_type")
    used = [f"`{name}`" for name in FOREIGN if config.get(name)]
    if config.get("bias") not in (None, "none"):
        used.append("`bias`")
    if kind != "LORA" or used:
        what = f"uses {', '.join(used)}" if kind == "LORA" else f"is {kind!s:.80}, not LORA"
        raise AdapterError(f"the adapter in `{path}` {what}, which no recipe can go on with")
    wrong = list(_differences(config, section))
    if wrong:
        lines = [f"  `{name}` is {ours}, and {its} there" for name, its, ours in wrong]
        raise AdapterError(
            "\n".join([f"the adapter in `{path}` does not fit the recipe:", *lines]),
            hint="take its own: " + " ".join(f"{name}={quote(its)}" for name, its, _ in wrong),
        )


def _differences(config: dict[str, Any], section: AdapterSection) -> Iterator[tuple[str, str, str]]:
    """(field, the adapter's value, the recipe's value) for each that is not the same, as YAML."""
    for name in SHAPE:
        its, ours = config.get(name), getattr(section, name)
        if isinstance(ours, bool):
            its = bool(its)
        if isinstance(ours, list):
            its, ours = sorted(its) if isinstance(its, list) else its, sorted(ours)
        if its != ours:
            yield f"adapter.{name}", _shown(its), _shown(ours)


def _shown(value: Any) -> str:
    """A value as YAML, without blanks, so that it can be pasted into a command."""
    if isinstance(value, list):
        return shown(f"[{','.join(map(str, value))}]", 400)
    return str(value).lower() if isinstance(value, bool) else shown(str(value), 400)


def check_vocabulary(path: Path, setup: TemplateSetup) -> None:
    """Checks that an adapter trained the rows of the vocabulary that a recipe trains.

    Args:
        path: The adapter's directory.
        setup: The recipe's tokenizer, with the special tokens settled.

    Raises:
        AdapterError: It trained others.
    """
    facts = BaseFacts.read(path)
    its, ours = sorted(facts.trained_token_ids), sorted(setup.trained_token_ids)
    if (its, facts.resize_to) == (ours, setup.resize_to):
        return
    tokens = (" ".join(map(str, ids)) or "none" for ids in (its, ours))
    raise AdapterError(
        "the adapter in `{}` trained the vocabulary's rows {} and the recipe wants {}".format(path, *tokens),
        hint="`chat.template` and `chat.special_tokens` must be those that it was trained with",
    )
