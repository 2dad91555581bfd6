"""Everything a loop works with: model, adapter, optimiser, averages, rewards, prompts, counters; saved and restored."""

from __future__ import annotations

import contextlib
import math
import platform
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradScalerKwargs, InitProcessGroupKwargs, gather_object
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from align import checkpoint
from align.condition import ConditionNetwork, condition_network
from align.config import Config, to_yaml
from align.diversity import build_embedder
from align.early_stop import Watch, make_watch
from align.errors import UserError
from align.geometry import Geometry, geometry
from align.history import Past
from align.models.base import ImageModel, load_model
from align.objectives import old_policy_decay
from align.prompts import Prompt, load_prompts, prompt_indices
from align.real_images import check_images
from align.resume import changed_keys
from align.reward_loss import check_differentiable, enable_checkpointing
from align.tracking import Tracker, write_json
from align.trainable import check_trainable, restore_rewards, reward_tensors
from align.uncertainty import TrustState
from align.weights import WeightAverage
from rewards.base import Reward
from rewards.registry import set_up_rewards
from samplers.config import SamplerConfig
from samplers.kernels import KERNEL_LOG_PROB


@dataclass
class Counters:
    """Numbers that grow over a run and survive a resume."""

    iteration: int = 0
    """Iterations done."""
    updates: int = 0
    """Optimiser steps taken or passed over."""
    empty_updates: int = 0
    """Updates passed over because the selection left nothing to train in them."""
    nfe: int = 0
    """Network evaluations over all images and processes: a forward is 1, a backward 2 (3 with checkpointing)."""
    seconds: float = 0.0
    """Wall time of the iterations and of the calibration, without evaluations."""
    skipped_updates: int = 0
    """Updates skipped for a non-finite gradient."""
    consecutive_bad: int = 0
    """Non-finite updates in a row."""
    invalid_iterations: int = 0
    """Iterations in a row skipped for missing scores."""


@dataclass
class Run:
    """The state of one run on one process."""

    config: Config
    accelerator: Accelerator
    console: Console
    model: ImageModel
    parameters: list[torch.nn.Parameter]
    optimizer: Any
    average: WeightAverage | None
    old: WeightAverage | None
    """forward_process: the lagging weights that collect images and anchor the loss."""
    behaviour: WeightAverage | None
    """clipped_ratio with ratio repair: the weights that sampled this iteration."""
    rewards: dict[str, Reward]
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    grid: Tensor
    kernel: str
    """Kernel of the stochastic steps: the configured one, or psi_sde where a calibrated table is in force."""
    noise_levels: Tensor
    """(T,) float64, the kernel's noise level at each step."""
    shape: Geometry
    counters: Counters = field(default_factory=Counters)
    tracker: Tracker | None = None
    interrupted: bool = False
    warned: set[str] = field(default_factory=set)
    history: Past = field(default_factory=dict)
    """Rewards that each training prompt earned (`advantage.baseline: history`)."""
    watch: Watch | None = None
    """Evaluations of the watched reward and the best weights (`early_stop.reward`)."""
    embedder: Reward | None = None
    """What tells images of a prompt apart (`eval.diversity`)."""
    trust: TrustState = field(default_factory=TrustState)
    """What is known of the rewards' uncertainty (`uncertainty`), and of the base model's scores."""
    condition: ConditionNetwork | None = None
    """condition_consistency: the network that reads the condition; None for the diffusion loss alone."""
    rows_that_fit: int | None = None
    """Rows of one network call without gradient, once measured (`completions.chunk: auto`)."""

    @property
    def log_prob_form(self) -> str:
        """Form of the stored log-probs: the kernel's own, but pairs of trajectories compare true log-likelihoods."""
        if self.config.objective.type == "reward_difference":
            return "gaussian"
        return KERNEL_LOG_PROB.get(self.kernel, "gaussian")

    @property
    def log_prob_dtype(self) -> torch.dtype:
        """Small differences of log-probs, which pairs of trajectories need, are lost in float32."""
        return torch.float64 if self.config.objective.type == "reward_difference" else torch.float32

    @property
    def main(self) -> bool:
        """Whether this process reports and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def best(self) -> int | None:
        """Iterations done at the best evaluation of the watched reward; None without early stop, or before there is one."""
        return self.watch.verdict.best if self.watch is not None else None

    @property
    def stopped(self) -> bool:
        """Whether the watched reward has ended the run before its last iteration."""
        early = self.counters.iteration < self.config.train.iterations
        return early and self.watch is not None and self.watch.stopped

    def evaluated(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has the weights that are evaluated during the run: the average's, if it has one."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def result(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has the weights the run ends with: those of the best evaluation, or else the last ones."""
        if self.watch is None or self.best is None:
            return self.evaluated()
        return self.watch.weights.applied()

    def warn_once(self, key: str, text: str) -> None:
        """Print a warning the first time `key` comes up."""
        if key not in self.warned and self.main:
            self.console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)  # names and paths are no markup
        self.warned.add(key)

    def total(self, count: int) -> int:
        """Sum of a count over all processes."""
        counts = torch.tensor(count, dtype=torch.int64, device=self.accelerator.device)
        return int(self.accelerator.reduce(counts, reduction="sum"))

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Sums of several counts over all processes, in one message."""
        table = torch.tensor(list(counts), dtype=torch.int64, device=self.accelerator.device)
        return [int(n) for n in self.accelerator.reduce(table, reduction="sum").tolist()]

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop (all processes agree)."""
        flag = torch.tensor(float(self.interrupted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def learning_rate(self) -> float:
        """Rate of the next update: linear warm-up, then constant or cosine over the whole run."""
        config, done = self.config.optim, self.counters.updates
        if done < config.warmup_updates:
            return config.lr * (done + 1) / config.warmup_updates
        if config.schedule == "constant":
            return config.lr
        train = self.config.train
        total = train.iterations * train.updates_per_iteration * train.inner_epochs
        progress = min(1.0, (done - config.warmup_updates) / max(1, total - config.warmup_updates))
        low = config.final_lr_fraction
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))

    def save(self) -> None:
        """Write a checkpoint of the present state (main process writes, all take part)."""
        tensors = {f"param.{i}": p.detach() for i, p in enumerate(self.parameters)}
        state: dict[str, Any] = {"counters": vars(self.counters), "averages": {}, "history": self.history}
        state["trust"] = vars(self.trust)
        for name, average in (("average", self.average), ("old", self.old)):
            if average is not None:
                tensors |= {f"{name}.{i}": p for i, p in enumerate(average.shadow_params)}
                state["averages"][name] = average.optimization_step
        if self.watch is not None:
            best, state["early_stop"] = self.watch.state()
            tensors |= best
        tensors |= checkpoint.optimizer_tensors(self.optimizer) | reward_tensors(self.rewards)
        scaler = self.accelerator.scaler
        state["scaler"] = scaler.state_dict() if scaler is not None else None
        for rank, rng in enumerate(gather_object([rng_state()])):
            tensors |= {f"rng.{rank}.{k}": v for k, v in rng["tensors"].items()}
            state.setdefault("rng", []).append(rng["json"])
        if self.main:
            arguments = (self.counters.iteration, tensors, state, self.model, self.config.checkpoint.keep)
            checkpoint.save_checkpoint(self.config.run_dir, *arguments)
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Any) -> None:
        """Continue exactly where the checkpoint in `folder` was written."""
        tensors, state = checkpoint.load_checkpoint(folder)
        if not self._fits(tensors):
            raise UserError(
                f"{folder}: made for another model, LoRA or objective; use a new name or the run's own config"
            )
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"param.{i}"])
            for name, average in (("average", self.average), ("old", self.old)):
                if average is not None:
                    for i, shadow in enumerate(average.shadow_params):
                        shadow.copy_(tensors[f"{name}.{i}"])
                    average.optimization_step = state["averages"][name]
        checkpoint.restore_optimizer(self.optimizer, tensors)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        rank = self.accelerator.process_index
        if rank < len(state["rng"]):
            prefix = f"rng.{rank}."
            generators = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            restore_rng({"tensors": generators, "json": state["rng"][rank]})
        self.counters = Counters(**state["counters"])
        # rewards of another run may be of other prompts, or of another scale
        if _belongs(folder, self.config.run_dir):
            self.history = {int(p): [(int(i), float(r)) for i, r in e] for p, e in state.get("history", {}).items()}
            self.trust.restored(state.get("trust", {}))
            restore_rewards(self.rewards, tensors)
            watched = state.get("early_stop")
            if self.watch is not None and watched and not self.watch.restore(tensors, watched):
                self.console.print(
                    "early_stop: evaluated in another way than before, so its best and its count begin anew"
                )

    def _fits(self, tensors: dict[str, Tensor]) -> bool:
        sources: dict[str, Sequence[Tensor]] = {"param": self.parameters}
        for name, average in (("average", self.average), ("old", self.old)):
            if average is not None:
                sources[name] = average.shadow_params
        shapes = {f"{name}.{i}": p.shape for name, values in sources.items() for i, p in enumerate(values)}
        stored = {k: v.shape for k, v in tensors.items() if k.split(".")[0] in ("param", "average", "old")}
        return shapes == stored


def start(config: Config, console: Console, model: ImageModel | None = None) -> Run:
    """Build everything for `config` and continue the run's newest checkpoint if there is one and it may.

    `model`: use this one, its prompts already cached, instead of loading `config.model`.

    Raises: UserError for anything a person can put right.
    """
    accelerator = _accelerator(config)
    console = console if accelerator.is_main_process else Console(quiet=True)
    folder = checkpoint.find_checkpoint(config.run_dir, config.checkpoint.resume)
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    shape = geometry(config, accelerator.num_processes)
    train_prompts, eval_prompts = load_prompts(config.prompts.train), load_prompts(config.prompts.eval)
    rewards = set_up_rewards({**config.rewards, **config.eval_rewards}, accelerator.device)
    check_gradients(config, rewards, train_prompts)
    check_trainable(config, rewards, train_prompts)
    for name, reward in rewards.items():
        if reward.kind == "groupwise" and accelerator.num_processes > 1:
            raise UserError(f"reward '{name}' compares whole groups, which several processes share: use one process")
    if accelerator.is_main_process:
        write_run_files(config, accelerator, resumed=folder is not None)
    eval_prompts = eval_prompts[: config.eval.prompts]
    if model is None:
        with console.status("loading the model"):
            model = load_model(config.model, accelerator.device)
        if config.model.encoders == "release":
            cache_prompts(model, used_prompts(config, train_prompts) + [p.text for p in eval_prompts], console)
            model.release_encoders()
    model.guidance_scale = config.sampler.guidance_scale
    parameters = model.trained_parameters(config.train.seed)
    model.finish_setup()
    condition = condition_network(config, model, train_prompts, eval_prompts)
    if config.objective.type == "reward_gradient" and config.loss.checkpointing:
        enable_checkpointing(model, {name: rewards[name] for name in config.rewards}, config.rewards)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, eps=optim.eps
    )
    grid = sampling_grid(model, config.sampler).to(accelerator.device)
    run = Run(
        config=config,
        accelerator=accelerator,
        console=console,
        model=model,
        parameters=parameters,
        optimizer=accelerator.prepare(optimizer),
        average=WeightAverage(parameters, decay=optim.ema_decay) if optim.ema_decay > 0 else None,
        old=_old_policy(config, parameters),
        behaviour=WeightAverage(parameters, decay_of=lambda n: 0.0) if config.objective.ratio_repair != "off" else None,
        rewards=rewards,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        grid=grid,
        kernel=config.sampler.kernel,
        noise_levels=torch.full((config.sampler.num_steps,), config.sampler.noise_level, dtype=torch.float64),
        shape=shape,
        condition=condition,
        watch=make_watch(config.early_stop, config.eval, deploy_guidance(config), len(eval_prompts), parameters),
        embedder=build_embedder(config.eval.diversity, accelerator.device),
    )
    if folder is not None:
        run.restore(folder)
        if accelerator.is_main_process and _belongs(folder, config.run_dir):
            checkpoint.drop_newer(config.run_dir, run.counters.iteration)
        console.print(f"resuming at iteration {run.counters.iteration} from {folder}")
    accelerator.init_trackers(
        "logs", config={"config": to_yaml(config)} if "tensorboard" not in config.trackers else None
    )
    done = run.counters.iteration
    # the final evaluation writes its row again, unless it is of other weights than the last iteration's
    complete = done >= config.train.iterations and run.best is None
    run.tracker = Tracker(config.run_dir, accelerator, done, complete=complete)
    _stop_on_signal(run)
    return run


def sampling_grid(model: ImageModel, sampler: SamplerConfig) -> Tensor:
    """The configured times, float32 (T+1,). Raises: UserError for a stochastic last step where no noise is left."""
    try:
        grid = model.grid(sampler.grid, sampler.num_steps, sampler.shift, sampler.custom_grid)
    except ValueError as problem:
        raise UserError(f"sampler.grid: {problem}") from problem
    if sampler.noisy_end and not grid[-1] > 0:
        raise UserError(
            f"sampler.kernel: '{sampler.kernel}' draws the last step too, and the grid of this model ({model.family}) ends "
            "without noise; use cps, the same kernel for flow matching, or flow_sde"
        )
    return grid


def _belongs(folder: Path, run_dir: Path) -> bool:
    """Whether the checkpoint in `folder` is one of the run's own."""
    return folder.resolve().parent.parent == run_dir.resolve()


def used_prompts(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """The training prompts that the run will visit."""
    count = min(len(prompts), config.train.iterations * config.train.prompts_per_iteration)
    return [prompts[i].text for i in prompt_indices(len(prompts), count, 0, config.train.seed)]


def cache_prompts(model: ImageModel, prompts: Sequence[str], console: Console) -> None:
    """Embed `prompts` with a progress bar."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("embedding prompts", total=None)
        model.cache_prompts(prompts, progress=lambda n, total: bar.update(task, advance=n, total=total))


def check_gradients(config: Config, rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Raises: UserError if reward_gradient cannot differentiate a reward, or lacks the real images it starts from."""
    if config.objective.type != "reward_gradient":
        return
    check_differentiable({name: rewards[name] for name in config.rewards}, config.rewards)
    if config.backprop.partial_tau is not None:
        check_images(prompts)


def write_run_files(config: Config, accelerator: Accelerator, resumed: bool) -> None:
    """config.yaml and environment.json of a run; a resumed run must have the same config but for its length and output."""
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    text, path = to_yaml(config), run_dir / "config.yaml"
    if resumed and path.is_file():
        changed = changed_keys(path.read_text(encoding="utf-8"), text)
        if changed:
            raise UserError(
                f"{run_dir} was started with other settings ({', '.join(changed)}); choose another name=..., or restore them"
            )
    path.write_text(text, encoding="utf-8")
    write_json(run_dir / "environment.json", environment(accelerator))


def environment(accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    names = ("torch", "diffusers", "transformers", "accelerate", "peft", "open-clip-torch", "numpy", "flow-align")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(["align", *(["train"] if sys.argv[0].endswith("train.py") else []), *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes if accelerator else 1,
        "device": str(accelerator.device) if accelerator else None,
    }


def _accelerator(config: Config) -> Accelerator:
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.model.precision]
    # one process may wait for a reward that the others have done with
    patience = timedelta(seconds=max(1800.0, 2 * config.train.scoring_timeout))
    try:
        accelerator = Accelerator(
            mixed_precision=mixed,
            log_with=config.trackers or None,
            project_dir=config.run_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=patience),
                *([GradScalerKwargs(init_scale=1024.0)] if mixed == "fp16" else []),
            ],
        )
    except ValueError as problem:
        raise UserError(f"model.precision or trackers: {str(problem).splitlines()[0]}") from problem
    missing = set(config.trackers) - {str(tracker) for tracker in accelerator.log_with} - {"all"}
    if missing:  # accelerate leaves out what is not installed without a word
        raise UserError(
            f"trackers: {', '.join(sorted(missing))} is not installed; install it or remove it from trackers"
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; flow-align trains an adapter with plain data "
            "parallelism: launch with --multi_gpu (or run `accelerate config` again)"
        )
    return accelerator


def _old_policy(config: Config, parameters: Sequence[torch.nn.Parameter]) -> WeightAverage | None:
    objective = config.objective
    if objective.type != "forward_process":
        return None
    start_at, slope, most = objective.old_decay_start, objective.old_decay_slope, objective.old_decay_max
    return WeightAverage(parameters, decay_of=lambda n: old_policy_decay(n, start_at, slope, most))


def deploy_guidance(config: Config) -> float:
    """Guidance of evaluations."""
    guidance = config.eval.guidance_scale
    return config.sampler.guidance_scale if guidance is None else guidance


def _stop_on_signal(run: Run) -> None:
    """SIGTERM or the first Ctrl-C asks for a checkpoint and a clean end; a second Ctrl-C ends at once.

    A second SIGTERM changes nothing: a scheduler signals the whole group, and the launcher's end signals once more.
    """

    def handler(number: int, _: Any) -> None:
        run.interrupted = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch, numpy and Python, which users' rewards may draw from."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    version, internal, gauss = random.getstate()
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return {
        "tensors": tensors,
        "json": {
            "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
            "python": [version, list(internal), gauss],
        },
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    data = state["json"]
    torch.set_rng_state(state["tensors"]["cpu"])
    if "cuda" in state["tensors"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["tensors"]["cuda"])
    kind, keys, position, has_gauss, cached = data["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = data["python"]
    random.setstate((version, tuple(internal), gauss))
