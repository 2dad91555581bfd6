"""A reward that another process computes: a client of the service that `align serve-reward` starts."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, one_line
from rewards.wire import Limits, WireError, decode_object, decode_response, encode_request

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_RETRIED = frozenset({408, 429})  # and everything from 500 on
_ANSWER_BYTES = 16 * 2**20
_LOST_CALLS = 3
_ADVICE = {
    401: "name the environment variable that holds its token with args: {token_env: NAME}",
    403: "name the environment variable that holds its token with args: {token_env: NAME}",
    404: "give the address that `align serve-reward` printed, without a path behind it",
}


class _Failed(Exception):
    """An attempt that may succeed when it is repeated."""


class RemoteReward(Reward):
    """Scores of a service. It sees images as PNG: they score as `to_uint8(images) / 255` would here.

    A request is repeated on connection errors, timeouts, answers 408, 429 and 5xx, and answers that make no sense; after
    the last attempt its images have no score. Other answers 4xx, and a service that is gone, raise RewardError.
    """

    name = "remote"

    def __init__(
        self,
        url: str,
        token_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_in_flight: int = 32,
        batch: int = 16,
    ) -> None:
        """url: http(s)://HOST:PORT; token_env: environment variable that holds the bearer token.

        timeout: seconds of one attempt; backoff: seconds before the first repetition, doubled each time;
        max_in_flight: requests at a time; batch: most images of a request.
        """
        self.url = _checked_url(url)
        self.token_env = token_env
        if not timeout > 0 or not backoff >= 0:
            raise RewardError(f"timeout must be positive and backoff not negative, got {timeout} and {backoff}")
        if retries < 0 or max_in_flight < 1 or batch < 1:
            raise RewardError(
                f"retries must be 0 or more, max_in_flight and batch 1 or more, got {retries}, {max_in_flight}, {batch}"
            )
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.max_in_flight = max_in_flight
        self.batch = batch
        self.max_batch = batch * max_in_flight
        self.limits = Limits()
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(max_in_flight)
        self._lost = 0  # calls in a row without any answer

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Connect and ask the service what it is. Raises: RewardError if it does not answer, or cannot be used."""
        self._client = self._connect()
        try:
            health = _wait_for(self._repeated("GET", "/health", b"", decode_object))
        except _Failed as problem:
            raise self._error(
                f"does not answer ({problem}): start it with `align serve-reward`, or repair url"
            ) from None
        try:
            self.limits = _limits(health["limits"])
            self.uses_prompt, self.deterministic = bool(health["uses_prompt"]), bool(health["deterministic"])
        except (KeyError, TypeError):
            raise self._error("is no reward service, or one of another version of flow-align") from None

    def score(self, batch: RewardBatch) -> RewardOutput:
        """One request for each `batch` images, at most `max_in_flight` at a time; info has the reasons of failures."""
        if self._client is None:
            raise self._error("is not set up: call setup(device, dtype) first")
        if len(batch) == 0:
            return RewardOutput(torch.zeros(0))
        self._check_pixels(batch)
        pieces = list(torch.arange(len(batch)).split(min(self.batch, self.limits.images)))
        outcomes = _wait_for(self._score_all([batch.select(index) for index in pieces]))
        outputs: list[RewardOutput] = []
        failed: list[_Failed] = []
        for index, outcome in zip(pieces, outcomes, strict=True):
            if isinstance(outcome, RewardOutput):
                outputs.append(outcome)
            elif isinstance(outcome, _Failed):
                failed.append(outcome)
                outputs.append(_missing(len(index), str(outcome)))
            else:
                raise outcome
        self._lost = self._lost + 1 if len(failed) == len(pieces) else 0
        if self._lost:
            self._check_alive(failed[-1])
        return _joined(outputs)

    async def _score_all(self, pieces: list[RewardBatch]) -> list[RewardOutput | BaseException]:
        return await asyncio.gather(*(self._score_piece(piece) for piece in pieces), return_exceptions=True)

    async def _score_piece(self, piece: RewardBatch) -> RewardOutput:
        size = len(piece)
        async with self._slots:  # bodies are large: no more of them than requests
            body = await asyncio.to_thread(encode_request, piece)
            if len(body) > self.limits.request_bytes:
                raise self._error(
                    f"takes {self.limits.request_bytes} bytes, a request of {size} images has {len(body)}: "
                    f"lower args: {{batch: {self.batch}}}"
                )
            return await self._repeated("POST", "/score", body, lambda answer: decode_response(answer, size))

    async def _repeated(self, method: str, path: str, body: bytes, read: Callable[[bytes], T]) -> T:
        """`read` of the answer, after at most 1 + retries attempts. Raises: _Failed of the last one; RewardError."""
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(method, path, body, read)
            except _Failed:
                if attempt == self.retries:
                    raise
                await asyncio.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")

    async def _attempt(self, method: str, path: str, body: bytes, read: Callable[[bytes], T]) -> T:
        import httpx

        assert self._client is not None
        answer = bytearray()
        try:
            async with (
                asyncio.timeout(self.timeout),
                self._client.stream(method, self.url + path, content=body) as response,
            ):
                async for part in response.aiter_raw():
                    answer += part
                    if len(answer) > _ANSWER_BYTES:
                        raise _Failed("its answer is too long")
        except TimeoutError as error:
            raise _Failed(f"no answer within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise _Failed(one_line(error)) from error
        status = response.status_code
        if status in _RETRIED or status >= 500:
            raise _Failed(f"it answered {status}{_detail(bytes(answer))}")
        if status != 200:
            advice = f"; {_ADVICE[status]}" if status in _ADVICE else ""
            raise self._error(f"refused a request: {status}{_detail(bytes(answer))}{advice}")
        try:
            return read(bytes(answer))
        except WireError as error:
            raise _Failed(str(error)) from error

    def _check_alive(self, problem: _Failed) -> None:
        """A call got no score at all. Raises: RewardError if the service is gone, or this went on for three calls."""
        try:
            _wait_for(self._repeated("GET", "/health", b"", decode_object))
        except _Failed as worse:
            raise self._error(f"does not answer any more ({worse}): start it again, then repeat the command") from None
        if self._lost >= _LOST_CALLS:
            raise self._error(f"is up, but {self._lost} calls in a row got no score ({problem})")

    def _connect(self) -> httpx.AsyncClient:
        if find_spec("httpx") is None:
            raise RewardError(f"reward '{self.name}' needs httpx: pip install 'flow-align[serve]'")
        import httpx

        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token_env is not None:
            token = os.environ.get(self.token_env, "").strip()
            if not token:
                raise RewardError(f"reward '{self.name}': the environment variable {self.token_env} is not set")
            if not all("!" <= character <= "~" for character in token):  # httpx would show it in its error
                raise RewardError(
                    f"reward '{self.name}': the token in {self.token_env} must be of ASCII without spaces"
                )
            headers["Authorization"] = f"Bearer {token}"
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise RewardError(f"reward '{self.name}': url {self.url!r} cannot be used: {error}") from error
        host = urlsplit(self.url).hostname
        return httpx.AsyncClient(
            headers=headers,
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=self.max_in_flight + 1),
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # a proxy does not reach this machine's services
        )

    def _check_pixels(self, batch: RewardBatch) -> None:
        height, width = batch.images.shape[-2:]
        if height * width > self.limits.pixels:
            raise self._error(f"takes images of {self.limits.pixels} pixels, these are {width} x {height}")

    def _error(self, what: str) -> RewardError:
        return RewardError(f"reward '{self.name}': the service at {self.url} {what}")


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, AttributeError):
        usable = False
    if not usable:
        raise RewardError(f"url must be http://HOST:PORT or https://HOST, got {url!r}")
    if parts.username or parts.password:
        raise RewardError("url must not hold a password: put the token into an environment variable and name it")
    return url.rstrip("/")


def _detail(answer: bytes) -> str:
    """`: reason` of an answer that refuses, if it gives one."""
    try:
        reason = decode_object(answer).get("detail")
    except WireError:
        return ""
    return f": {' '.join(str(reason).split())[:300]}" if reason else ""


def _limits(told: dict[str, Any]) -> Limits:
    """Raises: TypeError if the service tells something else."""
    limits = Limits(**told)
    if any(isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 for value in told.values()):
        raise TypeError(told)
    return limits


def _missing(size: int, reason: str) -> RewardOutput:
    return RewardOutput(torch.full((size,), torch.nan), info={"reason": [reason] * size})


def _joined(outputs: list[RewardOutput]) -> RewardOutput:
    """Answers one after the other; where a request failed, everything is NaN and `reason` says why."""
    names = dict.fromkeys(name for output in outputs for name in output.components)
    blanks = [torch.full_like(output.scores, torch.nan) for output in outputs]
    uncertainty = [output.uncertainty for output in outputs]
    pairs = list(zip(outputs, blanks, strict=True))
    return RewardOutput(
        scores=torch.cat([output.scores for output in outputs]),
        components={name: torch.cat([output.components.get(name, blank) for output, blank in pairs]) for name in names},
        uncertainty=None
        if all(value is None for value in uncertainty)
        else torch.cat([blank if output.uncertainty is None else output.uncertainty for output, blank in pairs]),
        info={"reason": [text for output in outputs for text in output.info.get("reason", [""] * len(output.scores))]},
    )


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    """One loop for all services of the process, in a thread: connections outlive a call, and any thread may score."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="remote-rewards", daemon=True).start()
    return loop


def _wait_for(work: Coroutine[Any, Any, T]) -> T:
    future = asyncio.run_coroutine_threadsafe(work, _background_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
