"""Configuration: presets, overrides, and every mistake of a file told at once."""

from pathlib import Path

import pytest

from align.config import (
    CONFIG_DIR,
    Config,
    load_config,
    load_resolved,
    parse_config,
    preset_path,
    to_yaml,
)
from align.config_checks import without_effect
from align.errors import UserError
from align.objectives import ObjectiveConfig
from align.schema import build
from rewards.registry import RewardConfig

REWARDS = {"verifier": {"type": "verifier"}}
NFT = {"objective": {"type": "forward_process"}, "sampler": {"kernel": "ode"}}
PRDP = {"objective": {"type": "reward_difference"}}


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def errors_of(data: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config({"rewards": REWARDS, **data})
    return str(caught.value).splitlines()


def test_all_mistakes_come_at_once_with_the_nearest_valid_key():
    lines = errors_of(
        {
            "samplr": {},
            "train": {"iteration": 3, "group_size": "many"},
            "optim": {"schedule": "cosin"},
            "model": {"lora": {"rnk": 4}},
        }
    )
    assert len(lines) == 5
    for start, end in (
        ("samplr: unknown key", "'sampler'?)"),
        ("train.iteration: unknown key", "'iterations'?)"),
        ("train.group_size: expected int, got 'many'", ""),
        ("optim.schedule: 'cosin' is not one of constant, cosine", "'cosine'?)"),
        ("model.lora.rnk: unknown key", "'rank'?)"),
    ):
        assert any(line.startswith(start) and line.endswith(end) for line in lines), (start, lines)


def test_a_key_like_no_other_lists_the_valid_ones():
    (line,) = errors_of({"checkpoint": {"zzz": 1}})
    assert line == "checkpoint.zzz: unknown key (valid: every, keep, resume)"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"train": {"iterations": 2.5}}, "train.iterations: expected int, got 2.5"),
        ({"train": {"iterations": True}}, "train.iterations: expected int, got True"),
        ({"optim": {"lr": "fast"}}, "optim.lr: expected float, got 'fast'"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: expected a finite number, got inf"),
        ({"optim": {"lr": "nan"}}, "optim.lr: expected a finite number, got nan"),
        ({"optim": {"betas": [0.9]}}, "optim.betas: expected 2 values, got [0.9]"),
        ({"model": {"compile": 1}}, "model.compile: expected bool, got 1"),
        ({"train": [1]}, "train: expected a mapping, got [1]"),
        ({"trackers": "wandb"}, "trackers: expected a list, got 'wandb'"),
        ({"sampler": {"custom_grid": [1.0, "x"]}}, "sampler.custom_grid: expected float, got 'x'"),
        ({"eval_rewards": {"clip": "clip"}}, "eval_rewards.clip: expected a mapping, got 'clip'"),
    ],
)
def test_wrong_types_are_named_with_what_was_expected(data, line):
    assert errors_of(data) == [line]


def test_numbers_that_yaml_reads_as_something_else():
    assert build(Config, {"optim": {"lr": "1e-4"}}).optim.lr == 1e-4
    assert build(Config, {"optim": {"lr": 1}}).optim.lr == 1.0
    assert build(ObjectiveConfig, {"ratio_repair": False}).ratio_repair == "off"  # a bare `off`


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sampler": {"kernel": "ode"}}, ["sampler.kernel", "no probability ratio", "forward_process"]),
        ({"objective": {"type": "forward_process"}}, ["sampler.kernel", "final images only", "'flow_sde'"]),
        ({"train": {"updates_per_iteration": 7}}, ["updates_per_iteration", "7 does not divide the 1152 samples"]),
        ({"train": {"group_size": 1}}, ["train.group_size: must be at least 2, got 1"]),
        ({"sampler": {"solver": "dpm2m"}}, ["sampler.solver", "only acts with kernel 'ode'"]),
        ({"objective": {"share_noise": True}}, ["objective.share_noise has no effect with type clipped_ratio"]),
        ({"advantage": {"min_valid": 25}}, ["advantage.min_valid", "more than train.group_size 24"]),
        ({"sampler": {"plan": "window", "window_size": 12}}, ["sampler.window_range", "last step is deterministic"]),
        ({"sampler": {"plan": "sliding", "window_every": 0}}, ["sampler.window_every", "must be >= 1"]),
        ({"sampler": {"kernel": "cps", "psi": "auto"}}, ["sampler.psi", "kernel flow_sde", "cps"]),
        ({"sampler": {"kernel": "psi_sde"}}, ["sampler.kernel", "'psi_sde'"]),
        ({"credit": {"rule": "gains"}}, ["credit.rule", "did you mean 'gain'"]),
        (
            {"credit": {"rule": "gain"}, "completions": {"ode_steps": 11}},
            ["completions.ode_steps", "num_steps = 10", "11"],
        ),
        ({"completions": {"ode_steps": 0}}, ["completions.ode_steps", "got 0"]),
        (
            {"credit": {"rule": "turning_point"}, "sampler": {"plan": "window", "window_size": 1}},
            ["credit.rule: turning_point compares neighbouring steps", "only 1"],
        ),
        (
            {"credit": {"rule": "value"}, "objective": {"type": "forward_process"}, "sampler": {"kernel": "ode"}},
            ["credit.rule", "'value'", "trains by the final reward alone"],
        ),
        ({"credit": {"turning_point": {"eta": 0.0}}}, ["credit.turning_point.eta", "above 0"]),
        ({"calibration": {"samples": 0}}, ["calibration.samples"]),
        ({"sampler": {"kernel": "ode", "plan": "branched"}}, ["sampler.plan: 'branched'", "kernel 'ode' has none"]),
        (
            {"sampler": {"plan": "branched", "branch": {"suffix_start": 8, "suffix_end": 7}}},
            ["sampler.branch: need 2 <= suffix_start <= suffix_end <= num_steps = 10", "8 and 7"],
        ),
        ({"sampler": {"kernel": "ddim", "noise_level": 1.5}}, ["sampler.noise_level", "at most 1 with kernel ddim"]),
        ({"selection": {"rule": "extreme"}}, ["selection.rule: 'extreme' is not one of all, extremes"]),
        ({"selection": {"pos_threshold": -1.0}}, ["selection.neg_threshold must not be above pos_threshold"]),
        ({"advantage": {"history": {"entries": 8}}}, ["advantage.history.min_count 16 is never reached"]),
        (
            {"advantage": {"baseline": "history"}, "credit": {"rule": "gain"}},
            ["advantage.baseline: history keeps one reward an image", "credit.rule gain"],
        ),
        (
            {"selection": {"rule": "extremes"}, "credit": {"rule": "value"}},
            ["selection.rule: extremes ranks images by one number", "credit.rule value"],
        ),
        ({"train": {"inner_epochs": 0}}, ["train.inner_epochs: must be at least 1, got 0"]),
        ({"train": {"step_fraction": 0.0}}, ["train.step_fraction: must be in (0, 1], got 0.0"]),
        ({"train": {"step_fraction": 1.1}}, ["train.step_fraction: must be in (0, 1], got 1.1"]),
        ({**NFT, "train": {"inner_epochs": 2}}, ["train.inner_epochs: objective.type forward_process"]),
        ({**NFT, "train": {"step_fraction": 0.5}}, ["train.step_fraction: objective.type forward_process"]),
        ({**PRDP, "sampler": {"kernel": "ode"}}, ["sampler.kernel: 'ode' has no log-prob", "reward_difference"]),
        ({**PRDP, "selection": {"rule": "extremes"}}, ["selection.rule: objective.type reward_difference", "use all"]),
        ({**PRDP, "train": {"step_fraction": 0.5}}, ["train.step_fraction: objective.type reward_difference", "use 1"]),
        (
            {**PRDP, "advantage": {"baseline": "history"}, "train": {"group_size": 1}},
            ["train.group_size: objective.type reward_difference", "in pairs; use at least 2"],
        ),
        ({**PRDP, "credit": {"rule": "gain"}}, ["credit.rule: 'gain'", "reward_difference"]),
        (
            {**PRDP, "sampler": {"plan": "window"}},
            ["sampler.plan: objective.type reward_difference", "branched and shared"],
        ),
        (
            {**PRDP, "sampler": {"plan": "branched", "branch": {"shared": False}}},
            ["sampler.plan: objective.type reward_difference", "branched and shared"],
        ),
        (
            {**PRDP, "train": {"updates_per_iteration": 9, "prompts_per_iteration": 48, "group_size": 24}},
            ["train.updates_per_iteration: objective.type reward_difference", "divide train.prompts_per_iteration"],
        ),
        (
            {"selection": {"rule": "extremes", "pos_threshold": 6.0, "neg_threshold": -6.0}},
            ["selection: no advantage passes these thresholds", "advantage.clip is 5"],
        ),
        ({"objective": {"type": "reward_difference", "clip_range": 0.1}}, ["objective.clip_range has no effect"]),
        ({"objective": {"type": "reward_difference", "pair_beta": 0.0}}, ["objective.pair_beta must be above 0"]),
        ({"objective": {"type": "reward_difference", "step_clip": 0.0}}, ["objective.step_clip must be above 0"]),
        ({"objective": {"step_clip": 0.1}}, ["objective.step_clip has no effect with type clipped_ratio"]),
        ({"rewards": {}}, ["rewards: none given"]),
        ({"rewards": {"a": {"type": "jpeg", "weight": 0}}}, ["rewards: every weight is 0"]),
        ({"rewards": {"a": {"type": "jpg"}}}, ["rewards.a.", "'jpg'", "jpeg"]),
        ({"eval_rewards": REWARDS}, ["eval_rewards.verifier: already in rewards"]),
        ({"optim": {"betas": [0.9, 1.0]}}, ["optim.betas: both must be in [0, 1)"]),
        ({"optim": {"lr": 0.0}}, ["optim.lr: must be positive, got 0.0"]),
        ({"name": "a/b"}, ["name: must be a plain folder name"]),
        ({"model": {"resolution": 500}}, ["model.resolution: must be a positive multiple of 16, got 500"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(data, words):
    lines = errors_of(data)
    assert any(all(word in line for word in words) for line in lines), lines


def test_impossible_values_are_reported_together():
    lines = errors_of({"train": {"iterations": 0}, "optim": {"lr": -1.0}, "checkpoint": {"keep": 0}})
    assert [line.split(":")[0] for line in lines] == ["train.iterations", "checkpoint.keep", "optim.lr"]


def test_defaults_then_preset_then_file_then_command_line(tmp_path):
    write(tmp_path, "optim: {lr: 0.1, weight_decay: 0.2, eps: 0.3, max_grad_norm: 0.4}\nname: ignored\n", "low.yaml")
    write(tmp_path, "optim: {weight_decay: 0.5, eps: 0.5, max_grad_norm: 0.5}\n", "high.yaml")
    path = write(
        tmp_path,
        f"preset: [{tmp_path}/low.yaml, {tmp_path}/high.yaml]\n"
        "optim: {eps: 0.6, max_grad_norm: 0.6}\nrewards: {verifier: {type: verifier}}\n",
    )
    config = load_config(path, ["optim.max_grad_norm=0.7", "train.seed=5"])
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.eps, optim.max_grad_norm) == (0.1, 0.5, 0.6, 0.7)
    assert optim.betas == Config().optim.betas
    assert (config.train.seed, config.name) == (5, "mine")


def test_a_preset_of_a_preset_lies_below_it(tmp_path):
    write(tmp_path, f"preset: {tmp_path}/high.yaml\ntrain: {{group_size: 6}}\n", "middle.yaml")
    write(tmp_path, "train: {group_size: 4, micro_batch: 2}\n", "high.yaml")
    path = write(tmp_path, f"preset: {tmp_path}/middle.yaml\nrewards: {{verifier: {{type: verifier}}}}\n")
    assert (load_config(path).train.group_size, load_config(path).train.micro_batch) == (6, 2)
    write(tmp_path, f"preset: {tmp_path}/middle.yaml\n", "high.yaml")
    with pytest.raises(UserError, match="includes itself"):
        load_config(path)


def test_presets_can_be_chosen_on_the_command_line(tmp_path):
    path = write(tmp_path, "preset: nft\nrewards: {verifier: {type: verifier}}\n")
    assert load_config(path).objective.type == "forward_process"
    assert load_config(path, ["preset=dance_grpo"]).sampler.kernel == "dance_sde"


def test_an_unknown_preset_names_the_nearest_and_the_known_ones():
    with pytest.raises(UserError, match=r"no preset 'flow_gpo' \(did you mean 'flow_grpo'\?\); known: .*nft"):
        preset_path("flow_gpo")


@pytest.mark.parametrize("text", ["preset: 3\n", "preset: [{a: 1}]\n"])
def test_a_malformed_preset_entry_is_one_line(tmp_path, text):
    with pytest.raises(UserError, match="preset: expected a name or a list of names"):
        load_config(write(tmp_path, text))


METHODS = sorted(p.stem for p in (CONFIG_DIR / "methods").glob("*.yaml"))
MODELS = sorted(p.stem for p in (CONFIG_DIR / "models").glob("*.yaml"))
CONTROL = ("controlnet", "controlnet_pp", "ctrl_u")
RUNS = [p for p in sorted(CONFIG_DIR.rglob("*.yaml")) if p.parent.name not in ("methods", "models")]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_shipped_run_is_valid_and_survives_its_own_yaml(path, tmp_path):
    config = load_config(path)
    again = write(tmp_path, to_yaml(config), "config.yaml")
    assert load_config(again) == config
    assert load_resolved(again) == config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_every_method_goes_with_every_model(model, method, tmp_path):
    """A method that trains a ControlNet has a reward of its own, and others are only measured."""
    own = (
        "{verifier: {type: verifier, weight: 0}}\nconsistency: {network: edges}"
        if method in CONTROL
        else "{verifier: {type: verifier}}"
    )
    config = load_config(write(tmp_path, f"preset: [{model}, {method}]\nrewards: {own}\n"))
    assert config.preset == [model, method]
    assert config.rewards == {"verifier": RewardConfig(type="verifier", weight=0.0 if method in CONTROL else 1.0)}
    assert load_config(write(tmp_path, to_yaml(config), "config.yaml")) == config


def test_a_resolved_config_does_not_need_its_presets_any_more(tmp_path):
    preset = tmp_path / "gone.yaml"
    preset.write_text("train: {group_size: 6}\n")
    config = load_config(write(tmp_path, f"preset: {preset}\nrewards: {{verifier: {{type: verifier}}}}\n"))
    resolved = write(tmp_path, to_yaml(config), "config.yaml")
    preset.unlink()
    assert load_resolved(resolved).train.group_size == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping at the top, got a list"),
        ("3\n", "not valid YAML"),
        ("name: ${nothing}\n", "nothing"),
        ("hello\n", "hello: unknown key"),
    ],
)
def test_unreadable_files_say_so(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text))
    assert words in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "", "demo.yaml")
    with pytest.raises(UserError, match=r"no file .*dmo.yaml \(did you mean 'demo.yaml'\?\)"):
        load_config(tmp_path / "dmo.yaml")


@pytest.mark.parametrize(
    ("item", "words"), [("train.iterations", "overrides are written key=value"), ("a=[1", "overrides: ")]
)
def test_malformed_overrides_say_so(tmp_path, item, words):
    path = write(tmp_path, "rewards: {verifier: {type: verifier}}\n")
    with pytest.raises(UserError) as caught:
        load_config(path, [item])
    assert words in str(caught.value)


def test_what_nothing_reads_is_said_and_not_refused():
    data = {"sampler": {"window_size": 4, "shift": 2.0}, "optim": {"ema_decay": 0.0, "ema_every": 4}}
    notes = without_effect(parse_config({"rewards": REWARDS} | data))
    assert [note.split(" ")[0] for note in notes] == ["sampler.window_size", "sampler.shift", "optim.ema_every"]
    used = {"sampler": {"plan": "sliding", "window_size": 4, "window_every": 5}, "credit": {"rule": "gain"}}
    assert without_effect(parse_config({"rewards": REWARDS, "completions": {"ode_steps": 2}} | used)) == []
    assert without_effect(parse_config({"rewards": REWARDS})) == []


BRANCHED = {"plan": "branched"}
HISTORY = {"baseline": "history"}


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"sampler": {"branch": {"stages": 5}}}, ["sampler.branch has no effect: sampler.plan is full"]),
        ({"sampler": {**BRANCHED, "branch": {"stages": 5}}}, []),
        (
            {"sampler": BRANCHED, "train": {"iterations": 50}},
            ["sampler.branch.stages 100: after train.iterations = 50 the suffix has grown to 8 of 10 steps"],
        ),
        ({"sampler": {**BRANCHED, "branch": {"suffix_start": 10}}, "train": {"iterations": 50}}, []),
        (
            {"sampler": {**BRANCHED, "shared_noise": True}},
            ["sampler.shared_noise has no effect: sampler.plan is branched, see sampler.branch.shared"],
        ),
        (
            {"sampler": {**BRANCHED, "window_every": 5}},
            ["sampler.window_every has no effect: sampler.plan is branched"],
        ),
        ({"advantage": {"history": {"ddof": 1}}}, ["advantage.history has no effect: advantage.baseline is group"]),
        ({"advantage": {**HISTORY, "history": {"ddof": 1}}}, []),
        (
            {"advantage": {**HISTORY, "std": "group", "std_floor": 0.1, "min_valid": 3}},
            [
                f"advantage.{key} has no effect: advantage.baseline is history"
                for key in ("std", "std_floor", "min_valid")
            ],
        ),
        (
            {"selection": {"pos_threshold": 0.7, "neg_threshold": -0.7}},
            [f"selection.{key}_threshold has no effect: selection.rule is all" for key in ("pos", "neg")],
        ),
        ({"selection": {"rule": "extremes", "pos_threshold": 0.7}}, []),
        ({"selection": {"pos_weight": 0.5}}, []),
        (
            {**PRDP, "advantage": {"clip": 2.0}, "selection": {"neg_weight": 0.0}},
            [f"{key} has no effect: objective.type is reward_difference" for key in ("advantage", "selection")],
        ),
    ],
)
def test_idle_settings_of_branches_history_selection_and_pairs_are_said(data, lines):
    assert without_effect(parse_config({"rewards": REWARDS} | data)) == lines


@pytest.mark.parametrize("method", ["ddpo", "b2_diffurl", "prdp"])
def test_presets_set_nothing_idle(method, tmp_path):
    config = load_config(write(tmp_path, f"preset: {method}\nrewards: {{verifier: {{type: verifier}}}}\n"))
    assert without_effect(config) == []


def test_a_group_of_one_needs_a_history():
    assert parse_config({"rewards": REWARDS, "advantage": HISTORY, "train": {"group_size": 1}}).train.group_size == 1
    assert errors_of({"train": {"group_size": 1}}) == ["train.group_size: must be at least 2, got 1"]
