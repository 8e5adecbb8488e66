"""What each result shows of itself: the figures a reader looks for first, then the rest behind a fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mamba_sft.framing import in_cell
from mamba_sft.notebook.markup import Bars, Block, Cell, Fold, Pairs, Table, Text, View
from mamba_sft.wording import GIB, path_text, size_text, time_text

if TYPE_CHECKING:
    from mamba_sft.diagnostics.diagnosis import Diagnosis
    from mamba_sft.diagnostics.memory_in_use import MemoryNow
    from mamba_sft.exporting.request import Exported
    from mamba_sft.merging.check import MergeResult
    from mamba_sft.planning.plan import Plan
    from mamba_sft.recipe.recipe import Recipe
    from mamba_sft.run import Run


def view_of(result: Any) -> View:
    """Returns what is shown of a result of ours."""
    own = getattr(result, "view", None)
    return own() if own is not None else _VIEWS[type(result).__name__](result)


def _recipe(recipe: Recipe) -> View:
    from mamba_sft.recipe.mixtures import source_ids

    model, data, train = recipe.model, recipe.data, recipe.train
    length = f"{train.max_steps:,} steps" if train.max_steps > 0 else f"{train.num_train_epochs:g} epochs"
    adapter = recipe.adapter
    how = f"LoRA r {adapter.r} on {', '.join(adapter.target_modules)}" if adapter else "all weights"
    facts = [
        ("base", f"{model.base}, {model.dtype}, {model.quantization}"),
        ("trains", how),
        ("data", ", ".join(source_ids(data))),
        ("rows", f"up to {data.max_length:,} tokens" if data.max_length else "of any length"),
        ("length", f"{length}, learning rate {train.learning_rate:g}, {train.lr_scheduler_type}"),
        ("run", recipe.output_dir),
    ]
    return View("recipe", [Pairs(facts), Fold("every setting", [Text(recipe.to_yaml(), "code")])])


def _plan(plan: Plan) -> View:
    from mamba_sft.planning import in_words

    device, verdict = in_words.device(plan)
    blocks: list[Block] = []
    if in_words.falls_back(plan):
        blocks += [Text(in_words.FALLS_BACK, "note")]
    blocks += [Text(warning, "note") for warning in (plan.length.warnings() if plan.length else [])]
    blocks += [Pairs([*in_words.model(plan), *in_words.largest(plan)])]
    blocks += [
        Text("memory in GiB, planned, not measured (in brackets: not at the time of the peak)", "heading")
    ]
    parts = [
        (label, size, f"{size / GIB:.2f}" if counted else f"({size / GIB:.2f})")
        for label, size, counted in in_words.memory_parts(plan)
    ]
    parts += [("at once, at most", plan.peak, f"{plan.peak / GIB:.2f}")]
    blocks += [Bars(parts, plan.accelerator.usable_bytes)]
    blocks += [Text("time and disk", "heading"), Pairs([*in_words.time(plan), *in_words.disk(plan)])]
    if not plan.fits:
        blocks += [Text("what would fit", "heading"), *_fixes(plan)]
    return View(f"plan: {device}{verdict}", blocks)


def _fixes(plan: Plan) -> Iterator[Block]:
    if not plan.fixes:
        yield Text("nothing makes it fit: it needs a device with more memory")
    for fix in plan.fixes:
        yield Text(f"{size_text(fix.peak)}, {fix.slowdown:.2f} times the time:")
        yield Text(" ".join(fix.overrides), "code")


def _diagnosis(found: Diagnosis) -> View:
    problems = sum(finding.status == "problem" for finding in found.findings)
    blocks: list[Block] = []
    marks = {"ok": True, "note": None, "problem": False}
    for finding in found.findings:
        if finding.status != "ok":
            kind = "problem" if finding.status == "problem" else "note"
            fix = f"\n-> {finding.fix}" if finding.fix else ""
            blocks.append(Text(f"{kind}, {finding.name}: {finding.text}{fix}", "note"))
    sections = [""] + [finding.section for finding in found.findings]
    rows = [
        ("" if one.section == before else one.section, one.name, Cell(one.text, marks[one.status]))
        for before, one in zip(sections, found.findings, strict=False)
    ]
    title = "ready to train" if not problems else f"{problems} of the findings make training impossible"
    return View(f"doctor: {title}", [*blocks, Table(["", "", "found"], rows)])


def _memory(now: MemoryNow) -> View:
    others = now.host_total - now.host_available
    host: list[tuple[str, float, str]] = [
        ("this process", now.process, size_text(now.process)),
        ("at most so far", now.process_peak, size_text(now.process_peak)),
        ("in use by all", others, f"{size_text(others)} of {size_text(now.host_total)}"),
    ]
    blocks: list[Block] = [Text("host", "heading"), Bars(host, now.host_total)]
    if now.gpu_total is not None:
        used, tensors, peak = now.gpu_used or 0, now.gpu_tensors or 0, now.gpu_peak or 0
        gpu: list[tuple[str, float, str]] = [
            ("tensors of this process", tensors, size_text(tensors)),
            ("at most so far", peak, size_text(peak)),
            ("in use by all", used, f"{size_text(used)} of {size_text(now.gpu_total)}"),
        ]
        blocks = [Text("GPU", "heading"), Bars(gpu, now.gpu_total), *blocks]
    return View(f"memory now: {now.device}", blocks)


def _run(run: Run) -> View:
    from mamba_sft.evaluation import run_figures as figures
    from mamba_sft.evaluation.losses import loss_warnings
    from mamba_sft.evaluation.run_facts import read_facts
    from mamba_sft.notebook.answers import samples_of
    from mamba_sft.notebook.plots import loss_drawing

    if not run.recipe.is_file():
        return View(f"run {path_text(run.path)}", [Text("nothing there yet")])
    facts = read_facts(run)
    blocks: list[Block] = [Text(problem, "note") for problem in dict.fromkeys(facts.problems)]
    blocks += [Text(warning, "note") for warning in loss_warnings(facts.metrics)]
    blocks += [Pairs(list(figures.key_figures(facts)))]
    blocks += [loss_drawing(figures.loss_curves(facts), "loss over steps")]
    if facts.samples:
        samples = samples_of(run)
        blocks += [Fold(f"sample answers, {samples.heading}", samples.view(whole=False).blocks)]
    state = figures.state_text(facts, None)
    commands = [(what, in_cell(command)) for what, command in figures.next_commands(facts, None)]
    return View(f"run {path_text(run.path)}: {state}", [*blocks, Fold("what to do next", [Pairs(commands)])])


def _merge(merged: MergeResult) -> View:
    check = merged.check
    same = "the same next token" if check.same_next_token else "another next token"
    facts: list[tuple[str, object]] = [
        ("checkpoint", path_text(merged.path)),
        ("of", f"{merged.base}, merged onto {merged.onto}"),
        ("tensors", f"{merged.changed} of {merged.tensors} changed, {size_text(merged.nbytes)}"),
        ("took", f"{time_text(merged.seconds)}, peak memory {size_text(merged.peak_rss)}"),
        (
            "checked",
            f"logits differ from base + adapter by {check.difference:.1e} of their size "
            f"(at most {check.tolerance:.0e} is rounding), {same}",
        ),
        *((f"validation loss, {onto}", f"{loss:.4f}") for onto, loss in merged.losses.items()),
    ]
    if merged.losses_note:
        facts.append(("validation losses", f"not measured: {merged.losses_note}"))
    blocks: list[Block] = [Pairs(facts)]
    if merged.overflowed:
        blocks.insert(0, Text(f"{merged.overflowed:,} values are beyond float16 and became infinite", "note"))
    return View("merged", blocks)


def _exported(done: Exported) -> View:
    rows = []
    for file in done.files:
        found = file.quality
        measured = (f"{found.kl:.2g}", f"{found.top1:.1%}") if found is not None else ("-", "-")
        rows.append((file.path.name, file.method, size_text(file.nbytes), *measured))
    blocks: list[Block] = []
    if rows:
        blocks += [Table(["file", "stored as", "size", "KL, nats", "same next token"], rows)]
    if done.others:
        blocks += [Pairs([("also", path_text(path)) for path in done.others])]
    if done.url:
        blocks += [Pairs([("pushed to", done.url)])]
    return View(f"exported to {path_text(done.directory)}", blocks)


_VIEWS: dict[str, Callable[[Any], View]] = {
    "Diagnosis": _diagnosis,
    "Exported": _exported,
    "MemoryNow": _memory,
    "MergeResult": _merge,
    "Plan": _plan,
    "Recipe": _recipe,
    "Run": _run,
}
"""By the name of the class, which is imported already where there is such a result."""
