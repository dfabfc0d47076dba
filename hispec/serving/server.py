"""The process: its socket, uvicorn, and what signals do."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hispec.serving.batching.scheduler import Scheduler


class Server(uvicorn.Server):
    """Ends, at the first SIGTERM or SIGINT, once all running requests are answered; new ones are
    refused meanwhile. A second signal gives the running ones up."""

    def __init__(self, app: FastAPI, scheduler: Scheduler) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False))
        self._scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._scheduler.draining:
            self._scheduler.give_up()
        else:
            self._scheduler.drain(self._end)

    def _end(self) -> None:
        self.should_exit = True


def serve(
    app: FastAPI, scheduler: Scheduler, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Answer requests until a signal ends the process.

    Args:
        say: called with the address once it is listened at.

    Raises:
        OSError: the address cannot be had.
    """
    family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.create_server(place[:2], family=family) as listening:
        at = listening.getsockname()
        name = f"[{at[0]}]" if family == socket.AF_INET6 else at[0]
        say(f"http://{name}:{at[1]}/")
        scheduler.start()
        Server(app, scheduler).run(sockets=[listening])
