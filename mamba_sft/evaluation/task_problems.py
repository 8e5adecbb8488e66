"""What stands in the way of tasks of lm-eval, told from their files alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mamba_sft.errors import UsageError
from mamba_sft.evaluation.around_lm_eval import data_from, quiet
from mamba_sft.evaluation.settings import Settings
from mamba_sft.evaluation.suites import Problem
from mamba_sft.wording import first_line

_DEFAULT_ANSWER = 256
"""Tokens that are generated where a task does not say how many."""


def read_task_file(name: str) -> Mapping[str, Any]:
    """Returns what stands in a YAML file of a task.

    Raises:
        UsageError: It cannot be read as one.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(Path(name), resolve_func=False))
    except Exception as error:  # any YAML, by anybody
        raise UsageError(f"`{name}` cannot be read as a task: {first_line(error)}") from error


def data_problems(leaves: Mapping[str, Mapping[str, Any]], settings: Settings) -> Iterator[Problem]:
    """One for each data set that is neither here nor to be had."""
    from datasets import load_dataset_builder

    first: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}
    for name, config in leaves.items():
        if isinstance(config.get("dataset_path"), str):
            key = config["dataset_path"], repr(config.get("dataset_kwargs"))  # of `json`, which files
            first.setdefault(key, (name, config))
    for (path, _), (name, config) in first.items():
        extra = config.get("dataset_kwargs") or {}
        try:
            with quiet(), data_from(settings.data_dir):
                load_dataset_builder(path, config.get("dataset_name"), **extra)
        except Exception as error:  # what cannot be reached has as many errors as there are ways to it
            yield _unreachable(path, name, error, settings, files=extra.get("data_files"))


def _unreachable(path: str, task: str, error: Exception, settings: Settings, files: Any) -> Problem:
    if files is not None:
        place = settings.data_dir or Path.cwd()
        return Problem(
            f"the files of `{task}` cannot be read: {first_line(error)}",
            f"`data_files` with no `/` in front are looked for below `{place}`",
        )
    if "gated" in str(error):
        return Problem(
            f"the data set `{path}` of `{task}` is gated",
            f"accept its terms at https://huggingface.co/datasets/{path}, then `hf auth login`",
        )
    where = f"in `{settings.data_dir}`, in the cache" if settings.data_dir is not None else "in the cache"
    return Problem(
        f"the data set `{path}` of `{task}` is neither {where} nor to be had: {first_line(error)}",
        f"where there is a network: `hf download {path} --repo-type dataset --local-dir DIR/{path}`;"
        " then `--data-dir DIR`",
    )


def length_problems(leaves: Mapping[str, Mapping[str, Any]], settings: Settings) -> Iterator[Problem]:
    """One where the longest answer that is asked for leaves no room for a prompt."""
    longest, which = 0, ""
    for name, config in leaves.items():
        if config.get("output_type") == "generate_until":
            asked = config.get("generation_kwargs") or {}
            tokens = next((asked[key] for key in ("max_gen_toks", "max_new_tokens") if key in asked), None)
            tokens = _DEFAULT_ANSWER if not isinstance(tokens, int) else tokens
            if tokens > longest:
                longest, which = tokens, name
    if settings.max_length <= longest:
        yield Problem(
            f"`--max-length {settings.max_length}` leaves no room for a prompt: answers of `{which}` have up"
            f" to {longest:,} tokens",
            f"`--max-length 2048`, or more than {longest:,}",
        )


def sentence_problems(leaves: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """IFEval counts sentences with data that is no package; without them it fails after all is generated."""
    which = next((name for name in leaves if "ifeval" in name), None)
    if which is None:
        return
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        yield Problem(
            f"`{which}` counts sentences with nltk's `punkt_tab`, which is not on this machine",
            "`python -m nltk.downloader punkt_tab`, or copy it below a directory that NLTK_DATA names",
        )
