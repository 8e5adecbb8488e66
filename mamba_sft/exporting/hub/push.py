"""Files pushed to the Hugging Face hub, asking nothing, by the token that this machine is logged in with.

What needs no file is checked before any is written: that the hub is there and takes the token, whose the
name is and what it holds. Files go one commit after the other, the card and all small ones first. So a push
that is broken off leaves a repository that is known again, and one that follows sends only what is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mamba_sft.errors import UsageError
from mamba_sft.exporting.hub.hub_errors import hub_errors_explained
from mamba_sft.exporting.request import HubOptions, Progress, Pushed
from mamba_sft.model.checkpoint import INDEX_NAME, is_hub_id
from mamba_sft.run import MODEL_CARD

MARK = "mamba-sft"
"""A tag in the card's metadata; it also tells an earlier export from somebody else's directory."""
_SMALL = 10 << 20
"""Bytes; smaller files share a commit."""
_WEIGHTS = ("model*.safetensors", INDEX_NAME)
"""What of an earlier checkpoint would be loaded in the place of this one, or with it."""


@dataclass(frozen=True)
class Remote:
    """A repository as it is before a push.

    Args:
        hashes: Of every file in it, by name; see `_hashes`.
    """

    hashes: dict[str, str]

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is in it."""
        return "config.json" in self.hashes

    @property
    def gguf_files(self) -> list[str]:
        """The GGUF files in it."""
        return sorted(name for name in self.hashes if name.endswith(".gguf"))


def check_push(options: HubOptions) -> str | None:
    """Checks what can be told without asking the hub, and returns the token; None where nothing is pushed.

    Raises:
        UsageError: It is no repository's name, there is no token, or the hub is switched off.
    """
    repo = options.push_to_hub
    if repo is None:
        if options.private:
            raise UsageError("`--private` is of a push", hint="say where to with `--push-to-hub owner/name`")
        return None
    from huggingface_hub import constants, get_token

    if not is_hub_id(repo):
        raise UsageError(f"`{repo}` is not a repository's name", hint="give `owner/name`")
    if "/" not in repo:
        raise UsageError(f"`{repo}` has no owner", hint=f"give `owner/{repo}`")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("the hub is switched off: HF_HUB_OFFLINE is set", hint="unset it to push")
    token = get_token()
    if not token:
        raise UsageError(
            "pushing needs a token, and this machine is not logged in",
            hint="`hf auth login`, or set HF_TOKEN to a token with write access",
        )
    return token


def check_hub(options: HubOptions, already: str = "") -> Remote:
    """Asks the hub for all that can be told before there are files, and returns what the repository holds.

    Args:
        options: Where to push to, if anywhere.
        already: What is done whatever the hub says, to begin a message with.

    Raises:
        UsageError: The name is somebody else's, or holds something else, or is public and should not be.
        ExportError: The hub cannot be reached, or does not take the token.
    """
    token, repo = check_push(options), options.push_to_hub
    if token is None or repo is None:
        return Remote({})
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(token=token)
    with hub_errors_explained(repo, token, already):
        _check_owner(api.whoami(cache=True), repo)
        try:
            found = api.repo_info(repo, files_metadata=True)
        except RepositoryNotFoundError:
            return Remote({})
    return _known(found, repo, private=options.private)


def push_files(files: Sequence[Path], options: HubOptions, progress: Progress) -> Pushed:
    """Uploads files that are not there yet and returns what was sent.

    Args:
        files: Each goes by its own name; of a checkpoint, all of it.
        options: Where to.
        progress: Told how many bytes are there.

    Raises:
        UsageError: As `check_hub`.
        ExportError: The hub refuses; what was sent until then stays.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    already = exported(files[0].parent)
    remote, token, repo = check_hub(options, already), check_push(options), options.push_to_hub
    if token is None or repo is None:
        raise ValueError("there is nowhere to push to")
    api = HfApi(token=token)
    ordered = sorted(files, key=lambda path: (path.name != MODEL_CARD, path.name))
    new = [path for path in ordered if not _is_there(path, remote)]
    stale = _stale(remote, [path.name for path in files])
    sizes = {path: path.stat().st_size for path in files}
    total, done = sum(sizes.values()), sum(size for path, size in sizes.items() if path not in new)
    small = [path for path in new if sizes[path] < _SMALL]
    parts = [*([small] if small else []), *([path] for path in new if path not in small)]
    with hub_errors_explained(repo, token, already):
        url = api.create_repo(repo, private=options.private, exist_ok=True)
        for part in parts:
            progress("pushing", done, total)
            names = ", ".join(path.name for path in part[:3]) + (", ..." if len(part) > 3 else "")
            adds = [CommitOperationAdd(path.name, path) for path in part]
            api.create_commit(repo, adds, commit_message=f"Export with mamba-sft: {names}")
            done += sum(sizes[path] for path in part)
        if stale:
            removals = [CommitOperationDelete(name) for name in stale]
            api.create_commit(repo, removals, commit_message="Remove weights of an earlier export")
    progress("pushing", done, total)
    sent = [path.name for path in new]
    return Pushed(str(url), sent, [path.name for path in ordered if path.name not in sent], stale)


def exported(directory: Path) -> str:
    """Returns how a message begins that is of a push alone."""
    return f"`{directory}` was exported, but not all of it pushed to "


def _check_owner(known: dict[str, Any], repo: str) -> None:
    """Refuses another's name, and a token that only reads; of a fine-grained one the hub itself decides."""
    owner = repo.split("/", maxsplit=1)[0]
    access = (known.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read" or "write" not in json.dumps(access.get("fineGrained", "write")):
        raise UsageError("the token may read and not write", hint="make one with write access on the hub")
    names = [known.get("name"), *(each.get("name") for each in known.get("orgs") or [])]
    if access.get("role") == "write" and owner.lower() not in [str(name).lower() for name in names]:
        there_are = ", ".join(f"`{name}`" for name in names if name)
        raise UsageError(
            f"`{repo}` is not yours: the token is of {there_are}",
            hint=f"give `{names[0]}/{repo.split('/')[1]}`",
        )


def _known(found: Any, repo: str, *, private: bool) -> Remote:
    """What a repository holds, if it may be pushed to."""
    hashes = {each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id for each in found.siblings or []}
    hashes.pop(".gitattributes", None)
    if hashes and MARK not in (found.tags or []):
        raise UsageError(
            f"`{repo}` is there already, and no earlier export: its card has no tag `{MARK}`",
            hint="give another name, or put that tag on its card to have its files replaced",
        )
    if private and not found.private:
        raise UsageError(
            f"`{repo}` is there already and is public: `--private` would not change that",
            hint="make it private in its settings on the hub, or give another name",
        )
    return Remote(hashes)


def _is_there(path: Path, remote: Remote) -> bool:
    """Whether a repository holds this very file; one of another name there is not read to find out."""
    there = remote.hashes.get(path.name)
    return there is not None and there in _hashes(path)


def _hashes(path: Path) -> tuple[str, str]:
    """The hashes by which the hub knows a file: of its bytes where it is large, and git's own."""
    large, small = (
        hashlib.sha256(),
        hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False),
    )
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            large.update(piece)
            small.update(piece)
    return large.hexdigest(), small.hexdigest()


def _stale(remote: Remote, names: Sequence[str]) -> list[str]:
    """Weights of an earlier checkpoint that this one has not; none where no checkpoint is pushed."""
    if "config.json" not in names:
        return []
    return [
        name
        for name in remote.hashes
        if name not in names and any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)
    ]
