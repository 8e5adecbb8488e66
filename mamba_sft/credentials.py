"""Tokens and passwords, by their look or from the environment: kept out of what is written and shown."""

from __future__ import annotations

import os
import re

_HIDDEN = "***"
_LOOK = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|"
    r"glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
    r"|(?<=://)[^/\s@]+(?=@)"  # user and password in a URL
    r"|(?<=[?&])(?:X-Amz-Signature|X-Amz-Security-Token|Signature|sig|token|access_token|api_key)=[^&\s]+",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?:TOKEN|API_?KEY|SECRET(?:_ACCESS_KEY)?|PASSWORD|PASSWD)$")
_LEAST = 12
"""Letters of a secret: a shorter value of the environment is also an ordinary word somewhere."""


def has_credentials(text: str) -> bool:
    """Whether a text that others will read, such as a setting, holds a token or a password."""
    return masked(text) != text


def masked(text: str) -> str:
    """Returns a command or setting with stars for what looks like a token or password, or is one."""
    return without_secrets(_LOOK.sub(_HIDDEN, text))


def without_secrets(text: str) -> str:
    """Returns any text with stars for the secrets of this process's environment, by their values.

    Nothing is judged by its look, so the text of rows and answers stays what it is.
    """
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _LEAST and value in text and _NAME.search(name.upper())
    }
    for value in sorted(found, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(value, _HIDDEN)
    return text
