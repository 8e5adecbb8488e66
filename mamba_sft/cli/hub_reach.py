"""Whether the hub can be reached, asked once and briefly, before libraries ask it again and again."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterable
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mamba_sft.cli.console import err
from mamba_sft.recipe.builtin import is_here

OFFLINE, ENDPOINT = "HF_HUB_OFFLINE", "HF_ENDPOINT"
PATIENCE = 5.0
"""Seconds that the hub has to answer; `datasets` (5.2.0, read 2026-11-27) tries six times, for half a minute,
for each data set."""
_OF_THE_NETWORK = (socket.gaierror, ConnectionError, TimeoutError)
_NO_WAY = (errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN)
"""What a machine without a route says; Python has no kind of error for these."""


def use_cache_if_unreachable() -> None:
    """Has this process use what is in the hub's cache where the hub itself is out of reach, and says so.

    Nothing is asked where the user has said (`HF_HUB_OFFLINE`), the libraries are loaded already, or a proxy
    that only they know is between.
    """
    settled = OFFLINE in os.environ or "huggingface_hub" in sys.modules or _has_socks_proxy()
    if settled or _answers():
        return
    os.environ[OFFLINE] = "1"
    err.print("! the hub cannot be reached: what is in its cache on this machine is used")


def may_name_the_hub(names: Iterable[str]) -> bool:
    """Returns whether any of these bases or data sets can be one of the hub."""
    return any(map(_may_be_of_the_hub, names))


def _may_be_of_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not is_here(name)


def _has_socks_proxy() -> bool:
    return any(os.environ.get(name) for name in ("ALL_PROXY", "all_proxy"))


def _answers() -> bool:
    """Whether anything at all comes back; what else goes wrong is for the libraries to say."""
    try:
        request = Request(os.environ.get(ENDPOINT, "https://huggingface.co"), method="HEAD")
        with urlopen(request, timeout=PATIENCE):  # by the proxies of the environment
            return True
    except HTTPError:
        return True
    except OSError as error:  # and so what urllib wraps them in
        return not _is_of_the_network(getattr(error, "reason", error))
    except (ValueError, HTTPException):  # an endpoint that is no address, or that speaks something else
        return True


def _is_of_the_network(error: object) -> bool:
    return isinstance(error, _OF_THE_NETWORK) or getattr(error, "errno", None) in _NO_WAY
