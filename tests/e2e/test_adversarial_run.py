"""Runs with a reward that is trained along with the policy: who learns when, exact resume, processes, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from align.checkpoint import checkpoints
from align.config import load_config
from align.errors import UserError
from align.grids import as_image, save_png
from align.runfolder import metric_rows
from align.train import print_plan
from rewards import RewardConfig, RewardError

REPOSITORY = Path(__file__).parents[2]
REWARD = Path(__file__).with_name("moody_reward.py")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny DINOv2 in `dino` and five images in `real`."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(3)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, layerscale_value=1.0, **size)).save_pretrained(
        folder / "dino"
    )
    for i in range(5):
        save_png(as_image(torch.rand(3, 40, 60)), folder / "real" / f"{i}.png")
    return folder


@pytest.fixture
def configure(tmp_path, write_config, material):
    """configure(**args of the reward) -> a YAML file of a six-iteration run with a checkpoint after each."""

    def write(changes=None, **args):
        settings = {"references": str(material / "real"), "backbone": str(material / "dino"), "hidden": 8, "lr": 1e-2}
        return write_config(
            tmp_path,
            "flow_grpo",
            {
                "rewards": {"like": {"type": "adversarial", "args": {**settings, "every": 2, "patches": 3, **args}}},
                "eval_rewards": {"moody": {"type": f"{REWARD}:brightness"}},
                "checkpoint": {"every": 1, "keep": 9},
                **(changes or {}),
            },
        )

    return write


def state(folder, iteration):
    return load_file(folder / "checkpoints" / f"iteration-{iteration:06d}" / "state.safetensors")


def changed(before, after, start):
    keys = [key for key in after if key.startswith(start) and not key.startswith("reward.like/optim")]
    assert keys
    return [key for key in keys if not torch.equal(before[key], after[key])]


def timeless(folder):
    rows = metric_rows(folder / "metrics.jsonl")[0]
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("time/")} for row in rows]


def test_policy_and_discriminator_take_turns_and_leave_each_other_alone(configure, train_here, tmp_path):
    train_here(configure())
    folder = tmp_path / "run"
    for iteration in range(1, 6):  # from a checkpoint to the next, iteration `iteration` was done
        before, after = state(folder, iteration), state(folder, iteration + 1)
        policys = iteration % 2 == 1
        assert bool(changed(before, after, "param.")) == policys
        assert bool(changed(before, after, "reward.like/head")) != policys
    rows = [row for row in timeless(folder) if row["kind"] == "train"]
    assert [("train/loss" in row) for row in rows] == [False, True] * 3
    assert all(0 <= row["reward_update/like_accuracy"] <= 1 for row in rows)
    # what moves is measured in training and never compared across it
    assert all("eval/like" not in row for row in timeless(folder))
    assert set(json.loads((folder / "summary.json").read_text())["delta_ci95"]) == {"moody"}


def test_with_every_1_both_learn_in_each_iteration(configure, train_here, tmp_path):
    train_here(configure(every=1), "train.iterations=2")
    before, after = state(tmp_path / "run", 1), state(tmp_path / "run", 2)
    assert changed(before, after, "param.")
    assert changed(before, after, "reward.like/head")


def test_a_stopped_run_continues_bit_for_bit(configure, train_here, tmp_path, monkeypatch):
    config = configure(every=2, steps=2)
    monkeypatch.setenv("MOMENT", "SIGTERM 2 0")  # in the evaluation after the third iteration
    assert train_here(config, "name=disturbed") is None
    monkeypatch.delenv("MOMENT")
    assert checkpoints(tmp_path / "disturbed")[-1].name == "iteration-000003"
    train_here(config, "name=disturbed")
    train_here(config, "name=undisturbed")
    assert_same_end(tmp_path)


@pytest.mark.e2e
def test_a_killed_run_continues_bit_for_bit(configure, train_here, tmp_path):
    """SIGKILL in the evaluation after the third iteration, whose checkpoint is then not yet written."""
    config = configure(every=1)
    done = subprocess.run(
        [sys.executable, "-m", "align.train", str(config), "name=disturbed"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MOMENT": "SIGKILL 2 0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == -9, done.stdout + done.stderr
    assert checkpoints(tmp_path / "disturbed")[-1].name == "iteration-000002"
    train_here(config, "name=disturbed")
    train_here(config, "name=undisturbed")
    assert_same_end(tmp_path)


def assert_same_end(tmp_path):
    """The two runs' last checkpoints, discriminator and its optimiser included, and metrics, but for wall times."""
    ours, theirs = (state(tmp_path / name, 6) for name in ("disturbed", "undisturbed"))
    assert ours.keys() == theirs.keys()
    assert {key.split("/")[1].split(".")[0] for key in ours if key.startswith("reward.like/")} == {"head", "optim"}
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert timeless(tmp_path / "disturbed") == timeless(tmp_path / "undisturbed")


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_train_the_same_discriminator(configure, train_here, tmp_path):
    config, few = configure(every=1), ["train.iterations=3", "eval.every=0"]
    train_here(config, "name=on-1", *few)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
        + ["-m", "align.train", str(config), "name=on-2", *few],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (state(tmp_path / f"on-{processes}", 3) for processes in (1, 2))
    for key, value in one.items():
        if key.startswith("reward.like/"):
            torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
    rows = [[row for row in timeless(tmp_path / f"on-{n}") if row["kind"] == "train"] for n in (1, 2)]
    for ours, theirs in zip(*rows, strict=True):
        for key in ("reward/like", "reward_update/like_loss", "reward_update/like_accuracy"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4)


def test_images_of_the_prompt_file_can_be_the_references(configure, train_here, tmp_path, material):
    lines = [{"prompt": f"a red circle {i}", "image": str(material / "real" / f"{i}.png")} for i in range(4)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    config = configure(references=None, every=1)
    train_here(config, f"prompts.train={file}", "train.iterations=1")
    assert "reward_update/like_accuracy" in timeless(tmp_path / "run")[1]
    with pytest.raises(UserError, match="set its references to a folder of images"):
        train_here(config, "name=other")


def test_a_reference_that_cannot_be_read_stops_the_run_with_its_name(configure, train_here, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        train_here(configure(references=str(broken)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_rewards": {}}, "name at least one other in eval_rewards"),
        ({"train": {"iterations": 1}}, "leaves the policy no turn in 1 iterations"),
        ({"optim": {"schedule": "cosine"}}, "use constant"),
        ({"advantage": {"baseline": "history"}}, "advantage.baseline: history do not go together"),
        ({"combine": {"par": {"enabled": True}}, "advantage": {"std_floor": 0.1}}, "combine.par do not go together"),
        (
            {
                "rewards": {f"every_{n}": {"type": "adversarial", "args": {"every": n}} for n in (2, 3)},
                "train": {"iterations": 5},
            },
            "every_2, every_3 leave the policy no turn in common in 5 iterations",
        ),
        ({"rewards": {"kept": {"type": "cached", "args": {"type": "adversarial"}}}}, "is made of a trainable one"),
    ],
)
def test_what_a_moving_reward_cannot_do_is_refused_at_the_start(configure, changes, words):
    from rich.console import Console

    with pytest.raises(UserError, match=words):
        print_plan(load_config(configure(changes), []), Console(quiet=True))


def test_a_finished_run_is_evaluated_by_its_fixed_rewards(configure, train_here, tmp_path):
    from align.inference import Setup, chosen_rewards, ready_reward
    from align.models.base import load_model

    config = configure()
    train_here(config, "train.iterations=2")
    settings = load_config(config, [])
    setup = Setup(load_model(settings.model, "cpu"), None, 2, 1.0, 0, settings)
    assert set(chosen_rewards(setup, [])) == {"moody"}
    with pytest.raises(UserError, match="was trained along with the policy"):
        chosen_rewards(setup, ["like"])
    for kind, args in (("adversarial", {}), ("cached", {"type": "adversarial"})):
        with pytest.raises(RewardError, match="knows nothing outside that run"):
            ready_reward("like", RewardConfig(kind, args=args), torch.device("cpu"))
