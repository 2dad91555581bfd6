"""How images and trajectories are made from a velocity field; knows nothing of rewards, prompts or losses."""

from samplers.config import SamplerConfig
from samplers.grids import flux_mu, linspace_shift_grid, make_grid, scheduler_grid, static_shift
from samplers.kernels import (
    KERNELS,
    Transition,
    log_prob,
    noise_interval,
    transition_kl,
    velocity_mse,
)
from samplers.noise import keyed_generator, keyed_normal
from samplers.plans import Plan, draw_window, full_plan, window_plan
from samplers.rollout import Trajectory, Velocity, predict_transition, rollout, solve

__all__ = [
    "KERNELS",
    "Plan",
    "SamplerConfig",
    "Trajectory",
    "Transition",
    "Velocity",
    "draw_window",
    "flux_mu",
    "full_plan",
    "keyed_generator",
    "keyed_normal",
    "linspace_shift_grid",
    "log_prob",
    "make_grid",
    "noise_interval",
    "predict_transition",
    "rollout",
    "scheduler_grid",
    "solve",
    "static_shift",
    "transition_kl",
    "velocity_mse",
    "window_plan",
]
