"""Errors of the Hub as messages that tell the user what to do; none of them holds the token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, errors, get_token

from hispec.utils.console import one_line
from hispec.utils.files import DiskFullError, disk_is_full


class HubError(OSError):
    """The Hub refused, or cannot be reached; the message is one paragraph for the user."""


class UnreachableError(HubError):
    """No answer from the Hub."""


@contextmanager
def clearly(failed: str) -> Iterator[None]:
    """Turn errors of the Hub and of the way to it into a `HubError` that says what to do."""
    try:
        yield
    except (HubError, DiskFullError):
        raise
    except (OSError, RuntimeError, errors.HTTPError) as error:
        cause: Exception = error
        while isinstance(cause, RuntimeError) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # "Error while uploading" hides what it was
        if isinstance(cause, errors.HfHubHTTPError):
            raise HubError(f"{failed}: {_refusal(cause)}") from error
        if disk_is_full(cause):
            raise HubError(f"{failed}: the disk is full: {_safe(cause)}") from error
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ConnectionError):
            raise  # of this machine: a full disk, a missing right
        if isinstance(cause, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set, so the Hub is not asked"
        else:
            why = (
                f"{HfApi().endpoint} cannot be reached or the connection broke off "
                f"({type(cause).__name__}: {_safe(cause)}); run the same command again: files that "
                "have arrived whole are not sent again"
            )
        raise UnreachableError(f"{failed}: {why}") from error


def _refusal(error: errors.HfHubHTTPError) -> str:
    """An answer of the Hub as a reason, and what the user can do."""
    token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the one of `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its terms on its page first, with your token's account"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        seen = f"the token in use ({token}) may not see it" if get_token() else "no token is set"
        return f"the Hub has no such model, or it is private and {seen}"
    status = error.response.status_code
    if status == 401:
        return (
            f"the Hub does not accept the token in use ({token}): it is wrong or has expired; "
            "HF_TOKEN comes before what `hf auth login` stores"
        )
    if status == 403:
        return (
            f"the token in use ({token}) is valid but has no right to this: the repository or its "
            f"namespace is somebody else's, or the token may only read "
            f"({error.response.headers.get('X-Error-Message') or _safe(error)})"
        )
    if status == 409:
        return f"a repository of that name exists but cannot be seen ({_safe(error)})"
    if status == 412:
        return "somebody else has pushed to it in the meantime; look at it, then push again"
    return f"the Hub answered {status}: {_safe(error)}"


def _safe(error: Exception) -> str:
    """The text of an error in one line, without the token."""
    text, token = one_line(error), get_token()
    return text.replace(token, "***") if token else text
