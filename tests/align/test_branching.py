"""Branches of one start, selection, and inner epochs on real tiny models, flow and UNet."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from align.collect import Batch, collect, score_values
from align.config import load_config
from align.objectives import clipped_ratio_loss
from align.policy_loop import _prompts, run_iteration
from align.run import Run, start
from align.updates import micro_batches, trained_columns, update_order
from rewards.base import Reward, RewardBatch, RewardOutput
from samplers.noise import INITIAL_STREAM, keyed_normal
from samplers.rollout import solve

UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
STEPS, SUFFIX = 5, 3
BRANCH = {"num_steps": STEPS, "branch": {"suffix_start": SUFFIX, "suffix_end": STEPS, "stages": 3}}
KERNELS: dict[str, dict[str, Any]] = {
    "flow": {"kernel": "cps", "noise_level": 0.7},
    "unet": {"kernel": "ddim", "noise_level": 1.0},
}
FAMILIES = pytest.mark.parametrize("family", list(KERNELS))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return UNET["sd_pipeline"](tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture
def begin(tmp_path, write_config, on_cpu, sd15) -> Callable[..., Run]:
    """begin(preset, family, *changes) -> a run before its first iteration; two prompts, four images each, two updates."""

    def make(preset: str, family: str, *changes: dict[str, Any]) -> Run:
        path = write_config(tmp_path, preset, {"sampler": KERNELS[family]})
        overrides = [f"model.path={sd15}"] if family == "unet" else []
        overrides += [item for change in changes for item in dotted(change)]
        return start(load_config(path, overrides), Console(quiet=True))

    return make


def dotted(nested: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


def quiet(*_: object) -> None:
    pass


def collected(run: Run, samples: list[int] | None = None, iteration: int = 0) -> Batch:
    samples = list(range(run.shape.samples)) if samples is None else samples
    return collect(run, _prompts(run, iteration), samples, iteration, 0, quiet)


def counted_rows(run: Run) -> list[int]:
    """The batch sizes of all forwards of the network from now on."""
    rows: list[int] = []
    run.model.network.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    return rows


def frozen(run: Run) -> list[Tensor]:
    """Copies of the weights, of the optimiser's state and of the average."""
    tensors = [p.detach() for p in run.parameters]
    tensors += [torch.as_tensor(v) for entry in run.optimizer.state_dict()["state"].values() for v in entry.values()]
    tensors += list(run.average.shadow_params) if run.average is not None else []
    return [t.clone() for t in tensors]


class Partly(Reward):
    """Brightness, but .5 for every image of some prompts."""

    name = "partly"

    def __init__(self, flat: set[str]) -> None:
        self.flat = flat

    def score(self, batch: RewardBatch) -> RewardOutput:
        scores = batch.images.mean(dim=(1, 2, 3))
        for i, prompt in enumerate(batch.prompts):
            if prompt in self.flat:
                scores[i] = 0.5
        return RewardOutput(scores)


# -- one start, several branches


@FAMILIES
@pytest.mark.parametrize("prefix", ["ode", "stochastic"])
def test_a_group_shares_its_states_bitwise_up_to_the_split_and_none_after(begin, family, prefix):
    run = begin("b2_diffurl", family, {"sampler": BRANCH}, {"sampler": {"branch": {"prefix": prefix}}})
    batch = collected(run)
    split = STEPS - SUFFIX
    assert batch.plan.split == min(batch.states) == split
    shared, after = batch.states[split].view(2, 4, -1), batch.states[split + 1].view(2, 4, -1)
    assert (shared == shared[:, :1]).all()
    assert not torch.equal(shared[0], shared[1])
    for group in after:
        assert all((group[i] - group[j]).abs().max() > 0 for i in range(4) for j in range(i))
    # the way there: the ODE from the group's own noise, or not
    noise = keyed_normal(run.model.latent_shape, seed=0, iteration=0, samples=[0, 1], step=0, stream=INITIAL_STREAM)
    noise = noise * run.model.noise_scale(float(run.grid[0]))
    euler = solve(run.model.velocity, noise, batch.condition(torch.tensor([0, 4])), run.grid[: split + 1])
    distance = (batch.states[split][[0, 4]] - euler).abs().amax(dim=(1, 2, 3))
    assert (distance < 1e-5).all() if prefix == "ode" else (distance > 0.1).all()


@FAMILIES
def test_branches_of_the_whole_chain_start_from_one_noise(begin, family):
    run = begin("b2_diffurl", family, {"sampler": BRANCH}, {"sampler": {"branch": {"suffix_start": STEPS}}})
    batch = collected(run)
    assert (batch.plan.split, min(batch.states)) == (0, 0)
    first, second = batch.states[0].view(2, 4, -1), batch.states[1].view(2, 4, -1)
    assert (first == first[:, :1]).all()
    assert not torch.equal(first[0], first[1])
    assert (second[:, 1:] != second[:, :1]).any(-1).all()


@FAMILIES
def test_without_sharing_what_is_left_is_the_full_chain_with_fewer_trained_steps(begin, family):
    branch = {"prefix": "stochastic", "shared": False}
    run = begin("b2_diffurl", family, {"sampler": BRANCH}, {"sampler": {"branch": branch}})
    full = begin("ddpo", family, {"sampler": {"num_steps": STEPS}})
    ours, whole = collected(run), collected(full)
    assert torch.equal(ours.final, whole.final)
    assert list(ours.states) == list(range(STEPS - SUFFIX, max(whole.states) + 1))
    assert all(torch.equal(states, whole.states[k]) for k, states in ours.states.items())
    assert torch.equal(ours.log_probs, whole.log_probs[:, STEPS - SUFFIX :])
    assert ours.nfe == whole.nfe == 8 * STEPS
    run.config.sampler.branch.prefix = "ode"
    assert not torch.equal(collected(run).final, whole.final)


@pytest.mark.parametrize("prefix", ["ode", "stochastic"])
def test_branches_do_not_depend_on_the_cut_or_on_who_samples_them(begin, prefix):
    run = begin("b2_diffurl", "unet", {"sampler": BRANCH}, {"sampler": {"branch": {"prefix": prefix}}})
    whole = collected(run)
    run.config.train.rollout_batch = 8
    torch.testing.assert_close(collected(run).final, whole.final, atol=1e-5, rtol=0)
    for samples in ([5, 0, 1], [2, 3, 4, 6, 7]):
        part = collected(run, samples)
        torch.testing.assert_close(part.final, whole.final[samples], atol=1e-5, rtol=0)
        for k, states in part.states.items():
            torch.testing.assert_close(states, whole.states[k][samples], atol=1e-5, rtol=0)


@FAMILIES
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_group_costs_one_prefix_and_a_suffix_per_branch(begin, family, guidance):
    run = begin("b2_diffurl", family, {"sampler": BRANCH}, {"sampler": {"guidance_scale": guidance}})
    rows = counted_rows(run)
    lengths = []
    for iteration in range(4):
        rows.clear()
        batch = collected(run, iteration=iteration)
        lengths.append(STEPS - batch.plan.split)
        assert batch.nfe == sum(rows) == 2 * (batch.plan.split + 4 * lengths[-1]) * (1 if guidance == 1 else 2)
    assert lengths == [3, 4, 5, 5]


def test_states_of_branches_have_values_of_which_a_group_shares_the_first(begin):
    step_rewards = {"credit": {"rule": "gain"}, "advantage": {"baseline": "group"}, "selection": {"rule": "all"}}
    run = begin("b2_diffurl", "flow", {"sampler": BRANCH}, step_rewards, {"train": {"rollout_batch": 8}})
    rows = counted_rows(run)
    batch = collect(run, _prompts(run, 0), list(range(8)), 0, 0, quiet, with_values=True)
    # prefix 2, suffix 3 of which 2 are trained; a completion's first step is the trajectory's own
    assert batch.nfe == sum(rows) == 2 * (2 + 2) + 8 * (3 + 1)
    values = score_values(run, _prompts(run, 0), batch, 8, quiet).values["brightness"].view(2, 4, 3)
    assert (values[..., 0] == values[:, :1, 0]).all()
    assert values[..., 1].std(1).min() > 0


# -- selection


def test_keep_holds_the_chosen_samples_alone_and_frees_the_states_of_the_others(begin):
    batch = collected(begin("b2_diffurl", "unet", {"sampler": BRANCH}))
    before = {k: v.clone() for k, v in batch.states.items()}
    cond, log_probs, final = batch.condition(torch.arange(8)), batch.log_probs.clone(), batch.final.clone()
    rows = torch.tensor([6, 1])
    kept = batch.keep(rows)
    assert (kept.samples, kept.groups) == ([6, 1], [1, 0])
    assert kept.states.keys() == before.keys() == set(range(STEPS - SUFFIX, STEPS + 1))
    assert all(torch.equal(v, before[k][rows]) for k, v in kept.states.items())
    # storage of its own, of two samples and not a view of eight
    assert {v.untyped_storage().nbytes() for v in kept.states.values()} == {2 * final[0].nbytes}
    assert batch.states == {}
    assert torch.equal(kept.log_probs, log_probs[rows])
    assert torch.equal(kept.final, final[rows])
    for name, value in kept.condition(torch.arange(2)).tensors.items():
        assert torch.equal(value, cond.tensors[name][rows])
    one = kept.keep(torch.tensor([0]))
    assert (len(one.cond), one.cond_rows.tolist()) == (1, [0])
    none = one.keep(torch.zeros(0, dtype=torch.long))
    assert none.samples == []
    assert len(none.cond) == 0
    assert all(v.shape == (0, 4, 8, 8) for v in none.states.values())


def test_an_update_without_samples_on_this_process_has_no_micro_batch():
    assert list(micro_batches(range(0), torch.zeros(0, 3, dtype=torch.long), 4)) == []
    assert list(micro_batches(range(3, 3), torch.arange(2).expand(5, 2), 4)) == []
    assert list(micro_batches(range(0), 3, 4)) == []


@FAMILIES
@pytest.mark.parametrize("preset", ["b2_diffurl", "prdp"])
def test_constant_rewards_leave_weights_and_optimiser_as_they_are(begin, preset, family):
    sampler = BRANCH if preset == "b2_diffurl" else {"num_steps": 3}
    run = begin(preset, family, {"sampler": sampler}, {"optim": {"ema_decay": 0.9}, "train": {"inner_epochs": 2}})
    run_iteration(run, quiet)  # so that the optimiser has a state
    before, updates = frozen(run), run.counters.updates
    assert updates == 4
    empty = run.counters.empty_updates
    run.rewards["brightness"] = Partly({p.text for p in _prompts(run, 1)})
    metrics = run_iteration(run, quiet)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen(run), strict=True))
    assert len(before) == len(frozen(run)) > 3 * len(run.parameters)
    assert (run.counters.updates, run.counters.empty_updates) == (8, empty + 4)
    assert metrics["reward/mean"] == 0.5
    assert metrics["train/zero_spread_fraction"] == 1
    assert metrics["train/empty_updates"] == empty + 4
    assert metrics.get("select/kept_fraction", 0) == 0
    assert "train/loss" not in metrics
    assert all(value == value for value in metrics.values())


@pytest.mark.parametrize("preset", ["b2_diffurl", "prdp"])
@pytest.mark.parametrize("flat", [0, 1])
def test_an_empty_update_is_passed_over_beside_one_that_is_not(begin, preset, flat):
    """One group an update, and one of the two prompts has equal rewards; either may be the first."""
    sampler = BRANCH if preset == "b2_diffurl" else {"num_steps": 3}
    run = begin(preset, "flow", {"sampler": sampler}, {"train": {"inner_epochs": 1}})
    run.rewards["brightness"] = Partly({_prompts(run, 0)[flat].text})
    before = [p.detach().clone() for p in run.parameters]
    metrics = run_iteration(run, quiet)
    assert (run.counters.updates, run.counters.empty_updates) == (2, 1)
    assert {int(entry["step"]) for entry in run.optimizer.state_dict()["state"].values()} == {1}
    assert any(not torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    assert metrics["train/grad_norm"] > 0
    assert metrics["train/zero_spread_fraction"] == 0.5


LOW = {"rule": "extremes", "pos_threshold": 0.1, "neg_threshold": -0.1}


@pytest.mark.parametrize(
    ("preset", "family", "changes"),
    [
        ("nft", "flow", {"sampler": {"kernel": "ode"}, "selection": LOW}),
        ("prdp", "unet", {"sampler": {"plan": "branched", **BRANCH}}),
        ("b2_diffurl", "flow", {"objective": {"ratio_repair": "guard", "kl_beta": 0.04}, "sampler": BRANCH}),
        ("ddpo", "unet", {"sampler": {"plan": "window", "window_range": [1, 4], "num_steps": 4}, "selection": LOW}),
    ],
    ids=["nft extremes", "prdp branched", "b2 guard", "ddpo window extremes"],
)
def test_choices_combine(begin, preset, family, changes):
    run = begin(preset, family, changes, {"advantage": {"eps": 1e-4}})
    before = [p.detach().clone() for p in run.parameters]
    metrics = run_iteration(run, quiet)
    assert metrics["train/grad_norm"] > 0
    assert all(value == value for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    assert all(p.isfinite().all() for p in run.parameters)
    assert 0 < metrics.get("select/kept_fraction", 0.5) < 1


# -- DDPO and its relation to branches


def test_surrogate_values_and_gradients_on_both_sides_of_the_clip():
    """max(-A r, -A clip(r)) at clip range 1e-4; no gradient where moving on would only follow the clip."""
    ratio = torch.tensor([1.0002, 1.0002, 0.9998, 0.9998], dtype=torch.float64)
    score = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, info = clipped_ratio_loss(score, torch.zeros(4, dtype=torch.float64), advantages, 1e-4)
    assert loss.tolist() == pytest.approx([-1.0001, 1.0002, -0.9998, 0.9999], abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), score)
    assert gradient.tolist() == pytest.approx([0, 1.0002, -0.9998, 0], abs=1e-12)
    assert gradient[[0, 3]].tolist() == [0, 0]
    assert info["clipped"].tolist() == [1, 0, 0, 1]


@FAMILIES
def test_all_branches_of_one_and_the_whole_chain_are_ddpo(begin, family):
    """One branch a group, a suffix of all steps, no selection, one epoch and the same history: DDPO, bit for bit."""
    common = {
        "sampler": {"num_steps": 3},
        "advantage": {"eps": 1e-6, "history": {"entries": 6, "iterations": 0, "min_count": 2, "ddof": 0}},
        "train": {"prompts_per_iteration": 4, "group_size": 1, "inner_epochs": 1},
        "optim": {"lr": 1e-3},
    }
    branches = {"sampler": {"branch": {"suffix_start": 3, "suffix_end": 3}}, "selection": {"rule": "all"}}
    ddpo, b2 = begin("ddpo", family, common), begin("b2_diffurl", family, common, branches)
    assert (ddpo.config.sampler.plan, b2.config.sampler.plan) == ("full", "branched")
    ours, theirs = collected(ddpo), collected(b2)
    assert torch.equal(ours.log_probs, theirs.log_probs)
    assert all(torch.equal(ours.states[k], theirs.states[k]) for k in theirs.states)
    for iteration in range(2):
        metrics, other = run_iteration(ddpo, quiet), run_iteration(b2, quiet)
        timeless = {k for k in metrics if not k.startswith("time/") and k != "seconds"}
        assert {k: metrics[k] for k in timeless} == {k: other[k] for k in timeless}
        assert metrics["train/loss"] != 0
        assert metrics["train/history_fraction"] == (iteration > 0)
        assert all(torch.equal(a, b) for a, b in zip(ddpo.parameters, b2.parameters, strict=True))
    assert ddpo.history == b2.history
    assert {len(entries) for entries in ddpo.history.values()} == {2}


# -- inner epochs and a fraction of the steps


def test_half_of_the_steps_is_each_samples_own_choice(begin):
    run = begin("ddpo", "unet", {"sampler": {"num_steps": 5}, "train": {"step_fraction": 0.5, "inner_epochs": 2}})
    batch = collected(run)
    first, second = trained_columns(run, batch, 0), trained_columns(run, batch, 1)
    for columns in (first, second):
        assert columns.shape == (8, 2)
        assert all(len(set(row)) == 2 and set(row) <= set(range(5)) for row in columns.tolist())
        assert len({tuple(row) for row in columns.tolist()}) > 3
    assert not torch.equal(first, second)
    order = [3, 7, 0]  # another process, another order
    assert torch.equal(trained_columns(run, collected(run, order), 1), second[order])
    assert torch.equal(trained_columns(run, batch.keep(torch.tensor(order)), 0), first[order])
    run.config.train.step_fraction = 1.0
    assert torch.equal(trained_columns(run, batch, 0), torch.arange(5).expand(8, 5))
    run.config.train.step_fraction = 0.1
    assert trained_columns(run, batch, 0).shape == (8, 1)


@pytest.mark.parametrize("micro_batch", [3, 16])
def test_inner_epochs_pass_over_the_chosen_steps_again(begin, micro_batch):
    train = {"step_fraction": 0.5, "inner_epochs": 2, "micro_batch": micro_batch, "updates_per_iteration": 2}
    run = begin("ddpo", "unet", {"sampler": {"num_steps": 5}, "train": train})
    rows = counted_rows(run)
    run_iteration(run, quiet)
    assert sum(rows) == 8 * 5 + 2 * 8 * 2  # a rollout of 5 steps, 2 epochs of 2 steps a sample
    assert run.counters.nfe == 8 * 5 + 3 * 2 * 8 * 2
    assert run.counters.updates == 4
    assert {int(entry["step"]) for entry in run.optimizer.state_dict()["state"].values()} == {4}


def test_updates_of_a_later_epoch_come_in_an_order_of_their_own(begin):
    run = begin("ddpo", "unet", {"train": {"updates_per_iteration": 8, "inner_epochs": 3}})
    orders = [update_order(run, iteration, epoch) for iteration in (0, 1) for epoch in (0, 1, 2)]
    assert orders[0] == orders[3] == list(range(8))
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
