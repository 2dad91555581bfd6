"""The reward-gradient loop on genuine pipelines: its gradient against plain autograd from noise to score, and its counts."""

from __future__ import annotations

import runpy
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from align.backprop_loop import _chains, _gradients, _steps, gradient_velocity, run_iteration
from align.collect import initial_states, step_noise
from align.config import load_config
from align.errors import UserError
from align.prompts import Prompt
from align.run import Run, start
from align.targets import prompt_ids
from rewards.base import Reward, RewardBatch, RewardOutput
from samplers.differentiable import Chain, backward_chain
from samplers.gradient_plan import GradientPlan
from samplers.kernels import KERNELS
from samplers.rollout import rollout, solve

UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
PLAYGROUND = {"model": {"path": "playground", "max_sequence_length": 256}}
DDIM = {"kernel": "ddim", "noise_level": 1.0, "num_steps": 4}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return UNET["sd_pipeline"](tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture
def begin(tmp_path, write_config, on_cpu) -> Callable[..., Run]:
    """begin(changes, trained=True) -> a run before its first iteration; trained: its adapter is not zero any more."""

    def make(changes: dict[str, Any] | None = None, *overrides: str, trained: bool = True) -> Run:
        path = write_config(tmp_path, "draft_k", changes)
        small = ("train.prompts_per_iteration=2", "train.group_size=2", "train.rollout_batch=4", "optim.ema_decay=0")
        run = start(load_config(path, [*small, *overrides]), Console(quiet=True))
        generator = torch.Generator().manual_seed(11)
        for parameter in run.parameters if trained else []:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        return run

    return make


def quiet(*_: object) -> None:
    pass


def prompts_of(run: Run, iteration: int = 0) -> list[Prompt]:
    return [run.train_prompts[i] for i in prompt_ids(run, iteration)]


def owners_of(run: Run, samples: list[int]) -> tuple[list[int], list[Prompt]]:
    owners = [i // run.config.train.group_size for i in samples]
    return owners, [prompts_of(run)[g] for g in owners]


def chains(run: Run, samples: list[int]) -> tuple[Chain, GradientPlan, Any]:
    owners, texts = owners_of(run, samples)
    cond = run.model.conditioning([p.text for p in texts])
    return *_chains(run, samples, owners, texts, cond), cond


def gradient(run: Run, samples: list[int] | None = None) -> Tensor:
    """The gradient of an update as one vector, which is then forgotten."""
    run.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = defaultdict(float)
    found = _gradients(run, samples or list(range(run.shape.samples)), prompts_of(run), sums, quiet)
    assert isinstance(found, dict), found
    return taken(run)


def taken(run: Run) -> Tensor:
    vector = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in run.parameters])
    for parameter in run.parameters:
        parameter.grad = None
    return vector


def distance(found: Tensor, expected: Tensor) -> float:
    assert float(expected.norm()) > 0
    return float((found - expected).norm() / expected.norm())


def sampled(run: Run, samples: list[int]) -> Tensor:
    """Final states by the samplers that the rest of the package uses, without gradient."""
    _, texts = owners_of(run, samples)
    cond = run.model.conditioning([p.text for p in texts])
    x0 = initial_states(run, samples, 0, run.config.train.seed)
    if run.config.sampler.kernel == "ode":
        return solve(run.model.velocity, x0, cond, run.grid)
    plan = run.config.sampler.make_plan(run.config.train.seed, 0)
    noise = step_noise(run, samples, 0, run.config.train.seed)
    return rollout(run.model.velocity, x0, cond, run.grid, plan, run.kernel, run.noise_levels, noise).final


def mean_loss(run: Run, finals: Tensor, texts: list[Prompt], name: str) -> Tensor:
    """-R averaged over images that are decoded in the graph."""
    images, _ = run.model.decode_with_gradient(finals)
    batch = RewardBatch(images, [p.text for p in texts], [p.metadata for p in texts], torch.arange(len(texts)))
    return -run.rewards[name].score(batch).scores.mean()


# -- against plain autograd ----------------------------------------------------------------------------------------


def test_one_step_is_draft_1_by_plain_autograd_through_decoder_and_reward(begin):
    """On the playground with guidance, in float32: one graph of the last step, the VAE and a small CLIP.

    Both do the same float32 operations in other batches (guidance, checkpointing, slices of images), whose rounding of
    1e-6 the network's backward pass adds up.
    """
    changes = PLAYGROUND | {"rewards": {"proxy": {"type": "proxy"}}, "sampler": {"guidance_scale": 3.0}}
    run = begin(changes, "loss.image_batch=3", "train.micro_batch=3", "train.updates_per_iteration=1")
    found = gradient(run)
    samples = [0, 1, 2, 3]
    _, texts = owners_of(run, samples)
    cond = run.model.conditioning([p.text for p in texts])
    x = solve(run.model.velocity, initial_states(run, samples, 0, 0), cond, run.grid[:-1])
    final = x + (run.grid[-1] - run.grid[-2]) * run.model.velocity(x, run.grid[-2].expand(4), cond)
    mean_loss(run, final, texts, "proxy").backward()
    assert distance(found, taken(run)) < 1e-4


@pytest.mark.parametrize("k", [1, 3])
def test_in_half_precision_the_adjoint_is_autograd_over_the_same_calls(begin, k):
    """The playground in bfloat16: states and lam stay float32, so what is rounded is the same in both."""
    run = begin(PLAYGROUND | {"sampler": {"num_steps": 4}}, "model.precision=bf16", f"backprop.k={k}")
    samples = [2, 0]
    chain, plan, cond = chains(run, samples)
    lam = torch.randn(chain.final.shape, generator=torch.Generator().manual_seed(3))
    backward_chain(run.model.velocity, chain, cond, _steps(run), plan, lam, micro_batch=2)
    found = taken(run)
    state = initial_states(run, samples, 0, run.config.train.seed)
    for step, (t, t_next) in enumerate(pairwise(run.grid)):
        with torch.set_grad_enabled(step >= 4 - k):
            state = state + (t_next - t) * run.model.velocity(state, t.expand(2), cond)
    torch.testing.assert_close(state.detach(), chain.final, rtol=0, atol=1e-6)
    (state * lam).sum().backward()
    assert distance(found, taken(run)) < 1e-3


def held(v: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """v with the network's output as a constant."""
    return v.detach() + slope.view(-1, 1, 1, 1) * (x - x.detach())


def one_graph(run: Run, samples: list[int], plan: GradientPlan, mode: str, jacobian: bool) -> Tensor:
    """Final states of the chains in one graph, by the definition of each mode of guidance."""
    model, scale = run.model, run.config.sampler.guidance_scale
    _, texts = owners_of(run, samples)
    cond, empty = model.conditioning([p.text for p in texts]), model.conditioning([""]).take([0] * len(samples))
    noise, steps = step_noise(run, samples, 0, run.config.train.seed), _steps(run)
    state = initial_states(run, samples, 0, run.config.train.seed)
    for k in range(run.config.sampler.num_steps):
        t, t_next = run.grid[k].expand(len(samples)), run.grid[k + 1].expand(len(samples))
        slope = model.held_slope(t)
        seen = state if jacobian else state.detach()
        c, u = model._predict(seen, t, cond), model._predict(seen, t, empty)
        if not jacobian:  # the network's input is held, what the conversion adds of x is not
            c, u = (v + slope.view(-1, 1, 1, 1) * (state - state.detach()) for v in (c, u))
        v = {
            "both": u + scale * (c - u),
            "cond_only": held(u, state, slope) + scale * (c - held(u, state, slope)),
            "off": held(u + scale * (c - u), state, slope) + c - held(c, state, slope),
        }[mode]
        active = plan.active[:, k].view(-1, 1, 1, 1)
        v = torch.where(active, v, held(v, state, slope))
        kernel = run.kernel if k in steps.stochastic else "ode"
        step = KERNELS[kernel](state, v, t, t_next, run.noise_levels[k])
        state = step.mean + step.std.view(-1, 1, 1, 1) * noise(k)
    return state


@pytest.mark.parametrize("mode", ["both", "cond_only", "off"])
@pytest.mark.parametrize("family", ["unet", "transformer"])
def test_every_mode_of_guidance_is_its_definition_in_one_graph(begin, sd15, family, mode):
    """Two of four steps with one between them, where lam passes with the network's output held: a UNet that predicts noise,
    with ancestral sampling, and a transformer that predicts velocity. Without a Jacobian, as DRTune, in one mode."""
    sampler: dict[str, Any] = DDIM if family == "unet" else {"kernel": "cps", "noise_level": 0.7, "num_steps": 4}
    model = {"model": {"path": str(sd15)}} if family == "unet" else {}
    settings = [f"backprop.guidance_gradient={mode}", "backprop.steps=spread", "backprop.k=2"]
    run = begin({"sampler": sampler | {"guidance_scale": 3.0}} | model, *settings)
    samples = [2, 0]
    chain, plan, cond = chains(run, samples)
    assert all(row in ([True, False, True, False], [False, True, False, True]) for row in plan.active.tolist())
    for jacobian in (True, False) if mode == "cond_only" else (True,):
        lam = torch.randn(chain.final.shape, generator=torch.Generator().manual_seed(3))
        slope = run.model.held_slope
        velocity = gradient_velocity(run.model, mode)
        backward_chain(velocity, chain, cond, _steps(run), plan, lam, jacobian=jacobian, slope=slope, micro_batch=1)
        found = taken(run)
        final = one_graph(run, samples, plan, mode, jacobian)
        # both are float32 chains of a random network, whose rounding grows with the steps
        torch.testing.assert_close(chain.final, final.detach(), rtol=0, atol=1e-3 if family == "unet" else 1e-4)
        (final * lam).sum().backward()
        assert distance(found, taken(run)) < 1e-4


def test_the_conditional_gradient_alone_is_g_times_the_unguided_one_and_half_the_work(begin):
    """One active step of a flow model, at equal states; rows of the network in calls that are differentiated."""
    run = begin({"sampler": {"guidance_scale": 3.0}})
    samples = [0, 1, 2]
    chain, plan, cond = chains(run, samples)
    lam = torch.randn(chain.final.shape, generator=torch.Generator().manual_seed(3))
    rows: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            rows.append(len(kwargs["hidden_states"]))

    run.model.network.register_forward_pre_hook(count, with_kwargs=True)
    found, seen = {}, {}
    for mode in ("both", "cond_only", "off"):
        rows.clear()
        backward_chain(gradient_velocity(run.model, mode), chain, cond, _steps(run), plan, lam)
        found[mode], seen[mode] = taken(run), sum(rows)
    assert seen == {"both": 6, "cond_only": 3, "off": 3}
    run.model.guidance_scale = 1.0
    backward_chain(run.model.velocity, chain, cond, _steps(run), plan, lam)
    unguided = taken(run)
    assert distance(found["off"], unguided) < 1e-6
    assert distance(found["cond_only"], 3.0 * unguided) < 1e-5  # adapters before the last layers add up rounding
    assert distance(found["both"], found["cond_only"]) > 0.01


@pytest.mark.parametrize("family", ["unet", "transformer"])
def test_images_are_those_of_the_plain_sampler_for_every_number_of_active_steps(begin, sd15, family):
    changes = {"model": {"path": str(sd15)}, "sampler": DDIM} if family == "unet" else {"sampler": {"num_steps": 4}}
    run = begin(changes)
    samples = [0, 1, 2, 3]
    expected = sampled(run, samples)
    for k in (1, 2, 4):
        run.config.backprop.k = k
        chain, _, _ = chains(run, samples)
        assert torch.equal(chain.final, expected)
        assert sorted(chain.states) == list(range(4 - k, 4))


def test_copies_of_the_last_step_share_the_gradient(begin):
    """DRaFT-LV: three images of each sample, each a third of the loss, from states that hold no gradient."""
    run = begin({"sampler": {"guidance_scale": 1.0}}, "backprop.lv_draws=2", "train.updates_per_iteration=1")
    samples = [0, 1, 2, 3]
    found = gradient(run)
    chain, plan, cond = chains(run, samples)
    assert len(plan) == 12
    rows, states = chain.states[run.config.sampler.num_steps - 1]
    assert rows.tolist() == list(range(12))
    t = run.grid[-2]
    fresh = (states[4:] - (1 - t) * chain.final[:4].repeat(2, 1, 1, 1)) / t
    assert float(fresh.mean()) == pytest.approx(0, abs=5 / fresh.numel() ** 0.5)
    assert float(fresh.std()) == pytest.approx(1, abs=5 / fresh.numel() ** 0.5)
    assert float((fresh[:4] * fresh[4:]).mean()) == pytest.approx(0, abs=5 / fresh[4:].numel() ** 0.5)
    _, texts = owners_of(run, samples)
    final = states - t * run.model.velocity(states, t.expand(12), cond.take(list(range(4)) * 3))
    torch.testing.assert_close(final.detach(), chain.final, rtol=0, atol=1e-5)
    mean_loss(run, final, texts * 3, "brightness").backward()
    assert distance(found, taken(run)) < 1e-4


def test_the_velocity_penalty_is_its_gradient_at_the_sampled_states(begin):
    """In a run whose reward has weight but, by a satisfied hinge, no gradient: what is left is the penalty."""
    hinge = {"loss": {"kind": "hinge", "value": -1.0}, "sampler": {"guidance_scale": 2.0}}
    run = begin(hinge, "backprop.velocity_penalty=0.5", "backprop.k=2", "train.updates_per_iteration=1")
    samples = [0, 1, 2, 3]
    found = gradient(run)
    chain, _, cond = chains(run, samples)
    total = torch.zeros(())
    for k, (_, states) in chain.states.items():
        t = run.grid[k].expand(4)
        with torch.no_grad(), run.model.reference():
            base = run.model.velocity(states, t, cond)
        total = total + 0.5 * (run.model.velocity(states, t, cond) - base).square().mean() / 2
    total.backward()
    assert distance(found, taken(run)) < 1e-5
    metrics = run_iteration(run, quiet)
    assert metrics["train/ref_mse"] == pytest.approx(float(total.detach()) / 0.5, rel=1e-4)
    assert metrics["train/adjoint_growth"] == 1  # there is nothing that could grow


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_checkpointing_changes_memory_and_not_the_gradient(begin, penalty):
    """Of the network (over joined steps), the VAE and the reward."""
    changes = PLAYGROUND | {"rewards": {"proxy": {"type": "proxy"}}}
    settings = ["backprop.k=2", "train.updates_per_iteration=1", f"backprop.velocity_penalty={penalty}"]
    calls: dict[bool, list[int]] = {}
    found = {}
    for on in (True, False):
        flag = str(on).lower()
        run = begin(changes, *settings, f"model.gradient_checkpointing={flag}", f"loss.checkpointing={flag}")
        seen = calls.setdefault(on, [])
        run.model.network.transformer_blocks[0].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(1) if torch.is_grad_enabled() else None
        )
        found[on] = gradient(run)
    assert len(calls[True]) >= 2 * len(calls[False]) > 0
    assert distance(found[True], found[False]) < 1e-5


def test_the_rollout_and_training_batches_do_not_matter(begin):
    """Random numbers of active steps, stops and stochastic steps; with a penalty. All of it belongs to the sample."""
    sampler = {"sampler": {"kernel": "cps", "noise_level": 0.7, "num_steps": 6, "guidance_scale": 2.0}}
    settings = ["backprop.truncation=uniform", "backprop.cut_ratio=0.5", "backprop.velocity_penalty=0.1"]
    run = begin(sampler, *settings, "train.updates_per_iteration=1", "backprop.adjoint_clip=1.5")
    whole = gradient(run)
    run.config.train.rollout_batch, run.config.train.micro_batch, run.config.loss.image_batch = 1, 1, 1
    assert distance(gradient(run), whole) < 1e-4


# -- what an iteration touches and counts --------------------------------------------------------------------------


def test_only_the_adapter_gets_gradients_and_only_it_moves(begin):
    run = begin(PLAYGROUND | {"rewards": {"proxy": {"type": "proxy"}}}, "backprop.k=2", trained=False)
    proxy = run.rewards["proxy"]._loaded().model
    own = {id(p) for p in run.parameters}
    frozen = [*run.model.network.parameters(), *run.model.pipe.vae.parameters(), *proxy.parameters()]
    frozen = [p for p in frozen if id(p) not in own]
    before = [p.detach().clone() for p in frozen]
    first = [p.detach().clone() for p in run.parameters]
    metrics = run_iteration(run, quiet)
    assert metrics["train/grad_norm"] > 0
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in run.parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, run.parameters, strict=True))


@pytest.mark.parametrize(("guidance", "mode"), [(1.0, "both"), (3.0, "both")])
def test_network_evaluations_are_counted(begin, guidance, mode):
    """A forward is 1 and a backward 2; guidance runs the network twice."""
    run = begin(
        {"sampler": {"guidance_scale": guidance, "num_steps": 5}}, "backprop.k=2", f"backprop.guidance_gradient={mode}"
    )
    rows = {True: 0, False: 0}
    predict = run.model._predict

    def counted(x: Tensor, *rest: Any) -> Tensor:
        rows[torch.is_grad_enabled()] += len(x)
        return predict(x, *rest)

    run.model._predict = counted
    metrics = run_iteration(run, quiet)
    twice = 1 if guidance == 1 else 2
    assert rows == {False: 4 * 5 * twice, True: 4 * 2 * twice}
    checkpointed = run.config.model.gradient_checkpointing
    assert metrics["nfe"] == run.counters.nfe == rows[False] + (3 + checkpointed) * rows[True]
    assert metrics["sample/nfe_per_image"] == 5 * twice
    assert metrics["train/active_steps"] == 2


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_the_scale_of_the_loss_is_applied_after_the_backward_pass(begin, penalty):
    """So that half precision never sees the small numbers; the penalty is not part of the loss and keeps its weight."""
    found = []
    for scale in (1.0, 1e-6):
        run = begin({}, f"loss.scale={scale}", f"backprop.velocity_penalty={penalty * scale}")
        found.append(gradient(run) / scale)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6 * float(found[0].abs().max()))


def test_watched_rewards_do_not_judge_the_copies(begin):
    rewards = {"brightness": {"type": "brightness"}, "seen": {"type": "brightness", "weight": 0}}
    run = begin({"rewards": rewards}, "backprop.lv_draws=2")
    run.rewards["seen"] = Watching([])
    metrics = run_iteration(run, quiet)
    assert sum(len(images) for images in run.rewards["seen"].images) == run.shape.samples
    assert metrics["reward/seen"] == pytest.approx(metrics["reward/brightness"])


class Watching(Reward):
    """Brightness that keeps the images, and the weights as they are when it is called."""

    name, differentiable = "watching", True

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.images: list[Tensor] = []
        self.weights: list[list[Tensor]] = []

    def score(self, batch: RewardBatch) -> RewardOutput:
        self.images.append(batch.images.detach().clone())
        self.weights.append([p.detach().clone() for p in self.parameters])
        return RewardOutput(batch.images.mean(dim=(1, 2, 3)))


def test_a_second_update_is_made_from_images_of_the_moved_weights(begin):
    run = begin({"sampler": {"num_steps": 3}, "optim": {"lr": 0.05}}, "train.updates_per_iteration=2")
    watching = run.rewards["brightness"] = Watching(run.parameters)
    metrics = run_iteration(run, quiet)
    assert [len(images) for images in watching.images] == [2, 2]
    assert run.counters.updates == 2
    first, second = watching.weights
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for images, weights in zip(watching.images, watching.weights, strict=True):
        for parameter, value in zip(run.parameters, weights, strict=True):
            parameter.data = value
        everything = run.model.decode(sampled(run, [0, 1, 2, 3]))
        gaps = [min(float((image - other).abs().max()) for other in everything) for image in images]
        assert max(gaps) < 1e-5
    assert metrics["reward/mean"] == pytest.approx(float(torch.cat(watching.images).mean()), abs=1e-6)


def test_a_hinge_that_every_image_satisfies_teaches_nothing(begin):
    run = begin({"loss": {"kind": "hinge", "value": -1.0}}, "optim.weight_decay=0")
    before = [p.detach().clone() for p in run.parameters]
    metrics = run_iteration(run, quiet)
    assert (metrics["train/grad_norm"], metrics["train/loss"], metrics["train/adjoint_norm"]) == (0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


class Partial(Reward):
    """Brightness without a score for one prompt; there `blank` is its value, with or without a gradient of zero."""

    name, differentiable = "partial", True

    def __init__(self, prompt: str, blank: float) -> None:
        self.prompt, self.blank = prompt, blank

    def score(self, batch: RewardBatch) -> RewardOutput:
        scores = batch.images.mean(dim=(1, 2, 3))
        lost = torch.tensor([p == self.prompt for p in batch.prompts])
        return RewardOutput(torch.where(lost, 0 * scores + self.blank, scores))


class Silent(Partial):
    """No score for any image."""

    def __init__(self) -> None:
        super().__init__("", float("nan"))

    def score(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(batch.images.mean(dim=(1, 2, 3)) * float("nan"))


def test_images_without_a_score_are_left_out(begin):
    run = begin({}, "train.updates_per_iteration=1", "train.max_invalid_fraction=0.6")
    unknown = prompts_of(run)[1].text
    found = []
    for blank in (float("nan"), 0.0):
        run.rewards["brightness"] = Partial(unknown, blank)
        found.append(gradient(run))
    assert float(found[0].norm()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-8)
    run.rewards["brightness"] = Partial(unknown, float("nan"))
    metrics = run_iteration(run, quiet)
    assert metrics["reward/invalid_fraction"] == 0.5
    assert metrics["reward/mean"] > 0
    assert all(p.isfinite().all() for p in run.parameters)


def test_an_update_without_any_score_is_passed_over(begin):
    run = begin({}, "train.updates_per_iteration=1")
    run.rewards["brightness"] = Silent()
    before = [p.detach().clone() for p in run.parameters]
    metrics = run_iteration(run, quiet)
    assert metrics["reward/invalid_fraction"] == 1
    assert "reward/mean" not in metrics
    assert (run.counters.updates, run.counters.empty_updates, run.counters.iteration) == (1, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_updates_that_lack_too_many_scores_stop_the_run_after_64_images(begin):
    run = begin({}, "train.updates_per_iteration=1", "train.max_invalid_fraction=0.4")
    for number in range(16):
        run.rewards["brightness"] = Partial(prompts_of(run, number)[1].text, float("nan"))
        if number < 15:
            run_iteration(run, quiet)
        else:
            with pytest.raises(UserError, match="16 updates in a row lacked over 40% of their scores"):
                run_iteration(run, quiet)
