"""CLIPScore with genuine open_clip networks, built offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards import RewardError, checked_score, to_uint8
from rewards.clip import CLIPScore
from rewards.preprocess import preprocess

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["a red circle", "two blue square", "a star left of a ring"]


@pytest.fixture(scope="module")
def clip(clip_config) -> CLIPScore:
    reward = CLIPScore(config=clip_config, pretrained="random", seed=3)
    reward.setup(CPU, FP32)
    return reward


@pytest.fixture
def images() -> torch.Tensor:
    """(3, 3, 48, 40): smooth random fields, so that resizing does not only filter noise."""
    noise = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(noise, size=(48, 40), mode="bilinear").clamp(0, 1)


def test_score_is_the_cosine_of_open_clips_own_features(clip, images, make_batch):
    batch = make_batch(3, images=images, prompts=PROMPTS)
    pixels = preprocess(images, **clip.clip.transform)
    with torch.no_grad():
        pictures = clip.clip.model.encode_image(pixels, normalize=True)
        texts = clip.clip.model.encode_text(clip.clip.tokenizer(PROMPTS), normalize=True)
    assert torch.allclose(checked_score(clip, batch).scores, (pictures * texts).sum(-1), atol=1e-6)
    assert pictures.shape == (3, 16)


def test_each_image_meets_its_own_prompt_only(clip, images, make_batch):
    together = checked_score(clip, make_batch(3, images=images, prompts=PROMPTS)).scores
    batches = [make_batch(1, images=images[i : i + 1], prompts=PROMPTS[i : i + 1]) for i in range(3)]
    alone = [checked_score(clip, batch).scores for batch in batches]
    backwards = checked_score(clip, make_batch(3, images=images.flip(0), prompts=PROMPTS[::-1])).scores
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert torch.allclose(together, backwards.flip(0), atol=1e-6)
    crossed = checked_score(clip, make_batch(3, images=images, prompts=PROMPTS[1:] + PROMPTS[:1])).scores
    assert not torch.allclose(together, crossed, atol=1e-3)


def test_embeddings_of_prompts_do_not_depend_on_their_company(clip_config, images):
    """Bit for bit: a resumed run meets the prompts in other batches than the run it continues."""
    scores = []
    for warm in (PROMPTS, PROMPTS[:1], []):
        reward = CLIPScore(config=clip_config, pretrained="random", text_cache=2)
        reward.setup(CPU, FP32)
        for prompt in warm:
            reward.similarity(images[:1], [prompt])
        scores.append(reward.similarity(images, PROMPTS))
        assert len(reward._texts) == 2  # the limit: two of the three prompts are kept
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_an_embedding_made_in_inference_mode_serves_a_backward_pass(clip_config, images):
    reward = CLIPScore(config=clip_config, pretrained="random")
    reward.setup(CPU, FP32)
    with torch.inference_mode():
        reward.similarity(images, PROMPTS)
    leaf = images.clone().requires_grad_()
    reward.similarity(leaf, PROMPTS).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_gradient_reaches_the_pixels_and_no_weight(clip, images, make_batch):
    batch = make_batch(3, images=images.clone().requires_grad_(), prompts=PROMPTS)
    checked_score(clip, batch).scores.sum().backward()
    assert torch.isfinite(batch.images.grad).all()
    assert (batch.images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert all(not weight.requires_grad for weight in clip.clip.model.parameters())
    assert not clip.clip.model.training


def test_gradient_of_one_pixel_equals_the_finite_difference(clip_config, images):
    reward = CLIPScore(config=clip_config, pretrained="random")
    reward.setup(CPU, torch.float64)
    leaf = images[:1].double().requires_grad_()
    reward.similarity(leaf, PROMPTS[:1]).sum().backward()
    gradient = leaf.grad[0]
    pixel = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    step = torch.zeros_like(images[:1], dtype=torch.float64)
    step[0][pixel] = 1e-4
    with torch.no_grad():
        up, down = (reward.similarity(images[:1].double() + sign * step, PROMPTS[:1]).item() for sign in (1, -1))
    # Central difference: truncation is about step^2 = 1e-8, rounding about 1e-16 / step = 1e-12.
    assert (up - down) / 2e-4 == pytest.approx(gradient[pixel].item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(48, 40), (40, 75), (32, 32), (20, 16)])
def test_tensor_preprocessing_agrees_with_open_clips_transform_of_the_pil_image(mode, shape):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    noise = torch.rand(1, 3, 7, 6, generator=torch.Generator().manual_seed(1))
    picture = torch.nn.functional.interpolate(noise, size=shape, mode="bilinear").mul(255).round().div(255)
    cfg = PreprocessCfg(size=32, resize_mode=mode)
    pil = Image.fromarray(to_uint8(picture[0]).permute(1, 2, 0).numpy())
    expected = image_transform_v2(cfg, is_train=False)(pil)
    actual = preprocess(picture, (32, 32), cfg.mean, cfg.std, mode)[0]
    # PIL rounds to 1/255 after each of its two passes, and the smallest std is 0.26: 2 / 255 / 0.26 = 0.03.
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 0.03


def test_score_of_a_tensor_equals_the_score_of_the_pil_path(clip, images):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    rounded = images.mul(255).round().div(255)
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    pictures = [Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()) for image in rounded]
    pixels = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        features = clip.clip.model.encode_image(pixels, normalize=True)
        texts = clip.clip.model.encode_text(clip.clip.tokenizer(PROMPTS), normalize=True)
        assert torch.allclose(clip.similarity(rounded, PROMPTS), (features * texts).sum(-1), atol=1e-3)


def test_resizing_is_antialiased():
    """A checkerboard of single pixels halved is grey; without antialiasing single pixels would survive."""
    board = (torch.arange(64)[:, None] + torch.arange(64)[None]).remainder(2).float().expand(1, 3, 64, 64)
    small = preprocess(board, (16, 16), (0.0,) * 3, (1.0,) * 3)
    assert (small[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.05


def test_padding_is_black_and_even_when_the_longest_side_is_fitted():
    """512 x 1024 into 224: 112 rows of picture between 56 black rows, black being -mean / std."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    result = preprocess(torch.ones(1, 3, 512, 1024), (224, 224), mean, std, "longest")[0]
    black = torch.tensor([-1.7922625, -1.7520971, -1.4802198]).view(3, 1, 1)
    assert torch.allclose(result[:, :56], black.expand(3, 56, 224), atol=1e-5)
    assert torch.allclose(result[:, 168:], black.expand(3, 56, 224), atol=1e-5)
    assert (result[:, 56:168] > 1).all()


def test_a_checkpoint_file_and_a_folder_give_the_scores_of_the_network_saved(
    clip, clip_config, tokenizer_folder, images, tmp_path
):
    expected = clip.similarity(images, PROMPTS)
    weights = {key: value.contiguous() for key, value in clip.clip.model.state_dict().items()}
    safe, pickled = tmp_path / "mine.safetensors", tmp_path / "mine.pt"
    save_file(weights, safe)
    torch.save({"state_dict": weights}, pickled)
    config = tmp_path / "model.json"
    config.write_text(json.dumps(clip_config))
    folder = shutil.copytree(tokenizer_folder, tmp_path / "folder")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip_config, "preprocess_cfg": {}}))
    save_file(weights, folder / "open_clip_model.safetensors")
    for reward in (
        CLIPScore(config=clip_config, pretrained=str(safe)),
        CLIPScore(config=str(config), pretrained=str(pickled)),
        CLIPScore(model=str(folder)),
    ):
        reward.setup(CPU, FP32)
        assert torch.equal(reward.similarity(images, PROMPTS), expected)


def test_without_a_tokenizer_of_its_own_a_network_reads_clips_vocabulary(clip_config, images):
    text = {"context_length": 12, "width": 8, "heads": 2, "layers": 1}
    config = clip_config | {"text_cfg": text}
    reward = CLIPScore(config=config, pretrained="random")
    reward.setup(CPU, FP32)
    assert reward.clip.tokenizer(["a photo"])[0, 0] == 49406  # start of text
    assert len(reward.similarity(images[:1].expand(3, -1, -1, -1), PROMPTS).unique()) == 3


def test_a_seed_fixes_a_random_network_and_leaves_the_runs_own_random_stream_alone(clip_config, images):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    scores = []
    for seed in (0, 0, 1):
        reward = CLIPScore(config=clip_config, pretrained="random", seed=seed)
        reward.setup(CPU, FP32)
        scores.append(reward.similarity(images, PROMPTS))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2], atol=1e-3)


def test_a_network_in_bfloat16_still_gives_float32_scores(clip_config, images, make_batch):
    reward = CLIPScore(config=clip_config, pretrained="random")
    reward.setup(CPU, FP32)
    exact = reward.similarity(images, PROMPTS)
    reward.setup(CPU, torch.bfloat16)
    assert reward.clip.model.transformer.resblocks[0].mlp.c_fc.weight.dtype is torch.bfloat16
    rough = checked_score(reward, make_batch(3, images=images, prompts=PROMPTS)).scores
    assert rough.dtype is torch.float32
    # Two layers of bfloat16 (8 bits) keep about two digits of a unit vector.
    assert torch.allclose(rough, exact, atol=0.05)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "ViT-B-23", "pretrained": "openai"}, r"open_clip has no model 'ViT-B-23'; did you mean 'ViT-B-"),
        ({"model": "ViT-B-32"}, r"ViT-B-32 needs pretrained: the path of a checkpoint file, or one of openai"),
        ({"model": "ViT-B-32", "pretrained": "opena"}, r"has no weights 'opena'; did you mean 'openai'\?"),
        ({"model": "ViT-B-32", "pretrained": "lost.bin"}, r"there is no checkpoint .*lost.bin: place it there"),
        ({"model": "no/such/folder"}, r"there is no folder 'no/such/folder'"),
        ({"model": "{folder}"}, r"has no open_clip_config.json"),
    ],
)
def test_unknown_names_and_missing_files_are_one_line(args, message, tmp_path):
    reward = CLIPScore(**{key: value.format(folder=tmp_path) for key, value in args.items()})
    with pytest.raises(RewardError, match=f"^reward 'clip': .*{message}") as caught:
        reward.setup(CPU, FP32)
    assert "\n" not in str(caught.value)


def test_missing_named_weights_say_which_file_to_place_where(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reward = CLIPScore(model="RN50", pretrained="yfcc15m")
    with pytest.raises(RewardError, match="get open_clip_model.safetensors from https://huggingface.co/") as caught:
        reward.setup(CPU, FP32)
    assert "set pretrained to its path" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_is_refused(clip_config, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(RewardError, match=r"^reward 'clip': config and pretrained=.*do not fit") as caught:
        CLIPScore(config=clip_config, pretrained=str(path)).setup(CPU, FP32)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_would_run_code_is_refused(clip_config, tmp_path):
    path = tmp_path / "harmful.bin"
    torch.save({"state_dict": {"weight": Path("code")}}, path)
    with pytest.raises(RewardError, match="do not fit"):
        CLIPScore(config=clip_config, pretrained=str(path)).setup(CPU, FP32)


def test_contradictory_arguments_are_refused_before_anything_is_loaded(clip_config, tmp_path):
    with pytest.raises(RewardError, match="either model or config"):
        CLIPScore(model="ViT-B-32", config=clip_config, pretrained="random")
    with pytest.raises(RewardError, match="config needs pretrained"):
        CLIPScore(config=clip_config)
    with pytest.raises(RewardError, match="cannot be read: config is a mapping or the path of a JSON file"):
        CLIPScore(config=str(tmp_path / "lost.json"), pretrained="random")


def test_scores_before_setup_are_refused(clip_config, make_batch):
    with pytest.raises(RewardError, match="before setup"):
        checked_score(CLIPScore(config=clip_config, pretrained="random"), make_batch(1))
