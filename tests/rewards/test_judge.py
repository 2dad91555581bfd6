"""The judge: its arithmetic, and its talk with a real server on loopback that speaks the protocol."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardConfig, RewardError, build_reward, checked_score
from rewards.conformance import FAIL, check
from rewards.judge import JudgeReward, log_odds, parse_score, probability

CPU, FP32 = torch.device("cpu"), torch.float32
pytest.importorskip("httpx")


def test_probability_of_yes_against_no():
    assert probability(log_odds([("Yes", -0.2), ("No", -1.8)])) == pytest.approx(0.8320184, abs=1e-7)
    assert probability(log_odds([("No", -0.2), ("Yes", -1.8)])) == pytest.approx(0.1679816, abs=1e-7)


def test_surface_forms_add_up_before_the_ratio():
    top = [
        ("Yes", math.log(0.3)),
        (" yes", math.log(0.2)),
        ("YES,", math.log(0.1)),
        ("▁No", math.log(0.2)),
        ("I", -4.0),
    ]
    assert probability(log_odds(top)) == pytest.approx(0.6 / 0.8)
    assert log_odds([("yesterday", -0.1), ("No", -1.0)]) == pytest.approx(-1.0 + 1.0)  # a longer word is no Yes


def test_an_absent_form_has_at_most_the_probability_of_the_last_token_listed():
    top = [("Yes", -0.01), ("Maybe", -5.0), ("The", -7.0)]
    assert log_odds(top) == pytest.approx(-0.01 + 7.0)
    assert math.isnan(log_odds([("Maybe", -0.1), ("The", -2.0)]))
    assert math.isnan(log_odds([]))
    assert log_odds([("Yes", -0.01), ("Maybe", -5.0), ("No", -math.inf)]) == pytest.approx(4.99)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("It is close.\n**Final Score:** 4.5", 4.5),
        ("Colour score: 2. Shape score: 4.\nFinal Score: 3", 3.0),
        ("Alignment Score: 2\nCoherence Score: 5", 3.5),
        ("<Score>4</Score>", 4.0),
        ('{"score": 2}', 2.0),
        (" 4/5.", 4.0),
        ("Final Score: 9", None),
        ("I cannot rate 4 images.", None),
        ("", None),
    ],
)
def test_number_of_an_answer(text, value):
    assert parse_score(text, 1, 5) == pytest.approx(math.nan if value is None else value, nan_ok=True)


def test_a_pattern_of_ones_own_averages_all_its_matches():
    assert parse_score("[[1]] then [[4]]", 1, 5, r"\[\[(\d)\]\]") == pytest.approx(2.5)
    assert math.isnan(parse_score("[[x]]", 1, 5, r"\[\[(.)\]\]"))


class Server(ThreadingHTTPServer):
    """Answers as vLLM does. Its opinion is the mean of the image, so the test knows it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.refused_prompt = "\0"
        self.lock = threading.Lock()
        self.busy = self.most_busy = 0
        self.gate = threading.Semaphore(0)
        self.hold = 0
        self.lists_models = self.has_logprobs = True
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.server.lists_models:
            self.answer(200, {"data": [{"id": "small-vlm"}]})
        else:
            self.answer(404, {"error": "unknown path"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            failure = self.server.failures.pop(0) if self.server.failures else 0
            self.server.busy += 1
            self.server.most_busy = max(self.server.busy, self.server.most_busy)
            if self.server.busy == self.server.hold:
                self.server.gate.release(self.server.hold)
        if self.server.hold:
            self.server.gate.acquire(timeout=20)
        with self.server.lock:
            self.server.busy -= 1
        image, text = (part for part in body["messages"][0]["content"])
        if self.server.refused_prompt in text["text"]:
            failure = 400
        if failure:
            self.answer(failure, {"error": "on purpose"})
        else:
            self.answer(200, {"choices": [self.choice(body, opinion(image), text["text"])]})

    def choice(self, body: dict, value: float, question: str) -> dict:
        if not body.get("logprobs"):
            return {"message": {"content": f"Seen. Final Score: {1 + 4 * value:.3f}"}}
        if not self.server.has_logprobs:
            return {"message": {"content": "Yes"}, "logprobs": None}
        top = [{"token": "Yes", "logprob": math.log(value)}, {"token": " no", "logprob": math.log(1 - value)}]
        return {"message": {"content": "Yes"}, "logprobs": {"content": [{"token": "Yes", "top_logprobs": top}]}}

    def answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def pixels_of(part: dict) -> np.ndarray:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def opinion(part: dict) -> float:
    return float(pixels_of(part).mean()) / 255


@pytest.fixture
def server():
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def judge(server: Server, **arguments) -> JudgeReward:
    reward = build_reward("judge", RewardConfig("judge", args={"url": server.url, "backoff": 0.0} | arguments))
    assert isinstance(reward, JudgeReward)
    reward.setup(CPU, FP32)
    return reward


def means(batch) -> torch.Tensor:
    return ((batch.images * 255).round() / 255).mean(dim=(1, 2, 3))


def test_each_image_and_prompt_reach_the_server_and_the_share_of_yes_comes_back(server, make_batch):
    batch = make_batch(4, height=6, width=10)
    output = checked_score(judge(server), batch)
    assert torch.allclose(output.scores, means(batch), atol=1e-5)
    assert torch.allclose(output.components["p_yes"], output.scores)
    assert output.uncertainty is not None
    assert torch.allclose(output.uncertainty, 4 * output.scores * (1 - output.scores))
    assert output.info["answer"] == ["Yes"] * 4
    body = next(b for b in server.bodies if "prompt 2" in b["messages"][0]["content"][1]["text"])
    sent = torch.from_numpy(pixels_of(body["messages"][0]["content"][0]).copy()).permute(2, 0, 1)
    assert torch.equal(sent, (batch.images[2] * 255).round().to(torch.uint8))
    expected = {"model": "small-vlm", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert {key: body[key] for key in expected} == expected


def test_the_rewarded_answer_can_be_no_and_the_score_its_clipped_log_odds(server, make_batch):
    batch = make_batch(3)
    batch.images[0] = 0.995
    artifacts = judge(server, question="Does this image show digital artifacts? Yes or No.", good="no")
    assert not artifacts.uses_prompt
    assert torch.allclose(checked_score(artifacts, batch).scores, 1 - means(batch), atol=1e-5)
    scores = checked_score(judge(server, good="no", output="log_odds", clip=3.0), batch).scores
    assert torch.equal(checked_score(judge(server, good=False, output="log_odds", clip=3.0), batch).scores, scores)
    assert scores[0] == -3.0  # log(1/254) and less is below
    assert torch.allclose(scores[1:], -torch.logit(means(batch)[1:]), atol=1e-4)


def test_the_number_of_an_answer_as_it_is_and_rescaled(server, make_batch):
    batch = make_batch(2)
    raw = checked_score(judge(server, mode="score"), batch).scores
    assert torch.allclose(raw, 1 + 4 * means(batch), atol=1e-3)
    assert torch.allclose(checked_score(judge(server, mode="score", rescale=True), batch).scores, (raw - 1) / 4)
    assert server.bodies[-1]["max_tokens"] == 512
    assert "logprobs" not in server.bodies[-1]


def test_further_fields_image_size_and_a_key_by_name(server, make_batch, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "a-secret")
    fields = {"max_tokens": None, "max_completion_tokens": 1}
    reward = judge(server, token_env="JUDGE_KEY", request=fields, image_size=8)
    checked_score(reward, make_batch(1, height=16, width=32))
    (body,) = server.bodies
    assert body["max_completion_tokens"] == 1
    assert "max_tokens" not in body
    assert pixels_of(body["messages"][0]["content"][0]).shape == (4, 8, 3)
    assert server.keys == ["Bearer a-secret"]
    assert "a-secret" not in repr(vars(reward))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_failure_is_tried_again(server, make_batch, status):
    server.failures = [status, status]
    assert checked_score(judge(server), make_batch(1)).valid.all()
    assert len(server.bodies) == 3


def test_one_image_that_is_refused_has_no_score_and_is_not_tried_again(server, make_batch):
    server.refused_prompt = "prompt 1"
    output = checked_score(judge(server), make_batch(3))
    assert output.valid.tolist() == [True, False, True]
    assert output.info["problem"] == ["", 'it answered 400: {"error": "on purpose"}', ""]
    assert len(server.bodies) == 3


def test_when_no_image_is_answered_the_reason_is_told(server, make_batch):
    server.failures = [500] * 8
    with pytest.raises(
        RewardError, match=r"'judge': the model server at .* answered for none of 2 images \(it answered 500"
    ):
        checked_score(judge(server), make_batch(2))
    assert len(server.bodies) == 8  # four attempts each
    server.has_logprobs = False
    with pytest.raises(RewardError, match="no top_logprobs: let the server give them, or set mode: score"):
        checked_score(judge(server), make_batch(2))


def test_at_most_max_in_flight_requests_at_a_time(server, make_batch):
    server.hold = 3  # a request is answered when three are there at once
    checked_score(judge(server, max_in_flight=3), make_batch(9))
    assert server.most_busy == 3


def test_setup_tells_what_is_wrong(server):
    with pytest.raises(RewardError, match=r"does not serve 'smal-vlm'; did you mean 'small-vlm'\?; it has small-vlm"):
        judge(server, model="smal-vlm")
    server.lists_models = False
    assert judge(server, model="any").model == "any"  # the list is not part of every service
    with pytest.raises(RewardError, match="needs the model's name: set model"):
        judge(server)
    with pytest.raises(RewardError, match="the environment variable NOT_THERE is not set"):
        judge(server, token_env="NOT_THERE")
    with pytest.raises(RewardError, match="cannot be used .*: start it, or repair url"):
        JudgeReward("http://127.0.0.1:1/v1", retries=0).setup(CPU, FP32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "yesno"}, "mode 'yesno' must be yes_no or score; did you mean 'yes_no'"),
        ({"url": "localhost:8000"}, "url must be http://HOST:PORT/v1"),
        ({"url": "http://me:key@host/v1"}, "name that by token_env"),
        ({"score_range": [5, 1]}, "score_range must be"),
        ({"retries": -1}, "retries not negative"),
    ],
)
def test_wrong_arguments_are_named_before_anything_connects(arguments, message):
    with pytest.raises(RewardError, match=re.escape(message)):
        JudgeReward(**arguments)


@pytest.mark.parametrize("mode", ["yes_no", "score"])
def test_it_keeps_the_contract(server, mode):
    verdicts = check(JudgeReward(server.url, mode=mode, backoff=0.0))
    assert [(v.point, v.detail) for v in verdicts if v.status == FAIL] == []
