"""A base checkpoint: found or downloaded, checked, and told from others before anything heavy is loaded.

Headers and a few samples are read, not weights: a 13.5 GiB model takes well under a second. Only safetensors
is accepted. A `.bin` file is a pickle, and opening one can run any code its author put there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from mamba_sft.disk import is_file_name
from mamba_sft.errors import ModelError
from mamba_sft.model.tensor_headers import TensorEntry, read_header
from mamba_sft.recipe.builtin import bundled_root, find_path
from mamba_sft.run import ADAPTER_CONFIG, Run, refuse_gguf
from mamba_sft.wording import shown

BASE_MODEL = "tiiuae/falcon-mamba-7b"
MODEL_TYPE = "falcon_mamba"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Everything a snapshot needs and nothing that is code or a pickle.
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]
# Config fields that saving a model again changes while the model stays the same.
_INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_PROBES = 8
_PROBE_BYTES = 64


def is_hub_id(text: str) -> bool:
    """Returns whether `text` can name a repository on the hub: `name` or `owner/name`, by the hub's rules.

    It says nothing of whether it is there, nor of whether a file here goes by that name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not listed

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def resolve_base(base: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the local directory of a base model, downloading it if it is a hub id.

    Args:
        base: A directory (from here, or among the bundled data) or a hub id.
        revision: Branch, tag or commit on the hub; not allowed with a directory.
        weights: False fetches configuration and tokenizer only.

    Raises:
        ModelError: Nothing is there, the hub cannot be reached, or it is not a FalconMamba model.
        UsageError: It is a GGUF file.
    """
    path = find_path(base)
    refuse_gguf(path)
    if path.is_dir():
        if revision is not None:
            raise ModelError(
                f"`model.revision: {revision}` has no meaning for the local directory `{path}`",
                hint="remove `model.revision`, or give a hub id",
            )
        directory = path
    elif path.exists():
        raise _no_directory(path)
    elif _looks_local(base):
        raise ModelError(f"no model directory `{base}`", hint=_similar(base))
    else:
        directory = _download(base, revision, weights=False)
        read_config(directory)  # a wrong model is refused before its weights are fetched
        if weights:
            directory = _download(base, revision, weights=True)
    read_config(directory)
    return directory


def _no_directory(path: Path) -> ModelError:
    """What is said of a file where a model's directory goes."""
    if (path.parent / "config.json").is_file():
        hint = f"try `{path.parent}`"
    elif path.suffix in (".yaml", ".yml"):
        hint = f"if it is a recipe, `mamba-sft train {shlex.quote(str(path))}` makes a run of it; give that"
    else:
        hint = "give the directory of a run or of a checkpoint, or a hub id such as `owner/name`"
    return ModelError(f"`{path}` is a file; a model is a directory", hint=hint)


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the `config.json` of a FalconMamba checkpoint.

    Raises:
        ModelError: There is none, it is not JSON, it is of another model type, or the weights are quantized.
    """
    path = directory / "config.json"
    if not path.is_file():
        if (directory / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"`{directory}` is an adapter, not a base model: it has no `config.json`",
                hint="give the base model it was trained on, or merge it first with `mamba-sft merge`",
            )
        if (Run(directory).adapter / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"`{directory}` is a run, not a base model: it has no `config.json`",
                hint=f"`model.adapter: {directory}` trains its adapter further; or give its base",
            )
        raise ModelError(
            f"`{directory}` is not a model: it has no `config.json`",
            hint="give a directory that `save_pretrained` wrote, or a hub id",
        )
    config = _read_json(path)
    if config.get("model_type") != MODEL_TYPE:
        raise ModelError(
            f"`{directory}` is a `{config.get('model_type')}` model; mamba-sft trains `{MODEL_TYPE}` models",
            hint=f"try `{BASE_MODEL}`",
        )
    if config.get("quantization_config"):
        told = config["quantization_config"]
        method = told.get("quant_method", "unknown method") if isinstance(told, dict) else told
        raise ModelError(
            f"`{directory}` holds weights that are already quantized ({method})",
            hint="give the full-precision base with `model.quantization: nf4`: then the run can be merged",
        )
    return config


def read_tensors(directory: Path) -> dict[str, TensorEntry]:
    """Returns every tensor of a checkpoint by name, after checking that all shards are present and whole.

    Raises:
        ModelError: No safetensors file; a missing, truncated or corrupt shard; an index that disagrees.
    """
    places = _weight_map(directory)
    names = sorted(set(places.values())) or [SINGLE_NAME]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise _missing_weights(directory, missing, len(names))
    entries: dict[str, TensorEntry] = {}
    for name in names:
        entries.update(read_header(directory / name))
    for tensor, file in places.items():
        if tensor not in entries or entries[tensor].file.name != file:
            raise ModelError(
                f"`{directory / INDEX_NAME}` says that `{file}` holds `{tensor}`, but it does not",
                hint="the shards and the index are of different checkpoints; download the model again",
            )
    return entries


def base_fingerprint(directory: str | Path) -> str:
    """Returns a hash that tells one base model from another without reading all of its weights.

    It covers the architecture (`config.json` without incidental fields), every tensor's name, dtype and
    shape, and eight 64-byte samples spread over each tensor. It does not depend on how tensors are spread
    over shards. Fine-tuned or merged weights differ almost everywhere, so the samples tell them apart; an
    edit between samples, such as one token's embedding, goes unseen.

    Raises:
        ModelError: The directory is not a complete FalconMamba checkpoint.
    """
    directory = Path(directory)
    config = {key: value for key, value in read_config(directory).items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    entries = read_tensors(directory)
    files = {path: path.open("rb") for path in {entry.file for entry in entries.values()}}
    try:
        for name in sorted(entries):
            entry = entries[name]
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            last = max(entry.start, entry.end - _PROBE_BYTES)
            for i in range(_PROBES):
                offset = entry.start + (last - entry.start) * i // (_PROBES - 1)
                files[entry.file].seek(offset)
                digest.update(files[entry.file].read(min(_PROBE_BYTES, entry.end - offset)))
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


def _looks_local(base: str) -> bool:
    return not is_hub_id(base) or ("/" in base and any(parent.is_dir() for parent in _parents(base)))


def _parents(base: str) -> list[Path]:
    path = Path(base).expanduser().parent
    return [path, bundled_root() / path]


def _similar(base: str) -> str:
    if page := re.match(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", base):
        return f"its hub id is `{page[1]}`"
    return _meant(base).strip() or "give a directory, or a hub id such as `owner/name`"


def _meant(base: str) -> str:
    """The question whether a directory of nearly this name was meant, where there is one."""
    for parent in _parents(base):
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
        for name in difflib.get_close_matches(Path(base).name, names, n=1):
            return f"did you mean `{Path(base).parent / name}`? "
    named = base.lower().rpartition("/")[2]
    if base != BASE_MODEL and difflib.get_close_matches(named, [BASE_MODEL.rpartition("/")[2]], cutoff=0.9):
        return f"did you mean `{BASE_MODEL}`? "
    return ""


def _download(base: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT", "https://")
    if not endpoint.startswith(("http://", "https://")):
        raise ModelError(
            f"`HF_ENDPOINT={shown(endpoint)}` is no address, so `{base}` cannot be fetched",
            hint="`unset HF_ENDPOINT`, or give an address that begins with `https://`",
        )
    patterns = _TOKENIZER_FILES + (_WEIGHT_FILES if weights else [])
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"`{base}` is gated", hint="accept its terms on the hub, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"`{base}` has no revision `{revision}`", hint="see its branches and tags on the hub"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"no directory and no hub model `{base}`",
            hint="check the spelling; a private one needs `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError(
            f"`{base}` is not a directory here, not in the hub cache, and the hub cannot be reached",
            hint=f"{_meant(base)}go online once (and unset HF_HUB_OFFLINE), or give the path of a downloaded"
            " copy",
        ) from error
    except OSError as error:
        raise ModelError(f"`{base}` could not be downloaded: {error}", hint="is the disk full?") from error


def _weight_map(directory: Path) -> dict[str, str]:
    if not (directory / INDEX_NAME).is_file():
        return {}
    places = _read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"`{directory / INDEX_NAME}` lists no weights", hint="download the model again")
    for tensor, file in places.items():
        if not is_file_name(file):
            raise ModelError(
                f"`{directory / INDEX_NAME}` says that `{tensor:.100}` is in {file!r:.200},"
                " which is no name of a file beside it",
                hint="shards lie in the directory of their index; download the model again",
            )
    return places


def _missing_weights(directory: Path, missing: list[str], total: int) -> ModelError:
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles and missing == [SINGLE_NAME]:
        return ModelError(
            f"`{directory}` has its weights as pickles (`{pickles[0]}`), which can run code when opened; "
            "only safetensors is loaded",
            hint="convert it where you trust it: `from_pretrained(...)`, then `save_pretrained(...)`",
        )
    return ModelError(
        f"`{directory}` lacks {len(missing)} of {total} weight files: {', '.join(missing)}",
        hint="the download or copy is not complete; fetch the missing files",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read `{path}`: {error.strerror or error}") from error
    except RecursionError as error:
        raise ModelError(f"`{path}` is JSON nested too deeply", hint="download it again") from error
    except ValueError as error:
        raise ModelError(f"`{path}` is not valid JSON: {error}", hint="download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"`{path}` is not a JSON object", hint="download it again")
    return content
