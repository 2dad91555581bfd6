"""One denoising step as a Gaussian: mean and true standard deviation of x_{k+1} given x_k, and what follows from them.

Path: `x_t = (1 - t) x_data + t noise`, velocity `v = noise - x_data`, so the clean estimate is `x - t v` and the noise
estimate is `x + (1 - t) v`. A kernel maps latents x, v of shape (B, ...), any rank, times t > t_next of shape (B,)
float32 in [0, 1] and a noise level (a float, or (B,)) to a `Transition`. Each element has its own time, so a batch may
mix steps. Coefficients are computed in float64 from the float32 times, applied in float32: an element's result does
not depend on the rest of the batch.

Variance-preserving models (Stable Diffusion 1, 2, XL) are rescaled to this path, see `samplers.vp`. Their log-probs are
those of the rescaled states: another constant per step, the same ratios and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.vp import alpha_sigma

NoiseLevel = float | Tensor


class Transition(NamedTuple):
    """Gaussian of one step: mean (B, ...) float32, and std (B,) float32, the noise really added (0: deterministic)."""

    mean: Tensor
    std: Tensor


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, NoiseLevel], Transition]


def ode(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: NoiseLevel = 0.0) -> Transition:
    """Euler step `x - h v`, h = t - t_next, of the probability-flow ODE; std 0, the noise level is not used."""
    t, t_next, _ = _prepare(x, v, t, t_next, 0.0)
    return Transition(_combine(x, v, torch.ones_like(t), t_next - t), torch.zeros_like(t).float())


def flow_sde(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: NoiseLevel) -> Transition:
    """Reverse SDE with diffusion `sigma = a sqrt(t / (1 - t))`, a >= 0 (Flow-GRPO, arXiv 2505.05470).

    At t = 1 the published code puts 1 - t_next for 1 - t in sigma, and only there; then std = a for every grid.
    """
    t, t_next, a = _prepare(x, v, t, t_next, noise_level)
    data_weight = torch.where(t == 1, 1 - t_next, 1 - t)
    return _sde_step(x, v, t, t_next, a * torch.sqrt(t / data_weight))


def psi_sde(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: NoiseLevel) -> Transition:
    """Reverse SDE whose noise level is the diffusion `sigma >= 0` itself, one per step (DenseGRPO, arXiv 2601.20218).

    The step is `x - h v - sigma^2 h / (2 t) noise`, std = sigma sqrt(h). Never sample the last step with it: the drift
    divides by t and blows up the noise left by the step before.
    """
    t, t_next, sigma = _prepare(x, v, t, t_next, noise_level)
    return _sde_step(x, v, t, t_next, sigma)


def dance_sde(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: NoiseLevel) -> Transition:
    """Reverse SDE with constant diffusion `sigma = eta >= 0` (DanceGRPO, arXiv 2505.07818): `psi_sde` of one level."""
    return psi_sde(x, v, t, t_next, noise_level)


def cps(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: NoiseLevel) -> Transition:
    """Coefficient-preserving step: noise of level t_next, part estimated and part fresh (Flow-CPS, arXiv 2509.05952).

    `mean = (1 - t_next) clean + t_next cos(a pi/2) noise`, `std = t_next sin(a pi/2)`, with no sqrt of the step length.
    The noise level must lie in [0, 1]: at 1 all noise is fresh, and beyond it the sine falls again.
    """
    t, t_next, a = _prepare(x, v, t, t_next, noise_level)
    _at_most_one(a, "cps")
    kept = t_next * torch.cos(a * (math.pi / 2))
    mean = _combine(x, v, (1 - t_next) + kept, (1 - t) * kept - t * (1 - t_next))
    return Transition(mean, (t_next * torch.sin(a * (math.pi / 2))).float())


def ddim(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: NoiseLevel) -> Transition:
    """DDIM step with eta = noise level in [0, 1] (arXiv 2010.02502), as DDPO samples (arXiv 2305.13301).

    In VP coordinates, `mean = alpha' clean + sqrt(sigma'^2 - s^2) noise` with
    `s = eta sigma' / sigma sqrt(1 - alpha^2 / alpha'^2)`. eta = 0 is the Euler step, eta = 1 ancestral DDPM sampling.
    The std is positive on the last step too if t_next > 0 there, as on the grids of Stable Diffusion.
    """
    t, t_next, eta = _prepare(x, v, t, t_next, noise_level)
    _at_most_one(eta, "ddim")
    alpha, sigma = alpha_sigma(t)
    alpha_next, sigma_next = alpha_sigma(t_next)
    s = eta * sigma_next / sigma * torch.sqrt((alpha_next**2 - alpha**2) / alpha_next**2)
    kept = torch.sqrt((sigma_next**2 - s**2).clamp_min(0))
    scale = alpha_next + sigma_next
    return Transition(
        _combine(x, v, (alpha_next + kept) / scale, ((1 - t) * kept - t * alpha_next) / scale), (s / scale).float()
    )


KERNELS: dict[str, Kernel] = {
    "ode": ode,
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "psi_sde": psi_sde,
    "cps": cps,
    "ddim": ddim,
}

LOG_PROB_FORMS = ("gaussian", "mse")
# Which log-prob a method's published clip range goes with; a deterministic kernel has none.
KERNEL_LOG_PROB: dict[str, str] = {
    "flow_sde": "gaussian",
    "dance_sde": "gaussian",
    "psi_sde": "gaussian",
    "cps": "mse",
    "ddim": "gaussian",
}


def log_prob(
    sample: Tensor, mean: Tensor, std: Tensor, form: str = "gaussian", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Log-density of a step, averaged over the latent dimensions: sample and mean (B, ...), std (B,) -> (B,) `dtype`.

    "gaussian": `mean(-(sample - mean)^2 / (2 std^2) - log std - log(2 pi) / 2)` (arXiv 2505.05470; the mean, not the
    sum, is why clip ranges are 1e-5 to 1e-3). "mse": `-mean((sample - mean)^2)`, the form of arXiv 2509.05952.
    Raises ValueError for a deterministic step (std 0).
    """
    _require_noise(std, "log_prob")
    error = _mean_square(sample.float() - mean.float())
    if form == "mse":
        return (-error).to(dtype)
    if form != "gaussian":
        raise ValueError(f"unknown log-prob form {form!r}; choose one of {', '.join(LOG_PROB_FORMS)}")
    scale = std.double()
    return (-error / (2 * scale**2) - torch.log(scale) - 0.5 * math.log(2 * math.pi)).to(dtype)


KL_FORMS = ("exact_mean", "flow_grpo_code", "velocity_mse")


def transition_kl(
    mean: Tensor, mean_ref: Tensor, std: Tensor, form: str = "exact_mean", h: Tensor | None = None
) -> Tensor:
    """KL of two steps of equal std, averaged over the latent dimensions: means (B, ...), std (B,) -> (B,) float32.

    "exact_mean": `mean(d^2) / (2 std^2)`, the KL over the number of dimensions. "flow_grpo_code": h times that, i.e.
    divided by the diffusion instead of the std, as in the code of arXiv 2505.05470, which the published KL weights go
    with; h (B,) comes from `noise_interval`. The third form, `velocity_mse`, has its own function.
    Raises ValueError for a deterministic step (std 0), whose KL is 0 or infinite.
    """
    _require_noise(std, "transition_kl")
    kl = _mean_square(mean.float() - mean_ref.float()) / (2 * std.double() ** 2)
    if form == "flow_grpo_code":
        if h is None:
            raise ValueError("transition_kl: form flow_grpo_code needs h; pass h=noise_interval(kernel, t, t_next)")
        kl = kl * h.double()
    elif form != "exact_mean":
        raise ValueError(f"unknown transition KL {form!r}; choose exact_mean or flow_grpo_code, or call velocity_mse")
    return kl.float()


def noise_interval(kernel: str, t: Tensor, t_next: Tensor) -> Tensor:
    """Time (B,) in a step's noise variance `std^2 = sigma^2 h`: t - t_next for the SDE kernels, 1 for cps and ddim."""
    return torch.ones_like(t) if kernel in ("cps", "ddim") else t - t_next


def velocity_mse(v: Tensor, v_ref: Tensor) -> Tensor:
    """Mean squared distance of two velocities (B, ...) -> (B,) float32: the KL without its weight in time."""
    return _mean_square(v.float() - v_ref.float()).float()


def _prepare(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: NoiseLevel) -> tuple[Tensor, Tensor, Tensor]:
    """Check the shapes; return t, t_next and the noise level in float64."""
    if x.shape != v.shape:
        raise ValueError(f"the velocity must have the shape of the latents {tuple(x.shape)}, got {tuple(v.shape)}")
    if t.shape != x.shape[:1] or t_next.shape != x.shape[:1]:
        raise ValueError(f"times must have shape ({x.shape[0]},), got {tuple(t.shape)} and {tuple(t_next.shape)}")
    # A half-precision time near 1 rounds to 1 and would silently take the t = 1 branch of flow_sde.
    if not {t.dtype, t_next.dtype} <= {torch.float32, torch.float64}:
        raise ValueError(f"times must be the grid's float32 values, got {t.dtype} and {t_next.dtype}")
    level = torch.as_tensor(noise_level, dtype=torch.float64)
    if level.dim() > 0:
        level = level.expand_as(t).to(t.device)
    # A plain number stays a CPU scalar: checking it does not wait for the GPU.
    if not bool((level >= 0).all()):
        raise ValueError(f"noise_level must be a number >= 0, got {noise_level}")
    return t.double(), t_next.double(), level


def _at_most_one(level: Tensor, kernel: str) -> None:
    if bool((level > 1).any()):
        raise ValueError(
            f"{kernel}: noise_level must lie in [0, 1], got {level.max().item():g} (1 already renews all noise)"
        )


def _sde_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, sigma: Tensor) -> Transition:
    """Euler-Maruyama step of the reverse SDE with the ODE's marginals: `x - h v - sigma^2 h / (2 t) noise`."""
    h = t - t_next
    pull = sigma**2 * h / (2 * t)
    return Transition(_combine(x, v, 1 - pull, -(h + pull * (1 - t))), (sigma * torch.sqrt(h)).float())


def _combine(x: Tensor, v: Tensor, on_x: Tensor, on_v: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (x.dim() - 1)
    return on_x.float().view(shape) * x.float() + on_v.float().view(shape) * v.float()


def _mean_square(difference: Tensor) -> Tensor:
    # Summed in float64, so the order of summation, which depends on the batch shape, does not reach the float32 result.
    return difference.square().reshape(difference.shape[0], -1).mean(dim=1, dtype=torch.float64)


def _require_noise(std: Tensor, name: str) -> None:
    if not bool((std > 0).all()):
        raise ValueError(f"{name}: a step with std 0 is deterministic; use only the stochastic steps of the plan")
