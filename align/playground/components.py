"""The parts of the playground's two pipelines, all of them ordinary diffusers / transformers classes.

Sizes: 64x64 images, 16x16 latents of 4 channels, 16 text tokens. The Stable Diffusion 3 pipeline reads two text encoders
of width 64 and no T5 encoder; the Stable Diffusion pipeline (U-Net) reads the first of them and shares the autoencoder.
"""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.playground.captions import WORDS
from align.playground.scenes import SIZE

MAX_TOKENS = 16
LATENT_CHANNELS = 4
VAE_FACTOR = 4
LATENT_SIZE = SIZE // VAE_FACTOR
TEXT_WIDTH = 64
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def vocabulary(words: tuple[str, ...] = WORDS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level CLIP BPE in which each word is a single token.

    Every printable ASCII character is a token, inside a word and at its end, so other text can be encoded too.
    """
    letters = [chr(c) for c in range(33, 127)]
    vocab = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters)])}
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        # What the merges so far leave of the word is joined by new ones. These come last in rank, so they cannot
        # change how an earlier word is merged.
        left, *rest = _merge([*word[:-1], word[-1] + "</w>"], merges)
        for right in rest:
            merges.setdefault((left, right), len(merges))
            left += right
            vocab.setdefault(left, len(vocab))
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    for token in (BOS, EOS):
        vocab[token] = len(vocab)
    return vocab, list(merges)


def _merge(symbols: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges by rank until none fits."""
    while True:
        found = [(merges[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in merges]
        if not found:
            return symbols
        i = min(found)[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def build_tokenizer() -> Any:
    """A `CLIPTokenizer` of the playground's words; pads with the end-of-text token to 16 tokens, as SD3 does."""
    from transformers import CLIPTokenizer

    tokenizer: Any = CLIPTokenizer
    vocab, merges = vocabulary()
    return tokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def write_classic_tokenizer_files(folder: Path) -> None:
    """Add `vocab.json` and `merges.txt`, which transformers 4 reads where version 5 reads `tokenizer.json`."""
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def build_text_encoder() -> Any:
    """A `CLIPTextModelWithProjection` of 3 layers, width 64; its pooled output is read at the first end-of-text."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    vocab, _ = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=vocab[BOS],
        eos_token_id=vocab[EOS],
        pad_token_id=vocab[EOS],
    )
    return CLIPTextModelWithProjection(config)


def build_vae() -> Any:
    """An `AutoencoderKL` that shrinks 64x64 images four times to 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_transformer(layers: int = 6) -> Any:
    """An `SD3Transformer2DModel` of 4 heads of 32 channels on 64 image tokens (patch 2)."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )


def build_pipeline(vae: Any, text_encoders: tuple[Any, Any], transformer: Any) -> Any:
    """The `StableDiffusion3Pipeline` of the given parts, with a flow-match Euler scheduler of shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=build_tokenizer(),
        text_encoder_2=text_encoders[1],
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_unet() -> Any:
    """A `UNet2DConditionModel` of 48 channels at 16x16 and, with attention of 4 heads, 128 at 8x8; predicts the noise."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads: diffusers keeps the historical name
        norm_num_groups=8,
    )


def unet_text_encoder(encoder: Any) -> Any:
    """A `CLIPTextModel` whose last layer's output, normalised, is the penultimate hidden state of an SD3 encoder.

    The SD3 pipeline reads hidden_states[-2], so the last layer of its encoders never learned to condition anything: it is
    left out. The final norm, which that state has not passed either, starts anew as a plain normalisation.
    """
    from transformers import CLIPTextModel

    config = deepcopy(encoder.config)
    config.num_hidden_layers -= 1
    config.architectures = ["CLIPTextModel"]
    short = CLIPTextModel(config)
    layers = {name.removeprefix("text_model."): p for name, p in encoder.state_dict().items()}
    prefix = "text_model." if any(name.startswith("text_model.") for name in short.state_dict()) else ""
    short.load_state_dict({name: layers[name.removeprefix(prefix)] for name in short.state_dict()})
    norm: Any = short.get_submodule(f"{prefix}final_layer_norm")
    norm.reset_parameters()  # weight 1, bias 0
    return short.eval().requires_grad_(False)


def build_unet_pipeline(vae: Any, text_encoder: Any, unet: Any) -> Any:
    """The `StableDiffusionPipeline` of the given parts, with DDIM on Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def shared_parts(first: Path) -> tuple[Any, Any]:
    """The autoencoder and the U-Net's text encoder, frozen float32 modules made from the folder of the first base.

    The autoencoder names no shift: the Stable Diffusion pipeline would not undo one.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection

    vae = AutoencoderKL.from_pretrained(first / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    vae.register_to_config(shift_factor=None)
    encoder = CLIPTextModelWithProjection.from_pretrained(first / "text_encoder", dtype=torch.float32)
    return vae, unet_text_encoder(encoder)


def save_unet_pipeline(folder: Path, vae: Any, text_encoder: Any, unet: Any) -> None:
    """Write the Stable Diffusion pipeline as float16 safetensors, casting copies of the parts."""
    parts = [deepcopy(part).to(torch.float16) for part in (vae, text_encoder, unet)]
    _save(build_unet_pipeline(*parts), folder)


def save_pipeline(folder: Path, vae: Any, text_encoders: tuple[Any, Any], transformer: Any) -> None:
    """Write the pipeline as float16 safetensors, casting copies of the parts."""
    parts = [deepcopy(part).to(torch.float16) for part in (vae, *text_encoders, transformer)]
    _save(build_pipeline(parts[0], (parts[1], parts[2]), parts[3]), folder)


def _save(pipe: Any, folder: Path) -> None:
    pipe.save_pretrained(folder, safe_serialization=True)
    for tokenizer in folder.glob("tokenizer*"):
        write_classic_tokenizer_files(tokenizer)
    for encoder in folder.glob("text_encoder*"):
        # transformers 5 loads a model in the dtype that its config names, diffusers in float32 unless told otherwise:
        # a plain `from_pretrained` would mix the two and fail at the first convolution.
        path = encoder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None):  # where a shared part was read from: of no use to anyone else
            path.write_text(json.dumps(config, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def token_ids(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids (N, 16) int64 as the pipeline makes them."""
    encoded = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def conditioning(text_encoders: tuple[Any, Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` gives without a T5 encoder at `max_sequence_length=0`.

    ids: (B, 16). Returns the joint-attention states (B, 16, 128), which are the encoders' penultimate hidden states
    side by side, and the pooled vectors (B, 128). Differentiable.
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in text_encoders]
    states = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    pooled = torch.cat([out.text_embeds for out in outputs], dim=-1)
    return states, pooled
