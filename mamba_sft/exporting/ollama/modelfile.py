"""An Ollama Modelfile beside a GGUF file: template, stop tokens, system message, sampling.

Ollama compares the GGUF's own Jinja template with a list of known ones and falls back to no template at all,
so the Modelfile always has one, in Go's syntax.
"""

from __future__ import annotations

from typing import Any

from mamba_sft.errors import ExportError
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.ollama.go_template import Chat, to_go_template
from mamba_sft.model.chat_template import carried, split_rendered
from mamba_sft.recipe.recipe import Recipe

CONTEXT = 4096
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
_PARAMETERS = {"repetition_penalty": "repeat_penalty"}


def modelfile_text(model: FullModel, gguf: str, *, adapter: str | None = None) -> str:
    """Returns the Modelfile of a model.

    Args:
        model: The model.
        gguf: Its GGUF file, as the Modelfile sees it.
        adapter: A GGUF LoRA to load on it, or None.

    Raises:
        ExportError: There is no chat template, or Go cannot express it.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise ExportError(
            f"`{model.tokenizer_dir}` has no chat template, so Ollama would not know how to talk to it",
            hint="export a trained run, not its base",
        )

    def render(messages: Chat, opened: bool) -> str:
        pieces = split_rendered(tokenizer, list(messages), add_generation_prompt=opened)
        return "".join(text for text, _ in pieces)

    template = to_go_template(render, f"the chat template in `{model.tokenizer_dir}`")
    lines = [f"FROM ./{gguf}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{template}"""')
    if (left_out := what_ollama_lacks(model)) is not None:
        lines.append(f"# {left_out}")
    system = _system(model)
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stop_strings(model)]
    lines.append(f"PARAMETER num_ctx {CONTEXT}")
    lines += [f"PARAMETER {name} {value}" for name, value in sampling(model).items()]
    return "\n".join(lines) + "\n"


def what_ollama_lacks(model: FullModel) -> str | None:
    """Returns what the model's chat template renders and its Modelfile does not, as a sentence, or None.

    Go writes JSON in another way than the template the model was trained with, so tools are not carried over.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        return None
    template = carried(tokenizer)
    if not (template.tools or template.calls):
        return None
    return (
        "tools and tool calls are left out of this Modelfile's template, so Ollama will say that the model"
        " does not support tools; the chat template inside the GGUF file has them (`llama-server --jinja`)"
    )


def stop_strings(model: FullModel) -> list[str]:
    """Returns what ends an answer: every stop token of the model, and the mark that opens a turn."""
    config = model.generation_config
    ids = config.get("eos_token_id", model.config.get("eos_token_id"))
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    tokenizer = model.tokenizer
    tokens = [tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(number) for number in listed)]
    if "<|im_start|>" in tokenizer.chat_template:
        tokens.append("<|im_start|>")
    return list(dict.fromkeys(token for token in tokens if token))


def sampling(model: FullModel) -> dict[str, Any]:
    """Returns the sampling that the model's generation config asks for, by Ollama's names."""
    config = model.generation_config
    if config.get("do_sample") is False:
        return {"temperature": 0}
    return {_PARAMETERS.get(name, name): config[name] for name in _SAMPLING if config.get(name) is not None}


def _system(model: FullModel) -> str | None:
    if model.run is None:
        return None
    system = Recipe.load(str(model.run.recipe)).chat.system
    if system is not None and '"""' in system:
        raise ExportError('the recipe\'s system message holds `"""`, which ends a text in a Modelfile')
    return system
