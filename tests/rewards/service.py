"""Reward services for tests: the genuine server in a thread, and a proxy before it that misbehaves on purpose."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rewards import Reward
from rewards.server import create_app, listen, make_server

KINDS = ("drop", "cut", "delay", "500", "nan", "length", "garbage")


@contextlib.contextmanager
def served(reward: Reward, **options: Any) -> Iterator[str]:
    """Address of a server of `reward`; options are those of create_app."""
    reward.setup(torch.device("cpu"), torch.float32)
    listener = listen("127.0.0.1", 0)
    server = make_server(create_app(reward, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server, but for those to /score that `choose(number, body)` gives a kind of trouble."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str, choose: Callable[[int, bytes], str | None]) -> None:
        self.target = target.removeprefix("http://")
        self.choose = choose
        self.lock = threading.Lock()
        self.calls = 0
        self.troubles: Counter[str] = Counter()
        self.dead = False
        self.delay = 1.0
        self.waited = 0
        self.meet: Callable[[], Any] = lambda: None
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(*self.forward(b""))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            trouble = self.server.choose(self.server.calls, body)
            self.server.calls += 1
            if trouble:
                self.server.troubles[trouble] += 1
        self.server.meet()
        if self.server.dead or trouble == "drop":
            self.hang_up()
        elif trouble == "500":
            self.reply(500, b'{"detail": "out of luck"}')
        elif trouble == "422":
            self.reply(422, b'{"detail": "not for you"}')
        elif trouble == "garbage":
            self.reply(200, b"<html>\xff\x00 bad gateway")
        elif trouble == "delay":
            time.sleep(self.server.delay)
            self.server.waited += 1
            self.hang_up()
        else:
            self.damage(trouble, *self.forward(body))

    def damage(self, trouble: str | None, status: int, answer: bytes) -> None:
        if trouble == "cut":
            self.reply(status, answer[: len(answer) // 2], len(answer))
            self.hang_up()
            return
        if trouble in ("nan", "length"):
            scores = json.loads(answer)["scores"]
            scores = [float("nan"), *scores[1:]] if trouble == "nan" else scores + [0.5]
            answer = json.dumps({"scores": scores}).encode()
        self.reply(status, answer)

    def forward(self, body: bytes) -> tuple[int, bytes]:
        if self.server.dead:
            self.hang_up()
            raise ConnectionError
        connection = http.client.HTTPConnection(self.server.target)
        names = ("Content-Type", "Authorization")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        connection.request(self.command, self.path, body or None, headers)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, answer

    def reply(self, status: int, answer: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer) if length is None else length))
        self.end_headers()
        self.wfile.write(answer)

    def hang_up(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Silence."""


@contextlib.contextmanager
def proxy(target: str, choose: Callable[[int, bytes], str | None]) -> Iterator[Proxy]:
    """A proxy that answers until the block ends."""
    with Proxy(target, choose) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def chaos(seed: int, share: float, most_in_a_row: int) -> Callable[[int, bytes], str | None]:
    """Trouble, one kind after the other, for `share` of the calls; for one request at most `most_in_a_row` times on end."""
    draws, kinds = random.Random(seed), itertools.cycle(KINDS)
    row: Counter[bytes] = Counter()

    def choose(number: int, body: bytes) -> str | None:
        if draws.random() >= share or row[body] >= most_in_a_row:
            row[body] = 0
            return None
        row[body] += 1
        return next(kinds)

    return choose
