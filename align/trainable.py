"""Rewards that learn along with the policy: what they may be combined with, their reference images, and their update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.errors import UserError
from align.prompts import Prompt, prompt_indices
from align.real_images import IMAGE_SUFFIXES, fitted, read_picture
from align.scoring import reward_batch
from rewards.base import Reward, RewardError, onloaded

if TYPE_CHECKING:
    from align.config import Config
    from align.run import Run

_PREFIX = "reward"


def trainable_rewards(rewards: Mapping[str, Reward]) -> dict[str, Reward]:
    """Those of `rewards` that are trained along with the policy."""
    return {name: reward for name, reward in rewards.items() if reward.trainable}


def fixed_rewards(rewards: Mapping[str, Reward]) -> dict[str, Reward]:
    """Those that judge the base and the tuned model alike, so that evaluations can compare."""
    return {name: reward for name, reward in rewards.items() if not reward.trainable}


def check_fixed(name: str, reward: Reward) -> None:
    """Raises: RewardError for a reward that has something to say only in the run that trains it."""
    if any(part.trainable for part in (reward, *_parts(reward))):
        raise RewardError(
            f"reward '{name}' is trained along with a policy and knows nothing outside that run: name another"
        )


def check_trainable(config: Config, rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Raises: UserError if a reward is trainable and the configuration has no place for that, or if images are missing."""
    for name, reward in rewards.items():
        if any(part.trainable for part in _parts(reward)):
            raise UserError(
                f"reward '{name}' is made of a trainable one, which would not be trained: name that one itself"
            )
    found = trainable_rewards(rewards)
    if not found:
        return
    errors = [
        f"reward '{name}' {error}" for name, reward in found.items() for error in _conflicts(config, name, reward)
    ]
    turns = [{i for i in range(config.train.iterations) if r.policy_turn(i)} for r in found.values()]
    if all(turns) and not set.intersection(*turns):
        errors.append(
            f"rewards {', '.join(found)} leave the policy no turn in common in {config.train.iterations} iterations: "
            "give them the same `every`"
        )
    if len(found) == len(rewards):
        errors.append(
            f"reward '{next(iter(found))}' moves along with the policy, so it cannot tell whether the policy got better: "
            "name at least one other in eval_rewards"
        )
    if errors:
        raise UserError("\n".join(errors))
    for name, reward in found.items():
        reference_files(name, reward, prompts)


def _parts(reward: Reward) -> Iterator[Reward]:
    """Rewards that a reward is made of."""
    for value in vars(reward).values():
        for part in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        ):
            if isinstance(part, Reward):
                yield part
                yield from _parts(part)


def _conflicts(config: Config, name: str, reward: Reward) -> list[str]:
    """What the configuration asks of a trainable reward that it cannot give."""
    combine, train = config.combine, config.train
    turns = [reward.policy_turn(i) for i in range(train.iterations)]
    stale = "compares scores of different iterations, and those of a reward that is trained are not comparable"
    checks = {
        "is trained along with the policy: put it in rewards, not in eval_rewards": name not in config.rewards,
        f"is trained in the policy-gradient loop: objective.type {config.objective.type} has no place for it":
            config.objective.type in ("reward_gradient", "condition_consistency"),
        f"leaves the policy no turn in {train.iterations} iterations: lower its `every`": not any(turns),
        "leaves the policy only some iterations, which optim.schedule: cosine does not know: use constant":
            config.optim.schedule == "cosine" and any(turns) and not all(turns),
        f"and advantage.baseline: history do not go together: it {stale}": config.advantage.baseline == "history",
        f"and combine.par do not go together: it {stale}": combine.par.enabled,
        f"and combine.standardise do not go together: it {stale}": combine.standardise == "reference",
        f"and combine.constraints do not go together: it {stale}": name in combine.constraints.values,
        f"and early_stop.reward do not go together: it {stale}": config.early_stop.reward == name,
        "and sampler.psi do not go together: the noise would be measured before it has learnt anything":
            config.sampler.psi is not None,
    }  # fmt: skip
    return [error for error, wrong in checks.items() if wrong]


def reference_files(name: str, reward: Reward, prompts: Sequence[Prompt]) -> list[str]:
    """Image files of a trainable reward's folder, or each prompt's own. Raises: UserError if there are none."""
    if reward.references is None:
        missing = next((p for p in prompts if p.image is None or not Path(p.image).is_file()), None)
        if missing is not None:
            raise UserError(
                f"reward '{name}' needs images to be like: set its references to a folder of images, or give every prompt "
                f"an image that is there in a .jsonl (the prompt '{missing.text}' has none)"
            )
        return [str(p.image) for p in prompts]
    folder = Path(reward.references).expanduser()
    files = sorted(str(f) for f in folder.glob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not files:
        raise UserError(f"reward '{name}': references: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def policy_learns(run: Run) -> bool:
    """Whether the policy is updated in this iteration."""
    return all(reward.policy_turn(run.counters.iteration) for reward in trainable_rewards(run.rewards).values())


def update_rewards(
    run: Run, prompts: Sequence[Prompt], latents: Tensor, samples: Sequence[int], groups: Sequence[int], iteration: int
) -> dict[str, float]:
    """Let trainable rewards learn from this process's final latents (n, C, h, w); returns their metrics.

    prompts: of the iteration, one a group; samples, groups: global indices of the n samples and their groups. Raises:
    UserError, on all processes, for a reference image that cannot be read.
    """
    found = trainable_rewards(run.rewards)
    if not found:
        return {}
    images = _decoded(run, latents)
    batch = reward_batch(images, [prompts[g] for g in groups], groups, iteration)
    metrics: dict[str, float] = {}
    for name, reward in found.items():
        reference = _references(run, name, reward, prompts, samples, groups, iteration, images)
        with onloaded([reward]):
            measured = reward.update(batch, reference, lambda x: run.accelerator.reduce(x, reduction="sum"))
        metrics |= {f"reward_update/{name}_{key}": value for key, value in measured.items()}
    return metrics


def _references(
    run: Run,
    name: str,
    reward: Reward,
    prompts: Sequence[Prompt],
    samples: Sequence[int],
    groups: Sequence[int],
    iteration: int,
    images: Tensor,
) -> Tensor:
    """A reference image for each of this process's samples, of the size of `images` and from the same autoencoder.

    A folder's images take turns in an order of the run's seed; sample i of an iteration has the same one however many
    processes there are.
    """
    picked: Tensor | None = None
    problem = None
    try:
        if reward.references is None:
            files = [str(prompts[g].image) for g in groups]
        else:
            known = reference_files(name, reward, prompts)
            order = prompt_indices(len(known), run.shape.samples, iteration, run.config.train.seed)
            files = [known[order[i]] for i in samples]
        side = images.shape[-1]
        loaded = {file: fitted(read_picture(file), side) for file in dict.fromkeys(files)}
        picked = torch.cat([loaded[file] for file in files]) if files else torch.zeros(0, 3, side, side)
    except (UserError, RewardError) as error:
        problem = error
    if run.total(problem is not None):
        raise problem or UserError(f"reward '{name}': another process cannot read its reference images")
    assert picked is not None
    return _through_autoencoder(run, picked)


def _through_autoencoder(run: Run, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) as the model's autoencoder gives them back: its traces are then no sign of a generated one."""
    model, size = run.model, run.config.train.rollout_batch
    final = 1 / float(model.clean(torch.ones(())))  # latents of the encoder are clean ones, `decode` takes final states
    return torch.cat([_decoded(run, model.encode_images(some.to(model.device)) * final) for some in images.split(size)])


def _decoded(run: Run, latents: Tensor) -> Tensor:
    """Images (n, 3, H, W) on the CPU: those of a whole iteration would take gigabytes of a GPU."""
    size = run.config.train.rollout_batch
    return torch.cat([run.model.decode(some, size).cpu() for some in latents.split(size)])


def reward_tensors(rewards: Mapping[str, Reward]) -> dict[str, Tensor]:
    """State of the trainable rewards for a checkpoint, `reward.<name>/<key>`."""
    return {
        f"{_PREFIX}.{name}/{key}": value
        for name, reward in trainable_rewards(rewards).items()
        for key, value in reward.state_dict().items()
    }


def restore_rewards(rewards: Mapping[str, Reward], tensors: Mapping[str, Any]) -> None:
    """Inverse of `reward_tensors`."""
    for name, reward in trainable_rewards(rewards).items():
        start = f"{_PREFIX}.{name}/"
        own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        with onloaded([reward]):
            reward.load_state_dict(own)
