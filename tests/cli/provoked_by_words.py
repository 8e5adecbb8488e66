"""More mistakes: what stands in the place of something else, on the command line and as the base.

`WORD_ERRORS` goes on with the table in `provoked_errors`, in the directory that `prepare_files` filled.
"""

from __future__ import annotations

from tests.cli.provoked_errors import Provoked

WORD_ERRORS = {
    "train: a base with a word for a size": Provoked(
        "train recipe.yaml model.base=word-size",
        1,
        "`word-size/config.json` is not usable: Validation error for field 'hidden_size': TypeError:",
        "download it again",
    ),
    "train: a base with layers below none": Provoked(
        "train recipe.yaml model.base=below-none",
        1,
        "`below-none/config.json` is not usable: Class validation error for validator",
        "download it again",
    ),
    "train: a run as the base": Provoked(
        "train recipe.yaml model.base=runs/tiny",
        1,
        "`runs/tiny` is a run, not a base model: it has no `config.json`",
        "`model.adapter: runs/tiny` trains its adapter further; or",
    ),
    "train: an address as the base": Provoked(
        "train recipe.yaml model.base=https://huggingface.co/tiiuae/falcon-mamba-7b",
        1,
        "no model directory `https://huggingface.co/tiiuae/falcon-mamba-7b`",
        "its hub id is `tiiuae/falcon-mamba-7b`",
    ),
    "train: nearly the base's hub id": Provoked(
        "train recipe.yaml model.base=tiiuae/falcon-mamba-7",
        1,
        "`tiiuae/falcon-mamba-7` is not a directory here, not in the hub cache, and the hub cannot be",
        "did you mean `tiiuae/falcon-mamba-7b`? go online once (and",
    ),
    "train: a base without its owner": Provoked(
        "train recipe.yaml model.base=falcon-mamba-7b",
        1,
        "`falcon-mamba-7b` is not a directory here, not in the hub cache, and the hub cannot be reached",
        "did you mean `tiiuae/falcon-mamba-7b`? go online once (and",
    ),
    "train: a file as the base": Provoked(
        "train recipe.yaml model.base=chats.jsonl",
        1,
        "`chats.jsonl` is a file; a model is a directory",
        "give the directory of a run or of a checkpoint, or a hub id",
    ),
    "train: the base's config as the base": Provoked(
        "train recipe.yaml model.base=tiny-base/config.json",
        1,
        "`tiny-base/config.json` is a file; a model is a directory",
        "try `tiny-base`",
    ),
    "train: a port that is none": Provoked(
        "train recipe.yaml --processes 2 --nodes 2 --rank 0 --master host:99999",
        2,
        "`--master host:99999` is no HOST:PORT",
        "such as `--master node0:29500` or `[fd00::1]:29500`",
    ),
    "merge: a recipe": Provoked(
        "merge recipe.yaml",
        2,
        "`recipe.yaml` is a file; a run is a directory",
        "give the directory that `mamba-sft train` wrote, the recipe's `output_dir`",
    ),
    "merge: a dtype by its short name": Provoked(
        "merge runs/tiny --dtype fp16",
        2,
        "no such dtype `fp16`; did you mean `float16`?",
        "give one of float32, float16, bfloat16",
    ),
    "merge: into the run itself": Provoked(
        "merge runs/tiny --output runs/tiny",
        2,
        "`runs/tiny` is what would be merged; the result needs a directory of its own",
    ),
    "export: methods with commas": Provoked(
        "export runs/tiny -q q4_k_m,q8_0",
        2,
        "no quantization `q4_k_m,q8_0`",
        "one at a time: `-q q4_k_m -q q8_0`",
    ),
    "export: a format in capitals": Provoked(
        "export runs/tiny --format GGUF",
        2,
        "no format `GGUF`; did you mean `gguf`?",
        "there are gguf, hf, ollama",
    ),
    "export: private without a push": Provoked(
        "export runs/tiny --private",
        2,
        "`--private` is of a push",
        "say where to with `--push-to-hub owner/name`",
    ),
    "eval: no suite": Provoked(
        "eval runs/tiny",
        2,
        "say what to score on with `--suite` or `--tasks`",
        "suites are leaderboard-v2, leaderboard-v1, heldout,",
    ),
    "eval: a suite misspelt": Provoked(
        "eval runs/tiny --suite leaderbord-v1",
        2,
        "no suite `leaderbord-v1`; there are `leaderboard-v2`, `leaderboard-v1`, `heldout`,",
        "did you mean `leaderboard-v1`?",
    ),
    "eval: results that are none": Provoked(
        "eval runs/tiny --suite heldout --against array.json",
        2,
        "`array.json` does not hold results of `mamba-sft eval`: it is laid out otherwise",
        "give another file, or remove this one",
    ),
    "eval: no documents": Provoked(
        "eval runs/tiny --suite heldout --limit 0", 2, "`--limit 0` is not 1 or more"
    ),
    "generate: a recipe as the model": Provoked(
        "generate recipe.yaml -p hi",
        1,
        "`recipe.yaml` is a file; a model is a directory",
        "if it is a recipe, `mamba-sft train recipe.yaml` makes a run of it; give that",
    ),
    "generate: a web page of prompts": Provoked(
        "generate runs/tiny --input page.jsonl",
        1,
        "`page.jsonl` is a web page, not the file itself",
        "fetch the file anew: on the hub its address has `/resolve/`",
    ),
    "generate: a pointer of prompts": Provoked(
        "generate runs/tiny --input pointer.txt",
        1,
        "`pointer.txt` is a git-lfs pointer, not the file itself",
        "`git lfs pull` in its repository fetches the file",
    ),
    "generate: an array of prompts": Provoked(
        "generate runs/tiny --input array-prompts.jsonl",
        1,
        "array-prompts.jsonl:1: an array, where one prompt a line is needed",
        "python -c 'import pandas;",
    ),
    "generate: Python's prompts": Provoked(
        "generate runs/tiny --input python-prompts.jsonl",
        1,
        "python-prompts.jsonl:1: a Python value, not JSON: `json.dumps(row)` writes it, not `str(row)`",
        'one a line, as JSON: {"prompt": "What is a haiku?"}, or as',
    ),
    "generate: answers over somebody's file": Provoked(
        "generate runs/tiny -p hi --output chats.jsonl",
        2,
        "the output `chats.jsonl` is there and holds no answers",
        "give another file with `--output`, or remove this one",
    ),
    "generate: a seed with an exponent": Provoked(
        "generate runs/tiny -p hi --seed 1e3",
        2,
        "Invalid value for '--seed': Input should be a valid integer, unable to parse string as an",
    ),
    "generate: an empty stop string": Provoked(
        "generate runs/tiny -p hi --stop-strings ''",
        2,
        "a stop string is empty, which every answer begins with",
    ),
    "generate: a device by its kind": Provoked(
        "generate runs/tiny -p hi --device gpu",
        2,
        "`device` is auto, cpu or cuda, not gpu",
        "did you mean `--device cuda`?",
    ),
}

WORD_MENDED = {
    "train: a run as the base": (
        "train recipe.yaml model.base=tiny-base model.adapter=runs/tiny adapter.r=4 --dry-run",
        "model.adapter: runs/tiny",
    ),
    "export: a format in capitals": ("export runs/tiny --format gguf --dry-run", "did you mean `gguf`?"),
    "export: methods with commas": (
        "export runs/tiny -q q4_k_m -q q8_0 --dry-run",
        "-q q4_k_m -q q8_0",
    ),
    "merge: a dtype by its short name": ("merge runs/tiny --dtype float16", "did you mean `float16`?"),
}
"""As `MENDED` in `provoked_errors`."""

WORD_SHELL = {
    "generate: an array of prompts": (
        "python",
        "array-prompts-lines.jsonl",
        "generate tiny-base --raw --input {} --max-new-tokens 2",
    ),
}
"""As `SHELL` in `provoked_errors`."""
