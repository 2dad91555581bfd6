"""Training on a reward service that fails: the same run where retries suffice, masked samples where not, and a clean end."""

from __future__ import annotations

import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from align.cli import app
from align.runfolder import metric_rows
from rewards import FunctionReward, RewardConfig, build_reward
from rewards.wire import Limits, decode_request

REPOSITORY = Path(__file__).parents[2]
SERVICE = runpy.run_path(str(REPOSITORY / "tests" / "rewards" / "service.py"))
served, proxy, chaos = (SERVICE[name] for name in ("served", "proxy", "chaos"))
REWARD = Path(__file__).with_name("rounded_reward.py")
ROUNDED = runpy.run_path(str(REWARD))
SIZES = {"train": {"iterations": 4}, "checkpoint": {"every": 2}, "eval": {"every": 2}}

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def url():
    with served(FunctionReward("brightness", ROUNDED["brightness"])) as address:
        yield address


@pytest.fixture
def configure(tmp_path, write_config):
    """configure(name, type, **args) -> the YAML file of a run that trains on this one reward."""

    def write(name: str, kind: str, **args: Any) -> Path:
        reward = {"rewards": {"bright": {"type": kind, "args": args}}}
        return write_config(tmp_path / name, "flow_grpo", SIZES | reward)

    return write


_healthy: list[Any] = []


@pytest.fixture
def healthy(configure, train_here):
    """Outcome of the run without a service, made once."""
    if not _healthy:
        config = configure("near", f"{REWARD}:brightness")
        train_here(config)
        _healthy.append(outcome(config))
    return _healthy[0]


def outcome(config: Path) -> tuple[list[dict[str, str]], dict[str, list[float]]]:
    """Every metric but times, and the weights of the adapter."""
    folder = config.parent / "run"
    rows = metric_rows(folder / "metrics.jsonl")[0]
    kept = [{k: str(v) for k, v in row.items() if k != "seconds" and not k.startswith("time/")} for row in rows]
    weights = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    return kept, {name: weight.flatten().tolist() for name, weight in sorted(weights.items())}


def remote(front, **more: Any) -> dict[str, Any]:
    return {"url": front.url, "batch": 1, "backoff": 0.01, "max_in_flight": 4, "timeout": 20, **more}


def failing(every: int):
    """Requests of the images that `rounded_reward` would leave out never succeed."""

    def choose(number: int, body: bytes) -> str | None:
        image = decode_request(body, Limits()).images[0].mul(255).round()
        return "500" if ROUNDED["is_missing"](image, every) else None

    return choose


def train(config: Path) -> tuple[int, str]:
    """Exit status and output of `align train`, in this process."""
    result = CliRunner().invoke(app, ["train", str(config)], env={"COLUMNS": "400"})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.output


def test_a_chaotic_service_and_none_at_all_train_the_same(configure, train_here, healthy, url):
    with proxy(url, chaos(seed=0, share=0.3, most_in_a_row=3)) as front:
        front.delay = 0.1
        far = configure("far", "remote", **remote(front))
        train_here(far)
        assert set(front.troubles) == set(SERVICE["KINDS"])
    assert outcome(far) == healthy
    assert {row.get("reward/invalid_fraction") for row in outcome(far)[0] if row["kind"] == "train"} == {"0.0"}


def test_a_service_that_judges_while_others_are_sampled_trains_the_same(configure, train_here, healthy, url):
    far = configure("far", "remote", url=url, batch=1)
    train_here(far, "train.async_scoring=true")
    assert outcome(far) == healthy


def test_what_retries_do_not_mend_is_masked_and_counted(configure, train_here, url):
    near = configure("near", f"{REWARD}:brightness", missing_every=9)
    train_here(near)
    with proxy(url, failing(9)) as front:
        far = configure("far", "remote", **remote(front, retries=1))
        train_here(far)
        assert front.troubles["500"] >= 2
    assert outcome(far) == outcome(near)
    rows = [row for row in metric_rows(far.parent / "run" / "metrics.jsonl")[0] if row["kind"] == "train"]
    assert sum(row["reward/invalid_fraction"] > 0 for row in rows) >= 1
    assert all(math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)


def test_over_the_budget_the_run_stops_with_a_message(configure, on_cpu, url):
    with proxy(url, failing(2)) as front:
        code, output = train(configure("far", "remote", **remote(front, retries=0)))
    assert code == 1
    assert "error: three iterations in a row lacked over 20% of their scores" in output
    assert "Traceback" not in output


def test_a_dead_service_stops_the_run_which_continues_when_it_is_back(configure, healthy, url):
    with proxy(url, lambda number, body: None) as front:

        def choose(number: int, body: bytes) -> None:
            front.dead |= number == 2 + 2 * 8 + 2 + 8 + 3  # evaluation, two iterations, evaluation, one, and 3 images

        front.choose = choose
        far = configure("far", "remote", **remote(front))
        code, output = train(far)
        assert code == 1
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert re.match(
            r"error: reward 'bright': the service at \S+ does not answer any more .*: start it again, ", line
        )
        run = far.parent / "run"
        assert "a checkpoint of iteration 3 is written" in line
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["iteration-000002", "iteration-000003"]
        assert not (run / "summary.json").exists()
        front.dead = False
        front.choose = lambda number, body: None
        assert train(far)[0] == 0
    assert outcome(far) == healthy


@pytest.mark.slow
@pytest.mark.parametrize("meanwhile", [False, True], ids=["afterwards", "meanwhile"])
def test_a_refusal_of_one_process_ends_both(configure, url, meanwhile):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "align.train",
    ]
    with proxy(url, lambda number, body: "422" if number == 12 else None) as front:
        config = configure("far", "remote", **remote(front))
        done = subprocess.run(
            [*command, str(config), f"train.async_scoring={str(meanwhile).lower()}"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert front.troubles == {"422": 1}
    assert done.returncode == 1
    assert "error: a reward failed on another process" in done.stdout
    assert "error: reward 'bright': the service at" in done.stdout
    assert "422: not for you" in done.stdout


class TestCommand:
    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "align.cli", "serve-reward", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @pytest.mark.slow
    def test_serves_until_it_is_told_to_stop(self, monkeypatch):
        monkeypatch.setenv("ALIGN_REWARD_TOKEN", "s3cret")
        process = self.start(f"{REWARD}:brightness", "--port", "0", "--arg", "missing_every=1")
        assert process.stdout is not None
        try:
            address = re.search(r"on (http://\S+)", process.stdout.readline())
            assert address, process.communicate(timeout=60)
            assert f"{{url: '{address[1]}', token_env: ALIGN_REWARD_TOKEN}}" in process.stdout.readline()
            settings = {"url": address[1], "token_env": "ALIGN_REWARD_TOKEN"}
            reward = build_reward("far", RewardConfig(type="remote", args=settings))
            reward.setup(torch.device("cpu"), torch.float32)
            assert httpx.get(f"{address[1]}/health").status_code == 401
            told = httpx.get(f"{address[1]}/health", headers={"Authorization": "Bearer s3cret"}).json()
            assert told["name"] == f"{REWARD}:brightness"
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=60)[0]
        assert process.returncode == 0
        assert "Traceback" not in rest
        assert "s3cret" not in rest

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["brightness", "--host", "0.0.0.0"], "0.0.0.0 is reached by others: set ALIGN_REWARD_TOKEN"),
            (["brightnes"], "unknown reward type 'brightnes'; did you mean 'brightness'?"),
            (["jpeg", "--arg", "quality"], "--arg quality: give KEY=VALUE"),
            (["jpeg", "--arg", "quality=[1"], "--arg quality=[1: the value is not valid YAML"),
            (["jpeg", "--arg", "quality=0"], "quality must be in 1..100, got 0"),
            (["clip", "--run", "configs/demo.yaml"], "configs/demo.yaml has no reward 'clip': it has "),
        ],
    )
    def test_refuses(self, monkeypatch, arguments, reason):
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.delenv("ALIGN_REWARD_TOKEN", raising=False)
        result = CliRunner().invoke(app, ["serve-reward", "--port", "0", *arguments], env={"COLUMNS": "400"})
        assert result.exit_code == 1, result.output
        assert reason in result.output

    def test_a_reward_of_a_run(self, configure):
        from align.serve import chosen_reward

        config = configure("far", "jpeg", quality=40, divisor=2.0)
        found = chosen_reward("bright", ["quality=50"], str(config))
        assert found == RewardConfig("jpeg", args={"quality": 50, "divisor": 2.0})
