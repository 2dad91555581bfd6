"""Reward gradients where the reward is in doubt: weighted losses, and a penalty on the doubt itself."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from align.backprop_loop import run_iteration
from align.config import load_config
from align.models.base import ModelConfig, load_model
from align.prompts import Prompt
from align.reward_loss import LossConfig, image_gradient
from align.run import start
from align.train import _evaluate_base
from align.uncertainty import DoubtfulLoss, UncertaintyConfig
from rewards.base import Reward, RewardOutput
from rewards.registry import RewardConfig

PROMPTS = [Prompt("a"), Prompt("b"), Prompt("none"), Prompt("d")]


def doubtful(q50=0.0, q90=1.0, unit=1.0, **settings):
    return DoubtfulLoss(UncertaintyConfig(mode="weight", **settings), q50, q90, unit)


class Two(Reward):
    """The mean of red and green, unsure by how far they are apart; no score of the prompt "none"."""

    name = "two"
    differentiable = True

    def score(self, batch):
        red, green = (batch.images[:, c].square().mean(dim=(1, 2)) for c in (0, 1))
        lost = torch.tensor([text == "none" for text in batch.prompts])
        return RewardOutput(torch.where(lost, torch.nan, (red + green) / 2), uncertainty=(red - green).abs())


def test_a_worked_example():
    losses, doubt = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    assert doubtful(eta=0.0)(losses, doubt).item() == pytest.approx(1.2130613, abs=1e-7)
    assert doubtful(eta=1.0)(losses, doubt).item() == pytest.approx(1.7130613, abs=1e-7)
    # the penalty is in units of the reward, and stays a penalty where the loss will be turned round
    assert doubtful(eta=1.0, unit=3.0)(losses, doubt).item() == pytest.approx(1.2130613 + 1.5, abs=1e-7)
    assert doubtful(eta=1.0)(losses, doubt, -1.0).item() == pytest.approx(1.2130613 - 0.5, abs=1e-7)


@pytest.mark.parametrize("detach", [True, False])
def test_without_penalty_doubt_pays_unless_the_weight_is_detached(detach):
    doubt = torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    losses = torch.full((3,), 2.0, dtype=torch.float64)
    (plain,) = torch.autograd.grad(doubtful(eta=1e-300, detach_weight=detach)(losses, doubt).sum(), doubt)
    assert (plain.abs() < 1e-200).all() if detach else (plain < 0).all()
    (penalised,) = torch.autograd.grad(doubtful(eta=0.5, detach_weight=detach)(losses, doubt).sum(), doubt)
    slope = 0.5 - (0.0 if detach else 2.0 * torch.exp(-doubt.detach()))
    torch.testing.assert_close(penalised, torch.zeros(3, dtype=torch.float64) + slope)
    # 2 exp(-U) + U / 2 is least at U = ln 4
    low = torch.tensor([math.log(4)], dtype=torch.float64, requires_grad=True)
    (flat,) = torch.autograd.grad(doubtful(eta=0.5, detach_weight=False)(losses[:1], low).sum(), low)
    assert abs(float(flat)) < 1e-12


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(path="playground"))


@pytest.fixture(scope="module")
def latents(model):
    return torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def gradient(model, latents, rule=None, weight=1.0):
    settings = {"two": RewardConfig(type="brightness", weight=weight)}
    how = {"two": rule} if rule is not None else None
    return image_gradient(
        model, {"two": Two()}, settings, latents, PROMPTS, [0, 0, 1, 1], 0, LossConfig(), doubtful=how
    )


def test_each_images_gradient_is_weighted_and_no_weight_is_none_bit_for_bit(model, latents):
    plain = gradient(model, latents)
    doubt = plain.extras["two:uncertainty"]
    assert doubt.shape == (4,)
    idle = gradient(model, latents, doubtful(kappa=0.0, eta=0.0))
    assert torch.equal(idle.gradient, plain.gradient)
    assert torch.equal(idle.losses, plain.losses)
    steep = doubtful(q90=float(doubt.max()), eta=0.0, kappa=2.0)
    found = gradient(model, latents, steep)
    weights = torch.exp(-2 * doubt / doubt.max()).clamp_min(0.1)
    assert weights.min() < 0.5 * weights.max()
    torch.testing.assert_close(found.gradient, plain.gradient * weights.view(-1, 1, 1, 1))
    torch.testing.assert_close(found.losses, plain.losses * weights)
    assert (found.gradient[2] == 0).all()


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_the_penalty_lowers_the_doubt_whatever_the_sign_of_the_reward(model, latents, weight):
    rule = doubtful(q90=1.0, eta=1000.0)  # next to which the reward is nothing
    found = gradient(model, latents, rule, weight)
    before = found.extras["two:uncertainty"]
    after = gradient(model, latents - 1e-7 * found.gradient, rule, weight).extras["two:uncertainty"]
    scored = torch.tensor([0, 1, 3])
    assert (found.gradient[2] == 0).all()
    assert (after < before)[scored].all()


def test_a_run_weights_its_losses_and_says_so(tmp_path, write_config, on_cpu):
    members = {"a": {"type": "proxy"}, "b": {"type": "brightness"}}
    rewards = {"committee": {"type": "ensemble", "args": {"members": members, "objective": "mean"}}}
    changes = {"model": {"path": "playground", "max_sequence_length": 256}, "rewards": rewards}
    changes |= {"uncertainty": {"mode": "weight", "kappa": 5.0}, "eval": {"prompts": 4}}
    path = write_config(tmp_path, "draft_k", changes)
    small = ("train.prompts_per_iteration=2", "train.group_size=2", "train.updates_per_iteration=1")
    run = start(load_config(path, small), Console(quiet=True))

    class Silent:
        def log(self, *_):
            pass

    run.tracker = Silent()
    _evaluate_base(run)
    metrics = run_iteration(run, lambda *_: None)
    assert {"uncertainty/mean", "weight/ess", "ensemble/std_mean", "reward/committee/a"} <= set(metrics)
    assert 1 <= metrics["weight/ess"] <= 4
    assert all(math.isfinite(value) for value in metrics.values())
