"""Chains of the reward-gradient loop that begin at real images, and what the loop refuses at its start."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.backprop_loop import _noised, run_iteration
from align.collect import initial_states
from align.errors import UserError
from align.playground.captions import caption
from align.playground.scenes import render, sample_scene
from align.real_images import real_latents
from align.scoring import RewardFailure
from samplers.vp import timestep_of

LOOP = runpy.run_path(str(Path(__file__).with_name("test_backprop_loop.py")))
PLAYGROUND, chains, owners_of, quiet = (LOOP[name] for name in ("PLAYGROUND", "chains", "owners_of", "quiet"))
begin, sd15 = LOOP["begin"], LOOP["sd15"]


def test_a_reward_without_gradient_is_refused_at_the_start_by_name(begin):
    with pytest.raises(UserError, match=r"^reward 'files' has no gradient"):
        begin({"rewards": {"files": {"type": "jpeg"}}})
    assert begin({"rewards": {"files": {"type": "jpeg", "weight": 0}, "brightness": {"type": "brightness"}}})


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A prompt file of four rendered scenes, with their images."""
    rng, lines = np.random.default_rng(0), []
    for i in range(4):
        scene = sample_scene(rng)
        Image.fromarray(render(scene)).save(tmp_path / f"scene-{i}.png")
        lines.append(json.dumps({"prompt": caption(scene, rng), "image": f"scene-{i}.png"}))
    path = tmp_path / "pictures.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_chains_can_begin_at_real_images(begin, pictures):
    """At each one's own image, noised with the sample's own noise; a short chain ends near the picture, a long one not."""
    changes = PLAYGROUND | {"prompts": {"train": str(pictures)}, "sampler": {"num_steps": 10}}
    run = begin(changes, "backprop.partial_tau=0.6", "backprop.k=6", trained=False)
    samples = [0, 1, 2, 3]
    _, texts = owners_of(run, samples)
    real = torch.stack([torch.from_numpy(np.array(Image.open(p.image))).permute(2, 0, 1) / 255 for p in texts])
    chain, plan, _ = chains(run, samples)
    assert (plan.first, sorted(chain.states)) == (4, [4, 5, 6, 7, 8, 9])
    noise = initial_states(run, samples, 0, run.config.train.seed)
    expected = _noised(run.model.encode_images(real), noise, run.grid[4])
    torch.testing.assert_close(chain.states[4][1], expected, rtol=0, atol=1e-5)
    assert chain.nfe == 4 * 6
    away = {}
    for tau in (0.2, 1.0):
        run.config.backprop.partial_tau, run.config.backprop.k = tau, 1
        away[tau] = float((run.model.decode(chains(run, samples)[0].final) - real).abs().mean())
    assert away[0.2] < 0.3 * away[1.0]
    assert run_iteration(run, quiet)["train/grad_norm"] > 0


def test_the_partial_chain_of_stable_diffusion_begins_at_timestep_551(begin, pictures, sd15):
    """InstructVideo: 12 of 20 steps, at sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise of training timestep 551."""
    changes = {"model": {"path": str(sd15)}, "prompts": {"train": str(pictures)}}
    sampler = {"sampler": {"num_steps": 20, "kernel": "ddim", "noise_level": 1.0}}
    run = begin(changes | sampler, "backprop.partial_tau=0.6", "backprop.k=12")
    samples = [0, 3]
    chain, plan, _ = chains(run, samples)
    t = run.grid[plan.first]
    assert float(timestep_of(t[None], run.model._table)) == 551
    alpha_bar = float(run.model.schedule.alphas_cumprod[551])
    _, texts = owners_of(run, samples)
    noise = initial_states(run, samples, 0, run.config.train.seed) / run.model.noise_scale(float(run.grid[0]))
    x_vp = alpha_bar**0.5 * real_latents(run.model, texts) + (1 - alpha_bar) ** 0.5 * noise
    found = chain.states[plan.first][1] / run.model.noise_scale(float(t))
    torch.testing.assert_close(found, x_vp, rtol=0, atol=1e-5)


def test_prompts_without_images_are_refused_where_images_are_needed(begin, pictures):
    with pytest.raises(UserError, match=r"^backprop.partial_tau: .*the prompt 'a red circle' names none"):
        begin({}, "backprop.partial_tau=0.6", "sampler.num_steps=5")
    Path(pictures.parent / "scene-2.png").unlink()
    with pytest.raises(UserError, match=r"^prompts: there is no image .*scene-2.png"):
        begin({"prompts": {"train": str(pictures)}}, "backprop.partial_tau=0.6", "sampler.num_steps=5")


def test_an_image_that_cannot_be_read_stops_the_run_with_its_name(begin, pictures):
    """As a failing reward does: the failure travels with the scores, so that no process waits for another."""
    changes = PLAYGROUND | {"prompts": {"train": str(pictures)}}
    run = begin(changes, "backprop.partial_tau=0.5")
    for file in pictures.parent.glob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RewardFailure, match=r"the image .*scene-\d.png cannot be read"):
        run_iteration(run, quiet)


def test_a_watched_reward_that_compares_groups_is_refused(begin, tmp_path):
    code = "def ranks(images, prompts, metadata):\n    return list(range(len(prompts)))\nranks.kind = 'groupwise'\n"
    (tmp_path / "ranks.py").write_text(code)
    rewards = {"ranks": {"type": f"{tmp_path}/ranks.py:ranks", "weight": 0}, "brightness": {"type": "brightness"}}
    with pytest.raises(UserError, match=r"^reward 'ranks' judges whole groups.*move it to eval_rewards$"):
        begin({"rewards": rewards})
