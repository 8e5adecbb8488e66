"""What a run comes to, for every way to show it: state, figures, curves, answers, data, what is next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from mamba_sft.evaluation.leaderboards import LEADERBOARDS
from mamba_sft.evaluation.prompts import Prompt, Sample, exact_match, is_right, score_name
from mamba_sft.evaluation.results import Results
from mamba_sft.evaluation.run_facts import RunFacts
from mamba_sft.evaluation.svg_plot import Curve, Point, number_text, smooth
from mamba_sft.evaluation.table import Table, scores_table, settings_text
from mamba_sft.wording import GIB, MIB, count_text, size_text, time_text

SHOWN_SAMPLES = 12
"""Sample prompts in sight; the others are behind a fold, or left to the page."""
MARKS: dict[bool | None, str] = {True: "✓ ", False: "✗ ", None: ""}
"""What stands before an answer that is right, is wrong, or that nobody knows better."""


@dataclass(frozen=True)
class Progress:
    """How far a run is that some process is at.

    Args:
        step: Optimizer steps that are done.
        steps: Of the whole run.
        seconds_left: About how long it will take, where that is known.
        ended: What ended it before its time, or None while it runs.
    """

    step: int
    steps: int
    seconds_left: float | None = None
    ended: str | None = None


def state_text(facts: RunFacts, progress: Progress | None) -> str:
    """Returns in a sentence how far the run is.

    Args:
        facts: Of the run.
        progress: What the process that trains knows of it; None when the run is read afterwards.
    """
    if progress is not None and progress.ended is not None:
        return f"step {progress.step:,} of {progress.steps:,}; {progress.ended}"
    if progress is not None:
        left = "" if progress.seconds_left is None else f", about {time_text(progress.seconds_left)} left"
        return f"step {progress.step:,} of {progress.steps:,}{left}; this page is rewritten while it runs"
    if facts.is_finished:
        return "finished"
    of = "" if facts.steps is None else f" of {facts.steps:,}"
    return f"not finished: step {facts.last_step:,}{of} was the last one logged"


def key_figures(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Yields (what, figure): the numbers that a reader looks for first."""
    found = facts.number("steps")
    steps = facts.last_step if found is None else found
    of = f" of {facts.steps:,}" if facts.steps is not None and steps < facts.steps else ""
    yield "steps", f"{steps:,.0f}{of}"  # fewer after an early stop, or where a stopped run was finished
    if (seconds := facts.number("seconds")) is not None:
        yield "time", time_text(seconds)
    if tokens := [value for _, value in facts.series("num_tokens") if math.isfinite(value)]:
        yield "tokens read", f"{max(tokens):,.0f}"
    best = facts.number("best_validation_loss")
    losses = [value for _, value in facts.series("eval_loss") if math.isfinite(value)]
    if best is not None or losses:
        yield "best validation loss", f"{min(losses) if best is None else best:.4f}"
    if rates := _after_the_first(facts.series("tokens_per_second")):
        yield "tokens/s", number_text(median(rates))
    if memory := [value for _, value in facts.series("peak_memory") if math.isfinite(value)]:
        yield "peak memory", size_text(max(memory))
    for when in ("before", "after"):
        prompts = [sample.prompt for sample in facts.samples]
        score = exact_match(prompts, [getattr(sample, when) for sample in facts.samples])
        if score is not None:
            yield f"{score_name(prompts)} {when}", f"{100 * score:.1f} %"


def _after_the_first(points: Sequence[Point]) -> list[float]:
    """The values without the first, whose step compiled kernels, where there are more."""
    values = [value for _, value in points if math.isfinite(value)]
    return values[1:] or values


@dataclass(frozen=True)
class Plot:
    """One plot of a report.

    Args:
        title: What is plotted.
        unit: In which unit.
        curves: The curves; none, and there is nothing to draw.
        logarithmic: Whether its axis is; None: where the values lie far apart.
        from_zero: Whether it begins at zero: what is used up is seen as a whole.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    logarithmic: bool | None = None
    from_zero: bool = False

    @property
    def last(self) -> str:
        """The newest value of the curve in front."""
        finite = [value for _, value in self.curves[-1].points if math.isfinite(value)]
        return number_text(finite[-1]) if finite else ""


def loss_curves(facts: RunFacts) -> list[Curve]:
    """Returns the curves of the training and the validation loss, the latter in front."""
    train, validation = facts.series("loss"), facts.series("eval_loss")
    curves = []
    if train:
        curves.append(Curve("training, as logged", train, 0, "faint"))
        curves.append(Curve("training, smoothed", smooth(train), 0))
    if validation:
        curves.append(Curve("validation", validation, 1, "dots"))
    return curves


_PLOTTED = (  # title, unit, (legend, name in metrics.jsonl) of each curve, logarithmic
    ("learning rate", "", [("learning rate", "learning_rate")], False),
    ("gradient norm", "before it is cut to `max_grad_norm`", [("gradient norm", "grad_norm")], None),
    ("token accuracy", "share of trained tokens that were the likeliest",
     [("training", "mean_token_accuracy"), ("validation", "eval_mean_token_accuracy")], False),
    ("tokens per second", "read, without padding", [("tokens per second", "tokens_per_second")], None),
    ("time per step", "seconds", [("time per step", "seconds_per_step")], None),
    ("memory", "", [("peak so far", "peak_memory")], False),
    ("batch size", "rows", [("in an optimizer step", "rows_per_step"), ("at once", "rows_at_once")], None),
    ("tokens per step", "read, without padding", [("tokens per step", "tokens_per_step")], None),
    ("entropy", "nats per token", [("training", "entropy"), ("validation", "eval_entropy")], False),
    ("largest residual", "float16 ends at 65,504", [("largest residual", "largest_residual")], None),
)  # fmt: skip
_FROM_ZERO = {"token accuracy", "tokens per second", "time per step", "batch size", "tokens per step"}
_NO_COURSE = {
    "step", "epoch", "loss", "eval_loss", "num_tokens", "eval_num_tokens", "total_flos", "train_loss",
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime",
    "eval_samples_per_second", "eval_steps_per_second",
}  # fmt: skip
"""What is logged and has no plot: counters, and what stands in the figures."""


def plots(facts: RunFacts) -> Iterator[Plot]:
    """Yields every plot but the loss; what was logged by a name that nobody knows comes last."""
    seen = set(_NO_COURSE)
    for title, prefix in (("loss by source", "loss/"), ("validation loss by source", "eval_loss/")):
        names = sorted({name for line in facts.metrics for name in line if name.startswith(prefix)})
        seen |= set(names)
        if names:
            yield Plot(title, "", list(_by_source(facts, names, prefix)), None)
    for title, unit, named, logarithmic in _PLOTTED:
        seen |= {name for _, name in named}
        curves = [
            Curve(legend, points, number, "dots" if name.startswith("eval") else "line")
            for number, (legend, name) in enumerate(named)
            if (points := facts.series(name))
        ]
        if curves:
            from_zero = title in _FROM_ZERO
            made = Plot(title, unit, curves, logarithmic, from_zero)
            yield _memory(curves) if title == "memory" else made
    for name in sorted({name for line in facts.metrics for name in line} - seen):
        yield Plot(name, "", [Curve(name, facts.series(name))])


def _by_source(facts: RunFacts, names: Sequence[str], prefix: str) -> Iterator[Curve]:
    for number, name in enumerate(names):
        points = facts.series(name)
        if prefix == "loss/":
            yield Curve(name.removeprefix(prefix), smooth(points), number)
        else:
            yield Curve(name.removeprefix(prefix), points, number, "dots")


def _memory(curves: Sequence[Curve]) -> Plot:
    most = max((value for curve in curves for _, value in curve.points if math.isfinite(value)), default=0)
    size, unit = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    scaled = [Curve(c.name, [(step, v / size) for step, v in c.points], c.color) for c in curves]
    return Plot("memory", f"{unit}, the most so far", scaled, False, from_zero=True)


@dataclass(frozen=True)
class ShownSample:
    """A sample prompt as a report shows it.

    Args:
        prompt: What was asked.
        answers: (what gave it, the answer, whether it is right or None where nobody knows).
    """

    prompt: Prompt
    answers: Sequence[tuple[str, str, bool | None]]


def sample_titles(data: dict[str, Any]) -> tuple[str, str]:
    """Returns what gave the two answers to a sample prompt: base and tuned model, or before and after."""
    return ("before", "after") if data.get("start") else ("base", "tuned")


def shown_samples(facts: RunFacts) -> list[ShownSample]:
    """Returns the samples of a run, as `wrong_first` has them."""
    return wrong_first(facts.samples, sample_titles(facts.data))


def wrong_first(samples: Iterable[Sample], titles: tuple[str, str]) -> list[ShownSample]:
    """Returns samples with what is right, those answered wrongly after training first, the right ones last.

    Args:
        samples: In their own order, which they keep otherwise.
        titles: From `sample_titles`.
    """
    before, after = titles

    def rank(sample: Sample) -> int:
        return {False: 0, None: 1, True: 2}[is_right(sample.prompt, sample.after)]

    return [
        ShownSample(
            one.prompt,
            [
                (before, one.before, is_right(one.prompt, one.before)),
                (after, one.after, is_right(one.prompt, one.after)),
            ],
        )
        for one in sorted(samples, key=rank)
    ]


def in_sight(ordered: Sequence[ShownSample], count: int) -> list[ShownSample]:
    """Returns a few of many samples, wrong ones first, and right ones too where there are any.

    Six wrong answers of a run that got 200 of 207 right would look as if it had learned nothing.

    Args:
        ordered: From `wrong_first`.
        count: How many there is room for.
    """
    wrong = [one for one in ordered if one.answers[-1][2] is False]
    others = list(ordered[len(wrong) :])
    most = max((count + 1) // 2, count - len(others))
    return [*wrong[:most], *others][:count]


def changing_samples(facts: RunFacts) -> list[ShownSample]:
    """Returns the prompts that were answered while training went on, with every answer by its step."""
    final = {sample.prompt: sample.after for sample in facts.samples}
    given: dict[Prompt, dict[int, str]] = {}
    for one in facts.step_samples:
        given.setdefault(one.prompt, {})[one.step] = one.given
    found = []
    for prompt, by_step in given.items():
        answers = [
            (f"step {step:,}" if step else sample_titles(facts.data)[0], text)
            for step, text in sorted(by_step.items())
        ]
        answers += [("at the end", final[prompt])] if prompt in final else []
        found.append(ShownSample(prompt, [(title, text, is_right(prompt, text)) for title, text in answers]))
    return found


def data_sources(data: dict[str, Any]) -> Iterator[list[str]]:
    """Yields path, format, rows read, bad, kept, weight and rows an epoch of each source."""
    for source in data["sources"]:
        formats = ", ".join(dict.fromkeys(source["formats"].values()))
        counts = [f"{source[name]:,}" for name in ("read", "bad", "kept")]
        yield [source["path"], formats, *counts, f"{source['weight']:g}", f"{source['train_rows']:,}"]


def data_facts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what the rows came to, in words."""
    length, packed, lengths = data["length"], data.get("packed"), data["lengths"]
    yield "rows", f"{data['train_rows']:,} to train on, {data['validation_rows']:,} to validate on"
    if packed:
        full = f"{packed['rows']:,} rows of {packed['max_length']:,} tokens, {packed['fill']:.1%} full"
        yield "packed into", full
    yield "tokens an epoch", f"{data['train_tokens']:,}, {data['trained_share']:.1%} of them trained"
    if lengths:
        middle, high, longest = (lengths[name] for name in ("median", "percentile_95", "longest"))
        yield "tokens a row", f"median {middle:,}, 95% at most {high:,}, longest {longest:,}"
    for number, stage in enumerate(data.get("mixture", {}).get("stages", []), 1):
        yield f"stage {number}", stage_text(stage)
    batches = f"{length['accumulation']:,} micro-batches of {length['batch_size']:,}"
    if length.get("ramp"):
        batches = "{:,} to {:,} rows".format(*length["ramp"])
    yield "steps", f"{length['steps']:,}, {batches} in each, {length['tokens_per_step']:,} tokens in the mean"


def stage_text(stage: dict[str, Any]) -> str:
    """Returns a stage of a mixture in words: its steps, its longest row, and what was read of each source."""
    total = max(1, sum(stage["tokens"].values()))
    parts = ", ".join(f"{name} {count / total:.1%}" for name, count in stage["tokens"].items())
    most = f"rows up to {stage['max_length']:,} tokens" if stage["max_length"] is not None else "whole rows"
    return f"steps {stage['first']:,} to {stage['last']:,}, {most}: {total:,} tokens, {parts}"


def data_rows(data: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields where, text and trained text of the rows that were kept to be looked at."""
    for row in data.get("rows", []):
        yield row["where"], row["text"], row["trained_text"]


def data_changes(data: dict[str, Any]) -> Iterator[str]:
    """Yields what the run went on with that it had not been started with."""
    for change in data.get("changes", []):
        lines = "\n".join(change["what"])
        yield f"after step {change['after_step']:,} the run went on with other data:\n{lines}"


def data_warnings(data: dict[str, Any]) -> Iterator[str]:
    """Yields what was worth a look in the data."""
    yield from map(str, data.get("warnings", []))


def exported_files(files: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields the exported GGUF files with their sizes and what they lose."""
    for name, entry in sorted(files.items(), key=lambda item: int(item[1]["nbytes"])):
        measured = (f"{entry['kl']:.2g}", f"{entry['top1']:.1%}") if "kl" in entry else ("-", "-")
        yield name, size_text(entry["nbytes"]), *measured


def origins(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Yields where the run comes from: base, adapter, command, date, software and device."""
    environment, recipe = facts.environment, facts.recipe
    if recipe is not None:
        revision = f", revision {recipe.model.revision}" if recipe.model.revision else ""
        yield "base", f"{recipe.model.base}{revision}, {recipe.model.dtype}, {recipe.model.quantization}"
        if recipe.trains == "model":
            yield "trained", "all weights, without an adapter"
        if recipe.model.adapter:
            yield "started from", recipe.model.adapter
    for title, name in (("command", "command"), ("date", "date"), ("platform", "platform")):
        if isinstance(environment.get(name), str):
            yield title, environment[name]
    packages = environment.get("packages")
    if isinstance(packages, dict):
        named = (f"{name} {packages[name]}" for name in ("mamba-sft", "torch", "transformers", "trl", "peft")
                 if packages.get(name))  # fmt: skip
        yield "software", ", ".join(named)
    device = environment.get("device")
    if isinstance(device, dict):
        count = device.get("count", 1)
        yield "device", f"{f'{count} x ' if count != 1 else ''}{device.get('name', 'unknown')}"


def next_commands(facts: RunFacts, progress: Progress | None) -> Iterator[tuple[str, str]]:
    """Yields what to do next, with the command that does it."""
    where = shlex.quote(str(facts.run.path))
    if facts.is_finished:
        adapted = facts.run.adapter.is_dir()
        yield "talk to it", f"mamba-sft chat {where}{' --compare' if adapted else ''}"
        if adapted:
            yield "make one checkpoint of it", f"mamba-sft merge {where}"
        yield "make files for llama.cpp or Ollama", f"mamba-sft export {where} -q Q4_K_M --format ollama"
    elif progress is None or progress.ended is not None:
        yield "go on where it stopped", facts.run.resume_command
    yield "hold it against another run", f"mamba-sft report {where} runs/OTHER"


def samples_heading(shown: int, total: int) -> str:
    """Returns how many of the samples are in sight: `12 of 207 shown`."""
    return f"{shown:,} of {total:,} shown" if shown < total else count_text(total, "prompt")


def right_counts(samples: Iterable[ShownSample]) -> str:
    """Returns how many were answered rightly before and after, empty where nobody knows."""
    scored = [one for one in samples if one.prompt.is_scored]
    if not scored:
        return ""
    right = [sum(bool(one.answers[i][2]) for one in scored) for i in (0, -1)]
    before, after = scored[0].answers[0][0], scored[0].answers[-1][0]
    return f"right of {len(scored):,}: {right[0]:,} {before}, {right[1]:,} {after}"


class Evaluation(NamedTuple):
    """What `eval` measured on one suite, as tables and lines of text."""

    suite: str
    table: Table
    differences: list[tuple[str, str]]
    settings: str


def evaluations(facts: RunFacts) -> Iterator[Evaluation]:
    """Yields what `eval` measured, with the base and the published row beside it."""
    for models in facts.evaluations:
        tuned = models[0]
        board = LEADERBOARDS.get(tuned.suite)
        table = scores_table(models, board.published if board is not None else {})
        yield Evaluation(tuned.suite, table, list(_differences(tuned)), settings_text(tuned))


def _differences(tuned: Results) -> Iterator[tuple[str, str]]:
    """How the model differs from another, a line for each column."""
    compared = tuned.compared or {}
    for one in compared.get("columns", []):
        if "delta" in one:
            margin = one.get("margin")
            within = "" if margin is None else f" ± {number_text(margin)} (95 %)"
            yield f"{one['title']}, against {compared['with']['name']}", f"{one['delta']:+.4g}{within}"
