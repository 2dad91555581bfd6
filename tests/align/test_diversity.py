"""Diversity at evaluations: of the images it says, on any batch, and 1 for a model that knows one image."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from accelerate import Accelerator

from align.config import parse_config
from align.diversity import _SEED, DiversityConfig, EmbedderConfig, build_embedder, measure
from align.errors import UserError
from align.evaluate import half_width, sample_images
from align.models.base import ModelConfig, load_model
from align.prompts import Prompt
from align.report_curves import diversity_panels
from rewards.diversity import embedding_diversity, vendi_score

TEXTS = ["a red circle", "two green stars", "a yellow ring"]
PROXY = DiversityConfig(prompts=3, images=2, embedder=EmbedderConfig("proxy"))
REWARDS = {"verifier": {"type": "verifier"}}


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(path="playground"))


@pytest.fixture(scope="module")
def embedder():
    return build_embedder(PROXY, torch.device("cpu"))


def measured(model, embedder, batch_size: int = 6) -> dict[str, float]:
    prompts = [Prompt(text) for text in TEXTS]
    settings = {"num_steps": 2, "guidance_scale": 1.0, "seed": 7, "batch_size": batch_size}
    return measure(model, embedder, prompts, 2, Accelerator(cpu=True), **settings)


def test_the_metrics_are_of_images_of_one_prompt_whatever_the_batch(model, embedder):
    texts = [text for text in TEXTS for _ in range(2)]
    with torch.no_grad():
        embeddings = embedder.embed_images(sample_images(model, texts, range(6), 2, 1.0, 7 + _SEED))
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    spread, vendi = embedding_diversity(embeddings, ids), vendi_score(embeddings, ids)
    expected = {
        "diversity/spread": spread.mean().item(),
        "diversity/spread_ci95": half_width(spread),
        "diversity/vendi": vendi.mean().item(),
        "diversity/vendi_ci95": half_width(vendi),
    }
    assert expected["diversity/spread"] > 0
    assert 1 < expected["diversity/vendi"] <= 2
    for batch_size in (6, 4, 1):  # also where a batch cuts a prompt's images apart
        assert measured(model, embedder, batch_size) == pytest.approx(expected, abs=1e-4)


def test_a_model_that_knows_one_image_has_no_diversity(model, embedder):
    @contextlib.contextmanager
    def blind():
        last = model.pipe.vae.decoder.conv_out
        kept = last.weight.data.clone()
        last.weight.data.zero_()
        yield
        last.weight.data.copy_(kept)

    with blind():
        found = measured(model, embedder)
    assert found["diversity/spread"] == pytest.approx(0, abs=1e-5)
    assert found["diversity/vendi"] == pytest.approx(1, abs=1e-3)


def test_a_broken_image_leaves_its_prompt_out(model, embedder):
    class Broken:
        """Of the first prompt's first image there is no embedding."""

        max_batch = embedder.max_batch

        def embed_images(self, images):
            found = embedder.embed_images(images).clone()
            found[0] = math.nan
            return found

    whole, broken = measured(model, embedder), measured(model, Broken())
    assert math.isfinite(broken["diversity/vendi"])
    assert broken["diversity/spread"] != pytest.approx(whole["diversity/spread"], abs=1e-6)


def test_it_is_off_by_default_and_mistakes_are_told_at_start():
    assert build_embedder(parse_config({"rewards": REWARDS}).eval.diversity, torch.device("cpu")) is None
    wrong = {"prompts": 4, "images": 1, "embedder": {"type": "klip"}}
    with pytest.raises(UserError) as error:
        parse_config({"rewards": REWARDS, "eval": {"diversity": wrong}})
    assert "eval.diversity.images: " in str(error.value)
    assert "eval.diversity.embedder: unknown reward type 'klip'; did you mean 'clip'?" in str(error.value)
    with pytest.raises(UserError, match="'verifier' has no embed_images"):
        build_embedder(DiversityConfig(prompts=1, embedder=EmbedderConfig("verifier")), torch.device("cpu"))


def test_it_is_drawn_where_it_was_measured():
    rows = [
        {"iteration": i, "diversity/vendi": 3.0 - i, "diversity/vendi_ci95": 0.1, "diversity/spread": math.nan}
        for i in range(3)
    ]
    assert [panel.key for panel in diversity_panels(rows)] == ["diversity/vendi"]
    assert "effective number" in diversity_panels(rows)[0].hint
    assert diversity_panels([{"iteration": 0, "eval/verifier": 1.0}]) == []
