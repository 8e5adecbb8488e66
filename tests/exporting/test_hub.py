"""A checkpoint for the hub: its files, its card, the card's own snippets, and pushing."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from jinja2 import Template
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mamba_sft.errors import ExportError, UsageError
from mamba_sft.evaluation.checks import Check
from mamba_sft.evaluation.normalisation import Column, Pool
from mamba_sft.evaluation.prompts import Prompt, Sample, write_samples
from mamba_sft.evaluation.results import Results
from mamba_sft.evaluation.scores import Scores, TaskScores
from mamba_sft.exporting.export_run import export
from mamba_sft.exporting.full_model import base_of, find_model
from mamba_sft.exporting.hub import card, checkpoint
from mamba_sft.exporting.request import GGUFOptions, HubOptions
from mamba_sft.merging.merge_run import merge
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run, result_file
from mamba_sft.wording import size_text
from tests.merging.test_merge_run import PROMPT, Made, make_run, merged_logits, relative, weights

TOKEN = "hf_SecretSecretSecret"


def with_records(made: Made) -> Made:
    """What a real training leaves beside the adapter."""
    environment = {
        "packages": {"torch": "2.13.0", "triton": None},
        "device": {"type": "cuda", "name": "NVIDIA H100", "count": 8},
        "seconds": 7200.0,
        "steps": 2,
        "tokens": 12345,
        "best_validation_loss": 1.25,
    }
    made.run.environment.write_text(json.dumps(environment))
    lines = [
        {"step": 1, "loss": 2.0, "learning_rate": 1e-4},
        {"step": 2, "loss": 1.5, "learning_rate": 1e-4},
        {"step": 2, "eval_loss": 1.25},
    ]
    made.run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_samples(made.run.samples_file, [Sample(Prompt('Say "hi" \\ twice.', "hi"), "no", "hi")])
    return made


@pytest.mark.parametrize("merged", [False, True], ids=["summed", "merged"])
def test_the_checkpoint_is_base_and_adapter_in_the_bases_shards(tmp_path: Path, merged: bool) -> None:
    made = make_run(tmp_path)
    if merged:
        merge(made.run)
    done = export(made.run, format="hf")
    assert done.paths == [made.run.export / "hf"]
    assert relative(merged_logits(done.directory), made.logits()) < 2e-6
    shards = {path.name: list(load_file(path)) for path in made.base.glob("*.safetensors")}
    assert len(shards) > 1
    assert {path.name: list(load_file(path)) for path in done.directory.glob("*.safetensors")} == shards
    tokenizer = AutoTokenizer.from_pretrained(done.directory)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template
    generation = json.loads((done.directory / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    assert not (done.directory / "merge.json").exists()
    assert (done.directory / "LICENSE.txt").read_text() == "licence of the base"


def test_exporting_again_replaces_only_its_own(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    target = tmp_path / "published"
    export(made.run, format="hf", output=target)
    (target / "model-00009-of-00009.safetensors").write_text("of another base")
    export(made.run, format="hf", output=target)
    assert not (target / "model-00009-of-00009.safetensors").exists()
    (target / "stray.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds what no model consists of: `stray\.txt`"):
        export(made.run, format="hf", output=target)
    assert (target / "stray.txt").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for notes in (b"my notes on mamba-sft", "größere Notizen".encode("latin-1")):
        (foreign / "README.md").write_bytes(notes)
        with pytest.raises(UsageError, match="not an earlier export"):
            export(made.run, format="hf", output=foreign)
        assert (foreign / "README.md").read_bytes() == notes
    with pytest.raises(UsageError, match="what would be exported"):
        export(made.run, format="hf", output=made.run.adapter)


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini"])
def test_a_directory_with_what_a_system_put_there_counts_as_empty(tmp_path: Path, name: str) -> None:
    made = make_run(tmp_path)
    for verb in ("merge", "export"):
        place = tmp_path / verb
        place.mkdir()
        (place / name).write_text("x")
        if verb == "merge":
            merge(made.run, output=place)
        else:
            export(made.run, format="hf", output=place)
        assert (place / "config.json").is_file()
    (tmp_path / "mine").mkdir()
    for other in (name, "mine.txt"):
        (tmp_path / "mine" / other).write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        export(made.run, format="hf", output=tmp_path / "mine")


def test_a_merge_older_than_the_adapter_is_not_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_run(tmp_path)
    merge(made.run)
    path = made.run.adapter / "adapter_model.safetensors"
    later = (made.run.merged / "merge.json").stat().st_mtime + 10
    os.utime(path, (later, later))
    assert find_model(made.run).directory is None
    assert "older than the adapter" in caplog.text


def test_files_that_are_not_the_model_get_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path)
    write = checkpoint.write_companions

    def corrupt(plan: Any, directory: Path) -> None:
        write(plan, directory)
        path = sorted(directory.glob("*.safetensors"))[-1]
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x40
        path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "write_companions", corrupt)
    with pytest.raises(ExportError, match=r"not base \+ adapter"):
        export(made.run, format="hf")
    assert not list(made.run.export.glob("*"))


def read_card(directory: Path) -> tuple[dict[str, Any], str]:
    text = (directory / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---")[1]), text


def write_results(run: Run) -> None:
    """What `eval` leaves in a run: two columns of a leaderboard, of the model and of its base."""
    place, shares = run.eval, {"tuned": (0.625, 0.25), "base": (0.125, 0.25)}
    for role, values in shares.items():
        results = Results(
            "leaderboard-v2", {"name": "x", "role": role, "fingerprint": "f"}, {"chat_template": True}
        )
        columns = [Column(title, (Pool((title,), "acc"),)) for title in ("MuSR", "BBH")]
        for column, value in zip(columns, values, strict=True):
            marks = Scores.of([1.0] * round(value * 8) + [0.0] * round(8 - value * 8))
            keys = tuple("abcdefgh")
            results.scored[column.title] = TaskScores(column.title, 0, keys, keys, {"acc": marks})
        results.fill(columns)
        results.write(result_file(place, "leaderboard-v2", is_base=role == "base"))
        results.settings["limit"] = 8
        results.write(result_file(place, "leaderboard-v2", limit=8, is_base=role == "base"))  # claims nothing
    (place / "heldout.json").write_text("{")


def test_the_card_has_valid_metadata_and_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_records(make_run(tmp_path))
    recipe = json.loads(made.run.recipe.read_text())
    sources = [*recipe["data"]["sources"], {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}]
    made.run.recipe.write_text(json.dumps(recipe | {"data": recipe["data"] | {"sources": sources}}))
    write_results(made.run)
    monkeypatch.setattr(
        type(find_model(made.run)), "base_id", property(lambda self: "tiiuae/falcon-mamba-7b")
    )
    done = export(made.run, format="hf", name="my-model", options=HubOptions(languages=("en", "de")))
    metadata, text = read_card(done.directory)
    assert metadata == {
        "language": ["en", "de"],
        "license": "other",
        "license_name": "falcon-mamba-7b-license",
        "license_link": "https://falconllm.tii.ae/falcon-mamba-7b-terms-and-conditions.html",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mamba-sft", "falcon-mamba", "mamba", "sft", "lora", "conversational"],
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
        "base_model": "tiiuae/falcon-mamba-7b",
        "model-index": [
            {
                "name": "my-model",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "leaderboard-v2-musr", "name": "MuSR (leaderboard-v2)"},
                        "metrics": [{"type": "accuracy", "value": 62.5}],
                    },
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "leaderboard-v2-bbh", "name": "BBH (leaderboard-v2)"},
                        "metrics": [{"type": "accuracy", "value": 25.0}],
                    },
                ],
            }
        ],
    }
    result, _ = ModelCard(text).data.eval_results or []  # as the hub's own library reads it
    assert (result.dataset_name, result.metric_value) == ("MuSR (leaderboard-v2)", 62.5)
    for heading in (
        "# my-model", "# TL;DR", "# Model Details", "# Usage", "## Training Data",
        "### Training Hyperparameters", "### Hardware and Time", "### Loss", "# Evaluation", "## Results",
        "# Technical Specifications", "## Software", "# Citation",
    ):  # fmt: skip
        assert f"\n{heading}\n" in text, heading
    for row in (
        "| learning_rate | 0.0002 |", "| target_modules | in_proj, x_proj, out_proj |",
        "|  | MuSR | BBH | Average |", "| this model | 62.50 | 25.00 | 43.75 |", "| its base | 12.50 |",
        "leaderboard-v2: chat template on", "8 x NVIDIA H100", "2.0 h, 2 steps", "1.2500 nats",
        "100.0% by this model", "| `d_model` | 64 |", "torch 2.13.0",
    ):  # fmt: skip
        assert row in text, row
    assert "stderr" not in text
    assert "triton" not in text
    assert (done.directory / "loss.svg").read_text().startswith("<svg xmlns=")
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        titles = [line.lstrip("# ").lower().replace(" ", "-").replace(";", "") for line in text.splitlines()]
        assert anchor in titles


def test_nothing_is_claimed_that_was_not_recorded(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    metadata, text = read_card(export(made.run, format="hf").directory)
    assert "base_model" not in metadata  # a directory is no model on the hub
    assert "license" not in metadata
    assert "datasets" not in metadata
    for absent in ("### Loss", "### Hardware", "# Evaluation", "## GGUF", "None", "loss.svg"):
        assert absent not in text, absent
    plain = export(made.base, format="hf", output=tmp_path / "plain").directory
    assert "# Training Details" not in read_card(plain)[1]


def test_the_card_lists_gguf_files_with_size_and_quality(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("xllamacpp")
    made = make_run(tmp_path)
    files = export(made.run, quantization=["Q8_0", "f32"]).files
    export(made.run, quantization="Q4_0", options=GGUFOptions(verify=False))
    export(made.run, quantization="Q4_0", adapter_only=True, options=GGUFOptions(verify=False))
    made.run.report.write_text("as training left it")
    made.run.environment.write_text(json.dumps({"packages": {"mamba-sft": "0.1.0"}}))
    export(made.run, quantization="Q5_0", options=GGUFOptions(verify=False))
    report = made.run.report.read_text()
    assert "<pre>run.Q8_0.gguf</pre>" in report
    _, text = read_card(export(made.run, format="hf").directory)
    quality = files[0].quality
    assert quality is not None
    size = size_text(files[0].nbytes)
    assert f"| `run.Q8_0.gguf` | Q8_0 | {size} | {quality.kl:.2g} | {quality.top1:.1%} |" in text
    assert "| `run.Q4_0.gguf` | Q4_0 |" in text
    assert text.count("not measured | not measured") == 2
    assert ".base." not in text  # what was measured of it is against the base
    assert ".lora." not in text
    assert "writes it anew" not in caplog.text
    export(made.run, quantization="Q4_1", options=GGUFOptions(verify=False))
    assert "writes it anew" in caplog.text


def snippets(text: str) -> dict[str, str]:
    found = dict(re.findall(r"### ([^\n]*)\n\n```python\n(.*?)```", text, re.DOTALL))
    found["kernels"] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    return found


TITLES = [
    "Running the model on a CPU", "Running the model on a GPU", "FP16", "4-bit",
    pytest.param("Running the model on a GPU with `torch.compile`", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("title", TITLES)
def test_each_snippet_of_the_card_runs(
    tmp_path: Path, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = with_records(make_run(tmp_path))
    directory = export(made.run, format="hf").directory
    code = snippets((directory / "README.md").read_text(encoding="utf-8"))
    assert len(code) == 6
    short = code[title].replace("max_new_tokens=100", "max_new_tokens=3").replace('("run"', f'("{directory}"')
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(short, names)  # it is the test that the text is a program
    answer = AutoTokenizer.from_pretrained(directory).decode(
        names["answer"][0, names["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert capsys.readouterr().out == answer + "\n"
    if title == "Running the model on a CPU":
        torch.testing.assert_close(names["model"](PROMPT).logits, made.logits(), rtol=1e-3, atol=1e-3)
        exec(code["kernels"], names)
        torch.testing.assert_close(names["model"](PROMPT).logits, made.logits(), rtol=1e-3, atol=1e-3)


def test_the_snippet_for_4_bits_leaves_out_what_has_not_whole_blocks(tmp_path: Path) -> None:
    """Plain bitsandbytes packs weights on some CPUs, and what it cannot pack ends in an assertion."""
    code = snippets(read_card(export(make_run(tmp_path / "a").run, format="hf").directory)[1])["4-bit"]
    assert 'llm_int8_skip_modules=["lm_head", "dt_proj", "x_proj"],' in code
    made = make_run(tmp_path / "b", config={"time_step_rank": 32})
    whole = snippets(read_card(export(made.run, format="hf").directory)[1])["4-bit"]
    assert 'llm_int8_skip_modules=["lm_head", "dt_proj"],  # their weights are read directly' in whole


def test_a_base_without_its_adapter_is_not_written_as_the_run(tmp_path: Path) -> None:
    model = find_model(make_run(tmp_path).run)
    assert model.run is not None
    assert model.merge is not None
    base = base_of(model.run, model.merge)
    with pytest.raises(ExportError, match=r"`run\.base` is a base without its adapter"):
        checkpoint.write_checkpoint(base, tmp_path / "out", lambda path: None, lambda done, total: None)
    assert not (tmp_path / "out").exists()


def test_a_question_is_quoted_in_the_snippets(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    write_samples(made.run.samples_file, [Sample(Prompt('Say "hi" \\ twice.\nNow.', "hi"), "no", "hi")])
    _, text = read_card(export(made.run, format="hf").directory)
    assert '"content": "Say \\"hi\\" \\\\ twice.\\nNow."' in text
    for code in snippets(text).values():
        compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Prompt("Hi?", "hi"), "1 sample prompts, exact match: 0.0% by the base, 100.0% by this model."),
        (Prompt("Hi?", checks=(Check("contains", ["hi"]),)), "1 sample prompts, right answers: 0.0% by"),
    ],
)
def test_the_card_says_what_counts_as_right(tmp_path: Path, asked: Prompt, said: str) -> None:
    made = make_run(tmp_path)
    write_samples(made.run.samples_file, [Sample(asked, "no", "hi")])
    assert said in read_card(export(made.run, format="hf").directory)[1]


def test_a_push_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo, message in (("model", "has no owner"), ("a/b/c", "not a repository"), ("me/..x", "not a repo")):
        with pytest.raises(UsageError, match=message):
            export(made.run, format="hf", options=HubOptions(push_to_hub=repo))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="this machine is not logged in"):
        export(made.run, format="hf", options=HubOptions(push_to_hub="me/model"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        export(made.run, format="hf", options=HubOptions(push_to_hub="me/model"))
    with pytest.raises(UsageError, match="not described by `HubOptions`"):
        export(made.run, options=HubOptions(push_to_hub="me/model"))
    with pytest.raises(UsageError, match="an adapter alone is not pushed"):
        export(made.run, adapter_only=True, options=GGUFOptions(hub=HubOptions(push_to_hub="me/model")))
    with pytest.raises(UsageError, match="are GGUF files"):
        export(made.run, format="hf", quantization="Q8_0")
    assert not made.run.export.exists()


def test_a_file_is_no_dataset_of_the_card(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    assert card.hub_datasets(Recipe.load(str(made.run.recipe))) == []


def test_a_tables_cells_stay_cells() -> None:
    template: Any = Template(card.TEMPLATE.read_text(encoding="utf-8")).module
    assert template.table(["a"], [["x|y\nz"], [[1, 2]]]) == "| a |\n|---|\n| x\\|y z |\n| 1, 2 |\n"


def test_the_format_hf_needs_no_gguf_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path)
    for name in list(sys.modules):
        if name.split(".")[0] in ("gguf", "xllamacpp") or name.startswith("mamba_sft.exporting.export_run."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    done = export(made.run, format="hf")
    assert weights(done.directory)


def test_what_to_do_next_is_printed_as_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mamba_sft.cli.app import app

    pytest.importorskip("xllamacpp")
    made = make_run(tmp_path)
    run = str(made.run.path)

    def told(*arguments: str) -> list[str]:
        words = ["export", run, *arguments]
        return CliRunner().invoke(app, words, catch_exceptions=False).stderr.splitlines()

    assert told("--format", "hf")[-2:] == [
        f'load:   AutoModelForCausalLM.from_pretrained("{run}/export/hf")',
        f"push:   mamba-sft export {run} --format hf --push-to-hub owner/name",
    ]
    assert told("--no-verify")[-1] == f"serve:  llama-server -m {run}/export/run.Q4_K_M.gguf --jinja"
    one = told("--format", "ollama", "-q", "Q8_0", "--no-verify")
    assert one[-1] == f"next:   ollama create run -f {run}/export/Modelfile"
    two = told("--format", "ollama", "-q", "Q8_0", "-q", "Q4_0", "--no-verify")
    assert two[-2:] == [
        f"next:   ollama create run:q4_0 -f {run}/export/Modelfile.Q4_0",
        f"next:   ollama create run:q8_0 -f {run}/export/Modelfile.Q8_0",
    ]
