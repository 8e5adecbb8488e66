"""The model card, README.md of a published checkpoint, from what the run left behind.

`card.md.jinja` has every word of it; this file has the facts. The tests run every snippet of it on a tiny
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mamba_sft import __version__
from mamba_sft.data.sources import is_hub_dataset
from mamba_sft.evaluation.leaderboards import LEADERBOARDS
from mamba_sft.evaluation.prompts import exact_match, read_samples, score_name
from mamba_sft.evaluation.results import finished
from mamba_sft.evaluation.run_facts import read_facts
from mamba_sft.evaluation.run_figures import loss_curves
from mamba_sft.evaluation.svg_plot import svg_text
from mamba_sft.evaluation.table import scores_table, settings_text
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.tensors import layers
from mamba_sft.exporting.hub.push import MARK
from mamba_sft.exporting.request import HubOptions
from mamba_sft.exporting.texts import prompt_of
from mamba_sft.merging.saved_adapter import EMBEDDINGS
from mamba_sft.model.quantization import UNQUANTIZED, misfits
from mamba_sft.model.shape import Shape
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import MODEL_CARD, Run
from mamba_sft.run_reading import read_object, read_quality
from mamba_sft.wording import size_text, time_text

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PLOT_NAME = "loss.svg"
_KINDS = {
    "seconds": int | float, "steps": int, "tokens": int, "best_validation_loss": int | float,
    "packages": dict, "device": dict,
}  # fmt: skip
"""What is read of a run's environment.json; of another kind, it is not there."""
# The hub's own words for the licences of the bases that this package is for.
_FALCON_MAMBA = {
    "license": "other",
    "license_name": "falcon-mamba-7b-license",
    "license_link": "https://falconllm.tii.ae/falcon-mamba-7b-terms-and-conditions.html",
}
_FALCON_3 = {
    "license": "other",
    "license_name": "falcon-llm-license",
    "license_link": "https://falconllm.tii.ae/falcon-terms-and-conditions.html",
}
_LICENSES = {"tiiuae/falcon-mamba": _FALCON_MAMBA, "tiiuae/Falcon3-Mamba": _FALCON_3}
_NOT_SHOWN = {"report_to", "trainer_arguments", "logging_steps", "save_steps", "save_total_limit"}


@dataclass(frozen=True)
class Published:
    """What the card is of.

    Args:
        checkpoint: Whether there is a checkpoint, for `transformers`.
        gguf_files: The GGUF files in the repository, by name.
    """

    checkpoint: bool = True
    gguf_files: Sequence[str] = ()


def write_card(
    model: FullModel, directory: Path, name: str, options: HubOptions, published: Published = Published()
) -> None:
    """Writes README.md, and the loss plot where there were steps, into `directory`.

    Args:
        model: The model.
        directory: Where to.
        name: What the model is called.
        options: What else the card says.
        published: What lies beside the card.
    """
    from huggingface_hub import ModelCard

    curves = loss_curves(read_facts(model.run)) if model.run else []
    plot = PLOT_NAME if curves else None
    if plot is not None:
        drawn = svg_text(curves, title="loss over steps", width=800, height=320, legend=True)
        (directory / plot).write_text(drawn + "\n", encoding="utf-8")
    recipe = Recipe.load(str(model.run.recipe)) if model.run else None
    facts = _facts(model, name, options) | _training_facts(recipe) | _evaluation_facts(model.run)
    facts |= {"checkpoint": published.checkpoint, "gguf_files": list(published.gguf_files)}
    data = _metadata(model, recipe, name, options, facts["results"])
    if not published.checkpoint:
        data.library_name = "gguf"
    card = ModelCard.from_template(data, str(TEMPLATE), recipe=recipe, plot=plot, **facts)
    (directory / MODEL_CARD).write_text(card.content.rstrip() + "\n", encoding="utf-8")


def _metadata(
    model: FullModel,
    recipe: Recipe | None,
    name: str,
    options: HubOptions,
    results: list[dict[str, Any]],
) -> Any:
    """The head in the hub's own fields; evaluation results are structured, as leaderboards read them."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", f"{one['suite']} {column.title}".lower()),
            dataset_name=f"{column.title} ({one['suite']})",
            metric_type="accuracy" if column.kind == "percent" else column.title,
            metric_value=round(figure.value, 4),
        )
        for one in results
        for column, figure in one["figures"]
    ]
    return ModelCardData(
        language=list(options.languages),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[MARK, "falcon-mamba", "mamba", "sft", *_way(recipe), "conversational"],
        datasets=hub_datasets(recipe) or None,
        base_model=model.base_id,
        model_name=name if measured else None,
        eval_results=measured or None,
        **licence(model),  # type: ignore[arg-type]
    )


def _way(recipe: Recipe | None) -> list[str]:
    """The hub's word for how it was trained."""
    return ["lora"] if recipe is None or recipe.adapter is not None else ["full-fine-tuning"]


def licence(model: FullModel) -> dict[str, str]:
    """Returns the base's licence in the hub's fields; empty if it is not known."""
    for beginning, fields in _LICENSES.items():
        if (model.base_id or "").startswith(beginning):
            return dict(fields)
    return {}


def hub_datasets(recipe: Recipe | None) -> list[str]:
    """Returns the recipe's sources that are data sets on the hub, not files here."""
    sources = recipe.data.sources if recipe else []
    return list(dict.fromkeys(source.path for source in sources if is_hub_dataset(source.path)))


def _facts(model: FullModel, name: str, options: HubOptions) -> dict[str, Any]:
    """What is known of any model."""
    environment = _environment(model.run)
    question, _ = prompt_of(model)
    shape = Shape.from_config(model.config)
    left_out = misfits(shape, "nf4")
    packages = {k: v for k, v in (environment.get("packages") or {}).items() if v and k != MARK}
    software = [f"{MARK} {__version__}", *(f"{package} {version}" for package, version in packages.items())]
    return {
        "name": name,
        "repo": options.push_to_hub or name,
        "base": _base(model),
        "languages": options.languages,
        "question": json.dumps(question, ensure_ascii=False),
        "unquantized": json.dumps([*UNQUANTIZED, *left_out]),
        "unquantized_why": "read directly, or not whole 4-bit blocks"
        if left_out
        else "their weights are read directly",
        "architecture": list(_architecture(model)),
        "software": ", ".join(software),
        "hardware": _hardware(environment.get("device") or {}),
        "time": time_text(environment["seconds"]) if "seconds" in environment else None,
        "steps": f"{environment.get('steps', 0):,}",
        "tokens": f"{environment['tokens']:,}" if environment.get("tokens") else None,
    }


def _environment(run: Run | None) -> dict[str, Any]:
    found = read_object(run.environment) if run is not None else {}
    return {name: value for name, value in found.items() if isinstance(value, _KINDS.get(name, object))}


def _base(model: FullModel) -> str:
    if model.base_id is not None:
        return f"[{model.base_id}](https://huggingface.co/{model.base_id})"
    return f"the model in `{model.base}`" if model.base else "a FalconMamba model"


def _hardware(device: dict[str, Any]) -> str | None:
    if not device:
        return None
    count = device.get("count", 1)
    return f"{f'{count} x ' if isinstance(count, int) and count > 1 else ''}{device.get('name', 'unknown')}"


def _architecture(model: FullModel) -> Iterator[tuple[str, int, str]]:
    shapes, mixer = model.shapes, "backbone.layers.0.mixer."
    yield "Layers", layers(shapes), "Number of layers"
    yield "`d_model`", shapes[EMBEDDINGS][1], "Hidden dimension"
    yield "`d_inner`", shapes[mixer + "A_log"][0], "Channels of the state-space model"
    yield "`d_state`", shapes[mixer + "A_log"][1], "The SSM state dimension"
    yield "`d_conv`", shapes[mixer + "conv1d.weight"][-1], "Width of the convolution"
    yield "`dt_rank`", shapes[mixer + "dt_proj.weight"][1], "Rank of the time step"
    yield "Vocabulary", shapes[EMBEDDINGS][0], "Vocabulary size"


def _training_facts(recipe: Recipe | None) -> dict[str, Any]:
    if recipe is None:
        return {}
    rows: list[tuple[str, Any]] = [("seed", recipe.seed), ("dtype", recipe.model.dtype)]
    if recipe.model.quantization != "none":
        rows.append(("quantization", recipe.model.quantization))
    rows.append(("started from the adapter", recipe.model.adapter))
    rows.append(("max_length", recipe.data.max_length))
    rows += [("weights trained", "all")] if recipe.adapter is None else recipe.adapter.model_dump().items()
    rows += [(name, value) for name, value in recipe.train.model_dump().items() if name not in _NOT_SHOWN]
    return {
        "sources": [(_source(one.path), one.format, one.weight) for one in recipe.data.sources],
        "hyperparameters": [(name, value) for name, value in rows if value is not None],
    }


def _source(path: str) -> str:
    return f"[{path}](https://huggingface.co/datasets/{path})" if is_hub_dataset(path) else f"`{path}`"


def _evaluation_facts(run: Run | None) -> dict[str, Any]:
    """What was measured of the run; `evaluation` says whether anything was."""
    best = _environment(run).get("best_validation_loss")
    facts = {
        "validation_loss": None if best is None else f"{best:.4f}",
        "exact": _exact_matches(run) if run else None,
        "results": list(_results(run)) if run else [],
        "quantizations": list(_quantizations(run)) if run else [],
    }
    return facts | {"evaluation": any(facts.values())}


def _exact_matches(run: Run) -> dict[str, Any] | None:
    samples = read_samples(run.samples_file)
    prompts = [sample.prompt for sample in samples]
    before = exact_match(prompts, [sample.before for sample in samples])
    after = exact_match(prompts, [sample.after for sample in samples])
    if before is None or after is None:
        return None
    count = sum(prompt.is_scored for prompt in prompts)
    return {"count": count, "score": score_name(prompts), "before": f"{before:.1%}", "after": f"{after:.1%}"}


def _results(run: Run) -> Iterator[dict[str, Any]]:
    """What `eval` measured of the run, a table for each suite, the base and the published row beside it."""
    for models in finished(run.eval):
        tuned = models[0]
        board = LEADERBOARDS.get(tuned.suite)
        named = zip(models, ("this model", "its base"), strict=False)  # a base is there or not
        shown = [replace(one, model={**one.model, "name": name}) for one, name in named]
        table = scores_table(shown, board.published if board is not None else {})
        yield {
            "suite": tuned.suite,
            "titles": table.titles,
            "rows": table.rows,
            "settings": settings_text(tuned),
            "figures": [(column, figure) for column, figure in tuned.figures if figure is not None],
        }


def _quantizations(run: Run) -> Iterator[tuple[str, ...]]:
    """The sizes and the quality of the model's GGUF files."""
    files = read_quality(run.quality)
    for name, entry in sorted(files.items(), key=lambda item: int(item[1]["nbytes"])):
        if entry["method"] != "LoRA" and entry.get("of") != "base" and (run.export / name).is_file():
            measured = (
                (f"{entry['kl']:.2g}", f"{entry['top1']:.1%}") if "kl" in entry else ("not measured",) * 2
            )
            yield f"`{name}`", entry["method"], size_text(entry["nbytes"]), *measured
