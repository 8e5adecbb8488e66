"""The adapter as a GGUF LoRA, and Ollama's Modelfile with its Go template."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from mamba_sft.errors import ExportError, UsageError
from mamba_sft.exporting.export_run import export
from mamba_sft.exporting.full_model import find_model
from mamba_sft.exporting.gguf import lora
from mamba_sft.exporting.gguf.probe import Job, run_probe
from mamba_sft.exporting.ollama.go_template import _CHATS, learn_turns, to_go_template
from mamba_sft.exporting.ollama.modelfile import modelfile_text, stop_strings
from mamba_sft.exporting.request import GGUFOptions
from mamba_sft.merging.merge_run import merge
from mamba_sft.model.portable import plain_template
from mamba_sft.recipe.recipe import Recipe
from tests.exporting.go_templates import render_go
from tests.merging.test_merge_run import ALL, PROMPT, Made, make_run

WINDOW = PROMPT[0].tolist()


def seen_logits(base: Path, adapter: Path | None) -> torch.Tensor:
    job = Job(str(base), [], [WINDOW], [], 0, adapter=str(adapter) if adapter else None)
    return torch.from_numpy(run_probe(job).logits[0])


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "all targets": {"target_modules": ALL},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [True, False], ids=["epsilon fix", "no fix"])
def test_llama_cpp_with_the_adapter_computes_what_training_did(
    tmp_path: Path, kind: str, fixed: bool
) -> None:
    made = make_run(tmp_path, **KINDS[kind])
    options = GGUFOptions(fix_epsilon=fixed)
    done = export(made.run, quantization="f32", adapter_only=True, options=options)
    base, adapter = done.files
    assert [file.path.name for file in done.files] == ["run.base.F32.gguf", "run.lora.gguf"]
    assert (seen_logits(base.path, adapter.path) - made.logits()[0]).abs().max() < (1e-4 if fixed else 1e-3)
    assert (seen_logits(base.path, None) - made.logits()[0]).abs().max() > 0.1, (
        "the adapter must do something"
    )
    assert adapter.quality is not None
    assert adapter.quality.kl < 1e-6
    stored = json.loads((made.run.export / "quality.json").read_text())["files"]["run.lora.gguf"]
    assert stored["on"] == "run.base.F32.gguf"
    assert stored["fix_epsilon"] is fixed


def test_the_adapter_alone_needs_no_base_file(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    done = export(made.run, adapter_only=True)
    assert [path.name for path in done.paths] == ["run.lora.gguf"]
    reader = GGUFReader(done.paths[0])
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "mamba"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8.0
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    saved = load_file(made.run.adapter / "adapter_model.safetensors")
    key = "base_model.model.backbone.layers.1.mixer."
    assert np.array_equal(read["blk.1.ssm_in.weight.lora_a"], saved[key + "in_proj.lora_A.weight"])
    assert np.array_equal(read["blk.1.ssm_in.weight.lora_b"], saved[key + "in_proj.lora_B.weight"])
    np.testing.assert_allclose(
        read["blk.1.ssm_x.weight.lora_b"], saved[key + "x_proj.lora_B.weight"] * 10**0.5, rtol=1e-6
    )
    assert {"token_embd.weight.lora_a", "output.weight.lora_b"} <= read.keys()  # the chat's two new tokens


def test_patterns_of_rank_and_alpha_are_folded_into_b(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    path = made.run.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alpha_pattern": {r"layers\.1\.mixer\.in_proj": 64}}))
    base, adapter = export(made.run, quantization="f32", adapter_only=True).files
    merge(made.run)
    (whole,) = export(made.run, quantization="f32").files
    difference = seen_logits(base.path, adapter.path) - seen_logits(whole.path, None)
    assert difference.abs().max() < 1e-4


def damage(made: Made) -> None:
    path = made.run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"] = torch.ones(4, 32)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("made_with", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"config": {"vocab_size": 300}, "chat": {"special_tokens": "add"}}, "more rows"),
        ({"config": {"tie_word_embeddings": True}}, "both embedding and head"),
    ],
    ids=["dora", "new rows", "tied rows"],
)
def test_what_a_gguf_lora_cannot_hold_is_refused(
    tmp_path: Path, made_with: dict[str, Any], message: str
) -> None:
    if "vocab_size" in made_with.get("config", {}):
        from tests.conftest import build_tokenizer

        made_with = made_with | {"config": {"vocab_size": len(build_tokenizer())}}
    made = make_run(tmp_path, **made_with)
    with pytest.raises(ExportError, match=message):
        export(made.run, adapter_only=True)
    assert not list(made.run.export.glob("*"))


@pytest.mark.parametrize("source", ["backbone.layers.0.mixer.in_proj.weight", "backbone.embeddings.weight"])
def test_what_gguf_has_no_tensor_for_is_refused(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path)
    known = lora.gguf_name
    monkeypatch.setattr(lora, "gguf_name", lambda name: None if name == source else known(name))
    with pytest.raises(ExportError, match=f"llama.cpp has no tensor for the adapter's `{source}`"):
        export(made.run, adapter_only=True)
    assert not list(made.run.export.glob("*"))


def test_an_adapter_scaled_wrongly_is_found_by_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path)
    monkeypatch.setattr(lora, "adapter_alpha", lambda adapter: 1.0)
    pair = lora._module

    def unscaled(adapter: Any, module: str, name: str, alpha: float, epsilon: float) -> Any:
        return pair(adapter, module, name, 8.0, epsilon)

    monkeypatch.setattr(lora, "_module", unscaled)
    with pytest.raises(ExportError, match=r"run\.lora\.gguf. is not the model"):
        export(made.run, quantization="f32", adapter_only=True)
    assert not list(made.run.export.glob("*.lora.gguf*"))


def chatml(messages: Any, opened: bool) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if opened else "")


def by_role(messages: Any, opened: bool) -> str:
    forms = {"system": "[[{}]]\n", "user": "User: {}\n", "assistant": "Falcon: {}<|endoftext|>\n"}
    return "".join(forms[m["role"]].format(m["content"]) for m in messages) + ("Falcon: " if opened else "")


@pytest.mark.parametrize("render", [chatml, by_role])
def test_a_template_is_learned_and_written_in_go(render: Any) -> None:
    template = to_go_template(render, "it")
    for chat in _CHATS:
        assert render_go(template, chat) == render(chat, True)
    if render is chatml:
        assert template == (
            "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
            "<|im_start|>assistant\n"
        )


GO_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	data, _ := os.ReadFile(os.Args[2])
	var messages []Message
	if json.Unmarshal(data, &messages) != nil {
		os.Exit(2)
	}
	parsed := template.Must(template.New("t").Parse(string(text)))
	if parsed.Execute(os.Stdout, map[string]any{"Messages": messages}) != nil {
		os.Exit(3)
	}
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_gos_own_renderer_agrees_with_ours(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO_PROGRAM, encoding="utf-8")
    binary = tmp_path / "render"
    subprocess.run(["go", "build", "-o", str(binary), str(tmp_path / "main.go")], check=True, cwd=tmp_path)
    trims = 'a {{- range .Messages -}} {{ if eq .Role "user" }} u {{- .Content }}{{ else }}x{{ end -}} \n'
    trims += "{{ end }} z"
    for template in (to_go_template(chatml, "it"), to_go_template(by_role, "it"), trims):
        for number, chat in enumerate(_CHATS):
            (tmp_path / "t").write_text(template, encoding="utf-8")
            (tmp_path / "m").write_text(json.dumps(chat), encoding="utf-8")
            done = subprocess.run([str(binary), "t", "m"], cwd=tmp_path, check=True, capture_output=True)
            assert render_go(template, chat) == done.stdout.decode(), (template, number)


def trims_content(messages: Any, opened: bool) -> str:
    return chatml([m | {"content": m["content"].strip()} for m in messages], opened)


def adds_a_system_message(messages: Any, opened: bool) -> str:
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are Falcon."}, *messages]
    return chatml(messages, opened)


def drops_the_system_message(messages: Any, opened: bool) -> str:
    return chatml([m for m in messages if m["role"] != "system"], opened)


@pytest.mark.parametrize("render", [trims_content, adds_a_system_message, drops_the_system_message])
def test_a_template_that_go_would_get_wrong_is_refused(render: Any) -> None:
    with pytest.raises(ExportError, match=r"it (does more|cannot be written)"):
        to_go_template(render, "it")


def test_unknown_go_syntax_is_refused() -> None:
    with pytest.raises(ValueError, match="not in the part"):
        render_go("{{ range .Messages }}{{ .Thinking }}{{ end }}", _CHATS[0])
    with pytest.raises(ValueError, match="not in the part"):
        render_go("{{ range .Messages }}{{ if .Content }}{{ end }}{{ end }}", _CHATS[0])
    assert learn_turns(chatml).opening == "<|im_start|>assistant\n"


def test_a_modelfile_has_template_stops_system_and_the_file(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    recipe = json.loads(made.run.recipe.read_text())
    made.run.recipe.write_text(json.dumps(recipe | {"chat": {"system": "Be brief.\nAlways."}}))
    done = export(made.run, format="ollama", quantization="Q8_0")
    assert [path.name for path in done.paths] == ["run.Q8_0.gguf", "Modelfile"]
    text = (made.run.export / "Modelfile").read_text()
    assert text.startswith('FROM ./run.Q8_0.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>')
    assert 'SYSTEM """Be brief.\nAlways."""\n' in text
    for stop in ("<|im_end|>", "<|endoftext|>", "<|im_start|>"):
        assert f'PARAMETER stop "{stop}"\n' in text
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    model = find_model(made.run)
    for chat in _CHATS:
        wanted = model.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        assert render_go(template, chat) == wanted
    assert stop_strings(model)[0] == "<|im_end|>"


def test_a_modelfile_says_that_tools_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_run(tmp_path)
    model = find_model(made.run)
    assert "{%- if tools %}" in plain_template(model.tokenizer.chat_template)  # what the GGUF file has
    said = "# tools and tool calls are left out of this Modelfile's template"
    lines = modelfile_text(model, "m.gguf").splitlines()
    assert sum(line.startswith(said) for line in lines) == 1
    export(made.run, format="ollama", quantization="Q8_0", options=GGUFOptions(verify=False))
    assert [record.message for record in caplog.records if "tool calls are left out" in record.message]


def test_the_template_of_a_gguf_file_carries_tools(tmp_path: Path) -> None:
    from jinja2 import Environment

    model = find_model(make_run(tmp_path).run)
    text = plain_template(model.tokenizer.chat_template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    rendered = plain.render(messages=chat, tools=tools, add_generation_prompt=True)
    assert '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|im_end|>\n' in rendered
    assert '<tools>\n{"function": {"name": "f"}, "type": "function"}\n</tools>\n' in rendered


def test_a_template_without_tools_leaves_nothing_out(tmp_path: Path) -> None:
    model = find_model(make_run(tmp_path).run)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert "#" not in modelfile_text(model, "m.gguf")


def test_a_modelfile_can_load_the_adapter_on_its_base(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    with pytest.raises(UsageError, match="needs the base"):
        export(made.run, format="ollama", adapter_only=True)
    done = export(made.run, format="ollama", quantization=["Q8_0", "f16"], adapter_only=True)
    assert [path.name for path in done.others] == ["Modelfile.Q8_0", "Modelfile.F16"]
    lines = done.others[0].read_text().splitlines()
    assert lines[:2] == ["FROM ./run.base.Q8_0.gguf", "ADAPTER ./run.lora.gguf"]


def test_sampling_of_the_generation_config_is_taken_over(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    path = made.run.adapter / "generation_config.json"
    config = json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}
    path.write_text(json.dumps(config))
    text = modelfile_text(find_model(made.run), "m.gguf")
    assert "PARAMETER temperature 0.6\n" in text
    assert "PARAMETER repeat_penalty 1.1\n" in text


def test_a_base_without_a_template_is_no_chat_model(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    with pytest.raises(ExportError, match="no chat template"):
        export(made.base, format="ollama", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_read_for_its_system_message(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    assert Recipe.load(str(made.run.recipe)).chat.system is None
    assert "SYSTEM" not in modelfile_text(find_model(made.run), "m.gguf")
