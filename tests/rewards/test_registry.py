"""From a configuration entry to a reward."""

from __future__ import annotations

import sys
import textwrap

import pytest

from rewards import FunctionReward, RewardConfig, RewardError, build_reward, checked_score, register, validate_rewards
from rewards.jpeg import JPEGReward
from rewards.registry import known_rewards

USER_FILE = """
    import torch
    from dataclasses import dataclass
    from rewards import Reward, RewardOutput

    @dataclass
    class Settings:          # needs its module to be known while the file runs
        offset: float = 0.0

    class Offset(Reward):
        uses_prompt = False

        def __init__(self, offset: float, factor: float = 1.0):
            self.settings, self.factor = Settings(offset), factor

        def score(self, batch):
            return RewardOutput(self.factor * torch.full((len(batch),), self.settings.offset))

    def lengths(images, prompts, metadata, factor=1.0):
        return [factor * len(prompt) for prompt in prompts]

    def too_few(images, prompts):
        return [0.0 for _ in prompts]

    class NotAReward:
        pass

    constant = 3
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(textwrap.dedent(USER_FILE))
    return path


def test_registered_names_build_their_class_under_the_name_of_the_run():
    reward = build_reward("small_files", RewardConfig("jpeg", args={"divisor": 500}, max_batch=7))
    assert isinstance(reward, JPEGReward)
    assert reward.name == "small_files"
    assert reward.max_batch == 7
    assert {"jpeg", "clip", "brightness"} <= set(known_rewards())


def test_a_class_or_function_of_a_file_is_found_by_path(user_file, make_batch):
    batch = make_batch(3)
    reward = build_reward("a", RewardConfig(f"{user_file}:Offset", args={"offset": 2.0, "factor": 3.0}))
    assert checked_score(reward, batch).scores.tolist() == [6.0] * 3
    function = build_reward("b", RewardConfig(f"{user_file}:lengths", args={"factor": 0.5}))
    assert isinstance(function, FunctionReward)
    assert checked_score(function, batch).scores.tolist() == [4.0] * 3


def test_a_file_is_found_relative_to_the_working_directory(user_file, make_batch, monkeypatch):
    monkeypatch.chdir(user_file.parent)
    reward = build_reward("mine", RewardConfig("my_rewards.py:lengths"))
    assert checked_score(reward, make_batch(2)).scores.tolist() == [8.0, 8.0]


def test_a_module_of_the_working_directory_is_found_by_dotted_path(tmp_path, make_batch, monkeypatch):
    package = tmp_path / "user_package_of_rewards"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "scores.py").write_text("def ones(images, prompts, metadata):\n    return [1.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reward = build_reward("mine", RewardConfig("user_package_of_rewards.scores:ones"))
    assert checked_score(reward, make_batch(2)).scores.tolist() == [1.0, 1.0]


def test_two_files_of_the_same_name_stay_apart(tmp_path, make_batch):
    for folder, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scores.py").write_text(
            f"value = {value}\ndef f(images, prompts, metadata):\n    return [value] * len(prompts)\n"
        )
    rewards = [build_reward(name, RewardConfig(f"{tmp_path}/{name}/scores.py:f")) for name in ("one", "two")]
    assert [checked_score(reward, make_batch(1)).scores.item() for reward in rewards] == [1.0, 2.0]


def test_a_name_registered_in_this_process_can_be_used(user_file, make_batch):
    register("registered_by_a_test", f"{user_file}:lengths")
    reward = build_reward("mine", RewardConfig("registered_by_a_test"))
    assert checked_score(reward, make_batch(1)).scores.tolist() == [8.0]


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("jpgs", {}, r"unknown reward type 'jpgs'; did you mean 'jpeg'\?"),
        ("beauty", {}, r"unknown reward type 'beauty'; known: .*brightness, cached, clip, .*jpeg"),
        ("{file}", {}, r"a path needs the name after a colon"),
        ("no/such/file.py:f", {}, r"there is no file no/such/file.py"),
        ("no_such_package.scores:f", {}, r"no_such_package.scores cannot be imported .*check the spelling"),
        ("{file}:lenghts", {}, r"has no 'lenghts'; did you mean 'lengths'\?"),
        ("{file}:NotAReward", {}, r"is the class NotAReward, expected a subclass of rewards.Reward or a function"),
        ("{file}:constant", {}, r"is a int, expected a subclass"),
        ("{file}:too_few", {}, r"the function must take \(images, prompts, metadata\)"),
        ("{file}:lengths", {"facter": 1}, r"unknown argument 'facter'; did you mean 'factor'\?"),
        ("{file}:Offset", {}, r"args must give offset"),
        ("jpeg", {"qality": 90}, r"unknown argument 'qality'; did you mean 'quality'\?"),
        ("jpeg", {"quality": "high"}, r"TypeError: "),
        ("clip", {"config": {"embed_dim": 4}, "pretrained": "random"}, r"config lacks vision_cfg, text_cfg"),
    ],
)
def test_every_mistake_is_one_line_with_the_name_and_the_remedy(user_file, kind, args, message):
    with pytest.raises(RewardError, match=f"^reward 'mine': .*{message}") as caught:
        build_reward("mine", RewardConfig(kind.format(file=user_file), args=args))
    assert "\n" not in str(caught.value)


def test_a_file_with_a_syntax_error_is_one_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def f(:\n    pass\n")
    with pytest.raises(RewardError, match=r"^reward 'mine': .*broken.py cannot be imported \(SyntaxError") as caught:
        build_reward("mine", RewardConfig(f"{path}:f"))
    assert "\n" not in str(caught.value)


def test_validate_lists_every_error_at_once_and_imports_nothing():
    config = RewardConfig("no_such_package:f", weight=float("nan"), args=[1], max_batch=0)  # type: ignore[arg-type]
    errors = config.validate()
    assert len(errors) == 3
    assert any("weight must be a finite number" in error for error in errors)
    assert any("args must map names" in error for error in errors)
    assert any("max_batch must be a positive integer" in error for error in errors)
    assert RewardConfig("jpeg").validate() == []
    assert "type is missing" in RewardConfig().validate()[0]


def test_a_run_without_a_weighted_reward_is_refused_at_start():
    assert validate_rewards({}) == ["no reward is given: name at least one"]
    watched = {"a": RewardConfig("jpeg", weight=0.0), "b": RewardConfig("brightness", weight=0.0)}
    assert validate_rewards(watched) == ["every reward has weight 0: give at least one reward a weight"]
    assert validate_rewards(watched | {"c": RewardConfig("brightness", weight=-1.0)}) == []
    errors = validate_rewards({"mine": RewardConfig("jpgs")})
    assert errors == ["mine: unknown reward type 'jpgs'; did you mean 'jpeg'?"]
