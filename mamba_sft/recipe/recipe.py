"""The recipe: every setting of a run. Imports no torch.

A recipe is a frozen tree of sections. Code below takes the section it needs (`load_model(recipe.model)`),
never the whole recipe. `fields` holds the fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from mamba_sft.errors import UsageError
from mamba_sft.recipe import conflicts, yaml_text
from mamba_sft.recipe.builtin import expanded, find_recipe
from mamba_sft.recipe.fields import (
    ORDINARY,
    Adapter,
    AdapterSection,
    ChatSection,
    DataSection,
    EvalSection,
    FileName,
    ModelSection,
    Section,
    TrainSection,
)
from mamba_sft.showing import Showing
from mamba_sft.wording import path_text, shown


def _without_home(path: str) -> str:
    """`~/x` is a directory of the user, and not one that is called `~`: the kept recipe names the place."""
    try:
        return str(expanded(path)) if path.startswith("~") else path
    except UsageError:
        user = path.partition("/")[0]
        raise ValueError(f"must not begin with `{shown(user)}`: there is no user of that name here") from None


class Recipe(Showing, Section):
    """Every setting of a training run.

    Example: `Recipe.load("quickstart", ["train.max_steps=20"])`, which a notebook shows as a table.
    """

    output_dir: Annotated[FileName, AfterValidator(_without_home)]
    """The run directory: adapter (or model), checkpoints, metrics and report go there."""
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    """Drives the split, the shuffle, the adapter's start and dropout. The same seed repeats the run."""
    model: Annotated[ModelSection, ORDINARY]
    chat: Annotated[ChatSection, ORDINARY] = ChatSection()
    data: Annotated[DataSection, ORDINARY]
    adapter: Adapter = AdapterSection()
    """LoRA on frozen weights, or the word none: full fine-tuning, which trains all weights and takes 16 bytes
    of memory for each."""
    train: Annotated[TrainSection, ORDINARY] = TrainSection()
    eval: Annotated[EvalSection, ORDINARY] = EvalSection()

    @model_validator(mode="before")
    @classmethod
    def _derive_defaults(cls, values: Any) -> Any:
        return conflicts.derive_defaults(values)

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Recipe:
        conflicts.refuse_conflicts(self.model, self.data, self.adapter, self.train, self.eval)
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads a recipe file or a built-in recipe.

        Example: `Recipe.load("instruct-t4", ["train.max_steps=60", "data.validation=200"])`.

        Args:
            path: A YAML file, or the name of a built-in recipe (`quickstart`).
            overrides: `section.field=value` texts that win over the file, the value in YAML.

        Raises:
            RecipeError: No such recipe, not readable, or with problems: all of them, by line.
        """
        where = find_recipe(str(path))
        return cls.from_text(yaml_text.read_text(where), path_text(where), overrides)

    @classmethod
    def from_text(cls, text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
        """Reads a recipe from YAML text; `name` stands for the file in messages.

        Example: `Recipe.from_text(recipe.to_yaml(), overrides=["seed=1"])`.

        Raises:
            RecipeError: The text has problems: all of them, by line.
        """
        return yaml_text.load(cls, text, name, overrides)

    @classmethod
    def build(cls, **values: Any) -> Recipe:
        """Makes a recipe from Python values; a path may be a `Path`.

        Example: `Recipe.build(output_dir="runs/a", model={"base": "b"}, data={"sources": [{"path": "c"}]})`.

        Raises:
            RecipeError: The values have problems: all of them.
        """
        return yaml_text.build(cls, values)

    @property
    def trains(self) -> Literal["adapter", "model"]:
        """What a run of it trains, and leaves in a directory of that name."""
        return "model" if self.adapter is None else "adapter"

    def to_yaml(self) -> str:
        """The whole recipe, every value written out; reading it back gives an equal recipe.

        Example: `Path("mine.yaml").write_text(recipe.to_yaml())`.
        """
        return yaml_text.dump(self.model_dump())


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: help, choices, bounds and defaults of every field."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    for section in (schema, *schema["$defs"].values()):
        for field in section.get("properties", {}).values():
            if field.get("type") == "number":  # YAML 1.1 tools hand `1e-5` over as text
                field |= {"type": ["number", "string"], "pattern": yaml_text.EXPONENT}
    return schema
