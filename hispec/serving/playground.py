"""The playground: a page at `/` that chats with the served model and shows how it decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
_OWN = ("script-src", "style-src", "img-src", "connect-src")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; " + "; ".join(f"{kind} 'self'" for kind in _OWN),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask again after an update
}
"""The page loads nothing but its own files, runs no inline script, and is in nobody's frame."""


class _Files(StaticFiles):
    """Files with these headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_playground(app: FastAPI) -> None:
    """Serve the page at `/` and its files at `/static`. They hold no secret and need no key; what
    they ask the API for does."""
    app.mount("/static", _Files(directory=STATIC))

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=HEADERS)
