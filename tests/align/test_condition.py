"""The network D as it is loaded, and what is found wrong with it and with the data before a run begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SegformerForImageClassification, SegformerForSemanticSegmentation

from align.condition import SHIPPED_NETWORKS, ConditionNetwork, SegmentationNetwork, check_reading
from align.config import parse_config
from align.config_checks import without_effect
from align.control_data import CHECKED, check_conditions, check_examples, load_examples
from align.errors import UserError
from align.models.base import ModelConfig, load_model
from align.models.controlnet import SHIPPED_CONTROLNETS
from align.playground.layouts import CLASSES, IGNORE, condition_image, label_map, scene_of, scene_prompts
from align.playground.scenes import render
from align.prompts import Prompt, load_prompts

SHIPPED = SHIPPED_NETWORKS["playground"]


@pytest.fixture
def lines(tmp_path) -> Callable[..., list[Prompt]]:
    """lines(shift, **pictures) -> prompts of eight scenes in files, their labels counted from `shift`, pictures replaced."""

    def make(shift: int = 0, **pictures: Image.Image) -> list[Prompt]:
        rows = []
        for i, row in enumerate(scene_prompts("train_scenes", 8)):
            scene = scene_of(row["metadata"])
            labels = label_map(scene) + np.uint8(shift)
            made = {"image": render(scene), "condition": condition_image(label_map(scene)), "labels": labels}
            for name, pixels in made.items():
                pictures.get(name, Image.fromarray(pixels)).save(tmp_path / f"{name}-{i}.png")
            rows.append(json.dumps({"prompt": row["prompt"], **{name: f"{name}-{i}.png" for name in made}}))
        (tmp_path / "lines.jsonl").write_text("\n".join(rows))
        return load_prompts(str(tmp_path / "lines.jsonl"))

    return make


# -- the network --------------------------------------------------------------------------------------------------------


def test_a_network_without_a_trained_head_is_refused(tmp_path):
    """transformers would draw the head at random, and a run would train towards noise."""
    whole = SegformerForSemanticSegmentation.from_pretrained(SHIPPED)
    SegformerForImageClassification(whole.config).save_pretrained(tmp_path)
    shutil.copy(SHIPPED / "preprocessor_config.json", tmp_path)
    with pytest.raises(UserError, match="it lacks 16 weights, such as decode_head"):
        SegmentationNetwork(str(tmp_path))


def test_a_controlnet_with_a_weight_missing_is_refused(tmp_path):
    shutil.copytree(SHIPPED_CONTROLNETS["playground"], tmp_path / "part")
    file = tmp_path / "part" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["controlnet_mid_block.weight"]
    file.unlink()
    save_file(weights, file)
    with pytest.raises(
        UserError, match=r"^model.controlnet: '.*part' lacks 1 weights, such as controlnet_mid_block.weight"
    ):
        load_model(ModelConfig(path="playground-unet", controlnet=str(tmp_path / "part")))


def test_a_network_that_was_trained_on_blue_first_is_shown_blue_first(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "swapped")
    path = tmp_path / "swapped" / "preprocessor_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({"do_flip_channel_order": True, "do_normalize": False}))
    plain = tmp_path / "swapped" / "plain"
    shutil.copytree(SHIPPED, plain)
    (plain / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(
        SegmentationNetwork(str(tmp_path / "swapped")).outputs(images),
        SegmentationNetwork(str(plain)).outputs(images.flip(1)),
    )


def test_checkpointing_keeps_fewer_activations_and_the_same_gradient():
    def passed(recompute: bool) -> tuple[int, torch.Tensor]:
        network = SegmentationNetwork("playground")
        if recompute:
            network.enable_checkpointing()
        images = torch.linspace(0, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64).requires_grad_()
        kept = [0]

        def keep(value: torch.Tensor) -> torch.Tensor:
            kept[0] += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = network.outputs(images).square().mean()
        return kept[0], torch.autograd.grad(loss, images)[0]

    (all_of_them, expected), (fewer, found) = passed(False), passed(True)
    assert fewer < 0.7 * all_of_them
    torch.testing.assert_close(found, expected)


def test_the_controlnet_has_the_attention_backend_of_the_unet():
    model = load_model(ModelConfig(path="playground-unet", controlnet="playground", attention="math"))
    model.finish_setup()
    backends = [
        {str(m.processor._attention_backend) for m in network.modules() if hasattr(m, "processor")}
        for network in (model.network, model.controlnet)
    ]
    assert backends[0] == backends[1]
    assert len(backends[0]) == 1


# -- what it reads ------------------------------------------------------------------------------------------------------


def test_labels_that_count_from_another_number_than_the_network_are_found_out(lines):
    network = SegmentationNetwork("playground")
    check_reading(network, lines(), 64)
    with pytest.raises(
        UserError, match=r"the class before the label.s on \d+% .*; subtract 1 from the files and make 0 255"
    ):
        check_reading(network, lines(shift=1), 64)
    # of a network that knows a class 0 beyond those of the files
    network.outputs = lambda images, own=network.outputs: own(images).roll(1, 1)  # type: ignore[method-assign, misc]
    with pytest.raises(UserError, match=r"the class after the label.s on \d+% .*; add 1 to the files"):
        check_reading(network, lines(), 64)


@pytest.mark.parametrize("constant", [None, 0, 1])
def test_a_network_that_reads_images_badly_is_not_taken_for_one_that_counts_otherwise(lines, constant):
    """Most pixels are background, 0: one that says 1 everywhere is on most of them one class away.

    With few classes in view, one that says 0 everywhere is one class away from a good part of them.
    """

    class Guess(ConditionNetwork):
        kind = "probabilistic"
        classes = len(CLASSES)

        def outputs(self, images):
            found = torch.rand(len(images), self.classes, *images.shape[-2:])
            if constant is not None:
                found[:, constant] += 1
            return found

    for prompts in (
        lines(),
        lines(shift=1),
        lines(labels=Image.new("L", (64, 64), IGNORE)),
        lines(labels=Image.new("L", (64, 64))),
    ):
        check_reading(Guess(), prompts, 64)


def test_a_network_of_fixed_size_is_refused_at_the_start(lines):
    class Fixed(ConditionNetwork):
        kind = "continuous"

        def outputs(self, images):
            raise ValueError("Input image size (32*32) doesn't match model (64*64).\nmore")

    with pytest.raises(
        UserError, match=r"^consistency.network: it cannot read images of 32 x 32: ValueError: Input image size"
    ):
        check_reading(Fixed(), lines(), 32)


# -- the data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (
            {"condition": Image.new("RGB", (128, 64))},
            "is 64 x 64 and its condition 128 x 64: cut to a square they would",
        ),
        ({"labels": Image.new("L", (64, 80))}, "is 64 x 64 and its label map 64 x 80: cut to a square they would"),
        ({"condition": Image.new("I;16", (64, 64), 9000)}, "cannot be read .it has more than 8 bits, mode I;16"),
        ({"labels": Image.new("L", (128, 128))}, None),  # of another size, but the same piece
    ],
)
def test_files_that_do_not_belong_together_are_refused_at_the_start(lines, pictures, message):
    prompts = lines(**pictures)
    if message is None:
        check_examples(prompts, len(CLASSES), "prompts.train")
        assert load_examples(prompts, 32, labelled=True).labels.shape == (8, 32, 32)
        return
    for check in (
        lambda: check_examples(prompts, 6, "prompts.train"),
        lambda: load_examples(prompts, 64, labelled=True),
    ):
        with pytest.raises(UserError, match=message):
            check()


def test_an_image_that_cannot_be_read_is_found_at_the_start(lines):
    prompts = lines()
    Path(prompts[-1].image).write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"image-7.png cannot be read"):
        check_examples(prompts, 0, "prompts.train")


def test_only_some_of_many_files_are_read_at_the_start(lines, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr("align.control_data._read", lambda prompt, _: seen.append(prompt.text) or (None, None, None))
    check_examples(lines() * CHECKED, 0, "prompts.train")
    assert len(seen) == CHECKED


def test_evaluation_needs_conditions_that_can_be_read_and_no_images(lines):
    prompts = lines()
    check_conditions([Prompt(p.text, {"condition": p.metadata["condition"]}) for p in prompts], "prompts.eval")
    check_conditions(load_prompts("playground:heldout_scenes:2"), "prompts.eval")
    with pytest.raises(UserError, match=r"^prompts.eval: a ControlNet follows condition images, and 'a cat' has none"):
        check_conditions([Prompt("a cat")], "prompts.eval")
    Path(prompts[-1].metadata["condition"]).write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"condition-7.png cannot be read"):
        check_conditions(prompts, "prompts.eval")


# -- the configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("consistency", "keys"),
    [
        (
            {"grad_scale": 0.0, "t_max": 200, "ramp_updates": 0, "clamp": "straight_through"},
            ["t_max", "ramp_updates", "clamp"],
        ),
        ({"network": "edges", "ctrlu": {"kl_direction": "primary_to_aux"}}, ["ctrlu.kl_direction"]),
        ({"network": "playground", "t_max": 200, "ctrlu": {"kl_direction": "primary_to_aux"}}, []),
    ],
)
def test_settings_of_the_consistency_loss_that_nothing_reads_are_said(consistency, keys):
    data = {
        "objective": {"type": "condition_consistency"},
        "model": {"path": "playground-unet", "controlnet": "playground"},
        "sampler": {"kernel": "ode"},
        "train": {"group_size": 1},
        "consistency": consistency,
    }
    notes = [note.split(" ")[0] for note in without_effect(parse_config(data))]
    assert notes == [f"consistency.{key}" for key in keys]
