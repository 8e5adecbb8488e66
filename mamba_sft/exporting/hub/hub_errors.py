"""What the hub refuses and why, in a sentence each: offline, the token, the name, the hub itself.

The libraries under it raise kinds of their own, one around the other, with the request and so the token in
them. What is raised here has none of them as its cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mamba_sft.credentials import masked
from mamba_sft.errors import ExportError, MambaSFTError

_LOG_IN = "log in anew with `hf auth login`, or set HF_TOKEN to a token with write access"
_AGAIN = "run the same command again: what is there already is not sent twice"
_STATUS = {
    401: ("does not take the token", _LOG_IN),
    403: ("does not let this token write there", "give the token write access to it, or name another owner"),
    404: ("has no such repository, or hides it from this token", "check the owner and the token's access"),
    409: ("has that name taken by something else", "give another name"),
    413: ("finds it too large", "the owner's storage on the hub may be used up"),
    429: ("wants fewer requests", "wait some minutes, then " + _AGAIN),
}


@contextmanager
def hub_errors_explained(repo: str, token: str, already: str = "") -> Iterator[None]:
    """Turns what goes wrong between here and the hub, inside the block, into one sentence.

    Args:
        repo: `owner/name`.
        token: What no message may hold.
        already: What is done whatever happens here, to begin the sentence with.

    Raises:
        ExportError: The hub refuses, or cannot be reached.
    """
    try:
        yield
    except MambaSFTError:
        raise
    except Exception as error:  # huggingface_hub, its HTTP client and hf-xet each raise their own kinds
        problem, hint = _explained(error, repo)
        told = masked(problem).replace(token, "***")
        raise ExportError(already + told, hint=hint) from None


def _explained(error: BaseException, repo: str) -> tuple[str, str]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    for each in _chain(error):
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code
            what, hint = _STATUS.get(status, (f"answers {status}", _AGAIN))
            said = f": {each.server_message}" if each.server_message and status not in (401, 404) else ""
            return f"`{repo}`: the hub {what}{said:.300}", hint
    if any(_is_connection(each) for each in _chain(error)):
        where = f"`{repo}`: the hub cannot be reached (`{constants.ENDPOINT}`)"
        return where, f"go online (HF_ENDPOINT names another hub), then {_AGAIN}"
    return f"`{repo}`: {type(error).__name__}: {error!s:.300}", _AGAIN


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_connection(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or "httpx" in type(error).__module__
