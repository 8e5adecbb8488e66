"""Mistakes that people make, each with the command that makes it and what has to be said.

`ERRORS` is the table. Its commands are typed in a directory that `prepare` fills.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from mamba_sft.run import Run
from mamba_sft.run_contents import mark


class Provoked(NamedTuple):
    """One mistake.

    Attributes:
        command: What was typed, without `mamba-sft`; the shell's quotes hold words together.
        code: The exit code.
        says: What the message has to contain.
        hint: What the hint has to contain; commands in it are tried.
    """

    command: str
    code: int
    says: str
    hint: str = ""


CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "quick fox"}]}

RECIPE = """output_dir: runs/new
model: {base: tiny-base, dtype: float32}
data: {sources: [{path: chats.jsonl}], validation: 0, max_length: 96}
train: {max_steps: 4, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}
"""

RECIPES = {
    "empty": "",
    "list": "- a\n- b\n",
    "tabs": "model:\n\tbase: tiny-base\n",
    "open": "model: {base: tiny-base\n",
    "no-base": "output_dir: runs/new\ndata: {sources: [{path: chats.jsonl}]}\n",
    "no-data": "output_dir: runs/new\nmodel: {base: tiny-base}\n",
    "typo": RECIPE.replace("max_steps", "max_step"),
    "twice": RECIPE + "output_dir: runs/other\n",
    "word": RECIPE.replace("max_steps: 4", "max_steps: four"),
    "section": RECIPE + "optimizer: {lr: 1}\n",
    "negative": RECIPE.replace("max_steps: 4", "learning_rate: -1"),
    "quantized": RECIPE.replace("dtype: float32", "quantization: q4"),
    "axolotl": "base_model: tiny-base\ndatasets: [{path: chats.jsonl, type: sharegpt}]\n",
    "two-problems": RECIPE.replace("max_steps: 4", "max_stepz: 4, learning_rat: 1"),
}

ROWS = {
    "cut.jsonl": '{"messages": [{"role": "user"',
    "no-rows.jsonl": "",
    "blank.jsonl": "\n\n",
    "no-answer.jsonl": json.dumps({"messages": CHAT["messages"][:1]}),
    "unknown.jsonl": json.dumps({"foo": "a", "bar": "b"}),
    "roles.jsonl": json.dumps({"messages": [{"role": "narrator", "content": "x"}, *CHAT["messages"]]}),
    "chosen.jsonl": json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}),
    "picture.jsonl": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}, CHAT["messages"][1]]}
    ),
    "numbers.jsonl": json.dumps({"messages": 3}),
    "text.jsonl": "Once upon a time\n",
    "array.json": "[1, 2]",
    "semicolons.csv": "prompt;response\na;b\n",
    "header.csv": "prompt,response\n",
    "short.csv": "foo,bar\na,b\n",
    "broken.parquet": "PAR1",
    "broken.jsonl.gz": "not gzip",
}

PROMPTS = {
    "prompts.jsonl": '{"prompt": "hello"}\n',
    "number.jsonl": '{"prompt": "a"}\n{"prompt": 3}\n',
    "both.jsonl": '{"prompt": "a", "messages": []}\n',
    "neither.jsonl": '{"question": "a"}\n',
    "empty-prompt.jsonl": '{"prompt": " "}\n',
    "own-word.jsonl": json.dumps({"messages": [{"role": "assistant", "content": "x"}]}),
    "asked.md": "What is a haiku?\n",
    "asked.csv": "prompt\nhi\n",
    "none.txt": "\n",
}


def prepare(place: Path, run: Run, base: Path) -> None:
    """Fills a directory with what the commands name, good and bad."""
    shutil.copytree(base, place / "tiny-base")
    (place / "chats.jsonl").write_text((json.dumps(CHAT) + "\n") * 24)
    (place / "recipe.yaml").write_text(RECIPE)
    for name, text in RECIPES.items():
        (place / f"{name}.yaml").write_text(text)
    for name, text in (ROWS | PROMPTS).items():
        (place / name).write_text(text)
    (place / "utf16.jsonl").write_bytes(json.dumps(CHAT).encode("utf-16"))
    (place / "latin.jsonl").write_bytes(json.dumps(CHAT).replace("hello", "caf\xe9").encode("latin-1"))
    (place / "picture.png").write_bytes(b"\x89PNG")
    (place / "x.gguf").write_bytes(b"GGUF")
    (place / "file").write_text("x")
    (place / "folder").mkdir()
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("x")
    _runs(place, run)
    _models(place)


def _runs(place: Path, run: Run) -> None:
    """Runs, whole and damaged."""
    for name in ("tiny", "no-adapter", "no-weights", "cut-weights", "no-config", "bad-config", "bad-recipe"):
        own = Run(place / "runs" / name)
        shutil.copytree(run.path, own.path)
        text = own.recipe.read_text().replace(str(run.path), f"runs/{name}")
        own.recipe.write_text(text.replace("rows.jsonl", "chats.jsonl"))
        mark(own)
    runs = place / "runs"
    shutil.rmtree(runs / "no-adapter" / "adapter")
    (runs / "no-weights" / "adapter" / "adapter_model.safetensors").unlink()
    weights = runs / "cut-weights" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (runs / "no-config" / "adapter" / "adapter_config.json").unlink()
    (runs / "bad-config" / "adapter" / "adapter_config.json").write_text("{")
    (runs / "bad-recipe" / "recipe.yaml").write_text("model: 3\n")


def _models(place: Path) -> None:
    """Checkpoints of other models, and damaged ones."""
    llama = place / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    for name in ("no-tensors", "cut-tensors", "no-tokenizer", "bad-config"):
        shutil.copytree(place / "tiny-base", place / name)
    (place / "no-tensors" / "model.safetensors").unlink()
    tensors = place / "cut-tensors" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    for file in (place / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (place / "bad-config" / "config.json").write_text("{")


ERRORS = {
    # verbs and options
    "no such verb": Provoked(
        "trian recipe.yaml",
        2,
        "No such command 'trian'. Did you mean 'train'?",
    ),
    "no such option": Provoked(
        "train recipe.yaml --resum",
        2,
        "No such option: --resum (Possible options: --resume)",
    ),
    "a field as an option": Provoked(
        "train recipe.yaml --learning-rate 1e-4",
        2,
        "`--learning-rate` is no option: fields of a recipe are set without dashes",
        "write `train.learning_rate=1e-4`",
    ),
    "an option's value left out": Provoked(
        "generate runs/tiny --prompt",
        2,
        "Option '--prompt' requires an argument.",
    ),
    "a word for a number": Provoked(
        "generate runs/tiny -p hi --top-k many",
        2,
        "Invalid value for '--top-k': Input should be a valid integer, unable to parse string as an",
    ),
    "no recipe named": Provoked(
        "train",
        2,
        "Missing argument 'RECIPE'.",
    ),
    "data: no recipe named": Provoked(
        "data",
        2,
        "which recipe?",
        "`mamba-sft data RECIPE`, or `mamba-sft data --cached`",
    ),
    "two runs where one goes": Provoked(
        "merge runs/tiny runs/no-adapter",
        2,
        "Got unexpected extra argument(s) (runs/no-adapter)",
    ),
    # recipes
    "recipe: none of that name": Provoked(
        "train nosuch",
        2,
        "no recipe `nosuch`: neither a file nor a built-in recipe",
        "built-in recipes: continue-pretraining, falcon-mamba-procedure,",
    ),
    "recipe: nearly a built-in name": Provoked(
        "train quickstar",
        2,
        "no recipe `quickstar`: neither a file nor a built-in recipe; did you mean `quickstart`?",
        "built-in recipes: continue-pretraining, falcon-mamba-procedure,",
    ),
    "recipe: nearly a file": Provoked(
        "train recipe.yml",
        2,
        "no recipe `recipe.yml`: neither a file nor a built-in recipe; did you mean `recipe.yaml`?",
        "built-in recipes: continue-pretraining, falcon-mamba-procedure,",
    ),
    "recipe: a directory": Provoked(
        "train folder",
        2,
        "recipe `folder` is a directory",
        "give a YAML file or the name of a built-in recipe",
    ),
    "recipe: a run": Provoked(
        "train runs/tiny",
        2,
        "recipe `runs/tiny` is a directory",
        "its recipe is `runs/tiny/recipe.yaml`",
    ),
    "recipe: data": Provoked(
        "train chats.jsonl",
        2,
        "`chats.jsonl` is a file of data, not a recipe",
        "for example: mamba-sft train instruct-qlora 'data.sources=[{path: chats.jsonl}]'",
    ),
    "recipe: a model": Provoked(
        "train x.gguf",
        2,
        "`x.gguf` is a model's file, not a recipe",
        "a recipe is YAML: give a file, or the name of a built-in one (`mamba-sft recipes`)",
    ),
    "recipe: a picture": Provoked(
        "train picture.png",
        2,
        "picture.png:1: not UTF-8: byte 0x89",
        "save the file as UTF-8",
    ),
    "recipe: empty": Provoked(
        "train empty.yaml",
        2,
        "empty.yaml:1: the recipe is empty",
        "`mamba-sft recipes show quickstart` prints one",
    ),
    "recipe: a list": Provoked(
        "train list.yaml",
        2,
        "list.yaml:1: a recipe must consist of fields (`name: value`), got a list",
    ),
    "recipe: tabs": Provoked(
        "train tabs.yaml",
        2,
        "tabs.yaml:2: tabs cannot indent YAML; use spaces",
    ),
    "recipe: a bracket left open": Provoked(
        "train open.yaml",
        2,
        "open.yaml:2: not valid YAML: expected ',' or '}', but got '<stream end>'",
    ),
    "recipe: no base": Provoked(
        "train no-base.yaml",
        2,
        "no-base.yaml:1: `model` is missing; it needs `model.base`",
    ),
    "recipe: no data": Provoked(
        "train no-data.yaml",
        2,
        "no-data.yaml:1: `data` is missing; it needs `data.sources`",
    ),
    "recipe: a field misspelt": Provoked(
        "train typo.yaml",
        2,
        "typo.yaml:4: unknown field `train.max_step`; did you mean `max_steps`?",
    ),
    "recipe: a field twice": Provoked(
        "train twice.yaml",
        2,
        "twice.yaml:5: `output_dir` is set twice, first on line 1",
    ),
    "recipe: a word for a number": Provoked(
        "train word.yaml",
        2,
        "word.yaml:4: `train.max_steps` must be a whole number, got the text `four`",
    ),
    "recipe: no such section": Provoked(
        "train section.yaml",
        2,
        "section.yaml:5: unknown field `optimizer`; here it is `train.optim`",
    ),
    "recipe: a number out of range": Provoked(
        "train negative.yaml",
        2,
        "negative.yaml:4: `train.learning_rate` must be greater than 0, got -1",
    ),
    "recipe: no such quantization": Provoked(
        "train quantized.yaml",
        2,
        "quantized.yaml:2: `model.quantization` must be one of `none`, `nf4`, `int8`, got `q4`; did you",
    ),
    "recipe: another tool's": Provoked(
        "train axolotl.yaml",
        2,
        "axolotl.yaml:1: `data` is missing; it needs `data.sources`",
    ),
    "recipe: two problems": Provoked(
        "train two-problems.yaml",
        2,
        "two-problems.yaml:4: unknown field `train.learning_rat`; did you mean `learning_rate`?",
    ),
    "override: misspelt": Provoked(
        "train recipe.yaml train.learning_rte=1",
        2,
        "override `train.learning_rte=1`: unknown field `train.learning_rte`; did you mean",
    ),
    "override: no section": Provoked(
        "train recipe.yaml learning_rate=1",
        2,
        "override `learning_rate=1`: unknown field `learning_rate`; it goes under `train`",
    ),
    "override: no equals sign": Provoked(
        "train recipe.yaml train.max_steps",
        2,
        "override `train.max_steps`: must read `section.field=value`",
    ),
    "override: no value that fits": Provoked(
        "train recipe.yaml train.max_steps=lots",
        2,
        "override `train.max_steps=lots`: `train.max_steps` must be a whole number, got the text `lots`",
    ),
    "override: a bracket left open": Provoked(
        "train recipe.yaml adapter.target_modules=[q_proj",
        2,
        "override `adapter.target_modules=[q_proj`: not valid YAML: expected ',' or ']', but got",
    ),
    "override: a star without quotes": Provoked(
        "data recipe.yaml 'data.sources.0.path=*.tsv'",
        2,
        "override `data.sources.0.path=*.tsv`: not valid YAML: a text that begins with `*` needs quotes",
    ),
    "recipes: none of that name": Provoked(
        "recipes show nosuch",
        2,
        "no built-in recipe `nosuch`",
        "there are `continue-pretraining`, `falcon-mamba-procedure`,",
    ),
    "recipes: nearly a name": Provoked(
        "recipes show quickstar",
        2,
        "no built-in recipe `quickstar`; did you mean `quickstart`?",
        "there are `continue-pretraining`, `falcon-mamba-procedure`,",
    ),
    "recipes: no such word": Provoked(
        "recipes shwo quickstart",
        2,
        "No such command 'shwo'. Did you mean 'show'?",
    ),
    "recipes: --json with another word": Provoked(
        "recipes --json schema",
        2,
        "`--json` is for the list of recipes",
        "`mamba-sft recipes --json`",
    ),
    # train
    "train: two ways at once": Provoked(
        "train recipe.yaml --resume --overwrite",
        2,
        "`--resume` goes on with a run and `--overwrite` replaces it: both cannot be meant",
        "leave one out",
    ),
    "train: changed data of a new run": Provoked(
        "train recipe.yaml --allow-changed-data",
        2,
        "`--allow-changed-data` goes with `--resume`",
        "a new run takes any data",
    ),
    "train: nothing to resume": Provoked(
        "train recipe.yaml --resume",
        2,
        "no run at `runs/new`",
        "`mamba-sft train RECIPE` makes one",
    ),
    "train: resume a model": Provoked(
        "train recipe.yaml --resume output_dir=tiny-base",
        2,
        "`tiny-base` is not a run directory: it has no `recipe.yaml`",
        "give the directory that `mamba-sft train` wrote",
    ),
    "train: a finished run in the way": Provoked(
        "train recipe.yaml output_dir=runs/tiny",
        1,
        "`runs/tiny` holds a finished run",
        "start anew with `--overwrite`, or choose another directory:",
    ),
    "train: another recipe's run": Provoked(
        "train recipe.yaml --resume output_dir=runs/tiny",
        2,
        "`chat.system` was 'be brief', now None",
        "`mamba-sft merge runs/tiny`",
    ),
    "train: a file in the way": Provoked(
        "train recipe.yaml output_dir=file",
        1,
        "cannot write to `file`: `file` is a file",
        "choose another directory: `output_dir=runs/NAME`",
    ),
    "train: somebody's directory": Provoked(
        "train recipe.yaml output_dir=mine",
        1,
        "`mine` exists and is not a run: it holds `thesis.tex`",
        "choose another directory: `output_dir=runs/NAME`",
    ),
    "train: somebody's directory, overwritten": Provoked(
        "train recipe.yaml --overwrite output_dir=mine",
        1,
        "`mine` exists and is not a run: it holds `thesis.tex`",
        "choose another directory: `output_dir=runs/NAME`",
    ),
    "train: no such base": Provoked(
        "train recipe.yaml model.base=tiny-bas",
        1,
        "`tiny-bas` is not a directory here, not in the hub cache, and the hub cannot be reached",
        "did you mean `tiny-base`? go online once (and unset HF_HUB_OFFLINE),",
    ),
    "train: a base that is no model": Provoked(
        "train recipe.yaml model.base=folder",
        1,
        "`folder` is not a model: it has no `config.json`",
        "give a directory that `save_pretrained` wrote, or a hub id",
    ),
    "train: another kind of model": Provoked(
        "train recipe.yaml model.base=llama",
        1,
        "`llama` is a `llama` model; mamba-sft trains `falcon_mamba` models",
        "try `tiiuae/falcon-mamba-7b`",
    ),
    "train: a base in GGUF": Provoked(
        "train recipe.yaml model.base=x.gguf",
        2,
        "`x.gguf` is a GGUF file, for llama.cpp; here a run is needed, or a checkpoint in safetensors",
        "give the run or checkpoint that it was made from;",
    ),
    "train: a base without tensors": Provoked(
        "train recipe.yaml model.base=no-tensors",
        1,
        "`no-tensors` lacks 1 of 1 weight files: model.safetensors",
        "the download or copy is not complete; fetch the missing files",
    ),
    "train: a base cut short": Provoked(
        "train recipe.yaml model.base=cut-tensors",
        1,
        "`cut-tensors/model.safetensors` is truncated: it has 525,328 bytes, its header promises 526,328",
        "an interrupted download leaves this; fetch it again",
    ),
    "train: a base without tokenizer": Provoked(
        "train recipe.yaml model.base=no-tokenizer",
        1,
        "`no-tokenizer` has no `tokenizer.json`",
        "copy the tokenizer's files beside the weights",
    ),
    "train: a base with a broken config": Provoked(
        "train recipe.yaml model.base=bad-config",
        1,
        "`bad-config/config.json` is not valid JSON: Expecting property name enclosed in double quotes:",
        "download it again",
    ),
    "train: no adapter to start from": Provoked(
        "train recipe.yaml model.adapter=folder",
        1,
        "`model.adapter: folder` is neither a run nor an adapter: `folder` has no `adapter_config.json`",
        "give the directory of a run, or its `adapter/`",
    ),
    "train: no such template": Provoked(
        "train recipe.yaml chat.template=none.jinja",
        1,
        "cannot read the chat template `none.jinja`: No such file or directory",
        "`chat.template` is `chatml`, `tokenizer` or the path of a .jinja file",
    ),
    "train: the base has no template": Provoked(
        "train recipe.yaml chat.template=tokenizer",
        1,
        "`chat.template: tokenizer`, but the base's tokenizer has no chat template",
        "use `chat.template: chatml`, or the path of a .jinja file",
    ),
    "train: no such prompts": Provoked(
        "train recipe.yaml eval.prompts=none.jsonl",
        1,
        "cannot read the sample prompts `none.jsonl`: No such file or directory",
        "see `eval.prompts`",
    ),
    "train: a prompt that is a number": Provoked(
        "train recipe.yaml eval.prompts=number.jsonl",
        1,
        "number.jsonl:2: a sample prompt needs `prompt` and may have `answer` and `system`, all strings",
        'for example {"prompt": "What is the capital of France?", "answer":',
    ),
    "train: processes of none": Provoked(
        "train recipe.yaml --processes 0",
        2,
        "`--processes` takes at least one, not 0",
    ),
    "train: a rank without nodes": Provoked(
        "train recipe.yaml --rank 1",
        2,
        "`--rank` goes with `--processes`",
        "say how many run on each machine",
    ),
    # data
    "data: no such file": Provoked(
        "data recipe.yaml data.sources.0.path=chat.jsonl",
        1,
        "no file `chat.jsonl`",
        "did you mean `chats.jsonl`?",
    ),
    "data: no file matches": Provoked(
        "data recipe.yaml data.sources.0.path=folder/*.tsv",
        1,
        "no file matches `folder/*.tsv`",
        "globs start from the working directory; `**` crosses directories",
    ),
    "data: a picture": Provoked(
        "data recipe.yaml data.sources.0.path=picture.png",
        1,
        "cannot read `picture.png`",
        "data files end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt,",
    ),
    "data: an empty folder": Provoked(
        "data recipe.yaml data.sources.0.path=folder",
        1,
        "`folder` is a directory without data files",
        "data files end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt",
    ),
    "data: UTF-16": Provoked(
        "data recipe.yaml data.sources.0.path=utf16.jsonl",
        1,
        "`utf16.jsonl` is UTF-16",
        "iconv -f UTF-16 -t UTF-8 utf16.jsonl > converted.jsonl",
    ),
    "data: latin-1": Provoked(
        "data recipe.yaml data.sources.0.path=latin.jsonl",
        1,
        "none of the first 1 rows can be read: latin.jsonl:1: not UTF-8: byte 0xe9 at 47",
        "if it is latin-1, as older programs write: iconv -f LATIN1 -t UTF-8",
    ),
    "data: cut.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=cut.jsonl",
        1,
        "none of the first 1 rows can be read: cut.jsonl:1: not JSON: Expecting ',' delimiter, column 30",
    ),
    "data: no-rows.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=no-rows.jsonl",
        1,
        "`no-rows.jsonl` holds no rows",
    ),
    "data: blank.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=blank.jsonl",
        1,
        "`blank.jsonl` holds no rows",
    ),
    "data: no-answer.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=no-answer.jsonl",
        1,
        "no-answer.jsonl:1: no assistant turn, so nothing to train on",
        "mend them, or set `data.on_bad_row: skip` to leave them out (listed",
    ),
    "data: unknown.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=unknown.jsonl",
        1,
        "looked at the only row of `unknown.jsonl`: columns `foo`, `bar`; no format has these",
        "say under `data.sources` what they are, such as `columns: {prompt:",
    ),
    "data: roles.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=roles.jsonl",
        1,
        "roles.jsonl:1: turn 1: unknown role 'narrator'; say who it is: `roles: {narrator: user}` on the",
        "mend them, or set `data.on_bad_row: skip` to leave them out (listed",
    ),
    "data: chosen.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=chosen.jsonl",
        1,
        "`chosen.jsonl` is preference data: 1 of the 1 rows looked at have `chosen` and `rejected`, so",
        "`preference: chosen` under `data.sources` trains on `chosen` and",
    ),
    "data: picture.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=picture.jsonl",
        1,
        "picture.jsonl:1: turn 1: a content part is 'image'; only text can be trained on",
        "mend them, or set `data.on_bad_row: skip` to leave them out (listed",
    ),
    "data: numbers.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=numbers.jsonl",
        1,
        "numbers.jsonl:1: `messages` is a number, not a list",
        "mend them, or set `data.on_bad_row: skip` to leave them out (listed",
    ),
    "data: text.jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=text.jsonl",
        1,
        "none of the first 1 rows can be read: text.jsonl:1: not JSON: Expecting value, column 1",
        "if its lines are texts: mv text.jsonl text.txt",
    ),
    "data: array.json": Provoked(
        "data recipe.yaml data.sources.0.path=array.json",
        1,
        "none of the first 2 rows can be read: array.json:1: not an object but a number",
    ),
    "data: --prepare --json": Provoked(
        "data recipe.yaml --prepare --json",
        2,
        "`--prepare` shows no rows, and prints no JSON",
        "leave one of the two out",
    ),
    "data: semicolons.csv": Provoked(
        "data recipe.yaml data.sources.0.path=semicolons.csv",
        1,
        "semicolons.csv:1: the columns are separated by semicolons, not commas",
        'python -c \'import pandas; pandas.read_csv("semicolons.csv",',
    ),
    "data: header.csv": Provoked(
        "data recipe.yaml data.sources.0.path=header.csv",
        1,
        "`header.csv` holds no rows",
    ),
    "data: short.csv": Provoked(
        "data recipe.yaml data.sources.0.path=short.csv",
        1,
        "looked at the only row of `short.csv`: columns `foo`, `bar`; no format has these",
        "say under `data.sources` what they are, such as `columns: {prompt:",
    ),
    "data: broken.parquet": Provoked(
        "data recipe.yaml data.sources.0.path=broken.parquet",
        1,
        "`broken.parquet` is not a readable parquet file: Parquet file size is 4 bytes, smaller than the",
    ),
    "data: broken.jsonl.gz": Provoked(
        "data recipe.yaml data.sources.0.path=broken.jsonl.gz",
        1,
        "cannot read `broken.jsonl.gz`: Not a gzipped file (b'no')",
    ),
    "data: a split of a file": Provoked(
        "data recipe.yaml data.sources.0.split=test",
        1,
        "`chats.jsonl` is a file, for which `split: test` means nothing",
        "write `'data.sources=[{path: chats.jsonl}]'`",
    ),
    "data: no such column": Provoked(
        "data recipe.yaml 'data.sources.0.columns={prompt: task}'",
        1,
        "looked at the first 24 rows of `chats.jsonl`: columns `messages`; `columns` names `task`, which",
    ),
    "data: no such format": Provoked(
        "data recipe.yaml data.sources.0.format=openai",
        2,
        "override `data.sources.0.format=openai`: `data.sources.0.format` must be one of `auto`,",
    ),
    "data: too short for any row": Provoked(
        "data recipe.yaml data.max_length=2",
        2,
        "override `data.max_length=2`: `data.max_length` must be at least 8, got 2",
    ),
    "data: cached of one recipe": Provoked(
        "data recipe.yaml --cached",
        2,
        "`--cached` is about all recipes",
        "leave out the recipe and `--prepare`",
    ),
    "data: clear what": Provoked(
        "data --clear",
        2,
        "`--clear` goes with `--cached`",
        "`mamba-sft data --cached --clear`",
    ),
    "data: rows below none": Provoked(
        "data recipe.yaml --rows -1",
        2,
        "Invalid value for '--rows': Input should be greater than or equal to 0",
    ),
    # plan
    "plan: no such card": Provoked(
        "plan recipe.yaml --card 4080",
        2,
        "no GPU `4080` is known",
        "known GPUs: t4, v100-16, v100-32, l4, a10g, a10, 3090, 4090, 5090,",
    ),
    "plan: two cards of that name": Provoked(
        "plan recipe.yaml --card a100",
        2,
        "no GPU `a100` is known; did you mean `a100-40` or `a100-80`?",
        "known GPUs: t4, v100-16, v100-32, l4, a10g, a10, 3090, 4090, 5090,",
    ),
    "plan: processes without a card": Provoked(
        "plan recipe.yaml --processes 2",
        2,
        "`--processes` plans for GPUs, and there is none here",
        "name one: `--card h100`",
    ),
    "plan: nodes without processes": Provoked(
        "plan recipe.yaml --nodes 2",
        2,
        "`--nodes` goes with `--processes`",
        "say how many GPUs a machine has",
    ),
    "plan: a plot in another format": Provoked(
        "plan recipe.yaml --plot-file plot.png",
        2,
        "`--plot-file` writes SVG, and `plot.png` is not named so",
        "`--plot-file plot.svg`",
    ),
    "plan: a plot nowhere": Provoked(
        "plan recipe.yaml --plot-file nowhere/plot.svg",
        2,
        "`--plot-file nowhere/plot.svg` has no directory `nowhere` to be written into",
        "name a file in a directory that is there",
    ),
    "plan: a link of nothing": Provoked(
        "plan recipe.yaml --card h100 --processes 2 --nodes 2 --link 0",
        2,
        "`--link` takes more than zero, not 0",
    ),
    # runs
    "merge: no run": Provoked(
        "merge runs/tin",
        2,
        "no run at `runs/tin`",
        "did you mean `runs/tiny`?",
    ),
    "merge: no run, though a directory": Provoked(
        "merge folder",
        2,
        "`folder` is not a run directory: it has no `recipe.yaml`",
        "give the directory that `mamba-sft train` wrote",
    ),
    "merge: a model": Provoked(
        "merge tiny-base",
        2,
        "`tiny-base` is not a run directory: it has no `recipe.yaml`",
        "give the directory that `mamba-sft train` wrote",
    ),
    "merge: a GGUF file": Provoked(
        "merge x.gguf",
        2,
        "`x.gguf` is a GGUF file, for llama.cpp; here a run is needed, or a checkpoint in safetensors",
        "give the run or checkpoint that it was made from;",
    ),
    "merge: no such dtype": Provoked(
        "merge runs/tiny --dtype fp17",
        2,
        "no such dtype `fp17`",
        "give one of float32, float16, bfloat16",
    ),
    "merge: onto what": Provoked(
        "merge runs/tiny --onto nothing",
        2,
        "merge onto what? `nothing` is neither `base` nor `dequantized`",
    ),
    "merge: never quantized": Provoked(
        "merge runs/tiny --onto dequantized",
        2,
        "this run's base was not quantized, so there are no dequantized weights to merge onto",
        "leave `--onto` out",
    ),
    "merge: not finished": Provoked(
        "merge runs/no-adapter",
        1,
        "no adapter in `runs/no-adapter/adapter`: it has no `adapter_config.json`",
        "`mamba-sft train runs/no-adapter/recipe.yaml --resume`",
    ),
    "merge: no weights": Provoked(
        "merge runs/no-weights",
        1,
        "no adapter in `runs/no-weights/adapter`: it has no `adapter_model.safetensors`",
        "`mamba-sft train runs/no-weights/recipe.yaml --resume`",
    ),
    "merge: weights cut short": Provoked(
        "merge runs/cut-weights",
        1,
        "`runs/cut-weights/adapter/adapter_model.safetensors` is truncated: it has 24,348 bytes, its",
        "an interrupted download leaves this; fetch it again",
    ),
    "merge: no config": Provoked(
        "merge runs/no-config",
        1,
        "no adapter in `runs/no-config/adapter`: it has no `adapter_config.json`",
        "`mamba-sft train runs/no-config/recipe.yaml --resume`",
    ),
    "merge: a broken config": Provoked(
        "merge runs/bad-config",
        1,
        "`runs/bad-config/adapter/adapter_config.json` is not JSON: Expecting property name enclosed in",
        "copy it again",
    ),
    "merge: into a file": Provoked(
        "merge runs/tiny --output file",
        2,
        "`file` is a file",
        "give a directory with `--output`",
    ),
    "merge: over somebody's files": Provoked(
        "merge runs/tiny --output mine",
        2,
        "`mine` is not empty and not an earlier merge: it has no `merge.json`",
        "give another directory with `--output`, or empty this one",
    ),
    "merge: over the base": Provoked(
        "merge runs/tiny --output tiny-base",
        2,
        "`tiny-base` is not empty and not an earlier merge: it has no `merge.json`",
        "give another directory with `--output`, or empty this one",
    ),
    "export: no run": Provoked(
        "export runs/tin",
        2,
        "no run at `runs/tin`",
        "did you mean `runs/tiny`?",
    ),
    "export: no such format": Provoked(
        "export runs/tiny --format bin",
        2,
        "no format `bin`",
        "there are gguf, hf, ollama",
    ),
    "export: no such quantization": Provoked(
        "export runs/tiny -q Q4KM",
        2,
        "no quantization `Q4KM`; did you mean `Q4_K_M`?",
        "there are all, Q2_K, IQ3_XS, IQ3_S, IQ3_M, Q3_K_S, Q3_K, Q3_K_M,",
    ),
    "export: a checkpoint quantized": Provoked(
        "export runs/tiny --format hf -q Q8_0",
        2,
        "quantizations and adapters alone are GGUF files",
        "leave `--format hf` out",
    ),
    "export: push a GGUF file": Provoked(
        "export runs/tiny --push-to-hub me/x",
        2,
        "the hub is switched off: HF_HUB_OFFLINE is set",
        "unset it to push",
    ),
    "export: a name with a slash": Provoked(
        "export runs/tiny --name a/b",
        2,
        "`--name a/b` cannot be what the files are called",
        "a name has no slash or colon, and 200 bytes at most; `--output` says",
    ),
    "export: a checkpoint to nowhere": Provoked(
        "export tiny-base",
        2,
        "where to? a checkpoint outside a run has no `export/`",
        "give `--output`",
    ),
    "export: into a file": Provoked(
        "export runs/tiny --output file",
        2,
        "`file` is a file",
        "give a directory with `--output`",
    ),
    "export: not finished": Provoked(
        "export runs/no-adapter",
        1,
        "no adapter in `runs/no-adapter/adapter`: it has no `adapter_config.json`",
        "`mamba-sft train runs/no-adapter/recipe.yaml --resume`",
    ),
    "report: no run": Provoked(
        "report runs/tin",
        2,
        "no run at `runs/tin`",
        "did you mean `runs/tiny`?",
    ),
    "report: the same run twice": Provoked(
        "report runs/tiny runs/tiny",
        2,
        "the same run twice",
        "name each run once",
    ),
    "report: a page of one run": Provoked(
        "report runs/tiny --output page.html",
        2,
        "`--output` is for a comparison, and there is one run",
        "name two runs or more",
    ),
    "report: over another file": Provoked(
        "report runs/tiny runs/no-adapter --output file",
        2,
        "`file` exists and is no earlier comparison",
        "give another file with `--output`",
    ),
    # talking
    "chat: no such model": Provoked(
        "chat runs/tin",
        1,
        "no model directory `runs/tin`",
        "did you mean `runs/tiny`?",
    ),
    "chat: no model": Provoked(
        "chat folder",
        1,
        "`folder` is not a model: it has no `config.json`",
        "give a directory that `save_pretrained` wrote, or a hub id",
    ),
    "chat: another kind of model": Provoked(
        "chat llama",
        1,
        "`llama` is a `llama` model; mamba-sft trains `falcon_mamba` models",
        "try `tiiuae/falcon-mamba-7b`",
    ),
    "chat: a base": Provoked(
        "chat tiny-base",
        1,
        "`tiny-base` has no chat template: it is a base model that continues text",
        "`mamba-sft generate tiny-base --raw --prompt 'Once upon a time'`",
    ),
    "chat: compare a base": Provoked(
        "chat tiny-base --compare",
        2,
        "`tiny-base` has no adapter to switch off, so there is no base to compare with",
        "compare a run that trained an adapter, which has it beside its base",
    ),
    "chat: not merged": Provoked(
        "chat runs/tiny --merged",
        2,
        "`runs/tiny` has no merged checkpoint",
        "`mamba-sft merge runs/tiny` makes one",
    ),
    "chat: merged of no run": Provoked(
        "chat tiny-base --merged",
        2,
        "`tiny-base` is not a run, so it has no merged checkpoint",
        "leave `--merged` out",
    ),
    "chat: not finished": Provoked(
        "chat runs/no-adapter",
        2,
        "`runs/no-adapter` has no adapter yet: its training has not finished",
        "`mamba-sft train runs/no-adapter/recipe.yaml --resume`",
    ),
    "chat: a broken recipe": Provoked(
        "chat runs/bad-recipe",
        2,
        "runs/bad-recipe/recipe.yaml:1: `data` is missing; it needs `data.sources`",
    ),
    "chat: a broken adapter config": Provoked(
        "chat runs/bad-config",
        1,
        "`runs/bad-config/adapter/adapter_config.json` is not JSON: Expecting property name enclosed in",
        "copy it again",
    ),
    "chat: no weights": Provoked(
        "chat runs/no-weights",
        1,
        "no `adapter_model.safetensors` in `runs/no-weights/adapter`",
        "give the `adapter/` directory of a run",
    ),
    "chat: top_p of seven": Provoked(
        "chat runs/tiny --top-p 7",
        2,
        "`top_p` must be above 0 and at most 1, not 7.0",
    ),
    "chat: no tokens": Provoked(
        "chat runs/tiny --max-new-tokens 0",
        2,
        "`max_new_tokens` must be at least 1, not 0",
    ),
    "chat: below zero": Provoked(
        "chat runs/tiny --temperature -1",
        2,
        "`temperature` must be 0 (take the likeliest token) or more, not -1.0",
    ),
    "generate: nothing asked": Provoked(
        "generate runs/tiny",
        2,
        "give either `--prompt` or `--input`",
        'for example --prompt "What is a haiku?"',
    ),
    "generate: asked twice": Provoked(
        "generate runs/tiny -p hi --input prompts.jsonl",
        2,
        "give either `--prompt` or `--input`",
        'for example --prompt "What is a haiku?"',
    ),
    "generate: an empty prompt": Provoked(
        "generate runs/tiny -p ''",
        2,
        "prompt 1: the prompt is empty",
    ),
    "generate: a file as a prompt": Provoked(
        "generate runs/tiny -p prompts.jsonl",
        2,
        "`--prompt prompts.jsonl`: that is a file; a prompt is the text itself",
        "`--input prompts.jsonl` answers the prompts in it",
    ),
    "generate: no such prompts": Provoked(
        "generate runs/tiny --input none.jsonl",
        1,
        "no file `none.jsonl`",
        "prompts are JSON Lines, or a .txt with one a line",
    ),
    "generate: number.jsonl": Provoked(
        "generate runs/tiny --input number.jsonl",
        1,
        "number.jsonl:2: `prompt` is not a string",
    ),
    "generate: both.jsonl": Provoked(
        "generate runs/tiny --input both.jsonl",
        1,
        "both.jsonl:1: a line needs either `prompt` or `messages`",
        'for example {"prompt": "What is the capital of France?"}',
    ),
    "generate: neither.jsonl": Provoked(
        "generate runs/tiny --input neither.jsonl",
        1,
        "neither.jsonl:1: a line needs either `prompt` or `messages`",
        'for example {"prompt": "What is the capital of France?"}',
    ),
    "generate: empty-prompt.jsonl": Provoked(
        "generate runs/tiny --input empty-prompt.jsonl",
        1,
        "empty-prompt.jsonl:1: the prompt is empty",
    ),
    "generate: own-word.jsonl": Provoked(
        "generate runs/tiny --input own-word.jsonl",
        1,
        "own-word.jsonl:1: the last message is the assistant's own",
        "end with a `user` message",
    ),
    "generate: asked.md": Provoked(
        "generate runs/tiny --input asked.md",
        1,
        "asked.md:1: plain text, which only a file called .txt holds; prompts are JSON Lines",
        "mv asked.md asked.txt",
    ),
    "generate: asked.csv": Provoked(
        "generate runs/tiny --input asked.csv",
        1,
        "`asked.csv` is a table, and prompts are JSON Lines",
        "python -c 'import pandas;",
    ),
    "generate: none.txt": Provoked(
        "generate runs/tiny --input none.txt",
        1,
        "`none.txt` holds no prompts",
        'one a line, as JSON: {"prompt": "What is a haiku?"}, or as they are',
    ),
    "generate: answers into a directory": Provoked(
        "generate runs/tiny -p hi --output folder",
        2,
        "the output `folder` is a directory",
        "for example `answers.jsonl`",
    ),
    "generate: answers over the prompts": Provoked(
        "generate runs/tiny --input prompts.jsonl --output prompts.jsonl",
        2,
        "the output `prompts.jsonl` is the file of prompts",
        "for example `answers.jsonl`",
    ),
    "generate: lines twice": Provoked(
        "generate runs/tiny -p hi --json --output x.jsonl",
        2,
        "`--output` writes JSON Lines already",
        "leave out `--json`",
    ),
    "generate: a base that chats": Provoked(
        "generate tiny-base -p hi",
        1,
        "`tiny-base` has no chat template: it is a base model that continues text",
        "`mamba-sft generate tiny-base --raw --prompt 'Once upon a time'`",
    ),
    "generate: messages as text": Provoked(
        "generate runs/tiny --raw --input own-word.jsonl",
        1,
        "own-word.jsonl:1: the last message is the assistant's own",
        "end with a `user` message",
    ),
    # the machine
    "bench: no such device": Provoked(
        "bench kernels --device tpu",
        2,
        "no device `tpu`",
        "there are `auto`, `cpu`, `cuda` and `cuda:N`",
    ),
    "bench: a GGUF file": Provoked(
        "bench generate x.gguf",
        2,
        "`x.gguf` is a GGUF file, for llama.cpp; here a run is needed, or a checkpoint in safetensors",
        "give the run or checkpoint that it was made from;",
    ),
    "bench: no GPU": Provoked(
        "bench kernels --device cuda",
        2,
        "no device `cuda`: this machine shows 0 CUDA devices",
        "see `mamba-sft doctor`",
    ),
    "doctor: a word": Provoked(
        "doctor please",
        2,
        "Got unexpected extra argument(s) (please)",
    ),
}

MENDED = {
    "a field as an option": (
        "train recipe.yaml train.learning_rate=1e-4 --dry-run",
        "train.learning_rate=1e-4",
    ),
    "no such verb": ("train recipe.yaml --dry-run", "train"),
    "data: no recipe named": ("data recipe.yaml", "mamba-sft data RECIPE"),
    "recipe: nearly a built-in name": ("recipes show quickstart", "quickstart"),
    "recipe: nearly a file": ("train recipe.yaml --dry-run", "recipe.yaml"),
    "recipe: no such quantization": ("plan recipe.yaml model.quantization=nf4 --card t4", "nf4"),
    "override: misspelt": ("train recipe.yaml train.learning_rate=1e-4 --dry-run", "learning_rate"),
    "override: no section": ("train recipe.yaml train.learning_rate=1 --dry-run", "goes under `train`"),
    "override: a star without quotes": (
        "data recipe.yaml \"data.sources.0.path='chat*.jsonl'\"",
        "quotes of its own",
    ),
    "recipes: nearly a name": ("recipes show quickstart", "did you mean `quickstart`?"),
    "recipes: no such word": ("recipes show quickstart", "Did you mean 'show'?"),
    "train: a finished run in the way": (
        "train recipe.yaml output_dir=runs/mine --dry-run",
        "output_dir=runs/NAME",
    ),
    "train: somebody's directory": (
        "train recipe.yaml output_dir=runs/mine --dry-run",
        "output_dir=runs/NAME",
    ),
    "train: no such base": (
        "train recipe.yaml model.base=tiny-base --dry-run",
        "did you mean `tiny-base`?",
    ),
    "train: the base has no template": (
        "train recipe.yaml chat.template=chatml --dry-run",
        "chat.template: chatml",
    ),
    "data: no such file": (
        "data recipe.yaml data.sources.0.path=chats.jsonl",
        "did you mean `chats.jsonl`?",
    ),
    "data: no such format": (
        "data recipe.yaml data.sources.0.format=messages",
        "did you mean `messages`?",
    ),
    "data: no-answer.jsonl": (
        "data recipe.yaml 'data.sources=[{path: chats.jsonl},{path: no-answer.jsonl}]' data.on_bad_row=skip",
        "data.on_bad_row: skip",
    ),
    "data: unknown.jsonl": (
        "data recipe.yaml 'data.sources=[{path: unknown.jsonl, columns: {prompt: foo, response: bar}}]'",
        "under `data.sources` what they are",
    ),
    "data: chosen.jsonl": (
        "data recipe.yaml data.sources.0.path=chosen.jsonl data.sources.0.preference=chosen",
        "preference: chosen",
    ),
    "data: roles.jsonl": (
        "data recipe.yaml data.sources.0.path=roles.jsonl 'data.sources.0.roles={narrator: user}'",
        "roles: {narrator: user}",
    ),
    "plan: two cards of that name": ("plan recipe.yaml --card a100-80", "a100-80"),
    "plan: processes without a card": ("plan recipe.yaml --processes 2 --card h100", "--card h100"),
    "merge: no run": ("report runs/tiny", "did you mean `runs/tiny`?"),
    "merge: never quantized": ("merge runs/tiny", "leave `--onto` out"),
    "chat: no such model": ("chat runs/tiny", "did you mean `runs/tiny`?"),
    "chat: merged of no run": (
        "generate tiny-base --raw -p hi --max-new-tokens 2",
        "leave `--merged` out",
    ),
    "generate: nothing asked": (
        "generate runs/tiny -p 'What is a haiku?' --max-new-tokens 2",
        "--prompt",
    ),
    "generate: a file as a prompt": (
        "generate runs/tiny --input prompts.jsonl --max-new-tokens 2",
        "--input prompts.jsonl",
    ),
    "generate: lines twice": ("generate runs/tiny -p hi --json --max-new-tokens 2", "leave out"),
}
"""What follows the hint of a mistake, and works; with the words of the message that say so."""

SHELL = {
    "data: UTF-16": ("iconv", "converted.jsonl", "data recipe.yaml data.sources.0.path={}"),
    "data: latin-1": ("iconv", "utf8-latin.jsonl", "data recipe.yaml data.sources.0.path={}"),
    "data: text.jsonl": ("mv", "text.txt", "data recipe.yaml data.sources.0.path={}"),
    "data: semicolons.csv": ("python", "semicolons.jsonl", "data recipe.yaml data.sources.0.path={}"),
    "generate: asked.csv": (
        "python",
        "asked.jsonl",
        "generate tiny-base --raw --input {} --max-new-tokens 2",
    ),
    "generate: asked.md": ("mv", "asked.txt", "generate tiny-base --raw --input {} --max-new-tokens 2"),
}
"""Hints that are a command of the shell: how it begins, the file it makes, and what takes that file."""
