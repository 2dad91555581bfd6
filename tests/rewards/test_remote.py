"""The client of a reward service: equal scores, retries, missing scores and errors. Real HTTP on loopback."""

from __future__ import annotations

import json
import runpy
import threading
from pathlib import Path

import httpx
import pytest
import torch

from rewards import (
    FunctionReward,
    Reward,
    RewardConfig,
    RewardError,
    RewardOutput,
    build_reward,
    checked_score,
    to_uint8,
)
from rewards.debug import BrightnessReward
from rewards.jpeg import JPEGReward
from rewards.remote import RemoteReward
from rewards.wire import Limits, WireError, decode_response

SERVICE = runpy.run_path(str(Path(__file__).with_name("service.py")))
served, proxy, chaos, KINDS = (SERVICE[name] for name in ("served", "proxy", "chaos", "KINDS"))
FAST = {"timeout": 20.0, "backoff": 0.01}


def connect(url: str, **args) -> Reward:
    reward = build_reward("far", RewardConfig(type="remote", args={"url": url, **FAST, **args}))
    reward.setup(torch.device("cpu"), torch.float32)
    return reward


def rounded(batch):
    """The same batch, of the images that a service sees."""
    batch.images = to_uint8(batch.images).float().div(255)
    return batch


@pytest.fixture(scope="module")
def url():
    with served(BrightnessReward()) as address:
        yield address


class TestAnswer:
    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (b"", "not JSON"),
            (b"<html>", "not JSON"),
            (b'{"scores": [NaN, 1]}', "not JSON, or NaN"),
            (b'{"scores": [1, -Infinity]}', "not JSON, or NaN"),
            (b"[1, 2]", "no scores"),
            (b'{"score": [1, 2]}', "no scores"),
            (b'{"scores": [1]}', "as many numbers, got 1"),
            (b'{"scores": [1, 2, 3]}', "as many numbers, got 3"),
            (b'{"scores": 2}', "as many numbers, got int"),
            (b'{"scores": [1, "2"]}', "neither a number nor null"),
            (b'{"scores": [1, true]}', "neither a number nor null"),
            (b'{"scores": [1, [2]]}', "neither a number nor null"),
            (b'{"scores": [1, 1e400]}', "not finite"),
            (b'{"scores": [1, 1e39]}', "not finite"),
            (b'{"scores": [1, ' + b"9" * 400 + b"]}", "too large"),
            (b'{"scores": [1, 2], "components": {"a": [1]}}', "component 'a' of 2 images"),
            (b'{"scores": [1, 2], "components": [1]}', "not an object"),
            (b'{"scores": [1, 2], "uncertainty": [1]}', "uncertainty of 2 images"),
        ],
    )
    def test_refused(self, answer, reason):
        with pytest.raises(WireError, match=reason):
            decode_response(answer, 2)

    def test_null_is_missing(self):
        assert decode_response(b'{"scores": [null, 2]}', 2).valid.tolist() == [False, True]


class TestScores:
    @pytest.mark.parametrize("reward", [BrightnessReward(), JPEGReward()], ids=["brightness", "jpeg"])
    def test_equal_local_ones_to_the_last_bit(self, make_batch, reward):
        with served(reward) as address:
            far = checked_score(connect(address, batch=3), rounded(make_batch(10, 16, 24)))
        near = checked_score(reward, rounded(make_batch(10, 16, 24)))
        assert torch.equal(far.scores, near.scores)
        assert far.components.keys() == near.components.keys()
        assert all(torch.equal(far.components[key], near.components[key]) for key in near.components)

    def test_see_prompts_and_metadata_and_keep_missing_ones(self, make_batch):
        def row(images, prompts, metadata):
            return [None if "3" in p else m["row"] for p, m in zip(prompts, metadata, strict=True)]

        with served(FunctionReward("row", row)) as address:
            output = checked_score(connect(address, batch=2), make_batch(5))
        assert output.scores.nan_to_num(-1).tolist() == [0, 1, 2, -1, 4]
        assert set(output.info["reason"]) == {""}  # a missing score is no failure of the service

    def test_carry_uncertainty(self, make_batch):
        class Sure(Reward):
            name = "sure"

            def score(self, batch):
                means = batch.images.mean(dim=(1, 2, 3))
                return RewardOutput(means, uncertainty=means / 10)

        with served(Sure()) as address:
            output = checked_score(connect(address, batch=2), make_batch(4))
        assert output.uncertainty is not None
        assert torch.equal(output.uncertainty, output.scores / 10)

    def test_of_no_images(self, url, make_batch):
        assert checked_score(connect(url), make_batch(4).select(torch.tensor([], dtype=torch.long))).scores.shape == (
            0,
        )

    def test_are_asked_for_from_several_threads(self, url, make_batch):
        reward, found = connect(url, batch=2), {}
        threads = [
            threading.Thread(target=lambda k=k: found.update({k: reward.score(make_batch(4, seed=k)).scores}))
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k in range(4):
            assert torch.equal(found[k], BrightnessReward().score(rounded(make_batch(4, seed=k))).scores)


class TestRetries:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_trouble_is_repeated(self, url, make_batch, kind):
        with proxy(url, lambda number, body: kind if number < 2 else None) as front:
            output = checked_score(
                connect(front.url, retries=2, timeout=2.0 if kind == "delay" else 20.0), make_batch(3)
            )
            assert front.calls == 3
        assert torch.equal(output.scores, BrightnessReward().score(rounded(make_batch(3))).scores)

    def test_an_answer_after_the_timeout_is_not_waited_for(self, url, make_batch):
        with proxy(url, lambda number, body: "delay" if number == 0 else None) as front:
            front.delay = 60.0
            output = checked_score(connect(front.url, retries=1, timeout=1.0), make_batch(2))
            assert (front.calls, front.waited) == (2, 0)
        assert output.valid.all()

    def test_scores_of_a_chaotic_service_equal_a_healthy_ones(self, url, make_batch):
        with proxy(url, chaos(seed=1, share=0.3, most_in_a_row=3)) as front:
            front.delay = 0.1
            output = checked_score(connect(front.url, batch=1, max_in_flight=8), make_batch(60))
            assert set(front.troubles) == set(KINDS)
            assert front.calls == 60 + sum(front.troubles.values())
        assert torch.equal(output.scores, BrightnessReward().score(rounded(make_batch(60))).scores)

    def test_a_request_that_never_succeeds_has_no_score_and_a_reason(self, url, make_batch):
        def choose(number, body):
            return "500" if "prompt 4" in json.loads(body)["prompts"] else None

        with proxy(url, choose) as front:
            output = checked_score(connect(front.url, batch=2, retries=1), make_batch(7))
            assert front.troubles == {"500": 2}
        assert output.valid.tolist() == [True] * 4 + [False] * 2 + [True]
        assert output.info["reason"][4] == "it answered 500: out of luck"
        assert torch.equal(output.scores[:4], BrightnessReward().score(rounded(make_batch(7))).scores[:4])

    def test_max_in_flight_requests_at_a_time(self, url, make_batch):
        together, lock, inside = threading.Barrier(3), threading.Lock(), [0, 0]

        def meet():
            with lock:
                inside[0] += 1
                inside[1] = max(inside)
            together.wait(30)  # breaks, and the request fails, if fewer than three ever come together
            with lock:
                inside[0] -= 1

        with proxy(url, lambda number, body: None) as front:
            front.meet = meet
            assert checked_score(connect(front.url, batch=1, max_in_flight=3, retries=0), make_batch(12)).valid.all()
        assert inside == [0, 3]


class TestGone:
    def test_a_dead_service_is_an_error(self, url, make_batch):
        with proxy(url, lambda number, body: None) as front:
            reward = connect(front.url)
            assert checked_score(reward, make_batch(2)).valid.all()
            front.dead = True
            with pytest.raises(
                RewardError, match=r"^reward 'far': the service at .* does not answer any more .*start it again"
            ):
                checked_score(reward, make_batch(2))
            front.dead = False
            assert checked_score(reward, make_batch(2)).valid.all()

    def test_a_service_that_is_up_and_never_scores_is_an_error_of_the_third_call(self, url, make_batch):
        troubled = [True]
        with proxy(url, lambda number, body: "500" if troubled[0] else None) as front:
            reward = connect(front.url, retries=0)
            for _ in range(2):
                assert not checked_score(reward, make_batch(2)).valid.any()
            troubled[0] = False
            assert checked_score(reward, make_batch(2)).valid.all()  # the count begins anew
            troubled[0] = True
            for _ in range(2):
                assert not checked_score(reward, make_batch(2)).valid.any()
            with pytest.raises(
                RewardError, match="is up, but 3 calls in a row got no score .it answered 500: out of luck"
            ):
                checked_score(reward, make_batch(2))

    def test_nobody_listens(self):
        with pytest.raises(
            RewardError, match=r"^reward 'far': the service at http://127.0.0.1:9 does not answer .ConnectError"
        ):
            connect("http://127.0.0.1:9", retries=1)

    def test_something_else_listens(self, url):
        with pytest.raises(RewardError, match="refused a request: 404: Not Found; give the address"):
            connect(f"{url}/elsewhere")


class TestRefused:
    def test_a_refusal_is_not_repeated_and_says_why(self, make_batch):
        with (
            served(BrightnessReward(), limits=Limits(prompt_chars=5)) as address,
            proxy(address, lambda number, body: None) as front,
        ):
            with pytest.raises(RewardError, match="refused a request: 422: prompt 0 is longer than 5 characters"):
                checked_score(connect(front.url), make_batch(2))
            assert front.calls == 1

    def test_token(self, monkeypatch, make_batch):
        with served(BrightnessReward(), token="s3cret") as address:
            with pytest.raises(
                RewardError, match="401: the bearer token is missing or wrong; name the environment variable"
            ):
                connect(address)
            with pytest.raises(RewardError, match="environment variable REWARD_TOKEN is not set"):
                connect(address, token_env="REWARD_TOKEN")
            for wrong, reason in (
                ("wr0ng", "401"),
                ("wr0ng\nX-Evil: 1", "must be of ASCII"),
                ("wr0ng€", "must be of ASCII"),
            ):
                monkeypatch.setenv("REWARD_TOKEN", wrong)
                with pytest.raises(RewardError, match=reason) as caught:
                    connect(address, token_env="REWARD_TOKEN")
                assert "wr0ng" not in str(caught.value)
            monkeypatch.setenv("REWARD_TOKEN", "s3cret")
            assert checked_score(connect(address, token_env="REWARD_TOKEN"), make_batch(2)).valid.all()

    def test_images_beyond_the_services_limits(self, make_batch):
        with served(BrightnessReward(), limits=Limits(images=2, pixels=300, request_bytes=4000)) as address:
            reward = connect(address)
            assert checked_score(reward, make_batch(5)).valid.all()  # cut into requests of two
            with pytest.raises(RewardError, match="takes images of 300 pixels, these are 24 x 16"):
                checked_score(reward, make_batch(1, 16, 24))
            with pytest.raises(RewardError, match="takes 4000 bytes, a request of 2 images has"):
                checked_score(reward, make_batch(2, 17, 17, metadata=[{"x": "y" * 2000}] * 2))

    def test_not_set_up(self, make_batch):
        with pytest.raises(RewardError, match="is not set up"):
            RemoteReward("http://127.0.0.1:9").score(make_batch(1))

    @pytest.mark.parametrize(
        ("args", "reason"),
        [
            ({"url": "127.0.0.1:8400"}, "url must be http"),
            ({"url": "file:///etc/passwd"}, "url must be http"),
            ({"url": "http://"}, "url must be http"),
            ({"url": 8400}, "url must be http"),
            ({"url": "http://me:word@host:1"}, "must not hold a password"),
            ({"url": "http://host:99999"}, "url must be http"),
            ({"url": "http://host:1", "timeout": 0}, "timeout must be positive"),
            ({"url": "http://host:1", "retries": -1}, "retries must be 0 or more"),
            ({"url": "http://host:1", "batch": 0}, "batch 1 or more"),
            ({"url": "http://host:1", "token": "s3cret"}, "unknown argument 'token'; did you mean 'token_env'"),
            ({}, "args must give url"),
        ],
    )
    def test_arguments(self, args, reason):
        with pytest.raises(RewardError, match=reason) as caught:
            build_reward("far", RewardConfig(type="remote", args=args))
        assert "word" not in str(caught.value).replace("password", "")


def test_it_takes_on_what_the_service_says_of_its_reward():
    with served(BrightnessReward()) as address:
        reward = connect(address)
        assert (reward.uses_prompt, reward.deterministic, reward.differentiable) == (False, True, False)
        assert httpx.get(f"{address}/health").json()["name"] == "brightness"
