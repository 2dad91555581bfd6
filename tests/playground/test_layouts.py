"""Layouts of scenes: label maps, how the reader and the shipped network find them again, and the reward."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from align.condition import SHIPPED_NETWORKS, ConditionReward, SegmentationNetwork
from align.control_data import load_conditions
from align.evaluate import sample_images
from align.models.base import ModelConfig, load_model
from align.models.controlnet import SHIPPED_CONTROLNETS
from align.playground.captions import parse
from align.playground.layouts import (
    CLASSES,
    IGNORE,
    SCENE_SPLITS,
    LayoutReward,
    condition_image,
    label_map,
    mean_iou,
    scene_of,
    scene_prompts,
)
from align.playground.reader import UNREADABLE, read_shapes
from align.playground.scenes import COLORS, HELD_OUT_PAIRS, Obj, Scene, render
from align.playground.train_segmenter import SegmenterRecipe, assess, save, train
from align.playground.verifier import verify_batch
from align.prompts import load_prompts
from rewards.base import RewardBatch


def batch(images: np.ndarray, metadata: list[dict]) -> RewardBatch:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return RewardBatch(pixels, [""] * len(images), metadata, torch.arange(len(images)))


def test_a_label_map_holds_each_object_where_it_is_drawn():
    scene = Scene((Obj("ring", "red", 20.0, 20.0, 10.0), Obj("square", "blue", 44.0, 44.0, 10.0)), "two")
    labels = label_map(scene)
    assert labels[44, 44] == CLASSES.index("square")
    assert labels[20, 20] == 0  # the hole of the ring
    assert labels[20, 20 + 8] == CLASSES.index("ring")
    area = {name: int((labels == i).sum()) for i, name in enumerate(CLASSES)}
    assert area["square"] == pytest.approx((2 * 9) ** 2, rel=0.12)
    assert area["ring"] == pytest.approx(np.pi * (10.4**2 - 5.0**2), rel=0.05)
    assert area["circle"] == area["star"] == area["triangle"] == 0


@pytest.mark.parametrize("split", SCENE_SPLITS)
def test_scenes_come_with_a_prompt_that_says_what_they_show(split):
    rows = scene_prompts(split, 40)
    scenes = [scene_of(json.loads(json.dumps(row["metadata"]))) for row in rows]  # as a report would hold them
    images = np.stack([render(scene) for scene in scenes])
    assert all(v.full for v in verify_batch(images, [parse(row["prompt"]) for row in rows]))
    held_out = [any(o.pair in HELD_OUT_PAIRS for o in scene.objects) for scene in scenes]
    assert all(held_out) if split == "heldout_scenes" else not any(held_out)
    assert scene_prompts(split, 10) == rows[:10]


def test_no_scene_is_in_two_splits():
    found = [json.dumps(row["metadata"]["scene"]) for split in SCENE_SPLITS for row in scene_prompts(split, 50)]
    assert len(set(found)) == len(found)


def test_the_reader_finds_the_layout_of_a_render():
    scenes = [scene_of(row["metadata"]) for row in scene_prompts("heldout_scenes", 60)]
    images, labels = np.stack([render(s) for s in scenes]), np.stack([label_map(s) for s in scenes])
    found = read_shapes(images)
    scores = [mean_iou(a, b) for a, b in zip(found, labels, strict=True)]
    assert min(scores) > 0.97
    assert not (found == UNREADABLE).any()
    moved = [mean_iou(np.roll(a, 3, 1), b) for a, b in zip(found, labels, strict=True)]
    assert np.mean(moved) < 0.8


def test_a_blob_without_a_shape_counts_against_what_should_be_there():
    """Two fused squares are no shape: their pixels are in no class, so the square's IoU is 0."""
    objects = tuple(Obj("square", "red", x, y, 10.0) for x, y in ((22.0, 22.0), (34.0, 34.0)))
    image = render(Scene(objects, "count"))[None]
    assert set(np.unique(read_shapes(image))) == {0, UNREADABLE}
    wanted = label_map(Scene(objects[:1], "single"))
    assert mean_iou(read_shapes(image)[0], wanted) < 0.35


def test_mean_iou_in_closed_form():
    wanted = np.array([[0, 0, 1, 1], [0, 0, 1, IGNORE]])
    found = np.array([[0, 0, 1, 0], [0, 0, 2, 5]])
    # class 0: 4 of 5, class 1: 1 of 3, class 2: 0 of 1; the ignored pixel is in none
    assert mean_iou(found, wanted) == pytest.approx((4 / 5 + 1 / 3 + 0) / 3)
    assert mean_iou(wanted, wanted) == 1.0
    assert np.isnan(mean_iou(found, np.full_like(wanted, IGNORE)))


def test_the_condition_image_tells_classes_apart_and_no_colour_of_an_object():
    colours = condition_image(np.arange(len(CLASSES), dtype=np.uint8))
    away = np.abs(colours[:, None].astype(int) - colours[None].astype(int)).sum(-1)
    assert (away + 1000 * np.eye(len(CLASSES))).min() > 90
    assert not {tuple(c) for c in colours.tolist()} & set(COLORS.values())
    assert condition_image(np.array([IGNORE], np.uint8)).tolist() == [[0, 0, 0]]


def test_both_rewards_measure_a_picture_of_the_scene_and_nothing_without_one():
    rows = scene_prompts("seen_scenes", 12)
    images = np.stack([render(scene_of(row["metadata"])) for row in rows])
    metadata = [row["metadata"] for row in rows]
    metadata[3] = {}
    learned = ConditionReward()
    learned.setup(torch.device("cpu"), torch.float32)
    for reward, least in ((LayoutReward(), 0.97), (learned, 0.9)):
        scores = reward.score(batch(images, metadata)).scores
        assert bool(scores[3].isnan())
        assert float(scores[~scores.isnan()].min()) > least
        wrong = reward.score(batch(images[::-1].copy(), metadata)).scores
        assert float(wrong.nanmean()) < 0.5


def test_the_shipped_network_is_as_good_as_its_card_says():
    folder = SHIPPED_NETWORKS["playground"]
    figures = json.loads((folder / "segmenter.json").read_text())
    found = assess(folder, count=64)
    for name, entry in figures["accuracy"].items():
        assert found[name]["mean_iou"] == pytest.approx(entry["mean_iou"], abs=0.02)
    assert (folder / "model.safetensors").stat().st_size < 1_000_000


def test_the_shipped_controlnet_keeps_layouts_as_its_card_says():
    """On a few scenes, with few steps: far better than the U-Net alone, and about as well as measured on many."""
    model = load_model(ModelConfig(path="playground-unet", controlnet="playground"))
    rows = load_prompts("playground:heldout_scenes:12")
    conditions = load_conditions(rows, 64)
    images = sample_images(model, [p.text for p in rows], range(12), 8, 1.0, 0, conditions)
    scores = LayoutReward().score(RewardBatch(images, [""] * 12, [p.metadata for p in rows], torch.arange(12))).scores
    folder = SHIPPED_CONTROLNETS["playground"]
    figures = json.loads((folder / "controlnet.json").read_text())
    assert float(scores.mean()) == pytest.approx(figures["trained"]["layout"], abs=0.12)
    assert float(scores.mean()) > figures["without_condition"]["layout"] + 0.3
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_size < 4_000_000


def test_the_training_script_makes_what_the_loop_loads(tmp_path):
    model, loss = train(SegmenterRecipe(steps=8, batch=4, warmup=2), progress=False)
    again, _ = train(SegmenterRecipe(steps=8, batch=4, warmup=2), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert loss < 2.0
    save(model, tmp_path)
    network = SegmentationNetwork(str(tmp_path))
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    outputs = network.outputs(images)
    assert outputs.shape == (2, len(CLASSES), 64, 64)
    assert network.classes == len(CLASSES)
    assert float(torch.autograd.grad(outputs.square().sum(), images)[0].abs().max()) > 0
