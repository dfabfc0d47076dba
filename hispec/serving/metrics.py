"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hispec.serving.batching.jobs import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, max_rows: int) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"hispec_{name}", about, labels, registry=registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"hispec_{name}_seconds", about, buckets=_SECONDS, registry=registry)

        self.requests = counter("requests", "Answers by endpoint and HTTP status", "path", "status")
        self.texts = counter("texts", "Texts that ended, by reason", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read")
        self.new_tokens = counter("new_tokens", "Tokens that were made")
        self.drafted = counter("drafted_tokens", "Draft tokens by exit; -1: free drafter", "exit")
        self.accepted = counter("accepted_tokens", "Accepted draft tokens by exit", "exit")
        self.passes = counter("target_passes", "Passes of the full model, per row")
        self.running = Gauge("hispec_rows_running", "Rows that decode", registry=registry)
        self.waiting = Gauge("hispec_queue_waiting", "Texts that wait", registry=registry)
        Gauge("hispec_rows_max", "Rows that may decode", registry=registry).set(max_rows)
        self.queued_for = seconds("queue", "Time in the queue")
        self.first_token = seconds("time_to_first_token", "From request to first token")
        self.per_token = seconds("time_per_token", "Mean time of each further token of a text")
        self.whole = seconds("text", "From request to end of text")

    def ended(self, reason: str, usage: Usage) -> None:
        """Count a text that has ended, or was cut off (`cancelled`)."""
        self.texts.labels(reason).inc()
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.new_tokens.inc(usage.new_tokens)
        self.passes.inc(usage.passes)
        for exit, count in usage.drafted.items():
            self.drafted.labels(str(exit)).inc(count)
        for exit, count in usage.accepted.items():
            self.accepted.labels(str(exit)).inc(count)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
