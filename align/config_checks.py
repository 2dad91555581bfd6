"""What is wrong with a configuration, and what in it has no effect: checks that need no model."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from align.combination import PAR_FLOOR
from align.control_checks import OBJECTIVE as CONTROL
from align.control_checks import control_cases, control_errors, control_notes
from samplers.plans import suffix_length

if TYPE_CHECKING:
    from align.config import Config


def validate(config: Config) -> list[str]:
    """Impossible values and combinations, one line each."""
    errors = config.model.validate()
    errors += [f"sampler.{line}" for line in config.sampler.validate()]
    errors += [f"completions.{line}" for line in config.completions.validate(config.sampler.num_steps)]
    errors += [f"calibration.{line}" for line in config.calibration.validate()]
    errors += [f"credit.{line}" for line in config.credit.validate()]
    errors += [f"combine.{line}" for line in config.combine.validate(config.rewards)]
    errors += [f"uncertainty.{line}" for line in config.uncertainty.validate(config.rewards)]
    errors += [f"advantage.{line}" for line in config.advantage.validate()]
    errors += [f"selection.{line}" for line in config.selection.validate()]
    errors += [f"objective.{line}" for line in config.objective.validate(config.sampler.num_steps)]
    if config.objective.type == "reward_gradient":
        errors += [f"backprop.{line}" for line in config.backprop.validate(config.sampler.num_steps)]
        errors += [f"loss.{line}" for line in config.loss.validate(config.rewards)]
    watch = (config.rewards, config.eval_rewards, config.eval.every)
    errors += [f"early_stop.{line}" for line in config.early_stop.validate(*watch)]
    errors += [f"eval.diversity.{line}" for line in config.eval.diversity.validate()]
    for kind, group in (("rewards", config.rewards), ("eval_rewards", config.eval_rewards)):
        for name, reward in group.items():
            errors += [f"{kind}.{name}.{line}" for line in reward.validate()]
    if config.objective.type == CONTROL:
        pass  # its reward is consistency.network
    elif not config.rewards:
        errors.append("rewards: none given; add for example  rewards: {verifier: {type: verifier}}")
    elif all(r.weight == 0 for r in config.rewards.values()):
        errors.append("rewards: every weight is 0, so there is nothing to learn")
    for name in set(config.rewards) & set(config.eval_rewards):
        errors.append(f"eval_rewards.{name}: already in rewards, which are always evaluated too")
    errors += _minimums(config)
    errors += _combinations(config)
    return errors


def _alone(config: Config) -> bool:
    """Whether an image is trained without others of its prompt."""
    return config.advantage.baseline == "history" or config.objective.type in ("reward_gradient", CONTROL)


def _minimums(config: Config) -> list[str]:
    lowest = {
        "train.iterations": 1, "train.prompts_per_iteration": 1, "train.micro_batch": 1,
        "train.group_size": 1 if _alone(config) else 2, "train.inner_epochs": 1,
        "train.updates_per_iteration": 1, "train.rollout_batch": 1, "train.seed": 0, "eval.every": 0, "eval.during": 1,
        "eval.prompts": 1, "eval.num_steps": 1, "eval.grid_prompts": 1, "eval.pictures": 0, "eval.seed": 0, "checkpoint.every": 1,
        "checkpoint.keep": 1, "optim.ema_every": 1, "optim.warmup_updates": 0,
    }  # fmt: skip
    errors = []
    for key, low in lowest.items():
        room, name = key.split(".")
        value = getattr(getattr(config, room), name)
        if value < low:
            errors.append(f"{key}: must be at least {low}, got {value}")
    for key in ("lr", "max_grad_norm", "eps"):
        if getattr(config.optim, key) <= 0:
            errors.append(f"optim.{key}: must be positive, got {getattr(config.optim, key)}")
    for key in ("ema_decay", "final_lr_fraction"):
        if not 0 <= getattr(config.optim, key) < 1 + (key != "ema_decay"):
            errors.append(f"optim.{key}: must be between 0 and 1, got {getattr(config.optim, key)}")
    if not 0 <= config.train.max_invalid_fraction <= 1:
        errors.append(f"train.max_invalid_fraction: must be between 0 and 1, got {config.train.max_invalid_fraction}")
    if not config.train.scoring_timeout > 0:
        errors.append(f"train.scoring_timeout: must be positive, got {config.train.scoring_timeout}")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        errors.append(f"optim.betas: both must be in [0, 1), got {list(config.optim.betas)}")
    if config.optim.weight_decay < 0:
        errors.append(f"optim.weight_decay: must not be negative, got {config.optim.weight_decay}")
    if "/" in config.name or config.name in ("", ".", ".."):
        errors.append(f"name: must be a plain folder name, got '{config.name}'")
    return errors


def _combinations(config: Config) -> list[str]:
    errors = []
    samples, updates = config.samples_per_iteration, config.train.updates_per_iteration
    if updates > 0 and samples % updates:
        errors.append(f"train.updates_per_iteration: {updates} does not divide the {samples} samples of an iteration")
    if config.objective.type == "clipped_ratio" and config.sampler.kernel == "ode":
        errors.append(
            "sampler.kernel: 'ode' is deterministic, so it has no probability ratio; objective.type clipped_ratio needs "
            "flow_sde, dance_sde, cps or ddim (or use objective.type forward_process)"
        )
    if config.objective.type == "reward_difference" and config.sampler.kernel == "ode":
        errors.append("sampler.kernel: 'ode' has no log-prob, which reward_difference needs; use ddim, flow_sde or cps")
    if config.objective.type == "forward_process" and config.sampler.kernel != "ode":
        errors.append(
            f"sampler.kernel: objective.type forward_process trains on final images only and collects them with 'ode'; "
            f"got '{config.sampler.kernel}'"
        )
    if config.sampler.kernel == "ode" and config.sampler.plan != "full":
        errors.append(
            f"sampler.plan: '{config.sampler.plan}' chooses stochastic steps, and kernel 'ode' has none; use plan 'full'"
        )
    if config.sampler.kernel != "ode" and config.sampler.solver != "euler":
        errors.append(
            f"sampler.solver: '{config.sampler.solver}' only acts with kernel 'ode'; got '{config.sampler.kernel}'"
        )
    if config.sampler.kernel == "ode" and config.sampler.psi is not None:
        errors.append("sampler.psi: kernel 'ode' has no noise to set; remove psi")
    errors += _credit_errors(config) + _one_reward_errors(config) + _combine_errors(config)
    errors += _pair_errors(config) + _backprop_errors(config) + _uncertainty_errors(config)
    errors += control_errors(config)
    chosen, clip = config.selection, config.advantage.clip
    if chosen.rule == "extremes" and chosen.pos_threshold > clip and chosen.neg_threshold < -clip:
        errors.append(
            f"selection: no advantage passes these thresholds, since advantage.clip is {clip:g}; bring them nearer"
        )
    if not 0 < config.train.step_fraction <= 1:
        errors.append(f"train.step_fraction: must be in (0, 1], got {config.train.step_fraction}")
    if config.objective.type == "forward_process":
        for key in ("inner_epochs", "step_fraction"):
            if getattr(config.train, key) != 1:
                errors.append(f"train.{key}: objective.type forward_process trains drawn times once; leave it at 1")
    if config.train.group_size >= 2 and not _alone(config) and config.advantage.min_valid > config.train.group_size:
        errors.append(
            f"advantage.min_valid: {config.advantage.min_valid} is more than train.group_size "
            f"{config.train.group_size}, so no group would ever count"
        )
    return errors


def _credit_errors(config: Config) -> list[str]:
    rule, sampler = config.credit.rule, config.sampler
    if not config.credit.needs_values:
        return []
    if config.objective.type != "clipped_ratio":
        return [
            f"credit.rule: '{rule}' gives every sampling step its own reward, and objective.type "
            f"{config.objective.type} trains by the final reward alone; use clipped_ratio, or credit.rule terminal"
        ]
    if rule == "turning_point" and not sampler.validate() and len(sampler.make_plan(0, 0).stochastic) < 2:
        return ["credit.rule: turning_point compares neighbouring steps, and only 1 is stochastic; use 2 or more"]
    return []


def _one_reward_errors(config: Config) -> list[str]:
    """History and the choice of extremes need one reward per image."""
    rule = config.credit.rule
    if rule == "terminal":
        return []
    errors = []
    if config.advantage.baseline == "history":
        errors.append(
            f"advantage.baseline: history keeps one reward an image, and credit.rule {rule} gives one a step; use group"
        )
    if config.selection.rule == "extremes":
        errors.append(
            f"selection.rule: extremes ranks images by one number, and credit.rule {rule} gives one a step; use all"
        )
    return errors


def _apart(config: Config) -> bool:
    """Whether each weighted reward gets an advantage of its own."""
    gradient = config.objective.type == "reward_gradient"  # its rewards are summed as losses, see loss.equalise
    return not gradient and config.combine.apart({name: entry.weight for name, entry in config.rewards.items()})


def _combine_errors(config: Config) -> list[str]:
    """What needs one number per image cannot have several rewards apart; shaped rewards need a floor."""
    par, advantage = config.combine.par, config.advantage
    grouped = config.objective.type in ("clipped_ratio", "forward_process") and advantage.baseline == "group"
    if par.enabled and grouped and config.combine.rule != "rank" and advantage.std_floor < PAR_FLOOR:
        return [
            f"combine.par: a group in which it is saturated would be spread out again by its std; set "
            f"advantage.std_floor to {PAR_FLOOR:g} or more, got {advantage.std_floor:g}"
        ]
    if not _apart(config):
        return []
    needing = [
        (config.objective.type == "reward_difference", "objective.type reward_difference compares one raw reward"),
        (config.advantage.baseline == "history", "advantage.baseline history remembers one reward"),
        (config.credit.rule == "turning_point", "credit.rule turning_point follows the turns of one reward"),
    ]
    return [
        f"combine.rule: {reason} an image, and {config.combine.rule} keeps several apart; use combine.rule: sum"
        + (", without combine.gates" if config.combine.gates else "")
        + (", without combine.constraints" if config.combine.constraints.values else "")
        for needs, reason in needing
        if needs
    ]


def _pair_errors(config: Config) -> list[str]:
    """reward_difference compares whole trajectories of one prompt, by their raw rewards."""
    if config.objective.type != "reward_difference":
        return []
    reason = "objective.type reward_difference compares the raw rewards of whole trajectories"
    errors = []
    if config.selection.rule != "all":
        errors.append(f"selection.rule: {reason}; use all")
    if config.train.step_fraction != 1:
        errors.append(f"train.step_fraction: {reason}; use 1")
    if config.sampler.plan not in ("full", "branched") or not (
        config.sampler.branch.shared or config.sampler.plan == "full"
    ):
        errors.append(
            f"sampler.plan: {reason}, from a start that they share or to the end; use full, or branched and shared"
        )
    if (
        config.train.updates_per_iteration > 0
        and config.train.prompts_per_iteration % config.train.updates_per_iteration
    ):
        errors.append(f"train.updates_per_iteration: {reason}, so it must divide train.prompts_per_iteration")
    if config.train.group_size < 2:
        errors.append(f"train.group_size: {reason} in pairs; use at least 2")
    return errors


def _uncertainty_errors(config: Config) -> list[str]:
    """Weights act on advantages of groups or on the losses of images, a gated penalty needs a penalty."""
    settings, objective = config.uncertainty, config.objective
    kind, errors = objective.type, []
    if settings.mode == "weight":
        if kind == "reward_difference":
            errors.append("uncertainty.mode: weight acts on advantages, and reward_difference regresses on raw rewards")
        elif kind != "reward_gradient" and config.advantage.baseline == "history":
            errors.append(
                "uncertainty.mode: weight needs the uncertainty of everything an image is compared with, and "
                "advantage.baseline history keeps past rewards alone; use group"
            )
        if kind == "reward_gradient" and "rank_disagreement" in settings.sources:
            errors.append("uncertainty.sources: rank_disagreement compares a group, and reward_gradient trains alone")
        watched = [n for n in settings.native_of if n in config.rewards and config.rewards[n].weight == 0]
        if kind == "reward_gradient" and watched:
            errors.append(
                f"uncertainty.native_of: '{watched[0]}' has weight 0, and under reward_gradient each loss is weighted by the "
                "uncertainty of its own reward"
            )
        if kind == "reward_gradient" and config.loss.equalise:
            errors.append(
                "uncertainty.mode: weight scales gradients, and loss.equalise brings them back; use one of them"
            )
    if settings.mode != "off" and "rank_disagreement" in settings.sources and config.train.group_size < 2:
        errors.append(
            "uncertainty.sources: rank_disagreement compares the images of a group, and train.group_size is "
            f"{config.train.group_size}; use 2 or more"
        )
    if settings.mode == "weight" and settings.per_step:
        silent = [n for n in settings.native_of if n in config.rewards and config.rewards[n].weight == 0]
        if not config.credit.needs_values:
            errors.append(
                f"uncertainty.per_step: credit.rule {config.credit.rule} completes no states, so only final images have an "
                "uncertainty; use value, gain or turning_point"
            )
        elif "native" not in settings.sources or silent:
            reason = f"'{silent[0]}' has weight 0" if silent else "native is no source"
            errors.append(f"uncertainty.per_step: {reason}, so nothing says how sure it is of completions")
        elif not config.sampler.validate() and len(config.sampler.make_plan(0, 0).stochastic) < 2:
            errors.append(
                "uncertainty.per_step: weighs steps against each other, and only 1 is stochastic; use 2 or more"
            )
    if settings.mode == "gate_kl":
        if objective.penalty is None:
            errors.append(f"uncertainty.mode: objective.type {kind} has no penalty by sample for gate_kl to act on")
        elif getattr(objective, objective.penalty) == 0:
            errors.append(f"uncertainty.mode: gate_kl chooses who feels objective.{objective.penalty}, which is 0")
    return errors


def _backprop_errors(config: Config) -> list[str]:
    """reward_gradient trains each image once, through Euler or stochastic steps of its own chain."""
    if config.objective.type != "reward_gradient":
        return []
    errors = []
    for key in ("inner_epochs", "step_fraction"):
        if getattr(config.train, key) != 1:
            errors.append(
                f"train.{key}: objective.type reward_gradient trains every image once, see backprop for its steps; "
                "leave it at 1"
            )
    if config.sampler.plan == "branched":
        errors.append("sampler.plan: branched compares images, and objective.type reward_gradient does not; use full")
    if config.sampler.solver != "euler":
        errors.append(f"sampler.solver: {config.sampler.solver} cannot be differentiated step by step; use euler")
    if config.backprop.lv_draws and config.sampler.noisy_end:
        errors.append(
            f"backprop.lv_draws: copies are finished without noise, and the last step of kernel '{config.sampler.kernel}' "
            "has some; use ode"
        )
    for name, reward in config.rewards.items():
        if reward.offload and reward.weight != 0:
            errors.append(
                f"rewards.{name}.offload: its network is part of every gradient of reward_gradient, so it stays; remove offload"
            )
    if config.sampler.psi is not None:
        errors.append("sampler.psi: it balances gains and losses of a policy gradient; remove it for reward_gradient")
    return errors


Case = tuple[bool, str, str]
"""Whether a setting is not read, its key, and why."""


def _combine_cases(config: Config) -> list[Case]:
    gradient = config.objective.type == "reward_gradient"
    ranked = config.combine.rule == "rank" and _apart(config)
    idle = "objective.type is reward_gradient, see loss.equalise" if gradient else "only one reward has a weight"
    if config.combine.rule == "sum":
        idle = "combine.rule is sum"
    return [
        (gradient, "combine.rule", idle),
        (gradient, "combine.par", idle),
        (gradient, "combine.standardise", idle),
        (config.combine.par.enabled, "combine.standardise", "combine.par has units of its own"),
        (not config.combine.par.enabled, "combine.par", "combine.par.enabled is false"),
        (_apart(config), "combine.standardise", f"combine.rule is {config.combine.rule}"),
        (not _apart(config), "combine.batch_norm", idle),
        (not _apart(config) or ranked, "combine.std_floor", "combine.rule is rank" if ranked else idle),
        (gradient, "combine.gates", idle),
        (
            gradient or not config.combine.constraints.values,
            "combine.constraints",
            "combine.constraints.values is empty",
        ),
        (ranked and config.combine.par.enabled, "combine.par", "it keeps the order, and combine.rule is rank"),
        (ranked, "advantage.std", "combine.rule is rank"),
        (ranked, "advantage.eps", "combine.rule is rank"),
        (ranked, "advantage.std_floor", "combine.rule is rank"),
    ]


def _uncertainty_cases(config: Config) -> list[Case]:
    settings, gradient = config.uncertainty, config.objective.type == "reward_gradient"
    weight, off = settings.mode == "weight", settings.mode == "off"
    idle = f"uncertainty.mode is {settings.mode}"
    cases = [
        (not weight, f"uncertainty.{key}", idle)
        for key in (
            "kappa", "w_min", "eta", "u_max", "renormalise", "weighted_baseline", "positive_only", "per_step", "shuffled",
        )
    ]  # fmt: skip
    cases += [
        (settings.mode != "gate_kl", f"uncertainty.{key}", idle) for key in ("gate_fraction", "gate_min", "gate_max")
    ]
    cases += [
        (weight and gradient, f"uncertainty.{key}", "objective.type is reward_gradient, which compares no images")
        for key in ("renormalise", "weighted_baseline", "positive_only", "shuffled")
    ]
    return [
        *cases,
        (weight and settings.positive_only, "uncertainty.weighted_baseline", "uncertainty.positive_only is true"),
        (weight and settings.positive_only, "uncertainty.renormalise", "uncertainty.positive_only is true"),
        (not (weight and gradient), "uncertainty.detach_weight", "it acts with mode weight and reward_gradient"),
        (off, "uncertainty.sources", idle),
        *(
            (off or source not in settings.sources, f"uncertainty.{key}", idle if off else f"{source} is no source")
            for key, source in (("native_of", "native"), ("auxiliaries", "rank_disagreement"))
        ),
    ]


def _backprop_cases(config: Config) -> list[Case]:
    sampler, backprop, kind = config.sampler, config.backprop, config.objective.type
    gradient = kind == "reward_gradient"
    return [
        (not gradient, "backprop", f"objective.type is {kind}"),
        (not gradient, "loss", f"objective.type is {kind}"),
        (
            backprop.truncation != "gaussian",
            "backprop.truncation_mean",
            f"backprop.truncation is {backprop.truncation}",
        ),
        (backprop.truncation != "gaussian", "backprop.truncation_std", f"backprop.truncation is {backprop.truncation}"),
        (backprop.truncation != "fixed", "backprop.k", f"backprop.truncation is {backprop.truncation}"),
        (backprop.steps != "late_biased", "backprop.late_bias", f"backprop.steps is {backprop.steps}"),
        (
            backprop.stop_window(sampler.num_steps) == 1,
            "backprop.cut_ratio",
            f"it is less than a step and a half of {sampler.num_steps}",
        ),
        (backprop.most_active(sampler.num_steps) == 1, "backprop.jacobian", "an image has one active step"),
        (
            sampler.guidance_scale == 1,
            "backprop.guidance_gradient",
            "sampler.guidance_scale is 1",
        ),
    ]


def without_effect(config: Config) -> list[str]:
    """Settings that differ from their defaults and that nothing will read, each with the reason: notes, not errors.

    A layer may well set what a later layer switches off, so these are said and not refused.
    """
    sampler, optim, plain = config.sampler, config.optim, type(config)()
    values = config.credit.needs_values or sampler.psi is not None
    kind = config.objective.type
    cases = [
        *_combine_cases(config),
        *_uncertainty_cases(config),
        (sampler.plan not in ("window", "sliding"), "sampler.window_size", f"sampler.plan is {sampler.plan}"),
        (sampler.plan not in ("window", "sliding"), "sampler.window_range", f"sampler.plan is {sampler.plan}"),
        (sampler.plan != "sliding", "sampler.window_every", f"sampler.plan is {sampler.plan}"),
        (sampler.plan != "sliding", "sampler.window_stride", f"sampler.plan is {sampler.plan}"),
        (sampler.plan != "branched", "sampler.branch", f"sampler.plan is {sampler.plan}"),
        (
            sampler.plan == "branched",
            "sampler.shared_noise",
            "sampler.plan is branched, see sampler.branch.shared",
        ),
        (config.advantage.baseline != "history", "advantage.history", "advantage.baseline is group"),
        (config.advantage.baseline == "history", "advantage.std", "advantage.baseline is history"),
        (config.advantage.baseline == "history", "advantage.std_floor", "advantage.baseline is history"),
        (config.advantage.baseline == "history", "advantage.min_valid", "advantage.baseline is history"),
        (kind in ("reward_difference", "reward_gradient", CONTROL), "advantage", f"objective.type is {kind}"),
        (kind in ("reward_difference", "reward_gradient", CONTROL), "selection", f"objective.type is {kind}"),
        *_backprop_cases(config),
        *control_cases(config),
        (
            kind in ("reward_gradient", "condition_consistency"),
            "train.async_scoring",
            f"objective.type is {kind}",
        ),
        (not config.train.async_scoring, "train.scoring_timeout", "train.async_scoring is false"),
        (config.selection.rule == "all", "selection.pos_threshold", "selection.rule is all"),
        (config.selection.rule == "all", "selection.neg_threshold", "selection.rule is all"),
        (sampler.grid != "linspace_shift", "sampler.shift", f"sampler.grid is {sampler.grid}"),
        (sampler.kernel == "ode", "sampler.noise_level", "sampler.kernel is ode"),
        (sampler.psi is not None, "sampler.noise_level", "sampler.psi sets the noise"),
        (not values, "completions", f"credit.rule is {config.credit.rule}"),
        (config.credit.rule != "turning_point", "credit.turning_point", f"credit.rule is {config.credit.rule}"),
        (not config.credit.turning_point.balance, "credit.turning_point.balance_scope", "balance is false"),
        (not config.credit.turning_point.balance, "credit.turning_point.balance_key", "balance is false"),
        (config.calibration.rule == "literal", "calibration.tolerance", "calibration.rule is literal"),
        (config.calibration.rule == "fraction", "calibration.count_tolerance", "calibration.rule is fraction"),
        (config.eval.diversity.prompts == 0, "eval.diversity.images", "eval.diversity.prompts is 0"),
        (config.eval.diversity.prompts == 0, "eval.diversity.embedder", "eval.diversity.prompts is 0"),
        (config.early_stop.reward is None, "early_stop.drop", "early_stop.reward is null"),
        (config.early_stop.reward is None, "early_stop.patience", "early_stop.reward is null"),
        (optim.ema_decay == 0, "optim.ema_every", "optim.ema_decay is 0"),
        (optim.schedule == "constant", "optim.final_lr_fraction", "optim.schedule is constant"),
    ]
    lines = []
    for unread, key, reason in cases:
        if unread and attrgetter(key)(config) != attrgetter(key)(plain):
            lines.append(f"{key} has no effect: {reason}")
    start, end = sampler.branch.lengths(sampler.num_steps)
    if sampler.plan == "branched" and start < end and sampler.branch.stages > config.train.iterations:
        reached = suffix_length(config.train.iterations - 1, start, end, sampler.branch.stages)
        lines.append(
            f"sampler.branch.stages {sampler.branch.stages}: after train.iterations = {config.train.iterations} the suffix has "
            f"grown to {reached} of {end} steps"
        )
    if config.eval.during > config.eval.prompts:
        lines.append(f"eval.during {config.eval.during}: only eval.prompts = {config.eval.prompts} are evaluated")
    return lines + control_notes(config)
