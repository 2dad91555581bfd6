"""What one iteration collects: values of states by any cut, network evaluations, and who judges what."""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from align.collect import collect, score_values
from align.config import load_config
from align.policy_loop import _prompts, run_iteration
from align.run import Run, start
from rewards.base import Reward, RewardBatch, RewardOutput


class Judge(Reward):
    """Mean brightness; remembers how many images it saw, and knows nothing about one prompt."""

    def __init__(self, unknown: str | None = None) -> None:
        self.name, self.images, self.unknown = "judge", 0, unknown

    def score(self, batch: RewardBatch) -> RewardOutput:
        self.images += len(batch)
        scores = batch.images.mean(dim=(1, 2, 3))
        for i, prompt in enumerate(batch.prompts):
            if prompt == self.unknown:
                scores[i] = float("nan")
        return RewardOutput(scores)


@pytest.fixture
def begin(tmp_path, write_config, on_cpu) -> Callable[..., Run]:
    """begin(changes, preset) -> a run of step rewards before its first iteration."""

    def make(changes: dict | None = None, preset: str = "dense_grpo_uniform") -> Run:
        return start(load_config(write_config(tmp_path, preset, changes)), Console(quiet=True))

    return make


def quiet(*_: object) -> None:
    pass


def values_of(run: Run) -> torch.Tensor:
    prompts, samples = _prompts(run, 0), list(range(run.shape.samples))
    batch = collect(run, prompts, samples, 0, 0, quiet, with_values=True)
    return score_values(run, prompts, batch, run.shape.samples, quiet).values["brightness"]


@pytest.mark.parametrize("shared", [False, True])
def test_values_do_not_depend_on_how_the_work_is_cut(begin, shared):
    run = begin({"sampler": {"shared_noise": shared, "num_steps": 4}, "train": {"rollout_batch": 8}})
    whole = values_of(run)
    assert whole.shape == (8, 4)
    assert whole.std(0)[1:].min() > 0
    run.config.train.rollout_batch = 3  # cuts groups of four
    run.config.completions.chunk = 5
    torch.testing.assert_close(values_of(run), whole, atol=1e-5, rtol=0)
    assert bool((whole[:4, 0] == whole[0, 0]).all()) == shared  # V_0 is the prompt's where the noise is


@pytest.mark.parametrize(
    ("guidance", "completions", "per_image"),
    [
        (1.0, None, 3 + 2 + 1),  # T = 3, states 0 and 1 completed, their first step known
        (4.5, None, 2 * (3 + 2 + 1)),
        (1.0, 4.5, 3 + 2 * (3 + 2)),  # another guidance reuses nothing and runs the network twice
        (4.5, 1.0, 2 * 3 + 3 + 2),
    ],
)
def test_network_evaluations_with_guidance(begin, guidance, completions, per_image):
    run = begin({"sampler": {"guidance_scale": guidance}, "completions": {"guidance_scale": completions}})
    calls = []
    predict = run.model._predict

    def counted(x, *rest):
        calls.append(len(x))
        return predict(x, *rest)

    run.model._predict = counted
    batch = collect(run, _prompts(run, 0), list(range(8)), 0, 0, quiet, with_values=True)
    assert batch.nfe == sum(calls) == 8 * per_image


def test_guidance_of_the_completions_alone_changes_the_values_and_not_the_images(begin):
    one, two = begin({"sampler": {"guidance_scale": 1.0}}), begin({"completions": {"guidance_scale": 4.5}})
    ours, theirs = (collect(run, _prompts(run, 0), [0, 5], 0, 0, quiet, with_values=True) for run in (one, two))
    torch.testing.assert_close(ours.final, theirs.final, atol=1e-5, rtol=0)
    assert not torch.allclose(ours.completions[0], theirs.completions[0], atol=1e-4)


def test_a_reward_that_is_only_watched_sees_final_images_alone(begin):
    watched = {"brightness": {"type": "brightness"}, "jpeg": {"type": "jpeg", "weight": 0.0}}
    run = begin({"rewards": watched})
    trained, idle = Judge(), Judge()
    run.rewards |= {"brightness": trained, "jpeg": idle}
    metrics = run_iteration(run, quiet)
    assert (trained.images, idle.images) == (8 * 3, 8)
    assert metrics["reward/jpeg"] == pytest.approx(metrics["reward/brightness"])
    assert metrics["reward/invalid_fraction"] == 0


def test_the_shared_start_of_a_group_is_judged_once(begin):
    run = begin({"sampler": {"shared_noise": True}})
    judge = run.rewards["brightness"] = Judge()
    run_iteration(run, quiet)
    assert judge.images == 2 + 8 + 8  # two groups of four: their V_0, then the state before step 1 and the final images


def test_a_prompt_that_cannot_be_judged_is_left_out_however_the_batch_is_cut(begin):
    run = begin({"train": {"rollout_batch": 2, "max_invalid_fraction": 0.6}})
    run.rewards["brightness"] = Judge(unknown=_prompts(run, 0)[0].text)
    metrics = run_iteration(run, quiet)
    assert metrics["reward/invalid_fraction"] == 0.5
    assert metrics["train/grad_norm"] > 0
    assert all(torch.isfinite(p).all() for p in run.parameters)


@pytest.mark.parametrize("preset", ["dense_grpo_uniform", "tp_grpo"])
def test_equal_values_teach_nothing_and_break_nothing(begin, tmp_path, preset):
    """A reward of one level: every group is without spread at every step, which is counted, and no weight becomes NaN."""
    (tmp_path / "constant.py").write_text("def score(images, prompts, metadata):\n    return [0.5] * len(prompts)\n")
    changes = {"rewards": {"flat": {"type": f"{tmp_path / 'constant.py'}:score"}}, "objective": {"kl_beta": 0.0}}
    run = begin(changes, preset)
    before = [p.detach().clone() for p in run.parameters]
    metrics = run_iteration(run, quiet)
    assert metrics["train/zero_spread_fraction"] == 1
    assert metrics["gain/up_00"] == metrics["gain/down_00"] == 0
    assert metrics["train/grad_norm"] == 0
    for old, new in zip(before, run.parameters, strict=True):
        torch.testing.assert_close(new.detach(), old, atol=1e-5, rtol=0)  # weight decay alone
