"""A reward as an HTTP service: POST /score and GET /health, of JSON and PNG only."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
import logging
import signal
import socket
import types
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score, one_line
from rewards.wire import Limits, WireError, decode_request, encode_response

_log = logging.getLogger("rewards.server")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Service:
    """One reward and its queue. Requests are admitted, read, then decoded two at a time and scored one at a time."""

    def __init__(self, reward: Reward, token: str | None, limits: Limits, device: torch.device) -> None:
        self.reward, self.limits, self.device = reward, limits, device
        self.secret = f"Bearer {token}".encode() if token else None
        self.admitted = 0
        self.ready = asyncio.Semaphore(2)  # the next request is decoded while one is scored
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="reward")  # networks are not thread-safe

    def check_token(self, request: Request) -> None:
        """Refuse a request without the token."""
        given = request.headers.get("authorization", "").encode()
        if self.secret is not None and not hmac.compare_digest(given, self.secret):
            raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def check_headers(self, request: Request) -> None:
        """Refuse what need not be read to be refused. The content type keeps out pages open in a browser, too."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the content type must be application/json")
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self.limits.request_bytes:
            raise HTTPException(413, f"a request may have at most {self.limits.request_bytes} bytes")

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """A place in the queue, or 503."""
        if self.admitted >= self.limits.queue:
            raise HTTPException(503, f"the queue of {self.limits.queue} requests is full", {"Retry-After": "1"})
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def body(self, request: Request) -> bytes:
        """The whole body, counted as it comes: its declared length may be false or absent."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.request_bytes:
                        raise HTTPException(413, f"a request may have at most {self.limits.request_bytes} bytes")
                    parts.append(part)
        except TimeoutError as error:
            raise HTTPException(408, "the request took too long to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(499, "the client is gone") from error
        return b"".join(parts)

    async def answer(self, request: Request) -> Response:
        """Scores of a request."""
        body = await self.body(request)
        async with self.ready:
            if await request.is_disconnected():  # it gave up while it waited
                raise HTTPException(499, "the client is gone")
            try:
                batch = await asyncio.to_thread(decode_request, body, self.limits)
            except WireError as error:
                raise HTTPException(422, str(error)) from error
            try:
                output = await asyncio.get_running_loop().run_in_executor(self.worker, self.judge, batch)
            except Exception as error:
                reason = str(error) if isinstance(error, RewardError) else one_line(error)
                _log.warning("%s", reason)
                raise HTTPException(500, reason) from error
        return Response(encode_response(output), media_type="application/json")

    def judge(self, batch: RewardBatch) -> RewardOutput:
        """Checked scores, from the thread of the reward."""
        with torch.no_grad():
            return checked_score(self.reward, dataclasses.replace(batch, images=batch.images.to(self.device)))


def create_app(
    reward: Reward, token: str | None = None, limits: Limits | None = None, device: str | torch.device = "cpu"
) -> FastAPI:
    """The service of `reward`, which is set up on `device` already; with `token`, every request must carry it.

    Raises: RewardError for a groupwise reward, whose groups a client would cut, and for one that waits for a run.
    """
    if reward.kind == "groupwise":
        raise RewardError(f"reward '{reward.name}' compares whole groups: only pointwise rewards can be served")
    if reward.needs_reference:
        raise RewardError(
            f"reward '{reward.name}' waits for a run's base evaluation, and no run reaches it here: name a run's "
            "uncertainty.json in args.reference, or set args.standardise to none"
        )
    service = _Service(reward, token, limits or Limits(), torch.device(device))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.worker.shutdown(cancel_futures=True)

    app = FastAPI(title="reward", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health(request: Request) -> dict[str, object]:
        service.check_token(request)
        return {
            "name": reward.name,
            "kind": reward.kind,
            "differentiable": False,
            "uses_prompt": reward.uses_prompt,
            "deterministic": reward.deterministic,
            "max_batch": reward.max_batch,
            "limits": dataclasses.asdict(service.limits),
        }

    @app.post("/score")
    async def score(request: Request) -> Response:
        service.check_token(request)
        service.check_headers(request)
        with service.admission():
            return await service.answer(request)

    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: RewardError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise RewardError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server of `app`, for `serve` or a thread of one's own; a stop lets requests in progress end within 30 s."""
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=30, lifespan="on"
    )
    return uvicorn.Server(settings)


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then return."""

    def end(_number: int, _frame: types.FrameType | None) -> None:
        """uvicorn raises the signal again when it is done; by then there is nothing left to stop."""

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        make_server(app).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
