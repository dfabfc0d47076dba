"""The command that answers requests over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from hispec.cli.options import Backend, Base, Device, Dtype, Exits, Weights, load_model, out
from hispec.utils.console import Output, bar, quiet_transformers
from hispec.utils.settings import check

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    checkpoint: Annotated[str, typer.Argument(help="EE checkpoint, or a base with --exits")],
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one")] = 8000,
    max_rows: Annotated[int, typer.Option(help="texts decoded at a time")] = 8,
    max_queue: Annotated[int, typer.Option(help="texts that may wait; more get status 429")] = 64,
    max_prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(help="tokens of a text")] = 1024,
    max_choices: Annotated[int, typer.Option(help="texts per request: prompts times n")] = 8,
    max_body: Annotated[int, typer.Option(help="bytes of a request")] = 2**20,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="HISPEC_API_KEY", help="requests must send one of these"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of the model in requests; default: the folder's")
    ] = None,
    exits: Exits = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    backend: Backend = "auto",
    weights: Weights = "full",
) -> None:
    """Serve a model: OpenAI's API under /v1, a page to try it at /."""
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: pip install 'hispec[serve]'")
    check(0 <= port < 2**16, "port", port, "from 0 to 65535")
    check(1 <= max_rows <= 1024, "max_rows", max_rows, "from 1 to 1024")
    check(max_queue >= 0, "max_queue", max_queue, "0 or more")
    for key, value in (("max_prompt", max_prompt), ("max_new_tokens", max_new_tokens)):
        check(1 <= value <= 2**17, key, value, f"from 1 to {2**17}")
    check(max_choices >= 1, "max_choices", max_choices, "1 or more")
    check(max_body >= 1, "max_body", max_body, "1 or more")
    check(all(api_key or ["-"]), "api_key", "''", "a key that is not empty")

    from hispec.serving.app import build_app
    from hispec.serving.batching.scheduler import Scheduler
    from hispec.serving.gate import LOOPBACK
    from hispec.serving.metrics import Metrics
    from hispec.serving.server import serve as run
    from hispec.serving.service import Limits, Service

    quiet_transformers()
    lm = load_model(
        checkpoint,
        dtype=dtype,
        device=device,
        exits=exits,
        base=base,
        backend=backend,
        weights=weights,
    )
    if lm.model.engine is not None:
        lm.model.engine.load(bar)
        lm.generate("Hello", max_new_tokens=8)  # what is compiled at first use is compiled now
    limits = Limits(max_prompt, max_new_tokens, max_choices, max_body).fitted(lm)
    service = Service(lm, name or Path(checkpoint).resolve().name, limits)
    metrics = Metrics(max_rows)
    scheduler = Scheduler(lm.model, max_rows, max_queue, limits.max_prompt, metrics)
    keys, local = api_key or [], host in LOOPBACK
    if not (local or keys):
        words = f"anyone who reaches {host} can use this server; --api-key asks for a key"
        Output(stderr=True).say(f"hispec: warning: {words}")
    app = build_app(service, scheduler, keys, local=local and not keys)
    run(app, scheduler, host, port, lambda url: out.say(f"serving {service.name} at {url}"))
