"""What is wrong with a configuration that trains a ControlNet, and what in it has no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.config import Config

OBJECTIVE = "condition_consistency"


def control_errors(config: Config) -> list[str]:
    """condition_consistency trains a ControlNet once on every image, by one reward of its own; nothing else can train one."""
    if config.objective.type != OBJECTIVE:
        if config.model.controlnet is None:
            return []
        return [
            f"model.controlnet: objective.type {config.objective.type} trains an adapter without condition images; use "
            f"{OBJECTIVE}, or leave it out"
        ]
    errors = [f"consistency.{line}" for line in config.consistency.validate()]
    if config.model.controlnet is None:
        errors.append(
            f"model.controlnet: objective.type {OBJECTIVE} trains a ControlNet; give a diffusers folder or hub id, or unet to "
            "make one from the model's UNet"
        )
    for key in ("inner_epochs", "step_fraction"):
        if getattr(config.train, key) != 1:
            errors.append(f"train.{key}: objective.type {OBJECTIVE} trains every image once; leave it at 1")
    trained = [name for name, reward in config.rewards.items() if reward.weight != 0]
    if trained:
        errors.append(
            f"rewards.{trained[0]}: objective.type {OBJECTIVE} trains by consistency.network alone; give it weight 0 or move it "
            "to eval_rewards"
        )
    if config.model.lora.init_from is not None:
        errors.append(
            f"model.lora.init_from: objective.type {OBJECTIVE} trains no LoRA; start from a ControlNet instead"
        )
    if config.uncertainty.mode != "off":
        errors.append(
            f"uncertainty.mode: objective.type {OBJECTIVE} has settings of its own, consistency.ctrlu; use off"
        )
    return errors


def control_cases(config: Config) -> list[tuple[bool, str, str]]:
    """(whether a setting is not read, its key, why)."""
    kind, consistency = config.objective.type, config.consistency
    other, mode = kind != OBJECTIVE, consistency.ctrlu.mode
    plain = not other and consistency.grad_scale == 0
    silent, why = (plain, "consistency.grad_scale is 0") if plain else (False, f"consistency.ctrlu.mode is {mode}")
    return [
        (other, "consistency", f"objective.type is {kind}"),
        *(
            (plain, f"consistency.{key}", "consistency.grad_scale is 0")
            for key in ("network", "t_min", "t_max", "ramp_updates", "clamp")
        ),
        (
            not other and consistency.network == "edges",
            "consistency.ctrlu.kl_direction",
            "consistency.network edges has no classes",
        ),
        *(
            (silent or (not other and mode == "off"), f"consistency.ctrlu.{key}", why)
            for key in ("add_timestep", "share_noise")
        ),
        *(
            (silent or (not other and mode != "uncertainty"), f"consistency.ctrlu.{key}", why)
            for key in ("u_scale", "eta", "scale_inside_exp", "kl_direction", "detach_weight", "symmetric")
        ),
    ]


def control_notes(config: Config) -> list[str]:
    """What is likely to be a mistake, though it runs."""
    settings = config.consistency
    twice = config.objective.type == OBJECTIVE and settings.grad_scale > 0 and settings.ctrlu.mode == "uncertainty"
    if twice and settings.ctrlu.share_noise and config.model.precision == "bf16":
        return [
            "consistency.ctrlu.share_noise: two predictions from the same noise differ by less than bf16 rounds, so most of "
            "their disagreement is rounding; use model.precision fp16 (as released) or fp32, or noise of their own"
        ]
    return []
