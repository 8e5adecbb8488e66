"""The model card, README.md of a published checkpoint, from what the run left behind.

Its shape is that of the published Falcon-Mamba-instruct card: in short, details, usage, training, evaluation,
specifications, citation. Nothing is claimed that the run has no record of; parts that were not done are left
out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_sft import __version__
from mamba_sft.data.sources import is_hub_dataset
from mamba_sft.evaluation.prompts import exact_match, read_samples
from mamba_sft.evaluation.report import loss_figure
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.tensors import layers
from mamba_sft.exporting.hub.card_tables import evaluation_table, quantization_table, table
from mamba_sft.exporting.hub.card_usage import usage
from mamba_sft.exporting.hub.checkpoint import MARK
from mamba_sft.exporting.request import HubOptions
from mamba_sft.exporting.texts import prompt_of
from mamba_sft.merging.saved_adapter import EMBEDDINGS
from mamba_sft.model.shape import Shape
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import MODEL_CARD, Run
from mamba_sft.wording import time_text

PLOT_NAME = "loss.png"
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
_PAPER = """\
@article{zuo2024falconmamba,
  title   = {Falcon Mamba: The First Competitive Attention-free 7B Language Model},
  author  = {Zuo, Jingwei and Velikanov, Maksim and Rhaiem, Dhia Eddine and Chahed, Ilyas and
             Belkada, Younes and Kunsch, Guillaume and Hacid, Hakim},
  journal = {arXiv preprint arXiv:2410.05355},
  year    = {2024}
}"""


@dataclass(frozen=True)
class _Record:
    """What a run left behind; all of it empty for a checkpoint without a run."""

    recipe: Recipe | None
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]


def write_card(model: FullModel, directory: Path, name: str, options: HubOptions) -> None:
    """Writes README.md, and the loss plot where there were steps, into `directory`.

    Args:
        model: The model.
        directory: The checkpoint's directory.
        name: What the model is called.
        options: What else the card says.
    """
    record = _read(model)
    steps = [m for m in record.metrics if "loss" in m]
    if steps:
        loss_figure(record.metrics).savefig(directory / PLOT_NAME, dpi=120)
    repo = options.push_to_hub or name
    question, _ = prompt_of(model)
    parts = [
        metadata(model, record.recipe, options),
        f"# {name}\n",
        _contents(),
        _summary(model, record, name),
        _details(model, options),
        usage(repo, question, Shape.from_config(model.config)),
        _training(model, record, plotted=bool(steps)),
        _evaluation(model, record),
        _specifications(model, record),
        f"# Citation\n\n```bibtex\n{_PAPER}\n```\n",
    ]
    (directory / MODEL_CARD).write_text("\n".join(part for part in parts if part), encoding="utf-8")


def metadata(model: FullModel, recipe: Recipe | None, options: HubOptions) -> str:
    """Returns the card's YAML head, in the hub's own fields."""
    from huggingface_hub import ModelCardData

    terms = licence(model)
    data = ModelCardData(
        language=list(options.languages),
        license=terms.get("license"),
        license_name=terms.get("license_name"),
        license_link=terms.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[MARK, "falcon-mamba", "mamba", "sft", "lora", "conversational"],
        datasets=hub_datasets(recipe) or None,
        base_model=model.base_id,
    )
    return f"---\n{data.to_yaml()}\n---\n"


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


def _read(model: FullModel) -> _Record:
    run = model.run
    if run is None:
        return _Record(None, {}, [])
    environment = json.loads(run.environment.read_text(encoding="utf-8")) if run.environment.is_file() else {}
    return _Record(Recipe.load(str(run.recipe)), environment, run.read_metrics())


def _contents() -> str:
    titles = ("TL;DR", "Model Details", "Usage", "Training Details", "Evaluation")
    anchors = [title.lower().replace(" ", "-").replace(";", "") for title in titles]
    lines = [f"{i}. [{titles[i]}](#{anchor})" for i, anchor in enumerate(anchors)]
    return "# Table of Contents\n\n" + "\n".join(lines) + "\n"


def _summary(model: FullModel, record: _Record, name: str) -> str:
    base = _base(model)
    recipe = record.recipe
    text = f"`{name}` answers in chats. It is {base}"
    if recipe:
        kind = "DoRA" if recipe.adapter.use_dora else "LoRA"
        targets = ", ".join(f"`{module}`" for module in recipe.adapter.target_modules)
        text += f", fine-tuned with {kind} of rank {recipe.adapter.r} on {targets} and merged"
    text += (
        ". It is a Mamba model: it has no attention, so its memory does not grow with the length of a chat."
    )
    return f"# TL;DR\n\n{text}\n"


def _base(model: FullModel) -> str:
    if model.base_id is not None:
        return f"[{model.base_id}](https://huggingface.co/{model.base_id})"
    return f"the model in `{model.base}`" if model.base else "a FalconMamba model"


def _details(model: FullModel, options: HubOptions) -> str:
    name = licence(model)
    licensed = f"[{name['license_name']}]({name['license_link']})" if name else "that of the base model"
    rows = [
        f"- **Base model:** {_base(model)}",
        "- **Model type:** Causal decoder-only",
        "- **Architecture:** Mamba",
        f"- **Language(s) (NLP):** {', '.join(options.languages)}",
        f"- **License:** {licensed}",
    ]
    return "# Model Details\n\n## Model Description\n\n" + "\n".join(rows) + "\n"


def _training(model: FullModel, record: _Record, *, plotted: bool) -> str:
    recipe = record.recipe
    if recipe is None:
        return ""
    sources = [(_source(source.path), source.format, source.weight) for source in recipe.data.sources]
    parts = [
        "# Training Details\n\n## Training Data\n\n" + table(["source", "format", "weight"], sources),
        "## Training Procedure\n\n" + _procedure(recipe),
        "### Training Hyperparameters\n\n" + table(["hyperparameter", "value"], _hyperparameters(recipe)),
        _hardware(record.environment),
    ]
    if plotted:
        parts.append(f"### Loss\n\n![training and validation loss]({PLOT_NAME})\n")
    return "\n".join(part for part in parts if part)


def _source(path: str) -> str:
    return f"[{path}](https://huggingface.co/datasets/{path})" if is_hub_dataset(path) else f"`{path}`"


def _procedure(recipe: Recipe) -> str:
    data, model = recipe.data, recipe.model
    learned = (
        "on the assistant's turns, each with its stop token" if data.assistant_only_loss else "on all turns"
    )
    weights = "" if model.quantization == "none" else f" on a base quantized to {model.quantization}"
    packed = "; chats are packed into rows, their states kept apart" if data.packing else ""
    return (
        f"Supervised fine-tuning with TRL's `SFTTrainer`{weights}. The loss is taken {learned}{packed}. "
        "Forward and backward of the scan are those that inference computes.\n"
    )


def _hyperparameters(recipe: Recipe) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("seed", recipe.seed), ("dtype", recipe.model.dtype)]
    if recipe.model.quantization != "none":
        rows.append(("quantization", recipe.model.quantization))
    rows.append(("max_length", recipe.data.max_length))
    for section in (recipe.adapter, recipe.train):
        rows += [(name, value) for name, value in section.model_dump().items() if name not in _NOT_SHOWN]
    return [(name, value) for name, value in rows if value is not None]


_NOT_SHOWN = {"report_to", "trainer_arguments", "logging_steps", "save_steps", "save_total_limit"}


def _hardware(environment: dict[str, Any]) -> str:
    device = environment.get("device") or {}
    rows = []
    if device:
        count = device.get("count", 1)
        rows.append(f"- **Hardware:** {f'{count} x ' if count > 1 else ''}{device.get('name', 'unknown')}")
    if "seconds" in environment:
        took = time_text(environment["seconds"])
        rows.append(f"- **Time:** {took}, {environment.get('steps', 0):,} steps")
    if environment.get("tokens"):
        rows.append(f"- **Tokens read:** {environment['tokens']:,}")
    return "### Hardware and Time\n\n" + "\n".join(rows) + "\n" if rows else ""


def _evaluation(model: FullModel, record: _Record) -> str:
    parts = []
    best = record.environment.get("best_validation_loss")
    if best is not None:
        parts.append(f"Loss on held-out rows of the training data: {best:.4f} nats per token.\n")
    if model.run is not None:
        parts += [_exact_matches(model.run), evaluation_table(model.run), quantization_table(model.run)]
    parts = [part for part in parts if part]
    return "# Evaluation\n\n" + "\n".join(parts) if parts else ""


def _exact_matches(run: Run) -> str:
    samples = read_samples(run.samples) if run.samples.is_file() else []
    prompts = [sample.prompt for sample in samples]
    before = exact_match(prompts, [sample.before for sample in samples])
    after = exact_match(prompts, [sample.after for sample in samples])
    if before is None or after is None:
        return ""
    count = sum(prompt.answer is not None for prompt in prompts)
    return (
        f"{count} held-out questions answered exactly: {before:.1%} by the base, {after:.1%} by this model.\n"
    )


def _specifications(model: FullModel, record: _Record) -> str:
    shapes, mixer = model.shapes, "backbone.layers.0.mixer."
    rows = [
        ("Layers", layers(shapes), "Number of layers"),
        ("`d_model`", shapes[EMBEDDINGS][1], "Hidden dimension"),
        ("`d_inner`", shapes[mixer + "A_log"][0], "Channels of the state-space model"),
        ("`d_state`", shapes[mixer + "A_log"][1], "The SSM state dimension"),
        ("`d_conv`", shapes[mixer + "conv1d.weight"][-1], "Width of the convolution"),
        ("`dt_rank`", shapes[mixer + "dt_proj.weight"][1], "Rank of the time step"),
        ("Vocabulary", shapes[EMBEDDINGS][0], "Vocabulary size"),
    ]
    packages = {k: v for k, v in (record.environment.get("packages") or {}).items() if v and k != MARK}
    software = ", ".join(
        [f"{MARK} {__version__}", *(f"{name} {version}" for name, version in packages.items())]
    )
    return (
        "# Technical Specifications\n\n## Model Architecture and Objective\n\n"
        "A causal language model of Mamba-1 blocks whose dt, B and C pass through RMS norms.\n\n"
        + table(["hyperparameter", "value", "comment"], rows)
        + f"\n## Software\n\n{software}.\n"
    )
