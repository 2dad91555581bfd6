"""PickScore on a tiny CLIPModel in the format of the published checkpoint."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from rewards import RewardConfig, RewardError, build_reward, checked_score, to_uint8
from rewards.pickscore import PickScore
from rewards.preprocess import preprocess

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["a red circle", "two blue square", "a star left of a ring"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """`path` of a CLIPModel of 2 + 2 layers for 32 x 32 pixels with logit scale 100, and `processor` of it."""
    folder = tmp_path_factory.mktemp("pickscore")
    clip_tokenizer = runpy.run_path(str(Path(__file__).parents[1] / "tiny.py"))["clip_tokenizer"]
    tokenizer = clip_tokenizer(folder / "processor")
    size = len(tokenizer)
    text = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = CLIPModel(
        CLIPConfig(
            text_config=text | width,
            vision_config={"image_size": 32, "patch_size": 8} | width,
            projection_dim=16,
            logit_scale_init_value=math.log(100),
        )
    )
    # Far from the tiny values at which training starts: scores of the images then differ.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(5 if "embedding" in name else 2)
    model.save_pretrained(folder / "model")
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder / "processor")
    return {"path": str(folder / "model"), "processor": str(folder / "processor")}


@pytest.fixture(scope="module")
def pickscore(folders) -> PickScore:
    reward = build_reward("pick", RewardConfig(type="pickscore", args=folders))
    reward.setup(CPU, FP32)
    return reward


@pytest.fixture
def images(smooth_images) -> torch.Tensor:
    return smooth_images(48, 40)


def test_score_is_the_logit_of_the_published_code_path_on_pil_images(pickscore, folders, images, make_batch):
    """transformers' own model and processor, prompts padded, the matrix of all pairs computed and its diagonal taken."""
    model = CLIPModel.from_pretrained(folders["path"]).eval()
    processor = CLIPProcessor.from_pretrained(folders["processor"])
    pictures = [Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()) for image in images]
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    output = checked_score(pickscore, make_batch(3, images=images, prompts=PROMPTS))
    # 2e-3 of the cosine, times 100: the processor rounds the resized image to 1/255, and this network is not smooth.
    assert torch.allclose(output.scores, expected, atol=0.2)
    assert expected.std() > 1
    with torch.no_grad():
        pixels = preprocess(images, **pickscore.clip.transform)
    # Two passes of resizing round to 1/255, and the smallest std is 0.26: 2 / 255 / 0.26 = 0.03.
    assert (pixels - inputs.pixel_values).abs().max() < 0.03
    # The same pixels give the same score but for rounding.
    with torch.no_grad():
        pictures = pickscore.clip.model.network.get_image_features(inputs.pixel_values).pooler_output
    texts = torch.stack([pickscore._text(prompt) for prompt in PROMPTS])
    cosines = torch.nn.functional.cosine_similarity(pictures, texts)
    assert torch.allclose(100 * cosines, expected, atol=1e-4)


def test_a_cosine_of_0_23_is_23_raw_and_the_divisor_is_the_last_step(folders, images, make_batch):
    expected = {1.0: 23.0, 26.0: 0.8846154, 100.0: 0.23}
    for divisor, value in expected.items():
        reward = PickScore(**folders, divisor=divisor)
        reward.setup(CPU, FP32)
        picture = reward.embed_images(images[:1])[0]
        other = torch.nn.functional.normalize(torch.eye(16)[0] - picture[0] * picture, dim=0)
        reward._texts["a prompt"] = 0.23 * picture + math.sqrt(1 - 0.23**2) * other
        output = checked_score(reward, make_batch(1, images=images[:1], prompts=["a prompt"]))
        assert output.scores.item() == pytest.approx(value, rel=1e-5)
        assert output.components["raw"].item() == pytest.approx(23.0, rel=1e-5)


def test_each_image_meets_its_own_prompt_only(pickscore, images, make_batch):
    together = checked_score(pickscore, make_batch(3, images=images, prompts=PROMPTS)).scores
    batches = [make_batch(1, images=images[i : i + 1], prompts=PROMPTS[i : i + 1]) for i in range(3)]
    alone = torch.cat([checked_score(pickscore, batch).scores for batch in batches])
    backwards = checked_score(pickscore, make_batch(3, images=images.flip(0), prompts=PROMPTS[::-1])).scores
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, backwards.flip(0), atol=1e-4)


def test_a_prompt_longer_than_77_tokens_is_cut(pickscore, images, make_batch):
    long = "7" * 200  # one token a digit, 75 of them beside start and end
    prompts = [long, long[:75], long[:74]]
    scores = checked_score(pickscore, make_batch(3, images=images[:1].expand(3, -1, -1, -1), prompts=prompts)).scores
    assert scores[0] == pytest.approx(scores[1].item(), abs=1e-4)
    assert abs(scores[1] - scores[2]) > 1e-3


def test_gradient_of_one_pixel_equals_the_finite_difference(folders, images):
    reward = PickScore(**folders)
    reward.setup(CPU, torch.float64)
    leaf = images[:1].double().requires_grad_()
    reward.similarity(leaf, PROMPTS[:1]).sum().backward()
    gradient = leaf.grad[0]
    assert torch.isfinite(gradient).all()
    pixel = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    step = torch.zeros_like(leaf.detach())
    step[0][pixel] = 1e-4
    with torch.no_grad():
        up, down = (reward.similarity(leaf + sign * step, PROMPTS[:1]).item() for sign in (1, -1))
    # Central difference: truncation is about step^2 = 1e-8, rounding about 1e-16 / step = 1e-12.
    assert (up - down) / 2e-4 == pytest.approx(gradient[pixel].item(), rel=1e-4)


def test_checkpointing_computes_layers_twice_and_changes_no_gradient(folders, images, make_batch):
    gradients, calls = [], []
    for recompute in (False, True):
        reward = PickScore(**folders)
        reward.setup(CPU, FP32)
        if recompute:
            reward.enable_checkpointing()
        network = reward.clip.model.network
        layer = network.vision_model.encoder.layers[0]
        seen = []
        layer.mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        batch = make_batch(3, images=images.clone().requires_grad_(), prompts=PROMPTS)
        checked_score(reward, batch).scores.sum().backward()
        assert all(not weight.requires_grad for weight in network.parameters())
        assert not any(module.training for module in reward.clip.model.modules())
        calls.append(len(seen))
        gradients.append(batch.images.grad)
    assert calls == [1, 2]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)
    assert (gradients[0].abs().sum(dim=(1, 2, 3)) > 0).all()


def test_in_bfloat16_scores_are_float32_and_the_logit_scale_is_not_rounded(pickscore, folders, images, make_batch):
    rough = PickScore(**folders)
    rough.setup(CPU, torch.bfloat16)
    assert rough.clip.model.network.visual_projection.weight.dtype is torch.bfloat16
    assert rough.scale == pytest.approx(100, rel=1e-5)  # ln(100) in bfloat16 would give 98.9
    batch = make_batch(3, images=images, prompts=PROMPTS)
    scores, exact = checked_score(rough, batch).scores, checked_score(pickscore, batch).scores
    assert scores.dtype is torch.float32
    # Two layers of bfloat16 (8 bits) keep about two digits of a unit vector: 0.05 times the scale.
    assert torch.allclose(scores, exact, atol=5)


def test_loading_leaves_the_runs_own_random_stream_alone(folders):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    PickScore(**folders).setup(CPU, FP32)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_checkpoint_that_lacks_a_weight_is_refused(folders, tmp_path):
    """transformers only warns, and scores with a random weight look plausible."""
    for file in Path(folders["path"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"^reward 'pickscore': .*lacks 1 weights, such as visual_projection.weight$"):
        PickScore(path=str(tmp_path), processor=folders["processor"]).setup(CPU, FP32)


def test_what_is_missing_is_one_line_that_says_where_to_get_it(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    cases = [
        ({"path": "no/such/folder"}, "there is no folder no/such/folder: path is a folder"),
        ({"path": str(tmp_path / "empty")}, "path .*empty cannot be loaded"),
        ({"processor": str(tmp_path / "empty")}, "processor .*empty cannot be loaded: it has no vocabulary"),
        ({"path": "yuvalkirstain/PickScore_v1"}, "get https://huggingface.co/yuvalkirstain/PickScore_v1 into a folder"),
        ({"processor": "laion/CLIP-H"}, "get https://huggingface.co/laion/CLIP-H into .* set processor to its path"),
    ]
    for changes, message in cases:
        with pytest.raises(RewardError, match=f"^reward 'pickscore': .*{message}") as caught:
            PickScore(**(folders | changes)).setup(CPU, FP32)
        assert "\n" not in str(caught.value)


def test_a_divisor_must_be_positive():
    with pytest.raises(RewardError, match="divisor must be positive, got 0"):
        PickScore(divisor=0)
