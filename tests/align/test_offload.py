"""Rewards whose networks rest on the CPU: on their device while they score, and nowhere else; the run stays the same."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from align.config import load_config
from align.errors import UserError
from align.policy_loop import run_iteration
from align.resume import changed_keys
from align.run import Run, start
from align.runfolder import metric_rows
from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score, networks, onloaded

FILE = '''
import torch
from torch import nn
from rewards import Reward, RewardOutput

class Network(Reward):
    """Mean of a random convolution."""

    def setup(self, device, dtype):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = {"first": [nn.Conv2d(3, 4, 3).to(device, dtype).eval().requires_grad_(False)]}

    def score(self, batch):
        return RewardOutput(self.layers["first"][0](batch.images).tanh().mean(dim=(1, 2, 3)))
'''


class Moved(nn.Linear):
    """Counts how often it is moved; if `full`, there is no room the next time."""

    moves, full = 0, False

    def _apply(self, *arguments, **options):
        if self.full:
            self.full = False
            raise RuntimeError("out of memory")
        self.moves += 1
        return super()._apply(*arguments, **options)


class Inner(Reward):
    def __init__(self) -> None:
        self.name, self.rests = "inner", True
        self.network = Moved(3, 1)
        self.scored_at: list[int] = []

    def score(self, batch: RewardBatch) -> RewardOutput:
        self.scored_at.append(self.network.moves)
        return RewardOutput(self.network(batch.images.mean(dim=(2, 3)))[:, 0].detach())


class Outer(Inner):
    """Made of another reward, which does not rest by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = {"member": Inner()}
        self.parts["member"].rests = False


@pytest.fixture
def batch() -> RewardBatch:
    return RewardBatch(torch.rand(5, 3, 8, 8), ["a"] * 5, [{}] * 5, torch.arange(5))


def test_a_network_is_moved_once_for_all_that_is_judged_within(batch):
    reward = Inner()
    reward.max_batch = 2
    reward.offload()
    assert reward.network.moves == 1
    reward.offload()  # is there already
    assert reward.network.moves == 1
    with onloaded([reward]):
        checked_score(reward, batch)
        checked_score(reward, batch)
    assert reward.scored_at == [2] * 6
    assert reward.network.moves == 3
    checked_score(reward, batch)  # whoever scores gets it to its device
    assert reward.scored_at[6:] == [4] * 3
    assert reward.network.moves == 5


def test_it_leaves_the_device_after_a_failure_too(batch):
    reward = Inner()
    reward.offload()
    reward.score = lambda batch: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(RewardError, match="division by zero"):
        checked_score(reward, batch)
    assert reward.network.moves == 3


def test_where_there_is_no_room_for_one_of_several_none_stays_and_the_failure_has_its_name(batch):
    first, second = Inner(), Inner()
    second.name, second.more = "large", Moved(3, 1)
    for reward in (first, second):
        reward.offload()
    second.more.full = True
    with (
        pytest.raises(
            RewardError, match="^reward 'large' cannot be brought to its device: RuntimeError: out of memory$"
        ),
        onloaded([first, second]),
    ):
        pass
    assert [network.moves for network in (first.network, second.network, second.more)] == [3, 3, 2]
    assert first._users == second._users == 0
    checked_score(second, batch)  # there is room now
    assert second.scored_at == [4]
    assert second.more.moves == 4


def test_a_reward_made_of_others_takes_their_networks_along(batch):
    reward = Outer()
    own, members = reward.network, reward.parts["member"].network
    assert {id(module) for module in networks(reward)} == {id(own), id(members)}
    reward.offload()
    checked_score(reward, batch)
    assert own.moves == members.moves == 3


@pytest.fixture
def begin(tmp_path, write_config, on_cpu) -> Callable[..., Run]:
    """begin(changes) -> a run before its first iteration."""

    def make(changes: dict) -> Run:
        return start(load_config(write_config(tmp_path, changes=changes)), Console(quiet=True))

    return make


@pytest.mark.parametrize("background", [False, True])
def test_in_an_iteration_it_is_there_from_the_first_image_judged_to_the_last(begin, tmp_path, background):
    """Afterwards sampling is over; in the background it is not. Either way the updates have the memory."""
    (tmp_path / "network.py").write_text(FILE)
    reward = {"type": f"{tmp_path / 'network.py'}:Network", "offload": True}
    run = begin({"rewards": {"net": reward}, "train": {"async_scoring": background, "rollout_batch": 2}})
    seen: list[str] = []
    net = run.rewards["net"]
    for owner, method in ((net, "onload"), (net, "offload"), (net, "score"), (run.model, "velocity")):
        logged(owner, method, seen)
    run_iteration(run, lambda *_: None)
    steps = [name for name, _ in itertools.groupby(seen)]
    assert seen.count("onload") == seen.count("offload") == 1
    assert seen.count("score") == (4 if background else 1)  # eight images: in pieces of a rollout batch, or at once
    there, away = steps.index("onload"), steps.index("offload")
    assert steps[0] == "velocity"
    assert all(there < i < away for i, name in enumerate(steps) if name == "score")
    assert "velocity" in steps[away:]
    assert ("velocity" in steps[there:away]) == background


def logged(owner, method: str, seen: list[str]) -> None:
    """Note the name of a method whenever it is called."""
    original = getattr(owner, method)

    def call(*arguments, **options):
        seen.append(method)
        return original(*arguments, **options)

    setattr(owner, method, call)


def test_a_run_is_the_same_bit_for_bit(write_config, train_here, tmp_path):
    (tmp_path / "network.py").write_text(FILE)
    ends = []
    for name, offload in (("stays", False), ("rests", True)):
        net = {"type": f"{tmp_path / 'network.py'}:Network", "offload": offload}
        config = write_config(tmp_path / name, changes={"rewards": {"net": net}, "train": {"iterations": 2}})
        train_here(config)
        folder = config.parent / "run"
        rows = [{k: v for k, v in r.items() if k != "seconds" and "time/" not in k} for r in timed(folder)]
        ends.append((rows, load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][key], ends[1][1][key]) for key in ends[0][1])


def timed(folder: Path) -> list[dict]:
    return metric_rows(folder / "metrics.jsonl")[0]


def test_what_cannot_rest_is_refused_at_the_start(begin, tmp_path, write_config):
    with pytest.raises(RewardError, match="^reward 'small': offload: it holds no network .* remove offload$"):
        begin({"rewards": {"small": {"type": "jpeg", "offload": True}}})
    gradient = {"rewards": {"proxy": {"type": "proxy", "offload": True}}, "objective": {"type": "reward_gradient"}}
    with pytest.raises(UserError, match=r"rewards.proxy.offload: its network is part of every gradient"):
        load_config(write_config(tmp_path, "refl", gradient))


def test_a_continued_run_may_offload_what_did_not(tmp_path):
    before = "rewards:\n  net: {type: proxy, weight: 1.0}\n"
    after = "rewards:\n  net: {type: proxy, weight: 1.0, offload: true}\n"
    assert changed_keys(before, after) == []
    assert changed_keys(before, after.replace("1.0", "2.0")) == ["rewards.net.weight"]
