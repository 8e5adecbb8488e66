"""What `from mamba_sft import ...` gives: a function for each verb, which returns what shows itself.

Each checks what it was given, before torch is loaded, and hands on to the room that does the work. In a
notebook it lets our messages appear and shows one bar meanwhile; elsewhere it is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.noise import quiet_loading
from mamba_sft.notebook.arguments import check_kind, check_rows
from mamba_sft.notebook.cell import in_notebook, speak_here
from mamba_sft.notebook.letting_go import LettingGo
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from mamba_sft.diagnostics.diagnosis import Diagnosis
    from mamba_sft.diagnostics.memory_in_use import MemoryNow
    from mamba_sft.evaluation.settings import Settings
    from mamba_sft.exporting.request import Exported, GGUFOptions, HubOptions
    from mamba_sft.exporting.request import Progress as ExportProgress
    from mamba_sft.inference.answer import Answer
    from mamba_sft.inference.chat_model import ChatModel
    from mamba_sft.inference.model_places import ModelPlace
    from mamba_sft.inference.prompt_rows import Prompt
    from mamba_sft.inference.sampling import Sampling
    from mamba_sft.merging.check import MergeResult
    from mamba_sft.merging.merge_run import Progress as MergeProgress
    from mamba_sft.notebook.answers import Answers
    from mamba_sft.notebook.pages import Page
    from mamba_sft.notebook.scored import Scored
    from mamba_sft.notebook.token_rows import Preview
    from mamba_sft.planning.plan import Plan

    Model = ChatModel | ModelPlace | Run | Recipe | str | Path


def doctor() -> Diagnosis:
    """Says what will run on this machine, and what would make it faster.

    Example:
        >>> doctor().status in ("ok", "note", "problem")  # doctest: +SKIP
        True

    Returns:
        The findings, which a notebook shows as a table.
    """
    speak_here()
    from mamba_sft.diagnostics.diagnosis import diagnose

    return diagnose()


def memory() -> MemoryNow:
    """Says what memory is in use now: of the GPU, of this process, and the most so far.

    Example:
        >>> memory().process_peak > 0
        True
    """
    from mamba_sft.diagnostics.memory_in_use import memory_now

    return memory_now()


def plan(recipe: Recipe | str | Path, *, card: str | None = None) -> Plan:
    """Says what a recipe takes in memory, time and disk, and whether it fits; loads no weights.

    Example:
        >>> plan("instruct-qlora", card="4090").fits
        True

    Args:
        recipe: A recipe, the name of a built-in one, or a file.
        card: A GPU that is not here, such as `t4`, `4090`, `a100-80`, `h100`; None plans for this machine.

    Returns:
        The plan, which a notebook shows as bars.

    Raises:
        MambaSFTError: There is no such recipe or GPU, or the base cannot be found.
    """
    speak_here()
    chosen = _recipe(recipe)
    from mamba_sft.planning.plan import make_plan

    return make_plan(chosen, card)


def preview(recipe: Recipe | str | Path, *, rows: int = 3) -> Preview:
    """Shows what a recipe trains on: rows as tokens, what of them is trained, lengths, what is left out.

    Example:
        >>> preview("quickstart").data.summary.train_rows
        2922

    Args:
        recipe: A recipe, the name of a built-in one, or a file.
        rows: How many rows to show.

    Returns:
        The prepared rows and counts, which a notebook shows with the trained tokens coloured.

    Raises:
        MambaSFTError: The base, its tokenizer, the template or the data cannot be used.
    """
    speak_here()
    check_rows(rows)
    chosen = _recipe(recipe)
    from mamba_sft.data.sources import check_source

    for source in chosen.data.sources:
        check_source(source)
    from mamba_sft.notebook.token_rows import prepared_preview

    quiet_loading()
    return prepared_preview(chosen, rows)


def train(
    recipe: Recipe | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed_data: bool = False,
    finish: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Trains a recipe and returns the finished run; a notebook sees the loss while it falls.

    Example:
        >>> run = train("quickstart")  # doctest: +SKIP
        >>> run.metrics["loss"].iloc[-1] < run.metrics["loss"].iloc[0]  # doctest: +SKIP
        True

    Args:
        recipe: A recipe, the name of a built-in one, or a file.
        resume: Go on exactly where the newest complete checkpoint of `recipe.output_dir` stopped.
        overwrite: Replace an earlier run in `recipe.output_dir`.
        allow_changed_data: Resume with other rows, or other prompts, than the run was started with.
        finish: With `resume`: take no step more, and finish the run at that checkpoint.
        callbacks: More callbacks of the trainer. One with `shows_progress = True` replaces its bar.

    Raises:
        MambaSFTError: The run cannot start, diverged, or trains weights that cannot learn.
        RunInterruptedError: Ctrl-C, the notebook's stop button, or SIGTERM; a checkpoint was saved.
    """
    speak_here()
    chosen = _recipe(recipe)
    from mamba_sft.training.first_checks import check_first

    checked = check_first(chosen, resume=resume, overwrite=overwrite, finish=finish)
    from mamba_sft.training.fine_tuning import train_prepared
    from mamba_sft.training.preparation import prepare_checked

    preparation = prepare_checked(checked, allow_changed_data=allow_changed_data)
    shown: list[TrainerCallback] = []
    if in_notebook():
        from mamba_sft.data.summary import FITS_NO_CHAT
        from mamba_sft.notebook.live import LiveTraining

        quiet_loading()
        warnings = [FITS_NO_CHAT] * preparation.data.summary.fits_no_chat + preparation.length.warnings()
        shown.append(LiveTraining(preparation.run, warnings))
    with LettingGo():
        return train_prepared(preparation, callbacks=[*shown, *callbacks])


def merge(
    run: Run | str | Path,
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    onto: str = "base",
    progress: MergeProgress | None = None,
) -> MergeResult:
    """Merges a run's adapter into its base: a checkpoint that `transformers` loads by itself.

    Example:
        >>> merge("runs/quickstart").check.same_next_token  # doctest: +SKIP
        True

    Args:
        run: A finished run.
        output: Where to; by default the run's `merged/`.
        dtype: `float32`, `bfloat16`, `float16`, or None to keep every tensor's own.
        onto: `base`, or `dequantized` for the rounded weights that a QLoRA was trained on.
        progress: Told how far it is; None shows a bar in a notebook.

    Returns:
        What was written and what its check found.

    Raises:
        MambaSFTError: It cannot be merged, or the check failed; then nothing is left.
    """
    speak_here()
    from mamba_sft.merging.request import check_request

    check_request(run, output=output, dtype=dtype, onto=onto)
    from mamba_sft.merging.merge_run import merge as merge_run
    from mamba_sft.notebook.stages import StageBar

    quiet_loading()
    with LettingGo(), StageBar("merge") as bar:
        shown = progress or bar.update
        return merge_run(run, output=output, dtype=dtype, onto=onto, progress=shown)


def export(
    run: Run | str | Path,
    *,
    format: str = "gguf",
    quantization: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    adapter_only: bool = False,
    options: GGUFOptions | HubOptions | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Exports a run, or any FalconMamba checkpoint: GGUF files, for Ollama, or a checkpoint for the hub.

    Example:
        >>> export("runs/quickstart", quantization="Q8_0").paths  # doctest: +SKIP
        [PosixPath('runs/quickstart/export/quickstart.Q8_0.gguf')]

    Args:
        run: A run, or the directory of a checkpoint.
        format: `gguf`; `ollama`, which is GGUF with a Modelfile; or `hf`, a checkpoint with its model card.
        quantization: One or several of the GGUF methods, or `all`; by default `Q4_K_M`.
        output: Where to; by default the run's `export/`.
        name: What the files are called; by default what the run is called.
        adapter_only: Write the adapter as a GGUF LoRA; with a quantization, also its base to load it on.
        options: `GGUFOptions` for GGUF files; `HubOptions` for a checkpoint, and where it is pushed to.
        progress: Told how far it is; None shows a bar in a notebook.

    Returns:
        What was written.

    Raises:
        MambaSFTError: It cannot be exported, or a file failed its check.
    """
    speak_here()
    from mamba_sft.exporting.export_run import check_request
    from mamba_sft.exporting.export_run import export as export_run
    from mamba_sft.exporting.request import GGUFOptions, HubOptions

    check_kind("options", options, HubOptions if format == "hf" else GGUFOptions, HubOptions, GGUFOptions)
    names = [quantization] if isinstance(quantization, str) else list(quantization or [])
    check_request(run, format, names, adapter_only, options)
    from mamba_sft.notebook.stages import StageBar

    quiet_loading()
    with LettingGo(), StageBar("export") as bar:
        return export_run(
            run, format=format, quantization=quantization, output=output, name=name,
            adapter_only=adapter_only, options=options, progress=progress or bar.update,
        )  # fmt: skip


def generate(
    model: Model,
    prompts: Prompt | Path | Iterable[Prompt],
    *,
    output: str | Path | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 8,
    on_answer: Callable[[int, Answer], None] | None = None,
) -> Answers:
    """Answers prompts, several at a time.

    Example:
        >>> generate("runs/quickstart", ["What is the opposite of hot?"])[0].text  # doctest: +SKIP
        'The opposite of hot is cold.'

    Args:
        model: A run, a model directory, a hub id, or what `load_chat_model` or `find_place` returned; or a
            recipe, whose base answers as it is before training.
        prompts: A text, a list of messages, several of either, or the `Path` of a JSON Lines file with one
            `{"prompt": ...}` or `{"messages": [...]}` a line, or of a txt file with one prompt a line.
        output: JSON Lines file to write: prompt, `answer`, `finish_reason` (`stop` or `length`), `tokens`.
        sampling: How to choose tokens; greedy by default.
        system: System message of prompts that have none; None takes the one the model was trained with.
        raw: Continue the texts as they are, without the chat template.
        batch_size: Prompts answered together.
        on_answer: Called with a prompt's number and answer as each one finishes, in any order.

    Returns:
        A list with an answer for each prompt, which a notebook shows beside the prompts.

    Raises:
        MambaSFTError: A prompt is blank, the output cannot be written, or there is no such model.
    """
    speak_here()
    from mamba_sft.inference.model_places import find_place
    from mamba_sft.inference.prompt_rows import read_prompts
    from mamba_sft.inference.request import check_batch_size, check_files
    from mamba_sft.inference.sampling import Sampling

    check_kind("sampling", sampling, Sampling)
    check_batch_size(batch_size)
    check_files(None, output)
    place = find_place(model) if isinstance(model, Run | str | Path) else model
    rows = read_prompts(prompts)
    from mamba_sft.inference.answering import answer_prompts
    from mamba_sft.inference.chat_model import load_base
    from mamba_sft.notebook.answers import Answers
    from mamba_sft.notebook.stages import StageBar

    quiet_loading()
    name = "base" if isinstance(place, Recipe) else place.name

    def give() -> list[Answer]:  # when it returns, nothing holds the model any more
        with StageBar("answering", len(rows)) as bar:

            def count(number: int, answer: Answer) -> None:
                bar.count(number, answer)
                if on_answer is not None:
                    on_answer(number, answer)

            return answer_prompts(
                load_base(place) if isinstance(place, Recipe) else place, rows, output=output,
                sampling=sampling, system=system, raw=raw, batch_size=batch_size, on_answer=count,
            )  # fmt: skip

    with LettingGo():
        given = give()
    return Answers(given, [_shown(row.prompt) for row in rows], name)


def chat(
    model: ChatModel | ModelPlace | Run | str | Path,
    *,
    compare: bool = False,
    merged: bool = False,
    sampling: Sampling | None = None,
    system: str | None = None,
) -> Any:
    """Talks to a model: a widget in a notebook that has `ipywidgets`, else line by line.

    Example:
        >>> chat("runs/quickstart", compare=True)  # doctest: +SKIP

    Args:
        model: A run, a model directory, a hub id, or what `load_chat_model` or `find_place` returned.
        compare: Talk to a run's base and to its tuned model at once; they share one model in memory.
        merged: Talk to the run's merged checkpoint rather than to base and adapter.
        sampling: How to choose tokens; greedy by default.
        system: System message; None takes the one the model was trained with.

    Returns:
        The widget, which shows itself as the last line of a cell; None where the conversation is over.

    Raises:
        MambaSFTError: There is no such model, or it cannot hold a conversation.
    """
    speak_here()
    from mamba_sft.inference.model_places import find_place
    from mamba_sft.inference.sampling import Sampling

    check_kind("sampling", sampling, Sampling)
    asked = (
        find_place(model, merged=merged, needs_adapter=compare)
        if isinstance(model, Run | str | Path)
        else model
    )
    from mamba_sft.inference.answering import open_session
    from mamba_sft.notebook.chatting import hold

    quiet_loading()
    return hold(open_session(asked, compare=compare, merged=merged, sampling=sampling, system=system))


def evaluate(
    model: Run | str | Path,
    suite: str | Sequence[str] = "heldout",
    *,
    tasks: str | None = None,
    base: Run | str | Path | None = None,
    settings: Settings | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Scored:
    """Scores a model on suites and tasks, beside another model if one is named.

    Example:
        >>> evaluate("runs/quickstart", "heldout", base="auto", overwrite=True)  # doctest: +SKIP

    Args:
        model: A run, a model directory or a hub id.
        suite: One or several of `leaderboard-v2`, `leaderboard-v1`, `heldout`, `instructions`, as a list
            or with commas; none of them where there are `tasks`: `[]`.
        tasks: Single tasks of lm-eval as well: `gsm8k:8,mine.yaml`.
        base: Score this one too and compare; `auto`: the base that the model was trained from.
        settings: Template, lengths, limits, and where data are: a `mamba_sft.evaluation.settings.Settings`.
        dtype: What to compute in; None: as it was trained.
        quantization: `none`, `nf4` or `int8`; None: as it was trained.
        output: Where results go; default: the run's `eval/`.
        resume: Go on after the last finished task.
        overwrite: Replace earlier results.

    Returns:
        The results, which a notebook shows as the tables that `mamba-sft eval` prints.

    Raises:
        MambaSFTError: Something stands in the way: all of it, in one message.
    """
    speak_here()
    from mamba_sft.evaluation.measuring import compare, find_subjects, measure, start_all
    from mamba_sft.evaluation.preflight import check_asked, problems_of, refuse
    from mamba_sft.evaluation.report import refresh_report
    from mamba_sft.evaluation.settings import Settings
    from mamba_sft.evaluation.suite_names import asked_suites
    from mamba_sft.run import evaluation_place

    check_kind("settings", settings, Settings)
    settings = settings or Settings()
    suites = asked_suites(suite, tasks)
    check_asked(suites, settings, resume=resume, overwrite=overwrite)
    place = Path(output) if output is not None else evaluation_place(model)
    subjects, problems = find_subjects(model, base, dtype=dtype, quantization=quantization)
    refuse([*problems, *problems_of(suites, [one.place for one in subjects], settings, place)])
    from mamba_sft.notebook.scored import Scored
    from mamba_sft.notebook.stages import StageBar

    works = start_all(suites, subjects, settings, place, resume=resume, overwrite=overwrite)
    quiet_loading()
    with LettingGo():
        with StageBar("scoring") as bar:
            measure(works, subjects, settings, quantization=quantization, progress=bar.update)
        for work in works:
            compare(work)
        if output is None:
            refresh_report(model)
    return Scored(works)


def report(*runs: Run | str | Path, output: str | Path | None = None) -> Page:
    """Writes a run's report anew, or a page that compares several runs, and shows it in a frame of its own.

    Example:
        >>> report("runs/quickstart")  # doctest: +SKIP
        report: runs/quickstart/report.html

    Args:
        runs: A run, or several to compare; none: the newest.
        output: The page that compares; by default `comparison.html` beside the first run.

    Returns:
        The page.

    Raises:
        MambaSFTError: There is no such run, or the page cannot be written.
    """
    speak_here()
    from mamba_sft.notebook.pages import written_report

    chosen = [Run.open(run) for run in runs] or [Run.newest()]
    return written_report(chosen, Path(output) if output is not None else None)


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _shown(prompt: Prompt) -> str:
    """A prompt as a table has it: of a conversation its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
