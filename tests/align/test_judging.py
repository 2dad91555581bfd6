"""Judging images afterwards, or while others are sampled: the same scores, and what happens when a reward fails or hangs."""

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from rich.console import Console

from align.collect import collect, score_values
from align.config import load_config
from align.errors import UserError
from align.judging import PIECES, SCORED_AT_ONCE, WAITING, Judging, piece_ends, piece_size
from align.policy_loop import _prompts, run_iteration
from align.run import Run, rng_state, start
from align.scoring import RewardFailure, Scores
from rewards.base import Reward, RewardBatch, RewardOutput

PATIENCE = 60


class Drawing(Reward):
    """Mean brightness with noise from three global generators; has a component, and nothing to say of one prompt."""

    deterministic = False

    def __init__(self, unknown: str) -> None:
        self.name, self.unknown = "drawing", unknown

    def score(self, batch: RewardBatch) -> RewardOutput:
        noise = torch.rand(len(batch)) + torch.tensor([np.random.rand() + random.random() for _ in batch.prompts])  # noqa: NPY002
        known = torch.tensor([prompt != self.unknown for prompt in batch.prompts])
        scores = torch.where(known, batch.images.mean(dim=(1, 2, 3)) + noise, torch.nan)
        return RewardOutput(scores, components={"noise": noise})


class Ranked(Reward):
    """Place of an image in its group by brightness: needs whole groups, and says so if it does not get them."""

    kind = "groupwise"
    name = "ranked"

    def score(self, batch: RewardBatch) -> RewardOutput:
        bright, scores = batch.images.mean(dim=(1, 2, 3)), torch.zeros(len(batch))
        for group in batch.group_ids.unique():
            mine = batch.group_ids == group
            assert int(mine.sum()) == 4
            scores[mine] = bright[mine].argsort().argsort().float()
        return RewardOutput(scores)


class Scripted(Reward):
    """Mean brightness, after `act(number of the call)`."""

    name = "scripted"

    def __init__(self, act: Callable[[int], object]) -> None:
        self.act, self.calls = act, 0

    def score(self, batch: RewardBatch) -> RewardOutput:
        self.calls += 1
        self.act(self.calls)
        return RewardOutput(batch.images.mean(dim=(1, 2, 3)))


@pytest.fixture
def begin(tmp_path, write_config, on_cpu) -> Callable[..., Run]:
    """begin(changes, preset) -> a run before its first iteration: two groups of four, sampled three at a time."""

    def make(changes: dict | None = None, preset: str = "flow_grpo") -> Run:
        return start(load_config(write_config(tmp_path, preset, changes)), Console(quiet=True))

    return make


def quiet(*_: object) -> None:
    pass


def judged(run: Run, background: bool) -> Scores:
    """Scores of an iteration whose images are judged while others are sampled, or afterwards."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    prompts, samples = _prompts(run, 0), list(range(8))
    values = run.config.credit.needs_values
    if not background:
        return score_values(run, prompts, collect(run, prompts, samples, 0, 0, quiet, values), 8, quiet)
    with Judging(run, prompts, samples, 0, 8, quiet, background=True) as judging:
        collect(run, prompts, samples, 0, 0, quiet, values, offer=judging.offer)
        return judging.scores()


@pytest.mark.parametrize("shared", [False, True])
def test_scores_of_all_states_are_those_of_judging_afterwards(begin, shared):
    """Of a reward that draws from the global generators too, whose draws are the same whenever it is done again."""
    watched = {"brightness": {"type": "brightness"}, "jpeg": {"type": "jpeg", "weight": 0.0}}
    run = begin({"rewards": watched, "sampler": {"shared_noise": shared, "num_steps": 4}}, "dense_grpo_uniform")
    run.rewards["brightness"] = Drawing(_prompts(run, 0)[1].text)
    before, after = judged(run, background=False), judged(run, background=True)
    state = rng_state()
    again = judged(run, background=True)
    assert before.values["brightness"].shape == (8, 4)
    assert not before.valid["brightness"].all()
    noises = [scores.extras["brightness:component/noise"] for scores in (before, after)]
    assert all(noise.isnan().sum() == 0 for noise in noises)
    bright = [s.values["brightness"] - noise for s, noise in zip((before, after), noises, strict=True)]
    torch.testing.assert_close(bright[1], bright[0], atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(after.values["jpeg"], before.values["jpeg"], equal_nan=True)
    assert all(torch.equal(after.valid[name], before.valid[name]) for name in watched)
    for once, twice in ((after.values, again.values), (after.extras, again.extras)):
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[key].nan_to_num(-1), twice[key].nan_to_num(-1)) for key in once)
    assert state["json"] == rng_state()["json"]
    assert torch.equal(state["tensors"]["cpu"], rng_state()["tensors"]["cpu"])


def test_afterwards_a_reward_is_asked_once_for_as_many_images_as_may_be(begin, monkeypatch):
    """Not in pieces of a rollout batch, which are three images here; of a shared start once a group."""
    run = begin({"sampler": {"shared_noise": True, "num_steps": 4}}, "dense_grpo_uniform")
    asked: list[int] = []
    reward = run.rewards["brightness"] = Scripted(lambda call: None)
    score = reward.score
    monkeypatch.setattr(reward, "score", lambda batch: asked.append(len(batch)) or score(batch))
    judged(run, background=False)
    assert asked == [2, 8, 8, 8]
    asked.clear()
    monkeypatch.setattr("align.judging.SCORED_AT_ONCE", 5)
    judged(run, background=False)
    assert asked == [2, 5, 3, 5, 3, 5, 3]


def test_a_groupwise_reward_waits_for_whole_groups(begin):
    run = begin()
    run.rewards["brightness"] = Ranked()
    scores = judged(run, background=True).values["brightness"]
    assert torch.equal(scores, judged(run, background=False).values["brightness"])
    assert scores[:4].flatten().sort().values.tolist() == [0, 1, 2, 3]


def test_images_are_judged_while_others_are_sampled(begin):
    """The reward of the first image returns only when two more have been sampled."""
    run = begin({"train": {"rollout_batch": 1}})
    third = threading.Event()
    met: list[bool] = []
    run.rewards["brightness"] = Scripted(lambda call: met.append(third.wait(PATIENCE)) if call == 1 else None)
    prompts, samples, sampled = _prompts(run, 0), list(range(4)), []
    with Judging(run, prompts, samples, 0, 8, quiet, background=True) as judging:

        def offer(latents):
            sampled.append(len(latents[-1]))
            if len(sampled) == 3:
                third.set()
            judging.offer(latents)

        collect(run, prompts, samples, 0, 0, quiet, offer=offer)
        judging.scores()
    assert met == [True]


def test_no_more_images_wait_than_may(begin):
    """A reward slower than the sampler holds it up, so that decoded images do not fill the memory."""
    run = begin({"train": {"rollout_batch": 1}})
    free = threading.Event()
    run.rewards["brightness"] = Scripted(lambda call: free.wait(PATIENCE))
    decoded, decode = [], run.model.decode

    def counted(latents, batch):
        decoded.append(len(latents))
        if len(decoded) > 1 + WAITING:
            free.set()  # this one finds no room: without the limit the reward would stay where it is
        return decode(latents, batch)

    run.model.decode = counted
    prompts = _prompts(run, 0)
    with Judging(run, prompts, list(range(8)), 0, 8, quiet, background=True) as judging:

        def offer(latents):
            judging.offer(latents)
            assert len(judging._worker._pieces) <= WAITING

        collect(run, prompts, list(range(8)), 0, 0, quiet, offer=offer)
        assert judging.scores().valid["brightness"].all()
    assert sum(decoded) == 8


def test_a_failure_stops_the_run_with_the_rewards_words_before_everything_is_sampled(begin):
    run = begin({"train": {"rollout_batch": 1, "async_scoring": True}})
    failed = threading.Event()

    def act(call: int) -> None:
        failed.set()
        raise ValueError("no such file: model.bin")

    run.rewards["brightness"] = Scripted(act)
    decoded, decode = [], run.model.decode

    def counted(latents, batch):
        images = decode(latents, batch)
        decoded.append(len(latents))
        if len(decoded) > 1:
            failed.wait(PATIENCE)
        return images

    run.model.decode = counted
    with pytest.raises(RewardFailure, match="failed: ValueError: no such file: model.bin") as caught:
        run_iteration(run, quiet)
    assert isinstance(caught.value, UserError)
    assert sum(decoded) <= 2 + WAITING
    assert_no_thread_stays()


def assert_no_thread_stays() -> None:
    for thread in threading.enumerate():
        if thread.name == "judging":
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_no_thread_stays_after_an_iteration_nor_after_one_that_ends_while_images_are_judged(begin):
    run = begin({"train": {"rollout_batch": 1, "async_scoring": True}})
    run_iteration(run, quiet)
    assert_no_thread_stays()
    begun, free = threading.Event(), threading.Event()
    run.rewards["brightness"] = Scripted(lambda call: (begun.set(), free.wait(PATIENCE)))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "sampling" and done == 3:
            assert begun.wait(PATIENCE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_iteration(run, interrupt)
    free.set()
    assert_no_thread_stays()
    assert run.rewards["brightness"].calls == 1


def test_a_mistake_of_ours_in_the_thread_is_not_swallowed(begin):
    run = begin({"train": {"async_scoring": True}})
    run.rewards["brightness"].max_batch = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="NoneType"):
        run_iteration(run, quiet)


def test_a_reward_that_hangs_leaves_no_score_and_no_nan_in_the_weights(begin):
    """What was judged by then counts; the iteration learns from it."""
    timeout = {"rollout_batch": 2, "async_scoring": True, "scoring_timeout": 2.0, "max_invalid_fraction": 0.6}
    run = begin({"train": timeout, "advantage": {"min_valid": 2}})
    free = threading.Event()
    run.rewards["brightness"] = Scripted(lambda call: free.wait(PATIENCE) if call == 3 else None)
    try:
        metrics = run_iteration(run, quiet)
        assert metrics["reward/invalid_fraction"] == 0.5
        assert "scoring_timeout" in run.warned
        assert metrics["train/grad_norm"] > 0
        assert all(torch.isfinite(p).all() for p in run.parameters)
    finally:
        free.set()
    assert run_iteration(run, quiet)["reward/invalid_fraction"] == 0  # it is back


def test_pieces_are_whole_rollout_batches_and_there_are_several():
    assert piece_size(1152, 16) == SCORED_AT_ONCE
    assert piece_size(1152, 48) == 48
    assert piece_size(144, 16) == 32
    assert piece_size(8, 16) == 16
    for samples in (16, 48, 144, 1000):
        assert len(piece_ends([0] * samples, piece_size(samples, 4), False)) >= PIECES


def test_pieces_of_whole_groups_end_where_no_group_is_open():
    assert piece_ends([0, 0, 0, 1, 1, 1], 2, False) == [2, 4, 6]
    assert piece_ends([0, 0, 0, 1, 1, 1], 2, True) == [3, 6]
    assert piece_ends([0, 1, 0, 1, 2, 2], 1, True) == [4, 6]
    assert piece_ends([0, 1, 1, 0], 1, True) == [4]
    assert piece_ends([], 3, False) == []
