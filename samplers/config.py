"""Settings of the sampler, with every check that needs no model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from samplers.grids import GRID_KINDS
from samplers.kernels import KERNELS
from samplers.plans import BranchConfig, Plan, draw_window, full_plan, sliding_window, window_errors
from samplers.rollout import SOLVERS

PLAN_KINDS = ("full", "window", "sliding", "branched")


@dataclass
class SamplerConfig:
    """How trajectories are made. `validate` lists what is wrong; `make_plan` gives an iteration's plan."""

    kernel: str = "flow_sde"
    """How a stochastic step is drawn: flow_sde, dance_sde, cps, ddim (SD and SDXL), or ode for none at all."""
    noise_level: float = 0.7
    """Strength of the noise: a of flow_sde (usual 0.7), eta of dance_sde (0.3), a of cps in (0, 1] (0.7 to 0.8), eta of
    ddim in (0, 1] (1)."""
    num_steps: int = 10
    """Sampling steps T of a rollout; the last one is deterministic and never trained, except with ddim."""
    grid: str = "scheduler"
    """Times of the steps: scheduler (the model's own), linspace_shift (uniform, shifted) or custom."""
    shift: float = 3.0
    """Shift of the linspace_shift grid; 1 is uniform."""
    custom_grid: list[float] | None = None
    """The num_steps + 1 times of the custom grid, falling from at most 1 to 0."""
    plan: str = "full"
    """Stochastic steps: full (all but the last), window (drawn anew each iteration), sliding (moves on with time) or
    branched (each group shares its first steps and its noise; the rest is stochastic, a part that grows)."""
    branch: BranchConfig = field(default_factory=BranchConfig)
    """The plan branched."""
    window_size: int = 3
    """Number of stochastic steps in the window (MixGRPO: 4 of 25)."""
    window_range: list[int] | None = None
    """First and one-past-last step the window may cover; a range of window_size fixes it. Default [0, num_steps // 2],
    or one window if longer; sliding: all steps but the last."""
    window_every: int = 25
    """Iterations between two moves of the sliding window (MixGRPO, arXiv 2507.21802)."""
    window_stride: int = 1
    """Steps by which the sliding window moves; after the last place it starts again at the first."""
    psi: str | None = None
    """Noise level per step, measured instead of given: auto (calibrate before training, or take the cached table) or
    the file of a table that `align calibrate` wrote. Only with kernel flow_sde, whose noise_level it replaces."""
    solver: str = "euler"
    """Solver where only final images are needed: euler or dpm2m (second order, same cost)."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the rollout and of training alike; 1 is no guidance, at half the cost."""
    shared_noise: bool = False
    """Start all samples of a group from the same initial noise (as DanceGRPO does)."""

    @property
    def noisy_end(self) -> bool:
        """Whether the last step is stochastic too."""
        return self.kernel == "ddim"

    @property
    def shared_start(self) -> bool:
        """Whether the samples of a group have the state before the first stochastic step in common."""
        return self.branch.shared if self.plan == "branched" else self.shared_noise

    def window_bounds(self) -> tuple[int, int]:
        """The window's range [lo, hi) with the default filled in."""
        if self.window_range is not None:
            return self.window_range[0], self.window_range[1]
        if self.plan == "sliding":
            return 0, self.num_steps - (not self.noisy_end)
        return 0, max(self.num_steps // 2, self.window_size)

    def make_plan(self, seed: int, iteration: int) -> Plan:
        """The plan of an iteration, the same on every rank; no stochastic step with the ode kernel."""
        if self.kernel == "ode":
            return Plan(self.num_steps, ())
        if self.plan == "full":
            return full_plan(self.num_steps, self.noisy_end)
        if self.plan == "branched":
            return self.branch.plan(self.num_steps, iteration, self.kernel)
        window = (self.num_steps, self.window_size, *self.window_bounds())
        if self.plan == "sliding":
            return sliding_window(*window, self.window_every, self.window_stride, iteration, self.noisy_end)
        return draw_window(*window, seed=seed, iteration=iteration, noisy_end=self.noisy_end)

    def validate(self) -> list[str]:
        """Every error, one line each, naming the field; an empty list if the settings can work."""
        errors = [
            *_choice("kernel", self.kernel, [k for k in KERNELS if k != "psi_sde"]),
            *_choice("grid", self.grid, GRID_KINDS),
            *_choice("plan", self.plan, PLAN_KINDS),
            *_choice("solver", self.solver, SOLVERS),
        ]
        if self.kernel != "ode" and not 0 < self.noise_level < float("inf"):
            errors.append(f"noise_level must be positive with kernel {self.kernel}, got {self.noise_level}; or use ode")
        if self.kernel in ("cps", "ddim") and self.noise_level > 1:
            errors.append(
                f"noise_level must be at most 1 with kernel {self.kernel} (1 renews all noise), got {self.noise_level}"
            )
        if self.psi is not None and self.kernel != "flow_sde":
            errors.append(f"psi sets the noise of kernel flow_sde, got {self.kernel}; remove psi or use flow_sde")
        least = 1 if self.kernel in ("ode", "ddim") else 2
        if self.num_steps < least:
            errors.append(f"num_steps must be at least {least} with kernel {self.kernel}, got {self.num_steps}")
        if not self.shift > 0:
            errors.append(f"shift must be positive, got {self.shift}; use 1 for no shift")
        if not self.guidance_scale >= 0:
            errors.append(f"guidance_scale must be at least 0, got {self.guidance_scale}; use 1 for no guidance")
        if self.plan == "branched" and self.num_steps >= least:
            errors += self.branch.validate(self.num_steps, self.kernel)
        return errors + self._grid_errors() + self._window_errors()

    def _grid_errors(self) -> list[str]:
        if self.grid != "custom":
            return [] if self.custom_grid is None else [f"custom_grid is set but grid is {self.grid}; use grid: custom"]
        times = self.custom_grid or []
        if len(times) != self.num_steps + 1:
            return [f"custom_grid needs num_steps + 1 = {self.num_steps + 1} times, got {len(times)}"]
        falling = all(a > b for a, b in pairwise(times))
        return [] if falling and 0 < times[0] <= 1 and times[-1] == 0 else ["custom_grid must fall from at most 1 to 0"]

    def _window_errors(self) -> list[str]:
        if self.plan not in ("window", "sliding") or self.kernel == "ode":
            return []
        if self.plan == "sliding" and min(self.window_every, self.window_stride) < 1:
            return [f"window_every and window_stride must be >= 1, got {self.window_every} and {self.window_stride}"]
        if self.window_range is not None and len(self.window_range) != 2:
            return [f"window_range needs 2 numbers, first and one-past-last step, got {self.window_range}"]
        return window_errors(self.num_steps, self.window_size, *self.window_bounds(), self.noisy_end)


def _choice(field: str, value: str, choices: Iterable[str]) -> list[str]:
    names = list(choices)
    if value in names:
        return []
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
    return [f"{field}: unknown value {value!r}; {hint}"]
