"""A checkpoint pushed to the Hugging Face hub, asking nothing; the token comes from the environment alone."""

from __future__ import annotations

import os
from pathlib import Path

from mamba_sft.errors import ExportError, UsageError
from mamba_sft.model.checkpoint import is_hub_id

TOKEN = "HF_TOKEN"


def check_push(repo: str) -> str:
    """Checks all that can be checked before a checkpoint is written, and returns the token.

    Args:
        repo: `owner/name`.

    Raises:
        UsageError: It is no repository's name, there is no token, or the hub is switched off.
    """
    from huggingface_hub import constants

    if not is_hub_id(repo):
        raise UsageError(f"`{repo}` is not a repository's name", hint="give `owner/name`")
    if "/" not in repo:
        raise UsageError(f"`{repo}` has no owner", hint=f"give `owner/{repo}`")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("the hub is switched off: HF_HUB_OFFLINE is set", hint="unset it to push")
    token = os.environ.get(TOKEN)
    if not token:
        raise UsageError(f"pushing needs a token in {TOKEN}", hint="make one with write access on the hub")
    return token


def push_directory(directory: Path, repo: str, *, private: bool) -> str:
    """Uploads a directory as one commit and returns the address of the repository.

    Args:
        directory: What is uploaded, all of it.
        repo: `owner/name`; made if it is not there.
        private: Whether a new repository is private; one that is there keeps its own setting.

    Raises:
        ExportError: The hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=check_push(repo))
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Export with mamba-sft")
    except (HfHubHTTPError, OSError) as error:
        raise ExportError(
            f"`{directory}` was exported, but not pushed to `{repo}`: {error}",
            hint="run the same command again: what is there already is not sent twice",
        ) from None  # the cause holds the request with its headers, and so the token
    return str(url)
