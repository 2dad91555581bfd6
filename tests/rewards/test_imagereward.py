"""ImageReward on a tiny checkpoint in the original naming, against the original network written out here."""

from __future__ import annotations

import math

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from rewards import RewardConfig, RewardError, build_reward, checked_score, to_uint8
from rewards.imagereward import ImageReward, standardise

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["a red circle", "two blue square", "a star left of a ring"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "square", "star", "ring"]
WIDTH, TEXT_WIDTH = 192, 128  # three and two heads of 64


def checkpoint() -> dict[str, Tensor]:
    """Random weights under the names of ImageReward.pt: a ViT of 2 layers, a text encoder of 2, projections, the head."""
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        noise = torch.randn(*shape, generator=generator)
        if len(shape) == 1:  # biases, and the scales of norms around 1
            tensors[name] = (1 if "orm" in name and name.endswith("weight") else 0) + 0.2 * noise
        else:
            tensors[name] = noise / math.sqrt(math.prod(shape[1:]) if "embed" not in name else 1)

    def linear(name: str, inputs: int, outputs: int) -> None:
        put(f"{name}.weight", outputs, inputs)
        put(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        put(f"{name}.weight", width)
        put(f"{name}.bias", width)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    put(f"{eye}.cls_token", 1, 1, WIDTH)
    put(f"{eye}.pos_embed", 1, 5, WIDTH)
    put(f"{eye}.patch_embed.proj.weight", WIDTH, 3, 8, 8)
    put(f"{eye}.patch_embed.proj.bias", WIDTH)
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 64)
        linear(f"{block}.mlp.fc2", 64, WIDTH)
    norm(f"{eye}.norm", WIDTH)
    tensors[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    put(f"{text}.embeddings.word_embeddings.weight", len(WORDS) + 2, TEXT_WIDTH)
    put(f"{text}.embeddings.position_embeddings.weight", 40, TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for part, source in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            linear(f"{layer}.{part}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{part}.self.key", source, TEXT_WIDTH)
            linear(f"{layer}.{part}.self.value", source, TEXT_WIDTH)
            linear(f"{layer}.{part}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{part}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", TEXT_WIDTH, 48)
        linear(f"{layer}.output.dense", 48, TEXT_WIDTH)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    linear("blip.vision_proj", WIDTH, 8)
    linear("blip.text_proj", TEXT_WIDTH, 8)
    widths = (TEXT_WIDTH, 32, 16, 8, 4, 1)
    for index, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        linear(f"mlp.layers.{index}", inputs, outputs)
    return tensors


def reference(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(B,) of pixels (B, 3, 16, 16), ids and mask (B, L): pre-norm ViT, post-norm BERT whose tokens attend to all patches."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        heads = [x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (queries, keys, values)]
        return F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2).flatten(2)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    kernel = tensors[f"{eye}.patch_embed.proj.weight"]
    patches = F.conv2d(pixels, kernel, tensors[f"{eye}.patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([tensors[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches], dim=1)
    x = x + tensors[f"{eye}.pos_embed"]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        mixed = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6))
        x = x + linear(f"{block}.attn.proj", attend(*mixed.chunk(3, dim=-1)))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    patches = norm(f"{eye}.norm", x, 1e-6)

    embeddings = f"{text}.embeddings"
    y = tensors[f"{embeddings}.word_embeddings.weight"][ids]
    y = y + tensors[f"{embeddings}.position_embeddings.weight"][: ids.shape[1]]
    y = norm(f"{embeddings}.LayerNorm", y, 1e-12)
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for part in ("attention", "crossattention"):
            source = y if part == "attention" else patches
            own = f"{layer}.{part}.self"
            seen = mask.bool()[:, None, None] if part == "attention" else None
            mixed = attend(
                linear(f"{own}.query", y), linear(f"{own}.key", source), linear(f"{own}.value", source), seen
            )
            output = f"{layer}.{part}.output"
            y = norm(f"{output}.LayerNorm", y + linear(f"{output}.dense", mixed), 1e-12)
        wide = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", y)))
        y = norm(f"{layer}.output.LayerNorm", y + wide, 1e-12)
    z = y[:, 0]
    for index in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{index}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and the arguments that name their file and a tokenizer in the format of bert-base-uncased."""
    folder = tmp_path_factory.mktemp("imagereward")
    tensors = checkpoint()
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tensors, {"path": str(folder), "tokenizer": str(folder)}


@pytest.fixture(scope="module")
def imagereward(published) -> ImageReward:
    reward = build_reward("ir", RewardConfig(type="imagereward", args=published[1]))
    reward.setup(CPU, FP32)
    return reward


@pytest.fixture
def images(smooth_images) -> Tensor:
    return smooth_images(24, 20)


def ids_and_mask(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Words between [CLS] and [SEP], 35 tokens with padding."""
    rows = [[2, *(WORDS.index(w) if w in WORDS else 1 for w in prompt.split()), 3] for prompt in prompts]
    ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    return ids, ids != 0


def test_score_is_that_of_the_original_network_on_pil_images(imagereward, published, images, make_batch):
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    bicubic = transforms.InterpolationMode.BICUBIC
    chain = [transforms.Resize(16, bicubic), transforms.CenterCrop(16), transforms.ToTensor()]
    transform = transforms.Compose([*chain, transforms.Normalize(mean, std)])
    pictures = [Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()) for image in images]
    pixels = torch.stack([transform(picture) for picture in pictures])
    expected = reference(published[0], pixels, *ids_and_mask(PROMPTS))
    scores = checked_score(imagereward, make_batch(3, images=images, prompts=PROMPTS)).scores
    # PIL rounds the resized image to 1/255, and this random network is not smooth.
    assert torch.allclose(scores, expected, atol=0.02)
    assert expected.std() > 0.05


def test_the_network_equals_the_original_to_rounding(imagereward, published, make_batch):
    """Images of the network's own size are not resized, so nothing but float32 rounding is left."""
    batch = make_batch(3, height=16, width=16, prompts=PROMPTS)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = reference(published[0], (batch.images - mean) / std, *ids_and_mask(PROMPTS))
    assert torch.allclose(checked_score(imagereward, batch).scores, expected, atol=2e-5)


def test_the_heads_output_is_standardised():
    outputs = torch.tensor([0.16717362830052426, 1.2005131, 0.0])
    assert torch.allclose(standardise(outputs), torch.tensor([0.0, 1.0, -0.1617798]), atol=1e-6)


def test_each_image_meets_its_own_prompt_only(imagereward, images, make_batch):
    together = checked_score(imagereward, make_batch(3, images=images, prompts=PROMPTS)).scores
    batches = [make_batch(1, images=images[i : i + 1], prompts=PROMPTS[i : i + 1]) for i in range(3)]
    alone = torch.cat([checked_score(imagereward, batch).scores for batch in batches])
    backwards = checked_score(imagereward, make_batch(3, images=images.flip(0), prompts=PROMPTS[::-1])).scores
    crossed = checked_score(imagereward, make_batch(3, images=images, prompts=PROMPTS[1:] + PROMPTS[:1])).scores
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, backwards.flip(0), atol=1e-5)
    assert not torch.allclose(together, crossed, atol=1e-3)


def test_a_prompt_longer_than_35_tokens_is_cut(imagereward, images, make_batch):
    prompts = [" ".join(["red"] * count) for count in (50, 33, 32)]
    scores = checked_score(imagereward, make_batch(3, images=images[:1].expand(3, -1, -1, -1), prompts=prompts)).scores
    assert scores[0] == pytest.approx(scores[1].item(), abs=1e-5)
    assert abs(scores[1] - scores[2]) > 1e-4


def test_gradient_of_one_pixel_equals_the_finite_difference(published, images):
    reward = ImageReward(**published[1])
    reward.setup(CPU, torch.float64)
    leaf = images[:1].double().requires_grad_()
    reward.rate(leaf, PROMPTS[:1]).sum().backward()
    gradient = leaf.grad[0]
    assert torch.isfinite(gradient).all()
    pixel = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    step = torch.zeros_like(leaf.detach())
    step[0][pixel] = 1e-4
    with torch.no_grad():
        up, down = (reward.rate(leaf + sign * step, PROMPTS[:1]).item() for sign in (1, -1))
    # Central difference: truncation is about step^2 = 1e-8, rounding about 1e-16 / step = 1e-12.
    assert (up - down) / 2e-4 == pytest.approx(gradient[pixel].item(), rel=1e-4)


def test_checkpointing_computes_layers_twice_and_changes_no_gradient(published, images, make_batch):
    gradients, calls = [], []
    for recompute in (False, True):
        reward = ImageReward(**published[1])
        reward.setup(CPU, FP32)
        if recompute:
            reward.enable_checkpointing()
        seen = []
        reward.vision.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        batch = make_batch(3, images=images.clone().requires_grad_(), prompts=PROMPTS)
        checked_score(reward, batch).scores.sum().backward()
        networks = (reward.vision, reward.text, reward.head)
        assert all(not weight.requires_grad for network in networks for weight in network.parameters())
        calls.append(len(seen))
        gradients.append(batch.images.grad)
    assert calls == [1, 2]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
    assert (gradients[0].abs().sum(dim=(1, 2, 3)) > 0).all()


def test_in_bfloat16_only_the_networks_are_rounded(published, imagereward, images, make_batch):
    reward = ImageReward(**published[1])
    reward.setup(CPU, torch.bfloat16)
    assert {network.dtype for network in (reward.vision, reward.text)} == {torch.bfloat16}
    assert reward.head[0].weight.dtype is FP32
    assert checked_score(reward, make_batch(3, images=images, prompts=PROMPTS)).scores.dtype is FP32


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", r"missing or unknown encoder.layers.1.self_attn.qkv.bias"),
        ("blip.visual_encoder.patch_embed.proj.weight", "there is no embeddings.patch_embedding.weight"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "crossattention.self.key.weight"),
        ("mlp.layers.7.bias", "the weights are not of this head: mlp.layers.* has or lacks mlp.layers.7.bias"),
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(published, tmp_path, odd, message):
    torch.save({key: value for key, value in published[0].items() if key != odd}, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardError, match=rf"^reward 'imagereward': .*ImageReward.pt: .*{message}") as caught:
        ImageReward(path=str(tmp_path), tokenizer=published[1]["tokenizer"]).setup(CPU, FP32)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_one_line_that_says_where_to_get_it(published, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cases = [
        (
            {"path": "THUDM/ImageReward"},
            "get ImageReward.pt from https://huggingface.co/THUDM/ImageReward and set path",
        ),
        (
            {"tokenizer": "bert-base-uncased"},
            "get https://huggingface.co/bert-base-uncased .* set tokenizer to its path",
        ),
        ({"tokenizer": str(tmp_path)}, "tokenizer .* cannot be loaded: it has no vocabulary of a BertTokenizer"),
    ]
    for changes, message in cases:
        with pytest.raises(RewardError, match=f"^reward 'imagereward': .*{message}") as caught:
            ImageReward(**(published[1] | changes)).setup(CPU, FP32)
        assert "\n" not in str(caught.value)
