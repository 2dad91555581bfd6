"""The reward service: what it answers, what it refuses, and that refusing leaves it up. Real HTTP on loopback."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import resource
import runpy
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from rewards import FunctionReward, Reward, RewardBatch, RewardConfig, RewardError, RewardOutput, build_reward, to_uint8
from rewards.debug import BrightnessReward
from rewards.server import create_app, is_loopback, listen
from rewards.wire import Limits, WireError, decode_request, encode_request

served = runpy.run_path(str(Path(__file__).with_name("service.py")))["served"]
JSON = {"Content-Type": "application/json"}


def png(width: int = 4, height: int = 4, mode: str = "RGB", kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def message(images: Any = None, prompts: Any = None, metadata: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "images": [png()] if images is None else images,
        "prompts": ["a"] if prompts is None else prompts,
        "metadata": [{}] if metadata is None else metadata,
        **more,
    }


def bomb(side: int) -> str:
    """A PNG of a few kB whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6), 9)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


class TestWire:
    def test_pixels_arrive_as_they_were_rounded(self, make_batch):
        batch = make_batch(3, 5, 9)
        batch.images[0, 0, 0, :3] = torch.tensor([-0.2, 1.7, 0.5])
        found = decode_request(encode_request(batch), Limits())
        assert torch.equal(to_uint8(found.images), to_uint8(batch.images))
        assert torch.equal(found.images, to_uint8(batch.images).float().div(255))
        assert (found.prompts, found.metadata) == (batch.prompts, batch.metadata)

    def test_metadata_that_json_lacks(self, make_batch):
        for value in (torch.zeros(1), float("nan"), b"bytes"):
            with pytest.raises(RewardError, match="metadata cannot be sent"):
                encode_request(make_batch(1, metadata=[{"value": value}]))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ([], "an object with images"),
            ({"images": [png()], "prompts": ["a"]}, "an object with images"),
            (message(path="/etc/passwd"), "nothing else"),
            (message(images=png()), "must be lists"),
            (message(prompts=["a", "b"]), "1 images came with 2 prompts"),
            (message(images=[], prompts=[], metadata=[]), "1 to 4 images"),
            (message([png()] * 5, ["a"] * 5, [{}] * 5), "1 to 4 images"),
            (message(images=["/etc/passwd"]), "PNG in base64"),
            (message(images=["file:///etc/passwd"]), "PNG in base64"),
            (message(images=[{"path": "/etc/passwd"}]), "PNG in base64"),
            (message(images=[base64.b64encode(b"/etc/passwd").decode()]), "PNG in base64"),
            (message(images=[png(kind="JPEG")]), "PNG in base64"),
            (message(images=[png(kind="GIF")]), "PNG in base64"),
            (message(images=[png()[: len(png()) // 2]]), "PNG in base64"),
            (message(images=[png(mode="RGBA")]), "must be RGB"),
            (message(images=[png(mode="L")]), "must be RGB"),
            (message(images=[png(11, 10)]), "more than 100 pixels"),
            (message(images=[bomb(60_000)]), "more than 100 pixels"),
            (message([png(), png(5, 4)], ["a"] * 2, [{}] * 2), "one size"),
            (message(prompts=[3]), "prompt 0 must be a string"),
            (message(prompts=["a" * 21]), "longer than 20 characters"),
            (message(prompts=["\ud800"]), "not valid Unicode"),
            (message(metadata=["x"]), "metadata 0 must be an object"),
            (message(metadata=[{"x": "y" * 50}]), "metadata 0 is longer than 50 bytes"),
        ],
    )
    def test_a_request_that_is_refused(self, content, reason):
        limits = Limits(images=4, pixels=100, prompt_chars=20, metadata_bytes=50)
        with pytest.raises(WireError, match=reason):
            decode_request(json.dumps(content).encode(), limits)

    @pytest.mark.parametrize(
        "body",
        [b"", b"\x80\x04\x95", b"[" * 100_000, b'{"a": NaN}', b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"],
        ids=["empty", "pickle", "deep", "nan", "utf-16", "digits"],
    )
    def test_a_request_that_is_not_json(self, body):
        with pytest.raises(WireError, match="not JSON"):
            decode_request(body, Limits())


class Slow(Reward):
    """Waits for leave, and notes whether two calls were ever inside at once."""

    name = "slow"

    def __init__(self) -> None:
        self.leave, self.inside, self.most = threading.Event(), 0, 0

    def score(self, batch: RewardBatch) -> RewardOutput:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.leave.wait(30)
        time.sleep(0.01)
        self.inside -= 1
        return RewardOutput(torch.zeros(len(batch)))


def score(url: str, content: Any = None, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/score", json=message() if content is None else content, trust_env=False, **options)


@pytest.fixture(scope="module")
def url():
    with served(BrightnessReward(), limits=Limits(request_bytes=20_000, read_seconds=0.5)) as address:
        yield address


def test_health_tells_what_is_served(url):
    told = httpx.get(f"{url}/health", trust_env=False).json()
    assert told["name"] == "brightness"
    assert (told["kind"], told["differentiable"], told["uses_prompt"]) == ("pointwise", False, False)
    assert told["limits"]["request_bytes"] == 20_000
    assert Limits(**told["limits"]).pixels == Limits().pixels


def test_a_missing_score_is_null_and_a_float_keeps_its_bits():
    value = torch.tensor(1 / 3).item()

    def partly(images, prompts, metadata):
        return [value if prompt == "a" else None for prompt in prompts]

    with served(FunctionReward("partly", partly)) as url:
        answer = score(url, message([png()] * 2, ["a", "b"], [{}] * 2))
    assert answer.json() == {"scores": [value, None]}


def test_a_failing_reward_is_an_error_of_one_line_and_the_next_request_is_served():
    def moody(images, prompts, metadata):
        if "a" in prompts:
            raise RuntimeError("no such\nweights")
        return [1.0] * len(prompts)

    with served(FunctionReward("moody", moody)) as url:
        answer = score(url)
        assert answer.status_code == 500
        assert answer.json()["detail"] == "reward 'moody' failed: RuntimeError: no such weights"
        assert score(url, message(prompts=["b"])).json() == {"scores": [1.0]}


def test_a_groupwise_reward_is_not_served():
    reward = BrightnessReward()
    reward.kind = "groupwise"
    with pytest.raises(RewardError, match="only pointwise"):
        create_app(reward)


def test_a_reward_that_waits_for_a_run_is_not_served():
    args = {"members": {"a": {"type": "brightness"}}}
    with pytest.raises(RewardError, match=r"waits for a run's base evaluation.*args\.reference"):
        create_app(build_reward("committee", RewardConfig(type="ensemble", args=args)))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("gpu7", False)],
)  # fmt: skip
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_a_taken_port_is_one_line():
    with listen("127.0.0.1", 0) as first, pytest.raises(RewardError, match="cannot listen on 127.0.0.1 port"):
        listen("127.0.0.1", first.getsockname()[1])


@pytest.fixture(scope="module")
def guarded():
    with served(BrightnessReward(), token="s3cret") as address:
        yield address


class TestToken:
    @pytest.mark.parametrize(
        "given", [None, "", "s3cret", "Bearer", "Bearer  s3cret", "Bearer s3cre", "Bearer s3crett", "bearer s3cret", "Basic s3cret"]
    )  # fmt: skip
    def test_refused(self, guarded, given):
        headers = {} if given is None else {"Authorization": given}
        for answer in (score(guarded, headers=headers), httpx.get(f"{guarded}/health", headers=headers)):
            assert answer.status_code == 401
            assert "brightness" not in answer.text

    def test_accepted(self, guarded):
        headers = {"Authorization": "Bearer s3cret"}
        assert score(guarded, headers=headers).json() == {"scores": [0.0]}
        assert httpx.get(f"{guarded}/health", headers=headers).status_code == 200


class TestRefusals:
    @pytest.mark.parametrize(
        "kind", [None, "text/plain", "multipart/form-data", "application/octet-stream", "application/x-pickle"]
    )
    def test_content_type(self, url, kind):
        headers = {} if kind is None else {"Content-Type": kind}
        body = json.dumps(message()).encode()
        assert httpx.post(f"{url}/score", content=body, headers=headers).status_code == 415

    def test_declared_length(self, url):
        assert httpx.post(f"{url}/score", content=b"x" * 20_001, headers=JSON).status_code == 413

    def test_undeclared_length(self, url):
        parts = (b"x" * 5000 for _ in range(5))
        assert httpx.post(f"{url}/score", content=parts, headers=JSON).status_code == 413

    def test_a_body_that_never_ends(self, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as line:
            line.sendall(
                b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            assert line.recv(100).startswith(b"HTTP/1.1 408")

    def test_content(self, url):
        for content in (message(images=["/etc/passwd"]), message(images=[bomb(60_000)]), {"cmd": "ls"}):
            answer = score(url, content)
            assert answer.status_code == 422
            assert "\n" not in answer.json()["detail"]
        assert httpx.post(f"{url}/score", content=b"\x80\x04\x95", headers=JSON).status_code == 422

    @pytest.mark.parametrize(
        "path", ["/", "/docs", "/openapi.json", "/score/../../etc/passwd", "/etc/passwd", "/%2e%2e/etc/passwd"]
    )
    def test_path(self, url, path):
        assert httpx.get(url + path).status_code in (404, 405)

    def test_bytes_that_are_not_http(self, url):
        host, port = url.removeprefix("http://").split(":")
        for noise in (b"\x16\x03\x01\x02\x00" * 50, b"GET " + b"a" * 100_000, b"\x00" * 1000):
            with socket.create_connection((host, int(port)), timeout=20) as line, contextlib.suppress(ConnectionError):
                line.sendall(noise + b"\r\n\r\n")
                assert b" 200 " not in line.recv(100)
        assert score(url).json() == {"scores": [0.0]}


def test_a_full_queue_is_503_and_one_request_is_scored_at_a_time():
    reward = Slow()
    with served(reward, limits=Limits(queue=4)) as url, ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(score, url, timeout=60) for _ in range(12)]
        while sum(answer.done() for answer in answers) < 8:
            time.sleep(0.01)
        assert {answer.result().status_code for answer in answers if answer.done()} == {503}
        reward.leave.set()
        assert sorted(answer.result().status_code for answer in answers) == [200] * 4 + [503] * 8
        assert score(url).status_code == 200
    assert reward.most == 1


def test_a_thousand_hostile_requests_at_once_leave_it_up():
    """Each announces a body and never sends it: those in the queue run into its time limit, the others are refused."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else 65536, most))
    with served(BrightnessReward(), limits=Limits(queue=8, read_seconds=0.5)) as url:
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        with contextlib.ExitStack() as stack:
            lines = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(1000)]
            for line in lines:
                line.sendall(head)
            answers = [line.recv(12) for line in lines]
        assert {bytes(answer) for answer in answers} <= {b"HTTP/1.1 503", b"HTTP/1.1 408"}
        assert score(url, timeout=60).json() == {"scores": [0.0]}
