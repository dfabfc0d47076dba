"""The playground's page in a browser, as a user sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Ui:
    """The page as a user sees it."""

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def open(self) -> Ui:
        self.page.goto(self.url)
        self.page.wait_for_selector("#send:enabled")
        return self

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def set(self, **fields: object) -> Ui:
        for name, value in fields.items():
            self.page.fill(f"#{name.replace('_', '-')}", str(value))
        return self

    def send(self, message: str, button: str = "#send") -> list[dict]:
        """Send a message and wait for the end; returns the chunks of the (last) answer."""
        self.page.fill("#prompt", message)
        with self.page.expect_response("**/v1/chat/completions") as first:
            self.page.click(button)
        response = first.value
        if button == "#compare":
            with self.page.expect_response("**/v1/chat/completions") as second:
                pass
            response = second.value
        response.finished()
        self.page.wait_for_selector("#stop:disabled")
        return chunks(response.text())

    def tokens(self, answer: str = ".answer >> nth=-1") -> list[tuple[str, str]]:
        """(text, class of its colour) of each token of an answer."""
        spans = self.page.locator(answer).locator(".tokens .t")
        found = spans.evaluate_all("all => all.map(s => [s.textContent, s.className])")
        return [(text, name.split()[1]) for text, name in found]

    def answer(self) -> str:
        return "".join(text for text, _ in self.tokens())


def chunks(body: str) -> list[dict]:
    """The chunks of an event stream that ended as it should."""
    data = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data")]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


def traced(answer: list[dict]) -> list[tuple[str, int]]:
    """(text, depth) of each token that a stream brought."""
    return [
        (token["text"], token["exit"])
        for chunk in answer
        for token in chunk.get("hispec", {}).get("tokens", [])
    ]


@contextmanager
def opened(browser, url: str, **options) -> Iterator[Ui]:
    context = browser.new_context(**options)
    try:
        ui = Ui(context.new_page(), url)
        yield ui
        assert ui.errors == []
        assert ui.hosts <= {url.split("/")[2]}  # nothing comes from anywhere else
    finally:
        context.close()
