"""More mistakes: files that are not what their names say, and YAML as other tools and hands write it.

`FILE_ERRORS` goes on with the table in `provoked_errors`.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

from tests.cli.provoked_errors import CHAT, RECIPE, Provoked

PAGE = "<!DOCTYPE html>\n<html><body>404</body></html>\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
USER, ASSISTANT = CHAT["messages"]


def _chat(*turns: object) -> str:
    return json.dumps({"messages": turns})


RECIPES = {
    "page.yaml": PAGE,
    "cells.ipynb": json.dumps({"cells": [], "metadata": {}, "nbformat": 4}),
    "script.py": "from mamba_sft import train\n",
    "settings.toml": '[model]\nbase = "tiny-base"\n',
    "quote.yaml": RECIPE.replace("runs/new", "'runs/new"),
    "two.yaml": f"{RECIPE}---\n{RECIPE}",
    "indented.yaml": "model:\n  base: tiny-base\n   dtype: float32\n",
    "colon.yaml": RECIPE.replace("base: tiny-base", "base:tiny-base"),
    "anchor.yaml": RECIPE.replace("{path: chats.jsonl}", "&a {path: chats.jsonl}, *a"),
    "tag.yaml": "model: !!python/object/apply:os.system [ls]\n",
    "yes.yaml": RECIPE.replace("validation: 0", "packing: yes"),
    "grouped.yaml": RECIPE.replace("max_steps: 4", "max_steps: 2_000"),
    "null.yaml": RECIPE.replace("base: tiny-base", "base: null"),
    "no-section.yaml": f"{RECIPE}adapter:\n",
    "one-source.yaml": RECIPE.replace("[{path: chats.jsonl}]", "chats.jsonl"),
    "plain-sources.yaml": RECIPE.replace("[{path: chats.jsonl}]", "[chats.jsonl]"),
    "llama-layers.yaml": f"{RECIPE}adapter: {{target_modules: [q_proj, v_proj]}}\n",
    "all-layers.yaml": f"{RECIPE}adapter: {{target_modules: all-linear}}\n",
    "no-rank.yaml": f"{RECIPE}adapter: {{r: 0}}\n",
    "endless.yaml": RECIPE.replace("max_steps: 4", "learning_rate: .inf"),
    "factory.yaml": "model_name_or_path: x\nfinetuning_type: lora\nlora_target: all\ncutoff_len: 2048\n",
    "deep.yaml": "model: " + "[" * 200 + "]" * 200 + "\n",
}
DATA = {
    "page.jsonl": PAGE,
    "page.parquet": PAGE,
    "pointer.jsonl": POINTER,
    "pointer.txt": POINTER,
    "comma.jsonl": '{"messages": [],}\n',
    "repr.jsonl": f"{CHAT}\n",
    "bars.csv": "prompt|response\na|b\n",
    "commas.tsv": "prompt,response\na,b\n",
    "ragged.csv": "prompt,response\na,b\na,b,c,d\n",
    "twice.csv": "prompt,prompt\na,b\n",
    "null-rows.jsonl": "null\n",
    "no-content.jsonl": _chat(USER, {"role": "assistant", "content": None}),
    "number-content.jsonl": _chat(USER, {"role": "assistant", "content": 3}),
    "no-role.jsonl": _chat({"content": "x"}, ASSISTANT),
    "two-answers.jsonl": _chat(USER, ASSISTANT, ASSISTANT),
    "printed.jsonl": json.dumps({"messages": str(CHAT["messages"])}),
    "several.json": json.dumps({"train": [CHAT], "test": [CHAT]}),
    "sheet.xlsx": "PK",
    "array-prompts.jsonl": '[{"prompt": "a"}]',
    "python-prompts.jsonl": "{'prompt': 'a'}\n",
}


def prepare_files(place: Path) -> None:
    """Adds to a directory, which `provoked_errors.prepare` filled, what the commands here name."""
    for name, text in (RECIPES | DATA).items():
        (place / name).write_text(text)
    packed = gzip.compress(f"{json.dumps(CHAT)}\n".encode() * 400)
    (place / "cut.jsonl.gz").write_bytes(packed[:-20])
    (place / "unnamed.jsonl").write_bytes(packed)
    (place / "table.jsonl").write_bytes(b"PAR1\x00\x00PAR1")
    (place / "link.yaml").symlink_to("gone.yaml")
    (place / "link.jsonl").symlink_to("gone.jsonl")
    config = json.loads((place / "tiny-base" / "config.json").read_text())
    for name, change in (("word-size", {"hidden_size": "big"}), ("below-none", {"num_hidden_layers": -1})):
        shutil.copytree(place / "tiny-base", place / name)
        (place / name / "config.json").write_text(json.dumps(config | change))


FILE_ERRORS = {
    "recipe: a web page": Provoked(
        "train page.yaml",
        2,
        "`page.yaml` is a web page, not the file itself",
        "fetch the file anew: on the hub its address has `/resolve/`",
    ),
    "recipe: a notebook": Provoked(
        "train cells.ipynb",
        2,
        "`cells.ipynb` is a notebook, not a recipe",
        "a recipe is YAML; `mamba-sft recipes show quickstart` prints one",
    ),
    "recipe: a program": Provoked(
        "train script.py",
        2,
        "`script.py` is a program, not a recipe",
        "a recipe is YAML; `mamba-sft recipes show quickstart` prints one",
    ),
    "recipe: TOML": Provoked(
        "train settings.toml",
        2,
        "`settings.toml` is TOML, not a recipe",
        "a recipe is YAML; `mamba-sft recipes show quickstart` prints one",
    ),
    "recipe: a link to nothing": Provoked(
        "train link.yaml", 2, "no recipe `link.yaml`: it is a link to `gone.yaml`, which leads nowhere"
    ),
    "recipe: an address": Provoked(
        "train https://example.com/recipe.yaml",
        2,
        "`https://example.com/recipe.yaml` is an address, not a file",
        "fetch it first: curl -LO https://example.com/recipe.yaml",
    ),
    "recipe: an empty name": Provoked(
        "train ''", 2, "the recipe's name is empty", "built-in recipes: continue-pretraining,"
    ),
    "recipe: left out before a change": Provoked(
        "train train.max_steps=4",
        2,
        "`train.max_steps=4` changes a field, and no recipe is named",
        "the recipe comes first: mamba-sft train quickstart train.max_steps=4",
    ),
    "recipe: a built-in name with an ending": Provoked(
        "train quickstart.yaml",
        2,
        "no recipe `quickstart.yaml`: neither a file nor a built-in recipe; did you mean `quickstart`?",
        "built-in recipes: continue-pretraining,",
    ),
    "recipe: a quotation mark left open": Provoked(
        "train quote.yaml",
        2,
        "quote.yaml:1: not valid YAML: a quotation mark opens here and nothing closes it",
    ),
    "recipe: two documents": Provoked(
        "train two.yaml", 2, "two.yaml:5: not valid YAML: `---` begins a second document, and a recipe is one"
    ),
    "recipe: indented too far": Provoked(
        "train indented.yaml",
        2,
        "indented.yaml:3: not valid YAML: this line is indented further than the one above, or has a",
    ),
    "recipe: no blank behind a colon": Provoked(
        "train colon.yaml",
        2,
        "colon.yaml:2: unknown field `model.base:tiny-base`; a blank goes behind the colon",
    ),
    "recipe: anchors": Provoked(
        "train anchor.yaml",
        2,
        "anchor.yaml:3: anchors and aliases (`&name`, `*name`) are not allowed; write the value out",
    ),
    "recipe: a tag that would run a program": Provoked(
        "train tag.yaml", 2, "tag.yaml:1: tags (`!python/object/apply:os.system`) are not allowed"
    ),
    "recipe: yes for true": Provoked(
        "train yes.yaml",
        2,
        "yes.yaml:3: `data.packing` must be true or false, got the text `yes`; write true",
    ),
    "recipe: digits in groups": Provoked(
        "train grouped.yaml",
        2,
        "grouped.yaml:4: `train.max_steps` must be a whole number, got the text `2_000`; write 2000",
    ),
    "recipe: null for the base": Provoked(
        "train null.yaml", 2, "null.yaml:2: `model.base` must be text, got null"
    ),
    "recipe: a section of nothing": Provoked(
        "train no-section.yaml",
        2,
        "no-section.yaml:5: `adapter` must be a section with fields of its own, or the word `none`, got",
    ),
    "recipe: a file for the list of sources": Provoked(
        "train one-source.yaml",
        2,
        "one-source.yaml:3: `data.sources` must be a list, got the text `chats.jsonl`; write [{path:",
    ),
    "recipe: a file for a source": Provoked(
        "train plain-sources.yaml",
        2,
        "plain-sources.yaml:3: `data.sources.0` must be a section with fields of its own, got the text",
    ),
    "recipe: layers of another model": Provoked(
        "train llama-layers.yaml",
        2,
        "llama-layers.yaml:5: `adapter.target_modules` names `q_proj`, `v_proj`; the linear layers of",
    ),
    "recipe: all layers, as PEFT says it": Provoked(
        "train all-layers.yaml",
        2,
        "all-layers.yaml:5: `adapter.target_modules` must be a list, got the text `all-linear`; leave",
    ),
    "recipe: rank zero": Provoked(
        "train no-rank.yaml", 2, "no-rank.yaml:5: `adapter.r` must be at least 1, got 0"
    ),
    "recipe: an infinite rate": Provoked(
        "train endless.yaml", 2, "endless.yaml:4: `train.learning_rate` must be a finite number, got inf"
    ),
    "recipe: LLaMA-Factory's": Provoked(
        "train factory.yaml",
        2,
        "factory.yaml:3: unknown field `lora_target`; here it is `adapter.target_modules`",
    ),
    "recipe: two hundred brackets": Provoked(
        "train deep.yaml", 2, "deep.yaml:1: not valid YAML: nested too deeply"
    ),
    "override: two equals signs apart": Provoked(
        "train recipe.yaml train.max_steps = 4",
        2,
        "override `train.max_steps`: must read `section.field=value`",
    ),
    "override: an entry that is not there": Provoked(
        "train recipe.yaml data.sources.5.path=x",
        2,
        "override `data.sources.5.path=x`: `data.sources` has no entry `5`: it has 1, counted from 0",
    ),
    "override: layers of another model": Provoked(
        "train recipe.yaml 'adapter.target_modules=[q_proj]'",
        2,
        "override `adapter.target_modules=[q_proj]`: `adapter.target_modules` names `q_proj`; the linear",
    ),
    "data: a web page": Provoked(
        "data recipe.yaml data.sources.0.path=page.jsonl",
        1,
        "`page.jsonl` is a web page, not the file itself",
        "fetch the file anew: on the hub its address has `/resolve/`",
    ),
    "data: a web page called parquet": Provoked(
        "data recipe.yaml data.sources.0.path=page.parquet",
        1,
        "`page.parquet` is a web page, not the file itself",
        "fetch the file anew: on the hub its address has `/resolve/`",
    ),
    "data: a git-lfs pointer": Provoked(
        "data recipe.yaml data.sources.0.path=pointer.jsonl",
        1,
        "`pointer.jsonl` is a git-lfs pointer, not the file itself",
        "`git lfs pull` in its repository fetches the file",
    ),
    "data: a git-lfs pointer called txt": Provoked(
        "data recipe.yaml data.sources.0.path=pointer.txt",
        1,
        "`pointer.txt` is a git-lfs pointer, not the file itself",
        "`git lfs pull` in its repository fetches the file",
    ),
    "data: packed without an ending": Provoked(
        "data recipe.yaml data.sources.0.path=unnamed.jsonl",
        1,
        "`unnamed.jsonl` is packed, and its name does not end in `.gz`",
        "mv unnamed.jsonl unnamed.jsonl.gz",
    ),
    "data: packed and cut": Provoked(
        "data recipe.yaml data.sources.0.path=cut.jsonl.gz",
        1,
        "cannot read `cut.jsonl.gz`: Compressed file ended before the end-of-stream marker was reached",
        "it is damaged, or a download that broke off: fetch it again",
    ),
    "data: parquet called jsonl": Provoked(
        "data recipe.yaml data.sources.0.path=table.jsonl",
        1,
        "`table.jsonl` is a parquet file",
        "mv table.jsonl table.parquet",
    ),
    "data: a comma too many": Provoked(
        "data recipe.yaml data.sources.0.path=comma.jsonl",
        1,
        "none of the first 1 rows can be read: comma.jsonl:1: not JSON: a comma before `}`, column 16",
    ),
    "data: Python instead of JSON": Provoked(
        "data recipe.yaml data.sources.0.path=repr.jsonl",
        1,
        "none of the first 1 rows can be read: repr.jsonl:1: a Python value, not JSON: `json.dumps(row)`",
    ),
    "data: Python's list in JSON": Provoked(
        "data recipe.yaml data.sources.0.path=printed.jsonl",
        1,
        "printed.jsonl:1: `messages` is a Python list written as text, not JSON; pandas writes JSON with",
        "mend them, or set `data.on_bad_row: skip`",
    ),
    "data: bars.csv": Provoked(
        "data recipe.yaml data.sources.0.path=bars.csv",
        1,
        "bars.csv:1: the columns are separated by bars, not commas",
        'python -c \'import pandas; pandas.read_csv("bars.csv", sep="|")',
    ),
    "data: commas.tsv": Provoked(
        "data recipe.yaml data.sources.0.path=commas.tsv",
        1,
        "commas.tsv:1: the columns are separated by commas, not tabs",
        'python -c \'import pandas; pandas.read_csv("commas.tsv", sep=",")',
    ),
    "data: ragged.csv": Provoked(
        "data recipe.yaml data.sources.0.path=ragged.csv",
        1,
        "ragged.csv:3: 4 fields where the header has 2",
        "mend them, or set `data.on_bad_row: skip`",
    ),
    "data: twice.csv": Provoked(
        "data recipe.yaml data.sources.0.path=twice.csv",
        1,
        "twice.csv:1: the header names a column twice or not at all: prompt, prompt",
    ),
    "data: rows of null": Provoked(
        "data recipe.yaml data.sources.0.path=null-rows.jsonl",
        1,
        "none of the first 1 rows can be read: null-rows.jsonl:1: not an object but null",
    ),
    "data: content that is null": Provoked(
        "data recipe.yaml data.sources.0.path=no-content.jsonl",
        1,
        "no-content.jsonl:1: turn 2 (assistant): empty content",
        "mend them, or set `data.on_bad_row: skip`",
    ),
    "data: content that is a number": Provoked(
        "data recipe.yaml data.sources.0.path=number-content.jsonl",
        1,
        "number-content.jsonl:1: turn 2: content is a number, not text",
        "mend them, or set `data.on_bad_row: skip`",
    ),
    "data: a turn without a role": Provoked(
        "data recipe.yaml data.sources.0.path=no-role.jsonl",
        1,
        "no-role.jsonl:1: turn 1 has no `role`; its keys are `content`, instead of `role` and `content`",
        "mend them, or set `data.on_bad_row: skip`",
    ),
    "data: two answers in a row": Provoked(
        "data recipe.yaml data.sources.0.path=two-answers.jsonl",
        1,
        "two-answers.jsonl:1: turn 3: an assistant turn that follows another: no turn asks for it",
        "mend them, or set `data.on_bad_row: skip`",
    ),
    "data: several lists": Provoked(
        "data recipe.yaml data.sources.0.path=several.json",
        1,
        "`several.json` holds several lists of rows: `train`, `test`",
        "one list a file: python -c 'import json; rows =",
    ),
    "data: a spreadsheet": Provoked(
        "data recipe.yaml data.sources.0.path=sheet.xlsx",
        1,
        "cannot read `sheet.xlsx`",
        "python -c 'import pandas;",
    ),
    "data: an address": Provoked(
        "data recipe.yaml data.sources.0.path=https://example.com/chats.jsonl",
        1,
        "`https://example.com/chats.jsonl` is an address, not a file",
        "fetch it first: curl -LO https://example.com/chats.jsonl",
    ),
    "data: a bucket": Provoked(
        "data recipe.yaml data.sources.0.path=s3://bucket/chats.jsonl",
        1,
        "`s3://bucket/chats.jsonl` is an address, not a file",
        "copy it here first; a data set of the hub is `owner/name`",
    ),
    "data: a link to nothing": Provoked(
        "data recipe.yaml data.sources.0.path=link.jsonl",
        1,
        "no file `link.jsonl`: it is a link to `gone.jsonl`, which leads nowhere",
    ),
}

FILE_MENDED = {
    "recipe: a built-in name with an ending": ("train quickstart --dry-run", "did you mean `quickstart`?"),
    "recipe: left out before a change": (
        "train quickstart train.max_steps=4 --dry-run",
        "mamba-sft train quickstart train.max_steps=4",
    ),
    "recipe: a file for the list of sources": (
        "data recipe.yaml 'data.sources=[{path: chats.jsonl}]'",
        "write [{path: chats.jsonl}]",
    ),
    "recipe: a file for a source": (
        "data recipe.yaml 'data.sources.0={path: chats.jsonl}'",
        "write {path: chats.jsonl}",
    ),
    "recipe: yes for true": ("train recipe.yaml data.packing=true --dry-run", "write true"),
    "recipe: layers of another model": (
        "train recipe.yaml 'adapter.target_modules=[in_proj, x_proj, dt_proj, out_proj]' --dry-run",
        "`in_proj`, `x_proj`, `dt_proj`, `out_proj`",
    ),
}
"""As `MENDED` in `provoked_errors`."""

FILE_SHELL = {
    "data: packed without an ending": ("mv", "unnamed.jsonl.gz", "data recipe.yaml data.sources.0.path={}"),
    "data: bars.csv": ("python", "bars.jsonl", "data recipe.yaml data.sources.0.path={}"),
    "data: commas.tsv": ("python", "commas.jsonl", "data recipe.yaml data.sources.0.path={}"),
    "data: several lists": ("python", "several-1.json", "data recipe.yaml data.sources.0.path={}"),
}
"""As `SHELL` in `provoked_errors`."""
