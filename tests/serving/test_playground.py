"""The playground in a real browser, on a real server with a tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from conftest import ROOT
from playground_page import CHROMIUM, FLAGS, opened, traced
from serve_process import Served, served

STATIC = ROOT / "hispec" / "serving" / "static"
CLASSES = {-1: "free", 2: "exit0", 4: "exit1", 6: "full"}
"""CSS class of tokens of the tiny model, by depth."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:  # with an empty profile of its own
        found = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(ee) -> Iterator[Served]:
    with served(ee, "--backend", "eager") as found:
        yield found


@pytest.fixture(scope="module")
def url(server) -> str:
    return server.url


@pytest.fixture(scope="module")
def locked(ee) -> Iterator[tuple[str, str]]:
    """(address, key) of a server that wants a key."""
    with served(ee, "--backend", "eager", "--api-key", "sk-hidden") as found:
        yield found.url, "sk-hidden"


@pytest.fixture
def ui(browser, url):
    with opened(browser, url) as found:
        yield found.open()


def test_the_page_shows_the_model_and_its_choices(ui):
    assert "6 layers" in ui.text("#model")
    assert "float32" in ui.text("#model")
    legend = ["free draft", "exit at depth 2", "exit at depth 4", "full model (depth 6)"]
    assert ui.text("#legend").split("\n") == legend
    assert ui.page.locator("#exits label").all_inner_texts() == ["depth 2", "depth 4"]
    drafters = ui.page.locator("#drafter option").all_inner_texts()
    assert drafters[0] == "auto"
    assert {"exit", "lookup", "recycle", "lookup+exit", "recycle+exit"} <= set(drafters)
    assert ui.page.is_hidden("#key-form")
    assert ui.page.is_hidden("#trouble")


def test_an_answer_streams_in_in_the_colours_of_its_exits(ui, lm):
    ui.set(max_tokens=60)
    ui.page.check("input[value=exits]")
    ui.page.evaluate(
        """() => {
          window.lengths = [];
          const log = document.getElementById("log");
          new MutationObserver(() => window.lengths.push(log.querySelectorAll(".tokens .t").length))
            .observe(log, { childList: true, subtree: true });
        }"""
    )
    answer = ui.send("Tell me a story.")
    found = traced(answer)
    assert ui.tokens() == [(text, CLASSES[depth]) for text, depth in found]
    assert len({depth for _, depth in found}) > 1
    assert len(set(ui.page.evaluate("window.lengths"))) > 5  # not all at once
    assert ui.answer() == lm.generate("Tell me a story.", ladder="plain", max_new_tokens=60).text[0]
    figures = ui.text(".figures")
    told = answer[-1]["usage"]
    assert f"{told['completion_tokens']} tokens in {told['hispec']['seconds']:.2f} s" in figures
    assert f"{told['hispec']['tokens_per_second']:.1f} tokens/s" in figures
    assert f"{told['hispec']['tokens_per_target_pass']:.2f} tokens per pass" in figures
    # Colour is not the only sign.
    span = ui.page.locator(".tokens .exit0").first
    assert span.get_attribute("title") == "exit at depth 2"
    assert span.evaluate("s => getComputedStyle(s).textDecorationStyle") == "dashed"
    # A screen reader hears the end of the text, and that it is the end.
    assert ui.page.get_attribute("#announce", "aria-live") == "polite"
    assert "60 tokens in" in ui.page.text_content("#announce")
    assert ui.page.get_attribute(".tokens", "aria-busy") == "false"


def test_rounds_and_acceptance_are_those_of_the_stream(ui):
    ui.set(max_tokens=48)
    ui.page.check("input[value=exits]")
    ui.page.select_option("#drafter", "lookup+exit")
    answer = ui.send("one two three one two three one two")
    rounds = [chunk["hispec"] for chunk in answer if chunk.get("hispec", {}).get("round")]
    assert ui.text("#at-number") == f"{len(rounds)} of {len(rounds)}"
    drafts = sum(r["round"]["drafted"] for r in rounds)
    assert drafts > 0
    for number in {0, 1, len(rounds) // 2, len(rounds) - 1}:
        ui.page.locator("#at").fill(str(number + 1))
        drafted, accepted = (rounds[number]["round"][key] for key in ("drafted", "accepted"))
        lanes = ui.page.locator("#round .lane")
        assert lanes.nth(0).locator(".t").count() == drafted
        assert lanes.nth(1).locator(".yes").count() == accepted
        assert lanes.nth(1).locator(".no").count() == drafted - accepted
        assert lanes.nth(2).locator(".t").count() == len(rounds[number]["tokens"])
        words = ui.text("#round-words")
        assert words.startswith(f"{drafted} drafted" if drafted else "No draft")
        # The tokens of the round are marked in the text.
        marked = ui.page.locator(".tokens .now").all_text_contents()
        assert marked == [token["text"] for token in rounds[number]["tokens"]]
    told = answer[-1]["usage"]["hispec"]
    bars = ui.page.locator("#bars li").all_inner_texts()
    counts = {int(depth): count for depth, count in told["drafted_per_exit"].items() if count}
    assert len(bars) == len(counts)
    for depth, bar in zip(sorted(counts), bars, strict=True):
        accepted = told["accepted_per_exit"][str(depth)]
        assert f"{accepted} of {counts[depth]} draft" in bar
        assert f"{100 * accepted / counts[depth]:.0f}%" in bar


def test_a_replay_goes_through_the_phases_of_a_round(ui):
    from playwright.sync_api import expect

    ui.set(max_tokens=12).send("Again")
    ui.page.locator("#at").fill("1")
    ui.page.click("#replay")
    assert ui.text("#replay") == "Pause"
    for phase in "123":
        ui.page.wait_for_selector(f"#round[data-phase='{phase}']")
    expect(ui.page.locator("#at")).to_have_value("2")
    ui.page.click("#replay")
    assert ui.text("#replay") == "Replay"


def test_stop_ends_the_request_and_keeps_what_came(ui, server, lm):
    ui.set(max_tokens=400).page.fill("#prompt", "Count.")
    ui.page.click("#send")
    ui.page.wait_for_selector(".tokens .t >> nth=5", state="attached")
    with ui.page.expect_event("requestfailed"):  # how a browser calls a request that was aborted
        ui.page.click("#stop")
    ui.page.wait_for_selector("#send:enabled")
    assert "stopped" in ui.text(".figures")
    assert ui.page.is_hidden("#trouble")
    whole = lm.generate("Count.", ladder="plain", max_new_tokens=400).text[0]
    assert 0 < len(ui.answer()) < len(whole)
    assert whole.startswith(ui.answer())
    assert ui.page.evaluate("document.activeElement.id") == "prompt"
    server.until(lambda: server.metric("rows_running") == 0)
    assert len(traced(ui.set(max_tokens=5).send("Go on."))) == 5


def test_the_ladder_and_the_settings_are_what_is_asked_for(ui):
    def asked(message: str) -> dict:
        with ui.page.expect_request("**/v1/chat/completions") as request:
            ui.send(message)
        return request.value.post_data_json

    ui.set(max_tokens=9, temperature=0.7, seed=11, system="Be brief.")
    body = asked("Hello")
    assert body["hispec"] == {"ladder": "auto", "trace": True}
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (9, 0.7, 11)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    ui.page.uncheck("#exits input[value='4']")  # which chooses the exits
    ui.page.select_option("#drafter", "exit")
    ui.set(draft_length=3)
    first = ui.answer()
    body = asked("And now?")
    assert body["hispec"] == {
        **{"ladder": [2, 6], "drafter": "exit", "draft_length": 3, "trace": True},
    }
    assert {name for _, name in ui.tokens()} <= {"exit0", "full"}
    # Further turns send what was said before.
    said = [message["content"] for message in body["messages"]]
    assert said == ["Be brief.", "Hello", first, "And now?"]
    ui.page.check("input[value=plain]")
    assert ui.page.is_disabled("#drafter")
    assert ui.page.is_disabled("#compare")
    assert asked("Plainly?")["hispec"] == {"ladder": "plain", "trace": True}
    assert {name for _, name in ui.tokens()} == {"full"}
    ui.page.click("#clear")
    assert ui.page.locator(".turn").count() == 0
    assert len(asked("Anew")["messages"]) == 2


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_compare_shows_both_clocks_and_that_the_texts_are_equal(ui, temperature):
    ui.set(max_tokens=40, temperature=temperature, seed="").page.check("input[value=exits]")
    bodies: list[dict] = []
    ui.page.on("request", lambda r: r.method == "POST" and bodies.append(r.post_data_json))
    ui.send("Say it twice.", "#compare")
    assert [body["hispec"]["ladder"] for body in bodies] == ["plain", [2, 4, 6]]
    assert bodies[0]["seed"] == bodies[1]["seed"] is not None
    plain, chosen = (ui.tokens(f".answer >> nth={number}") for number in (0, 1))
    assert {name for _, name in plain} == {"full"}
    assert len({name for _, name in chosen}) > 1
    assert "".join(text for text, _ in plain) == "".join(text for text, _ in chosen) != ""
    verdict = ui.text(".verdict")
    assert verdict.startswith("The texts are equal. ")
    clocks = ui.page.locator(".figures").all_inner_texts()
    speed = [float(re.search(r"([\d.]+) tokens/s", clock)[1]) for clock in clocks]
    ratio = float(re.search(r"([\d.]+)x the speed", verdict)[1])
    assert ratio == pytest.approx(speed[1] / speed[0], abs=0.02, rel=0.02)
    assert f"{ratio:.2f}x plain" in clocks[1]


def test_an_error_stands_where_it_happened(ui):
    ui.set(max_tokens=5, temperature=-1)
    ui.page.fill("#prompt", "Hello")
    with ui.page.expect_response("**/v1/chat/completions") as response:
        ui.page.click("#send")
    ui.page.wait_for_selector("#trouble:visible")
    assert 400 <= response.value.status < 500
    assert ui.text("#trouble") == response.value.json()["error"]["message"]
    assert ui.page.get_attribute("#trouble", "role") == "alert"
    assert ui.page.get_attribute("#temperature", "aria-invalid") == "true"
    assert ui.page.input_value("#prompt") == "Hello"  # to be sent again
    ui.set(temperature=0)
    with ui.page.expect_request("**/v1/chat/completions") as request:
        ui.send("Hello")
    assert len(request.value.post_data_json["messages"]) == 1  # what failed was never said
    assert ui.page.is_hidden("#trouble")
    assert ui.page.locator(".turn").count() == 1


def test_a_server_that_is_gone_is_named(browser, url):
    with opened(browser, url) as ui:
        ui.open().page.context.set_offline(True)
        ui.page.fill("#prompt", "Hello")
        ui.page.click("#send")
        ui.page.wait_for_selector("#trouble:visible")
        assert ui.text("#trouble") == "The server cannot be reached."
        ui.page.context.set_offline(False)
        assert traced(ui.set(max_tokens=3).send("Hello"))


def test_a_key_is_asked_for_only_by_a_server_that_wants_one(browser, locked):
    url, key = locked
    with opened(browser, url) as ui:
        ui.page.goto(url)
        ui.page.wait_for_selector("#key-form:visible")
        assert ui.page.is_disabled("#send")
        for tried in ("wrong", key):
            ui.page.fill("#key", tried)
            ui.page.keyboard.press("Enter")
            ui.page.wait_for_selector("#key-trouble:visible" if tried != key else "#send:enabled")
        assert ui.page.is_hidden("#key-form")
        assert traced(ui.set(max_tokens=4).send("Hello"))
        # The page keeps nothing.
        assert ui.page.context.cookies() == []
        assert ui.page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert key not in ui.page.content()
        ui.page.reload()
        ui.page.wait_for_selector("#key-form:visible")


def test_markup_in_a_text_stays_text(ui):
    ui.set(max_tokens=3).send("<img src=x onerror=alert(1)><b>bold</b>")
    assert ui.text(".user") == "<img src=x onerror=alert(1)><b>bold</b>"
    assert ui.page.locator(".log img, .log b").count() == 0


def test_a_narrow_screen_needs_no_sideways_scrolling(browser, url):
    size = {"width": 320, "height": 568}
    with opened(browser, url, viewport=size, has_touch=True, is_mobile=True) as ui:
        ui.open()
        assert ui.page.get_attribute("#settings", "open") is None  # out of the way
        box = ui.page.locator("#send").bounding_box()
        assert box["y"] + box["height"] <= 568  # within reach without scrolling
        ui.page.tap("summary")
        ui.set(max_tokens=40).send("w" * 300, "#compare")
        assert ui.page.evaluate("document.documentElement.scrollWidth") == 320
        edges = ui.page.locator("button:visible, input:visible, select:visible").evaluate_all(
            "all => all.map(e => e.getBoundingClientRect()).map(r => [r.left, r.right])"
        )
        assert all(left >= 0 and right <= 320 for left, right in edges)


def test_the_keyboard_alone_is_enough(ui):
    keys, focus = ui.page.keyboard, "document.activeElement.id || document.activeElement.value"

    def tab_to(wanted: str, most: int = 25) -> None:
        for _ in range(most):
            keys.press("Tab")
            if ui.page.evaluate(focus) == wanted:
                style = ui.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert style != "none"  # the focus can be seen
                return
        raise AssertionError(f"Tab does not lead to {wanted}")

    tab_to("prompt")
    keys.type("First line")
    keys.press("Shift+Enter")
    keys.type("second line")
    tab_to("auto")
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    assert ui.page.is_checked("input[value=exits]")
    tab_to("max-tokens")
    keys.press("Control+a")
    keys.type("300")
    for _ in range(25):
        keys.press("Shift+Tab")
        if ui.page.evaluate(focus) == "prompt":
            break
    keys.press("Enter")
    ui.page.wait_for_selector(".tokens .t >> nth=5", state="attached")
    keys.press("Escape")
    ui.page.wait_for_selector("#send:enabled")
    assert "stopped" in ui.text(".figures")
    assert ui.text(".user") == "First line\nsecond line"
    tab_to("at")
    last = int(ui.page.input_value("#at"))
    keys.press("ArrowLeft")
    assert ui.text("#at-number").startswith(f"{last - 1} of")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_pass_the_accessibility_check(browser, url, scheme):
    from axe_playwright_python.sync_playwright import Axe

    # axe is injected into the page, whose policy allows no such script.
    with opened(browser, url, color_scheme=scheme, bypass_csp=True) as ui:
        ui.open().set(max_tokens=30).send("Hello", "#compare")
        ui.page.locator("#at").fill("2")  # tokens of a round are marked
        found = Axe().run(ui.page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
        shade = "getComputedStyle(document.body).backgroundColor"
        red = int(re.search(r"\d+", ui.page.evaluate(shade))[0])
        assert red < 60 if scheme == "dark" else red > 200


def test_colours_are_those_of_the_report():
    def colours(path) -> list[tuple[str, str]]:
        css = path.read_text(encoding="utf-8")
        return re.findall(r"--(free|exit\d|full|tint): ([\d .]+);", css)

    mine = colours(STATIC / "playground.css")
    assert len(mine) == 14
    assert mine == colours(ROOT / "hispec" / "report" / "report.css")


def test_no_script_parses_markup_and_nothing_comes_from_elsewhere():
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|document\.write", text)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file
        assert not re.search(r"localStorage|sessionStorage|\.cookie", text), file
        assert len(text.splitlines()) <= 400, file
