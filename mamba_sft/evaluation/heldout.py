"""The suite `heldout`: the loss on rows that were not trained on, row by row, under training's own mask.

Rows are a run's validation rows, or those of a file or of a source of its recipe. They are read, rendered and
cut as training does it, and kept where training keeps them, so that a run's are there already. Needs nothing
that training does not need.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import DataError, MambaSFTError, UsageError
from mamba_sft.evaluation.normalisation import Column, Pool
from mamba_sft.evaluation.scores import Scores, TaskScores, document_keys
from mamba_sft.evaluation.settings import Settings
from mamba_sft.evaluation.suites import Problem, Progress
from mamba_sft.recipe.fields import ChatSection, DataSection, SourceSection
from mamba_sft.run import Run

if TYPE_CHECKING:
    from datasets import Dataset

    from mamba_sft.inference.chat_model import ChatModel
    from mamba_sft.inference.model_places import ModelPlace
    from mamba_sft.model.chat_template import TemplateSetup
    from mamba_sft.recipe.recipe import Recipe

NAME = "heldout"
LOSS, ACCURACY = "loss", "token_accuracy"


class Heldout:
    """Loss, perplexity and token accuracy on held-out rows."""

    name = NAME
    published: Mapping[str, Sequence[float]] = {}

    def __init__(self) -> None:
        self._rows: Dataset | None = None
        self._setup: TemplateSetup | None = None
        self._facts: dict[str, Any] = {}

    def problems(self, place: ModelPlace | None, settings: Settings) -> list[Problem]:
        """Looks whether there are rows, without reading them."""
        from mamba_sft.data.sources import check_source

        if place is None and settings.rows is None:
            return []  # without a model, nothing tells which rows
        try:
            recipe = None if place is None else _recipe_of(place)
            data = _data_of("" if place is None else place.name, recipe, settings)
            for source in data.sources:
                check_source(source)
        except MambaSFTError as error:
            return [Problem(error.message, error.hint)]
        return []

    def prepare(self, place: ModelPlace, settings: Settings) -> list[str]:
        """Makes tokens of the rows.

        Raises:
            DataError: The rows cannot be read, or none is left.
        """
        from mamba_sft.data.preparing import prepare_data

        recipe = _recipe_of(place)
        data = _data_of(place.name, recipe, settings)
        self._setup = _setup_of(place, recipe)
        system = recipe.chat.system if recipe is not None else None
        seed = recipe.seed if recipe is not None else 0
        prepared = prepare_data(data, self._setup, system=system, seed=seed)
        rows = prepared.train if data.validation == 0 else prepared.validation
        if rows is None:
            raise DataError(
                f"`{place.name}` holds no rows back: `data.validation` is {data.validation} of too few",
                hint="name rows with `--data FILE`",
            )
        self._rows = rows if settings.limit is None else rows.select(range(min(settings.limit, len(rows))))
        self._facts = {
            "data": [source.path for source in data.sources],
            "validation": data.validation,
            "digests": [source.digest for source in prepared.summary.sources],
            "rows": len(self._rows),
            "max_length": data.max_length,
        }
        return [NAME]

    def refuse_other_tokens(self, place: ModelPlace) -> None:
        """Refuses a model with other tokens than the rows were made of, as its files say.

        Raises:
            UsageError: It has; losses per token say nothing then.
        """
        from mamba_sft.model.loading import load_tokenizer

        if self._rows is None or self._setup is None:
            raise RuntimeError("`prepare` comes first")
        tokenizer = load_tokenizer(place.section) if place.adapter is None else _tokenizer_of(place.adapter)
        _refuse_other_tokens(place.name, tokenizer, self._setup, self._rows)

    def facts(self) -> dict[str, Any]:
        """Returns where the rows are from, and digests of their tokens."""
        return self._facts

    def columns(self) -> Sequence[Column]:
        """Returns the loss of a token, its exponential, and the share of tokens that were the likeliest."""
        return [
            Column("loss", (Pool((NAME,), LOSS),), kind="number", averaged=False, falls=True),
            Column("perplexity", (Pool((NAME,), LOSS),), kind="perplexity", averaged=False, falls=True),
            Column("token accuracy", (Pool((NAME,), ACCURACY),), averaged=False),
        ]

    def measure(
        self, chat_model: ChatModel, tasks: Sequence[str], settings: Settings, progress: Progress
    ) -> Iterator[TaskScores]:
        """Scores every row.

        Raises:
            DataError: No token of any row is trained.
        """
        from mamba_sft.data.packing import Collator
        from mamba_sft.inference.scoring import nothing_scored, score_rows

        if self._rows is None or self._setup is None:
            raise RuntimeError("`prepare` comes first")
        rows = self._rows
        begun = time.monotonic()
        found = []
        collator = Collator(self._setup.tokenizer.pad_token_id)
        for score in score_rows(chat_model.model, rows, collator, settings.batch_size):
            found.append(score)
            progress(NAME, len(found), len(rows))
        scored = [(number, score) for number, score in enumerate(found) if score.tokens]
        if not scored:
            raise nothing_scored(len(rows))
        tokens = tuple(float(score.tokens) for _, score in scored)
        keys = document_keys(str(list(rows[number]["input_ids"])) for number, _ in scored)
        yield TaskScores(
            task=NAME,
            shots=0,
            documents=keys,
            prompts=keys,
            metrics={
                LOSS: Scores(tuple(score.loss for _, score in scored), tokens),
                ACCURACY: Scores(tuple(float(score.right) for _, score in scored), tokens),
            },
            seconds=time.monotonic() - begun,
            samples=tuple({"where": rows[number]["where"]} | score._asdict() for number, score in scored),
        )


def _recipe_of(place: ModelPlace) -> Recipe | None:
    """What a model was trained by: also one that was merged or exported inside its run."""
    from mamba_sft.recipe.builtin import find_path
    from mamba_sft.recipe.recipe import Recipe

    if place.recipe is not None:
        return place.recipe
    here = (place.adapter or find_path(place.section.base)).resolve()
    above = next((Run(one) for one in here.parents[:2] if Run(one).recipe.is_file()), None)
    return None if above is None else Recipe.load(str(above.recipe))


def _data_of(name: str, recipe: Recipe | None, settings: Settings) -> DataSection:
    """What is read: rows that were named, else what the recipe holds back."""
    if settings.rows is None:
        if recipe is None:
            raise UsageError(
                f"`{name}` belongs to no run, so no rows were held back from its training",
                hint="name rows with `--data FILE`",
            )
        if recipe.data.validation == 0:
            raise UsageError(
                f"`{name}` holds no rows back: `data.validation` is 0", hint="name rows with `--data FILE`"
            )
        return recipe.data
    own = recipe.data.sources if recipe is not None else []
    source = next((one for one in own if settings.rows in (one.id, one.path)), None)
    if source is None:
        source = SourceSection(path=settings.rows)
    sources = [source.model_copy(update={"weight": 1.0})]  # each row once
    if recipe is None:
        return DataSection(sources=sources, validation=0, packing=False, max_length=settings.max_length)
    whole = {"sources": sources, "mixture": None, "validation": 0.0, "packing": False}
    return recipe.data.model_copy(update=whole)


def _setup_of(place: ModelPlace, recipe: Recipe | None) -> TemplateSetup:
    """The tokenizer and the template that the model was trained with; ChatML where nothing tells."""
    from mamba_sft.model.chat_template import prepare_tokenizer
    from mamba_sft.model.loading import load_config, load_setup, load_tokenizer, named_ids

    if recipe is not None:
        return load_setup(recipe.model, recipe.chat)
    if place.adapter is not None:
        config, tokenizer = load_config(place.section), _tokenizer_of(place.adapter)
        return prepare_tokenizer(tokenizer, ChatSection(), named_ids(config), config.vocab_size)
    template = load_tokenizer(place.section).chat_template or ""
    marked = "{% generation" in template or "{%- generation" in template
    setup = load_setup(place.section, ChatSection(template="tokenizer" if marked else "chatml"))
    if setup.resize_to is not None:
        raise DataError(
            f"`{place.name}` has no tokens for the marks of a chat, and no row of its vocabulary is unused",
            hint="score a model that was trained on chats",
        )
    return setup


def _tokenizer_of(adapter: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(adapter, trust_remote_code=False, local_files_only=True)


def _refuse_other_tokens(name: str, tokenizer: Any, setup: TemplateSetup, rows: Dataset) -> None:
    """Losses per token say nothing of a model with other tokens; marks of chats may have had other names."""
    used = {int(number) for row in rows for number in row["input_ids"]}
    used -= set(setup.tokenizer.added_tokens_decoder)
    numbers = sorted(used)
    ours, theirs = (one.convert_ids_to_tokens(numbers) for one in (setup.tokenizer, tokenizer))
    if ours != theirs:
        raise UsageError(
            f"`{name}` has other tokens than the rows were made of: losses cannot be compared",
            hint="compare models of one vocabulary",
        )
