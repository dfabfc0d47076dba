"""Errors as OpenAI's API shapes them."""

from __future__ import annotations

import re
from typing import Any

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_KEY = re.compile(r"([\w.\[\]]+)(?:=| is missing)")
_UNKNOWN = re.compile(r"unknown key (['\"])(.*?)\1(?:$|;)", re.DOTALL)
_LONGEST = 500  # characters of a message


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that is wrong.
        code: for programs, such as `model_not_found`.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @classmethod
    def of(cls, error: ValueError, prefix: str = "") -> ApiError:
        """The error of a request with a wrong value, as `hispec.utils.settings.check` and
        `hispec.utils.schema` word it: the field's name comes first.

        Args:
            prefix: put before that name.
        """
        message = str(error)
        if unknown := _UNKNOWN.match(message):
            param = unknown[2]
        else:
            param = found[1] if (found := _KEY.match(message)) else ""
        return cls(400, message[:_LONGEST], param=(prefix + param)[:_LONGEST] if param else None)

    def body(self) -> dict[str, Any]:
        """The response as JSON."""
        kind = _KINDS.get(self.status)
        if kind is None:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
