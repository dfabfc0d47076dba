"""The server against its own description: requests that schemathesis makes of it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_process import MODEL, served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
TIMES = 60


@pytest.fixture(scope="module")
def server(ee):
    limits = ("--max-prompt", "100", "--max-new-tokens", "4", "--max-body", "20000")
    with served(ee, *limits) as found:
        yield found


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(f"{server.url}openapi.json")


@pytest.mark.parametrize("mode", GenerationMode)
def test_what_is_sent_is_answered_as_described(description, mode):
    """Right and wrong requests: success or one clean 4xx."""
    sent = []
    for found in description.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=TIMES, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case):
            if isinstance(case.body, dict) and case.body.get("stream"):
                case.body["stream"] = False  # streams are checked with the openai client
            sent.append(case.call_and_validate(checks=CHECKS).status_code)

        try:
            check()
        except Unsatisfiable:  # nothing can be wrong where nothing is sent
            assert mode is GenerationMode.NEGATIVE, operation.label
    assert len(sent) >= 2 * TIMES
    assert any(status >= 400 for status in sent) or mode is GenerationMode.POSITIVE


def test_no_row_is_left(server):
    server.until(lambda: not server.metric("rows_running"))
    answer = server.http.post("v1/completions", json={"model": MODEL, "prompt": "a", "n": 1})
    assert answer.status_code == 200
