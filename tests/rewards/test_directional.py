"""D2-Align's guided score: the corrected text in closed form, gradients, the search for the direction, whose file it is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rewards import RewardBatch, RewardConfig, RewardError, build_reward, checked_score
from rewards.conformance import FAIL, check
from rewards.directional import DirectionalReward, fit_direction, guided_text, save_direction

CPU = torch.device("cpu")
E, B = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("omega", "expected"), [(0, (HALF, -HALF)), (0.5, (HALF, 0)), (1, (HALF, HALF)), (1.5, (HALF, 2 * HALF))]
)
def test_the_text_moves_along_the_direction_and_beyond_it(omega: float, expected: tuple[float, float]):
    guided = guided_text(E, B, omega)[0]
    assert guided.tolist() == pytest.approx(expected, abs=1e-12)
    unit = guided_text(E, B, omega, renorm=True)[0]
    assert unit.tolist() == pytest.approx(F.normalize(guided, dim=-1).tolist())
    assert unit.norm().item() == pytest.approx(1)


def test_omega_of_one_and_a_half_leaves_the_unit_sphere():
    assert guided_text(E, B, 1.5).norm().item() == pytest.approx(math.sqrt(2.5))


def test_no_direction_is_the_plain_text_and_a_turned_one_the_other_side():
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(5, 16, generator=generator, dtype=torch.float64), dim=-1)
    direction = torch.randn(16, generator=generator, dtype=torch.float64)
    for omega in (-1.0, 0.0, 0.5, 1.0, 1.5, 3.0):
        torch.testing.assert_close(guided_text(3 * texts, torch.zeros(16, dtype=torch.float64), omega), texts)
        turned = guided_text(texts, -direction, omega)
        torch.testing.assert_close(turned, guided_text(texts, direction, 1 - omega))


@pytest.fixture
def base_config(clip_config) -> dict:
    return {"type": "clip", "args": {"config": clip_config, "pretrained": "random", "seed": 0}}


def ready(entry: dict):
    reward = build_reward("base", RewardConfig(**entry))
    reward.setup(CPU, torch.float32)
    return reward


@pytest.fixture
def file(base_config, tmp_path: Path) -> Path:
    path = tmp_path / "direction.safetensors"
    direction = 0.5 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    save_direction(path, direction, ready(base_config), {"omega": "1.5"})
    return path


def guided(base: dict, file: Path, dtype: torch.dtype = torch.float32, **args) -> DirectionalReward:
    reward = build_reward("guided", RewardConfig("d2align", args={"base": base, "direction": str(file), **args}))
    reward.setup(CPU, dtype)
    assert isinstance(reward, DirectionalReward)
    return reward


def test_the_score_is_that_of_the_corrected_text_and_the_plain_one_is_beside_it(base_config, file, make_batch):
    reward, base, batch = guided(base_config, file), ready(base_config), make_batch(4)
    found = checked_score(reward, batch)
    texts = guided_text(base.embed_texts(batch.prompts), reward.direction, 1.5)
    torch.testing.assert_close(found.scores, (base.embed_images(batch.images) * texts).sum(-1))
    torch.testing.assert_close(found.components["unguided"], checked_score(base, batch).scores)
    assert (found.scores - found.components["unguided"]).abs().min() > 1e-3
    plain = guided(base_config, file, omega=0.5, renorm=True)
    between = F.normalize(F.normalize(base.embed_texts(batch.prompts) + reward.direction, dim=-1)
                          + F.normalize(base.embed_texts(batch.prompts) - reward.direction, dim=-1), dim=-1)  # fmt: skip
    torch.testing.assert_close(checked_score(plain, batch).scores, (base.embed_images(batch.images) * between).sum(-1))


def test_gradients_reach_the_images_and_never_the_direction(base_config, file, make_batch):
    reward = guided(base_config, file)
    before, batch = reward.direction.clone(), make_batch(2)
    images = batch.images.requires_grad_()
    checked_score(reward, RewardBatch(images, batch.prompts, batch.metadata, batch.group_ids)).scores.sum().backward()
    assert images.grad.abs().max() > 0
    assert not reward.direction.requires_grad
    assert reward.direction.grad is None
    assert torch.equal(reward.direction, before)


def test_gradient_of_one_pixel_equals_the_finite_difference(base_config, file, make_batch):
    reward, batch = guided(base_config, file, torch.float64), make_batch(1)
    leaf = batch.images.double().requires_grad_()
    reward.score(dataclasses.replace(batch, images=leaf)).scores.sum().backward()
    gradient = leaf.grad[0]
    pixel = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    step = torch.zeros_like(leaf.detach())
    step[0][pixel] = 1e-4
    # The score is rounded to float32, too coarse for a difference.
    text = guided_text(reward.base.embed_texts(batch.prompts), reward.direction.double(), 1.5)
    with torch.no_grad():
        up, down = ((reward.base.embed_images(leaf + sign * step) * text).sum().item() for sign in (1, -1))
    # Central difference: truncation is about step^2 = 1e-8, rounding about 1e-16 / step = 1e-12.
    assert (up - down) / 2e-4 == pytest.approx(gradient[pixel].item(), rel=1e-4)


def test_it_keeps_the_contract_of_rewards(base_config, file):
    args = {"base": base_config, "direction": str(file)}
    reward = build_reward("d2align", RewardConfig("d2align", args=args))
    assert [verdict for verdict in check(reward) if verdict.status == FAIL] == []


def test_the_search_raises_the_score_and_touches_no_network(base_config):
    base = ready(base_config)
    weights = [p.clone() for p in base.clip.model.parameters()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pictures = base.embed_images(torch.rand(12, 3, 32, 32, generator=generator))
        texts = base.embed_texts(["a red circle", "a blue star", "two ring"] * 4)
    direction = fit_direction(pictures, texts, steps=300, lr=1e-2)

    def score(b):
        return (pictures * guided_text(texts, b, 1.5)).sum(-1).mean().item()

    reached = score(direction)
    assert reached > score(torch.zeros(16)) + 0.1
    other = torch.randn(100, 16, generator=generator)
    assert reached > max(score(b) for b in other)
    # with b without limit, e_+ and e_- are +-unit(b): no score is above (2 omega - 1) |mean image|
    assert reached <= 2 * pictures.mean(0).norm().item() + 1e-5
    assert all(torch.equal(p, q) for p, q in zip(weights, base.clip.model.parameters(), strict=True))
    assert torch.equal(fit_direction(pictures, texts, steps=300, lr=1e-2), direction)


def test_a_limit_of_the_norm_gives_the_best_direction_of_that_length(base_config):
    base = ready(base_config)
    generator = torch.Generator().manual_seed(0)
    texts = base.embed_texts(["a red circle", "a blue star", "two ring"] * 4)
    pictures = F.normalize(torch.randn(12, 16, generator=generator) + 1, dim=-1)
    direction = fit_direction(pictures, texts, norm=0.3, steps=1000, lr=1e-3)
    assert direction.norm().item() == pytest.approx(0.3, abs=1e-6)

    def score(b):
        return (pictures * guided_text(texts, b, 1.5)).sum(-1).mean().item()

    near = direction + 0.05 * torch.randn(100, 16, generator=generator)
    others = torch.cat([near, torch.randn(100, 16, generator=generator)])
    assert score(direction) > max(score(b) for b in 0.3 * F.normalize(others, dim=-1)) - 1e-5


def test_a_direction_of_other_weights_is_refused(base_config, clip_config, file):
    other = {"type": "clip", "args": {"config": clip_config, "pretrained": "random", "seed": 1}}
    with pytest.raises(RewardError, match="of other weights: make it with `align fit-direction`"):
        guided(other, file)
    wider = {"type": "clip", "args": {"config": clip_config | {"embed_dim": 24}, "pretrained": "random"}}
    with pytest.raises(RewardError, match="of other weights"):
        guided(wider, file)


def test_bfloat16_still_knows_its_own_direction(base_config, file, make_batch):
    reward = build_reward("guided", RewardConfig("d2align", args={"base": base_config, "direction": str(file)}))
    reward.setup(CPU, torch.bfloat16)
    exact = checked_score(guided(base_config, file), make_batch(3)).scores
    torch.testing.assert_close(checked_score(reward, make_batch(3)).scores, exact, rtol=0, atol=0.05)


def test_mistakes_are_one_line(base_config, file, tmp_path: Path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for path in (tmp_path / "absent.safetensors", tmp_path / "broken.safetensors"):
        with pytest.raises(RewardError, match=r"cannot be read .*align fit-direction") as error:
            guided(base_config, path)
        assert "\n" not in str(error.value)
    save_direction(tmp_path / "nan.safetensors", torch.full((16,), math.nan), ready(base_config), {})
    with pytest.raises(RewardError, match="is broken: make it with"):
        guided(base_config, tmp_path / "nan.safetensors")
    for base, words in (({"type": "jpeg"}, "'jpeg' is not of CLIP type"), ({"kind": "clip"}, "base must be a reward")):
        with pytest.raises(RewardError, match=words):
            guided(base, file)
    with pytest.raises(RewardError, match="omega must be a number"):
        guided(base_config, file, omega="large")
