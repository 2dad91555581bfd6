"""One prompt's stochastic trajectories with the completed image and the value of each state: `align grid --trajectory`.

The value of a state is the reward of its completion, the deterministic finish from there (DenseGRPO, arXiv 2601.20218);
everything is sampled as the run trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from align.calibrate import read_table, rounded_grid
from align.collect import guided
from align.config import Config, load_config
from align.errors import UserError
from align.grids import save_png
from align.inference import Setup, chosen_prompts, chosen_rewards, load_target
from align.models.base import load_model
from align.models.controlnet import ControlNetSDModel
from align.prompts import Prompt, load_prompts
from align.run import sampling_grid
from align.scoring import score_local
from align.trajectory_picture import trajectory_picture
from rewards.combine import combine
from samplers.completions import CompletionConfig, CompletionPlan
from samplers.config import SamplerConfig
from samplers.noise import BRANCH_STREAM, INITIAL_STREAM, STEP_STREAM, keyed_normal
from samplers.plans import Plan
from samplers.rollout import Trajectory, rollout

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Trajectories:
    """n trajectories of one prompt; S stochastic steps, S + 1 columns: a completion each, then the final image."""

    prompt: str
    images: Tensor
    """(n, S + 1, 3, H, W) in [0, 1]: completions of the states before the stochastic steps, then the final images."""
    values: Tensor
    """(n, S + 1) float32 rewards of these images, NaN where one is missing."""
    steps: tuple[int, ...]
    """The S stochastic steps, of `num_steps`."""
    samples: tuple[int, ...]
    """Number of each trajectory, which names its noise."""
    note: str
    """What was sampled and how it was judged, in one line."""


def load_setup(target: str, adapter: str | None = None, seed: int | None = None, scale: float = 1.0) -> Setup:
    """`load_target`, which also takes a configuration (its model, untrained) or the adapter folder of a run.

    Raises: UserError if nothing can be loaded from `target` or `adapter`.
    """
    path = run = Path(target)
    if path.suffix in (".yaml", ".yml"):
        setup = _of_config(load_config(path), adapter, seed or 0, scale)
        run = setup.config.run_dir if setup.config else path
    elif (path / "pytorch_lora_weights.safetensors").is_file():
        above = [p for p in path.absolute().parents if (p / "config.yaml").is_file()]
        if not above:
            raise UserError(f"{target}: an adapter without its run; give its model, and --adapter {target}")
        run = above[0]
        setup = load_target(str(run), target, seed=seed, scale=scale)
    else:
        setup = load_target(target, adapter, seed=seed, scale=scale)
    if setup.config is not None and setup.config.sampler.psi is not None and (run / "psi.json").is_file():
        setup.config.sampler.psi = str(run / "psi.json")  # what this run was trained with, wherever its folder is now
    if isinstance(setup.model, ControlNetSDModel):
        raise UserError("--trajectory: not with a ControlNet, which follows condition images")
    setup = replace(setup, folder=run)
    return setup if scale else replace(setup, adapter=None)


def _of_config(config: Config, adapter: str | None, seed: int, scale: float) -> Setup:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(replace(config.model, encoders="keep", compile=False), device)
    folder = adapter or config.model.lora.init_from
    if folder is not None:
        model.load_adapter(folder, scale)
    model.finish_setup()
    steps, guidance = config.sampler.num_steps, config.sampler.guidance_scale
    return Setup(model, Path(folder) if folder else None, steps, guidance, seed, config)


def chosen_prompt(setup: Setup, text: str | None, source: str | None) -> Prompt:
    """The prompt `text`, with its metadata where `source` or the run's prompts have it; else the first held-out one."""
    if text is None:
        return chosen_prompts(setup, source, 1)[0]
    sources = [source] if source else []
    if setup.config is not None:
        sources += [setup.config.prompts.eval, setup.config.prompts.train]
    known = (prompt for name in sources for prompt in load_prompts(name) if prompt.text == text)
    return next(known, Prompt(text))


def sample_trajectories(
    setup: Setup,
    prompt: Prompt,
    samples: Sequence[int],
    reward_names: Sequence[str] = (),
    num_steps: int | None = None,
    guidance: float | None = None,
) -> Trajectories:
    """Roll out one trajectory of `prompt` for each of `samples`, complete every state, and score all images.

    Sampler, completions and rewards are the run's; without one: flow_sde at 0.7, 10 steps. A run that samples with the
    ode kernel is shown with flow_sde at 0.7 too. Branched runs are shown with the suffix of their end; only its states are
    completed. Options that are given win.

    Raises: UserError for settings that cannot work or without a reward; RewardError if a reward fails.
    """
    sampler = _sampler(setup, num_steps, guidance)
    weights = _weights(setup, reward_names)
    last = setup.config.train.iterations - 1 if setup.config is not None and sampler.plan == "branched" else 0
    model, plan = setup.model, sampler.make_plan(setup.seed, last)
    model.guidance_scale = sampler.guidance_scale
    grid = sampling_grid(model, sampler).to(model.device)
    kernel, levels, label = _noise(sampler, grid)
    trajectory = _roll(setup, prompt, samples, sampler, plan, grid, kernel, levels)
    columns = [model.decode(latents, ROWS_AT_ONCE) for latents in (*trajectory.completions, trajectory.final)]
    rewards = chosen_rewards(setup, list(weights))
    values = []
    for images in columns:
        scores = score_local(rewards, images, [prompt] * len(samples), [0] * len(samples), -1)
        values.append(combine(scores, {name: ~s.isnan() for name, s in scores.items()}, weights)[0])
    return Trajectories(
        prompt.text,
        torch.stack(columns, dim=1).cpu(),
        torch.stack(values, dim=1),
        plan.stochastic,
        tuple(samples),
        _note(setup, sampler, weights, label),
    )


def _note(setup: Setup, sampler: SamplerConfig, weights: dict[str, float], noise: str) -> str:
    rule = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
    facts = [f"{'tuned' if setup.adapter else 'base'} model", noise, f"{sampler.num_steps} steps", f"seed {setup.seed}"]
    if sampler.guidance_scale != 1:
        facts.insert(3, f"guidance {sampler.guidance_scale:g}")
    return f"reward: {rule}; {', '.join(facts)}"


def _sampler(setup: Setup, num_steps: int | None, guidance: float | None) -> SamplerConfig:
    sampler = setup.config.sampler if setup.config is not None else SamplerConfig()
    if sampler.kernel == "ode":
        sampler = replace(sampler, kernel="flow_sde", noise_level=0.7, plan="full", solver="euler")
    if guidance is not None:
        sampler = replace(sampler, guidance_scale=guidance)
    sampler = replace(sampler, num_steps=num_steps or sampler.num_steps)
    errors = [f"sampler.{line}" for line in sampler.validate()]
    if errors:
        raise UserError("\n".join(errors))
    return sampler


def _weights(setup: Setup, names: Sequence[str]) -> dict[str, float]:
    """Reward name -> weight in the value: those named, else all that the run trains on."""
    trained = setup.config.rewards if setup.config is not None else {}
    weights = {name: trained[name].weight if name in trained else 1.0 for name in names or trained}
    if not names:
        weights = {name: weight for name, weight in weights.items() if weight != 0}
    if not weights:
        raise UserError("give at least one --reward NAME")
    return {name: weight or 1.0 for name, weight in weights.items()}


def _noise(sampler: SamplerConfig, grid: Tensor) -> tuple[str, float | Tensor, str]:
    """(kernel, noise level or one per step, both in words); a run trained on a noise table is shown with that table."""
    if sampler.psi is None:
        return sampler.kernel, sampler.noise_level, f"{sampler.kernel} {sampler.noise_level:g}"
    if sampler.psi == "auto":
        raise UserError("sampler.psi: no noise table has been measured yet; show a run that was trained with one")
    path = Path(sampler.psi)
    table, times = read_table(path), rounded_grid(grid)
    if table["fingerprint"]["grid"] != times or len(table["sigma"]) != len(times) - 1:
        raise UserError(
            f"{path}: has noise levels for {len(table['sigma'])} steps at other times than the {len(times) - 1} of this "
            "grid; leave out --steps, or run align calibrate again"
        )
    return "psi_sde", torch.tensor(table["sigma"], dtype=torch.float64), "calibrated noise"


def _roll(
    setup: Setup,
    prompt: Prompt,
    samples: Sequence[int],
    sampler: SamplerConfig,
    plan: Plan,
    grid: Tensor,
    kernel: str,
    levels: float | Tensor,
) -> Trajectory:
    model, seed = setup.model, setup.seed
    shape, device = model.latent_shape, model.device
    owners = [0] * len(samples) if sampler.shared_start else list(samples)
    levels = torch.as_tensor(levels, dtype=torch.float64).cpu().expand(plan.num_steps)
    cond = model.conditioning([prompt.text] * len(samples))

    def noise(keys: Sequence[int], first: int = 0, stream: int = STEP_STREAM) -> Callable[[int], Tensor]:
        return lambda step: keyed_normal(
            shape, seed=seed, iteration=0, samples=keys, step=first + step, stream=stream, device=device
        )

    x = noise(owners, stream=INITIAL_STREAM)(0) * model.noise_scale(float(grid[0]))
    if plan.split:
        shared = noise(owners, stream=BRANCH_STREAM if plan.shared else STEP_STREAM)
        early = slice(None, plan.split)
        x = rollout(
            model.velocity,
            x,
            cond,
            grid[: plan.split + 1],
            plan.prefix(),
            kernel,
            levels[early],
            shared,
            chunk=ROWS_AT_ONCE,
        ).final
    settings = setup.config.completions if setup.config is not None else CompletionConfig()
    return rollout(
        model.velocity,
        x,
        cond,
        grid[plan.split :],
        plan.suffix(),
        kernel,
        levels[plan.split :],
        noise(list(samples), plan.split),
        completions=CompletionPlan(settings.ode_steps, guided(model, settings.guidance_scale, model.guidance_scale)),
        chunk=ROWS_AT_ONCE,
    )


def save_trajectories(path: Path, found: Trajectories) -> Path:
    """Draw `found` and write the PNG."""
    picture = trajectory_picture(
        [list(row) for row in found.images],
        found.values,
        found.steps,
        prompt=found.prompt,
        note=found.note,
        labels=[f"sample {i}" for i in found.samples],
    )
    return save_png(picture, path)
