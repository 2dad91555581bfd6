"""The proxy reward: its training data, its format, and what the shipped one sees and misses."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from align.playground.assess_proxy import KINDS, agreement, caption_pairs, pair_accuracy, round_trip, unit_pixels
from align.playground.captions import parse
from align.playground.proxy import WEIGHTS, ProxyReward, embed_images, load_proxy, proxy_folder
from align.playground.train_proxy import ProxyRecipe, clip_loss, make_data, save, train
from align.playground.verifier import verify_batch
from rewards import RewardBatch, RewardConfig, RewardError, build_reward, checked_score
from rewards.clip import CLIPScore

CPU = torch.device("cpu")
TINY = ProxyRecipe(pool=200, share=0.5, patch_size=16, steps=25, batch=20, warmup=5)


@pytest.fixture(scope="module")
def proxy() -> ProxyReward:
    return load_proxy(0)


@pytest.fixture(scope="module")
def trained():
    return train(make_data(TINY, progress=False), TINY, progress=False)


def pictures(kind: str, count: int) -> tuple[torch.Tensor, list[str], list[str]]:
    images, right, wrong = caption_pairs(kind, count, np.random.default_rng(99))
    return unit_pixels(images), right, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_caption_is_a_full_match_and_the_wrong_one_is_not(kind):
    images, right, wrong = caption_pairs(kind, 40, np.random.default_rng(3))
    assert all(v.full for v in verify_batch(images, [parse(text) for text in right]))
    assert not any(v.full for v in verify_batch(images, [parse(text) for text in wrong]))


def test_agreement_in_closed_form():
    gold = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.5, 1.0])
    # Group 1: the pairs (0, .5) and (.5, 1) are ordered alike, (0, 1) is too; group 2: .5 = .5 does not count, one of
    # the two pairs with 1 is wrong.
    scores = torch.tensor([-0.3, 0.1, 0.2, 0.9, 0.1, 0.4])
    assert agreement(scores, gold, 3) == {
        "concordance": 0.8,
        "gold_mean": round(3.5 / 6, 4),
        "gold_of_best": 0.75,
        "gold_best": 1.0,
    }
    assert agreement(-scores, gold, 3)["concordance"] == pytest.approx(0.2)


def test_members_share_a_pool_and_see_their_own_part_of_it():
    everything = [make_data(ProxyRecipe(seed=s, pool=200, share=1.0), False) for s in (0, 1)]
    assert np.array_equal(everything[0].images, everything[1].images)
    rows = {image.tobytes(): i for i, image in enumerate(everything[0].images)}
    seen = [[rows[image.tobytes()] for image in make_data(ProxyRecipe(seed=s, pool=200), False).images] for s in (0, 1)]
    assert len(set(seen[0])) == len(set(seen[1])) == 140
    # Two random shares of 70 % have 49 % of the pool in common: 98 scenes, with a standard deviation of 3.
    assert 85 < len(set(seen[0]) & set(seen[1])) < 111


def test_a_tenth_of_the_captions_is_of_another_scene():
    clean, noisy = (make_data(ProxyRecipe(pool=200, share=1.0, shuffled=s), False).ids for s in (0.0, 0.1))
    changed = (clean != noisy).any(-1).any(-1)
    # Two scenes of the pool can have equal captions, so a few of the 20 may look unchanged.
    assert 18 <= int(changed.sum()) <= 20
    assert sorted(map(str, clean.tolist())) == sorted(map(str, noisy.tolist()))


def test_the_loss_of_features_that_tell_nothing_apart_is_log_b(trained):
    model, _ = trained
    with torch.no_grad():
        same = torch.zeros(8, 3, 64, 64)
        ids = make_data(TINY, progress=False).ids[:8, 0]
        loss = clip_loss(model, same, ids[:1].expand(8, -1))
    assert loss.item() == pytest.approx(np.log(8), abs=1e-4)


def test_training_learns_and_is_repeatable(trained):
    model, loss = trained
    again, _ = train(make_data(TINY, progress=False), TINY, progress=False)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loss < np.log(TINY.batch)


def test_a_saved_network_is_a_folder_that_clip_loads(trained, tmp_path):
    model, _ = trained
    save(model, TINY, tmp_path / "mine")
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    reward = CLIPScore(model=str(tmp_path / "mine"))
    reward.setup(CPU, torch.float32)
    images, right, _ = pictures("color", 4)
    ids = reward.clip.tokenizer(right)
    with torch.no_grad():
        expected = (model.encode_image(images * 2 - 1, normalize=True) * model.encode_text(ids, normalize=True)).sum(-1)
    # Weights of 11 bits: a relative error of 5e-4 each, and far less in the cosine of 64 numbers.
    assert torch.allclose(reward.similarity(images, right), expected, atol=5e-3)


def test_settings_that_cannot_work_are_refused():
    for changes in ({"patch_size": 7}, {"share": 0.0}, {"shuffled": 1.5}, {"pool": 100}):
        with pytest.raises(ValueError):
            ProxyRecipe(**changes)


def test_the_package_offers_the_proxy_by_name():
    root = Path(__file__).resolve().parents[2]
    target = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["align.rewards"]["proxy"]
    reward = build_reward("mine", RewardConfig(target, args={"seed": 0}))
    assert isinstance(reward, ProxyReward)
    with pytest.raises(RewardError, match=r"^reward 'mine': no proxy of seed 77 is shipped \(there is: 0, 1, 2, 3, 4, 5") as caught:
        build_reward("mine", RewardConfig(target, args={"seed": 77}))
    assert "\n" not in str(caught.value)


def test_the_shipped_proxy_scores_what_it_is_given(proxy):
    images, right, wrong = pictures("color", 16)

    def batch(prompts: list[str]) -> RewardBatch:
        return RewardBatch(images.clone().requires_grad_(), prompts, [{}] * 16, torch.arange(16))

    given = batch(right)
    scores = checked_score(proxy, given).scores
    assert torch.isfinite(scores).all()
    assert (scores - checked_score(proxy, batch(wrong)).scores).mean() > 0.1
    scores.sum().backward()
    assert given.images.grad.abs().sum() > 0
    by_folder = build_reward("other", RewardConfig("clip", args={"model": str(proxy_folder(0))}))
    by_folder.setup(CPU, torch.float32)
    assert torch.equal(checked_score(by_folder, batch(right)).scores, scores)


def test_the_shipped_proxy_sees_colors_and_hardly_sees_relations(proxy):
    """Its blind spots are what makes it a proxy; the figures are those of proxy.json, here of other scenes."""
    figures = json.loads((proxy_folder(0) / "proxy.json").read_text())["pair_accuracy"]["render"]
    measured = {}
    for kind in KINDS:
        measured[kind] = pair_accuracy(proxy, *pictures(kind, 150))
        # Four standard errors: of a share of 150 at one half .041, of the figure itself, from 1,000, .016.
        assert measured[kind] == pytest.approx(figures[kind], abs=0.18)
    assert measured["color"] > 0.95
    assert measured["relation"] < 0.65


def test_the_autoencoder_hardly_moves_the_shipped_proxys_scores(proxy):
    """Generated images come from the autoencoder, and the network was trained on plain renders."""
    images, right, _ = caption_pairs("color", 60, np.random.default_rng(99))
    with torch.no_grad():
        before, after = (proxy.similarity(unit_pixels(x), right) for x in (images, round_trip(images)))
    # The spread is that of right images alone, the least that a reward has to tell apart.
    assert (after - before).abs().mean() < 0.2 * before.std()


def test_embeddings_are_unit_vectors_and_do_not_depend_on_their_company(proxy):
    images, _, _ = pictures("shape", 300)
    embeddings = embed_images(proxy, images)
    assert embeddings.shape == (300, 64)
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(300), atol=1e-5)
    assert torch.allclose(embeddings[256:], embed_images(proxy, images[256:]), atol=1e-5)
    assert not embeddings.requires_grad


def test_the_shipped_folder_is_small_and_half_precision():
    folders = sorted(WEIGHTS.glob("seed-*"))
    assert folders
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 1.6e6
        with safe_open(folder / "open_clip_model.safetensors", framework="pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        assert {tensor.dtype for tensor in tensors} == {torch.float16}
        figures = json.loads((folder / "proxy.json").read_text())
        assert sum(tensor.numel() for tensor in tensors) == figures["parameters"]
        assert f"seed-{figures['recipe']['seed']}" == folder.name
