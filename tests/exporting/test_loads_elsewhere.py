"""What we write, read by others: transformers 4 and 5, plain PEFT, and the loaders of vLLM, SGLang and GGUF.

vLLM and SGLang need a GPU and are not run here. What their loaders ask of a checkpoint was read from their
published wheels and is written down below, version and day beside it, to be read anew with a new version.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mamba_sft.exporting.export_run import export
from mamba_sft.exporting.request import GGUFOptions
from mamba_sft.merging.merge_run import merge
from mamba_sft.model.checkpoint import read_tensors
from tests.exporting import load_elsewhere
from tests.merging.test_merge_run import PROMPT, Made, make_run

# vLLM 0.33.0 and SGLang 0.5.23, their wheels on PyPI, read 2026-11-27:
# vllm/model_executor/models/mamba.py with layers/mamba/mamba_mixer.py and models/registry.py;
# sglang/srt/models/falcon_mamba.py with layers/attention/mamba/mamba1.py and configs/mamba.py.
# Both build their model from these keys, where transformers' FalconMambaConfig has defaults for some.
CONFIG_KEYS = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "state_size", "conv_kernel", "time_step_rank", "use_conv_bias", "use_bias", "hidden_act",
    "layer_norm_epsilon", "mixer_rms_eps", "tie_word_embeddings", "eos_token_id", "pad_token_id",
}  # fmt: skip
# Names in the files; vLLM maps `.A_log` to `.A`, SGLang `backbone.` to `model.`, `embeddings` to
# `embed_tokens` and `norm_f` to `norm`. V: rows of the vocabulary, D: width, I: inner width, N: state,
# R: rank of the time step, K: kernel.
TENSORS = {"backbone.embeddings.weight": "VD", "backbone.norm_f.weight": "D", "lm_head.weight": "VD"}
LAYER_TENSORS = {
    "norm.weight": "D", "mixer.A_log": "IN", "mixer.D": "I", "mixer.conv1d.weight": "I1K",
    "mixer.conv1d.bias": "I", "mixer.in_proj.weight": "2D", "mixer.x_proj.weight": "XI",
    "mixer.dt_proj.weight": "IR", "mixer.dt_proj.bias": "I", "mixer.out_proj.weight": "DI",
}  # fmt: skip

OLD = "MAMBA_SFT_TRANSFORMERS_4"
"""A directory with transformers 4 and what it needs older than here, as `pip install --target` makes it."""
OLD_PACKAGES = ("transformers==4.57.*", "huggingface_hub<1", "tokenizers<0.23")


def checkpoints(made: Made) -> list[Path]:
    return [export(made.run, format="hf").directory, merge(made.run).path]


def test_vllm_and_sglang_find_every_key_and_tensor_they_ask_for(tmp_path: Path) -> None:
    for path in checkpoints(make_run(tmp_path)):
        config = json.loads((path / "config.json").read_text())
        assert config.keys() >= CONFIG_KEYS
        assert config["architectures"] == ["FalconMambaForCausalLM"]
        sizes = {
            "V": config["vocab_size"], "D": config["hidden_size"], "I": config["intermediate_size"],
            "N": config["state_size"], "R": config["time_step_rank"], "K": config["conv_kernel"], "1": 1,
            "2": 2 * config["intermediate_size"], "X": config["time_step_rank"] + 2 * config["state_size"],
        }  # fmt: skip
        wanted = dict(TENSORS)
        for layer in range(config["num_hidden_layers"]):
            wanted |= {f"backbone.layers.{layer}.{name}": shape for name, shape in LAYER_TENSORS.items()}
        found = {name: entry.shape for name, entry in read_tensors(path).items()}
        assert found == {name: tuple(sizes[letter] for letter in shape) for name, shape in wanted.items()}


def test_a_tied_head_is_not_asked_for(tmp_path: Path) -> None:
    """Both tie the head to the embedding where the config says so; SGLang only warns of one that is there."""
    made = make_run(tmp_path, config={"tie_word_embeddings": True})
    path = merge(made.run).path
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True
    assert read_tensors(path).keys() >= TENSORS.keys() - {"lm_head.weight"}


def test_stop_ids_are_one_list_in_all_files_and_in_what_converts_them(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    made = make_run(tmp_path)
    for path in (*checkpoints(made), made.run.adapter):
        tokenizer = AutoTokenizer.from_pretrained(path)
        stops = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
        assert stops[0] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        if (path / "config.json").is_file():
            assert json.loads((path / "config.json").read_text())["eos_token_id"] == stops
            special = gguf.SpecialVocab(
                path, load_merges=True
            ).special_token_ids  # llama.cpp's converter's own
            assert special["eos"] == stops[0]


def test_the_exported_template_has_no_marks_and_the_adapters_keeps_them(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    for path in checkpoints(made):
        assert "generation %}" not in (path / "chat_template.jinja").read_text()
    assert "{%- generation %}" in (made.run.adapter / "chat_template.jinja").read_text()


def test_a_plain_checkpoint_is_exported_for_others_too(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    before = json.loads((made.base / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    path = export(made.base, format="hf", output=tmp_path / "plain").directory
    after = json.loads((path / "tokenizer_config.json").read_text())
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((made.base / "tokenizer_config.json").read_text()) == before  # copied, not linked


def elsewhere(tmp_path: Path, *arguments: Path, packages: Path | None = None) -> dict[str, Any]:
    """What `load_elsewhere` finds, in a process that has not this package on its path."""
    result = tmp_path / "result.json"
    checkpoint, *adapter = arguments
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    script = Path(load_elsewhere.__file__)
    command = [sys.executable, "-P", str(script), str(checkpoint), str(result), *map(str, adapter)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    return dict(json.loads(result.read_text()))


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with transformers 4: the one that `OLD` names, else one that pip makes now."""
    if named := os.environ.get(OLD):
        return Path(named)
    place = tmp_path_factory.mktemp("transformers-4")
    if importlib.util.find_spec("pip") is None:
        pytest.skip(f"no pip to install transformers 4 with; name a directory that has it with {OLD}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(place),
        *OLD_PACKAGES,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"transformers 4 cannot be installed: {done.stderr[-300:]}")
    return place


def same_logits(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return torch.allclose(torch.tensor(left["logits"]), torch.tensor(right["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("special_tokens", ["auto", "add"])
def test_transformers_4_and_5_load_the_same_model(
    tmp_path: Path, transformers_4: Path, special_tokens: str
) -> None:
    for path in checkpoints(make_run(tmp_path, chat={"special_tokens": special_tokens})):
        new, old = elsewhere(tmp_path, path), elsewhere(tmp_path, path, packages=transformers_4)
        assert (old["transformers"][:5], new["transformers"][:2]) == ("4.57.", "5.")
        assert old["tokenizer"] == "PreTrainedTokenizerFast"
        assert old["odd"] == new["odd"] == []
        assert old["ours"] == new["ours"] == []
        for what in ("ids", "answer", "stops"):
            assert old[what] == new[what], what
        assert same_logits(old, new)


@pytest.mark.slow
def test_plain_peft_loads_an_adapter_on_what_it_allows_and_the_card_says_so(tmp_path: Path) -> None:
    allowed = make_run(tmp_path / "a", target_modules=["in_proj", "x_proj"])
    found = elsewhere(tmp_path, allowed.base, allowed.run.adapter)
    assert "refused" not in found
    assert found["ours"] == []
    with torch.no_grad():
        expected = allowed.model(torch.tensor(found["ids"])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-3, atol=1e-3)
    assert "With PEFT and transformers alone:" in (allowed.run.adapter / "README.md").read_text()
    other = make_run(tmp_path / "b", target_modules=["in_proj", "out_proj"])
    refused = elsewhere(tmp_path, other.base, other.run.adapter)["refused"]
    assert "'out_proj' is incompatible with Mamba-based models" in refused
    assert "PEFT refuses `out_proj` on this architecture" in (other.run.adapter / "README.md").read_text()


@pytest.mark.slow
def test_stock_transformers_leaves_an_adapter_on_dt_proj_out_and_the_card_says_so(tmp_path: Path) -> None:
    made = make_run(tmp_path, target_modules=["dt_proj"])
    found = elsewhere(tmp_path, made.base, made.run.adapter)
    with torch.no_grad():
        expected = made.model(torch.tensor(found["ids"])).logits[0, -1]
    assert not torch.allclose(torch.tensor(found["logits"]), expected, rtol=1e-2, atol=1e-2)
    assert "reads the weight of `dt_proj` directly" in (made.run.adapter / "README.md").read_text()


@pytest.mark.parametrize("targets", [["in_proj", "x_proj"], ["in_proj", "out_proj", "dt_proj"]])
def test_the_adapters_card_is_a_program_that_loads_it(tmp_path: Path, targets: list[str]) -> None:
    made = make_run(tmp_path, target_modules=targets)
    text = (made.run.adapter / "README.md").read_text()
    assert "base_model:" not in text  # a directory is no model on the hub
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("DIRECTORY", str(made.run.adapter)), names)  # it is the test that the text is a program
    torch.testing.assert_close(names["model"](PROMPT).logits, made.logits(), rtol=1e-3, atol=1e-3)


SERVING = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 256, 1
params.port, params.use_jinja = 0, True
server = xllamacpp.Server(params)
def ask(path, **body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))
chat = json.loads(sys.argv[2])
answer = ask("/v1/chat/completions", messages=chat, max_tokens=4, temperature=0)
found = {"prompt": ask("/apply-template", messages=chat)["prompt"], "tokens": answer["usage"]}
print("found " + json.dumps(found), flush=True)
import os
os._exit(0)
"""


def test_llama_cpps_server_answers_with_our_template(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    made = make_run(tmp_path)
    (file,) = export(made.run, quantization="Q8_0", options=GGUFOptions(verify=False)).files
    chat = [
        *load_elsewhere.QUESTION,
        {"role": "assistant", "content": " a "},
        {"role": "user", "content": "b"},
    ]
    command = [sys.executable, "-c", SERVING, str(file.path), json.dumps(chat)]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found"))[6:])
    tokenizer = AutoTokenizer.from_pretrained(made.run.adapter)
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert found["prompt"] == wanted
    assert found["tokens"]["prompt_tokens"] == len(tokenizer(wanted).input_ids)
    assert found["tokens"]["completion_tokens"] > 0
