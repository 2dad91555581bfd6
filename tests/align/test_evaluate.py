"""Held-out evaluation: paired noise, weights that stand in, intervals."""

import contextlib
import math

import pytest
import torch
from accelerate import Accelerator

from align.evaluate import evaluate, half_width, paired_interval, sample_images
from align.models.base import ModelConfig, load_model
from align.prompts import Prompt
from rewards.debug import BrightnessReward
from rewards.function import FunctionReward

TEXTS = ["a red circle", "a blue square", "two green stars", "a yellow ring", "a red star and a blue circle"]
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def model():
    found = load_model(ModelConfig(path="playground"))
    found.add_lora(seed=0)
    return found


def images(model, rows, seed=1, guidance_scale=1.0):
    return sample_images(model, [TEXTS[i] for i in rows], rows, 4, guidance_scale, seed)


def test_an_image_depends_on_its_prompt_index_and_seed_and_not_on_its_batch(model):
    together = images(model, [0, 1, 2, 3, 4])
    assert together.shape == (5, 3, 64, 64)
    assert 0 <= together.min() <= together.max() <= 1
    apart = torch.cat([images(model, [3, 0]), images(model, [4, 2, 1])])
    # matrix products of another batch size round differently: 1e-6 a step in float32, far below one grey level (4e-3)
    torch.testing.assert_close(apart, together[[3, 0, 4, 2, 1]], rtol=0, atol=1e-5)
    assert (images(model, [0], seed=2)[0] - together[0]).abs().max() > 0.05
    same_prompt_other_index = sample_images(model, [TEXTS[0]], [1], 4, 1.0, 1)
    assert (same_prompt_other_index[0] - together[0]).abs().max() > 0.05


def test_guidance_acts_and_is_put_back(model):
    model.guidance_scale = 1.0
    assert (images(model, [0], guidance_scale=3.0) - images(model, [0])).abs().max() > 0.01
    assert model.guidance_scale == 1.0


def run(model, batch_size, rewards=None, **options):
    return evaluate(
        model,
        rewards or {"brightness": BrightnessReward()},
        PROMPTS,
        Accelerator(cpu=True),
        num_steps=2,
        guidance_scale=1.0,
        seed=7,
        batch_size=batch_size,
        **options,
    )


def test_scores_and_kept_images_do_not_depend_on_the_batch_size(model):
    calls = []
    one = run(model, 1, keep_images=3, progress=lambda done, total: calls.append((done, total)))
    all_at_once = run(model, 5, keep_images=3)
    assert calls == [(n, 5) for n in range(1, 6)]
    torch.testing.assert_close(one.scores.values, all_at_once.scores.values, rtol=0, atol=1e-5)
    assert one.images.shape == (3, 3, 64, 64)
    # kept as 8 bits, so a rounding difference may show as one grey level
    torch.testing.assert_close(one.images, all_at_once.images, rtol=0, atol=1.01 / 255)


def test_the_same_noise_makes_equal_weights_equal_and_other_weights_comparable(model):
    base = run(model, 5, weights=model.reference())
    torch.testing.assert_close(run(model, 5).scores.values, base.scores.values, rtol=0, atol=1e-5)

    @contextlib.contextmanager
    def brighter():
        bias = model.pipe.vae.decoder.conv_out.bias
        bias.data += 0.2  # decoded range is [-1, 1], so pixels rise by at most 0.1
        try:
            yield
        finally:
            bias.data -= 0.2

    tuned = run(model, 5, weights=brighter())
    low, high = paired_interval(base.scores.values["brightness"], tuned.scores.values["brightness"])
    assert 0 < low <= high <= 0.1 + 1e-5


def test_a_missing_score_is_null_in_the_file_and_left_out_of_the_mean(model):
    def second_is_missing(images, prompts, metadata):
        return [None if p == TEXTS[1] else 1.0 for p in prompts]

    found = run(model, 5, {"mine": FunctionReward("mine", second_is_missing)})
    assert found.scores.mean("mine") == 1.0
    written = found.to_json()
    assert written["prompts"] == TEXTS
    assert [math.isnan(x) for x in written["scores"]["mine"]] == [False, True, False, False, False]


def test_half_width_of_the_present_values():
    # std of 1, 2, 3, 4 is sqrt(5 / 3)
    expected = 1.96 * math.sqrt(5 / 3) / 2
    assert half_width(torch.tensor([1.0, math.nan, 2.0, 3.0, 4.0])) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(half_width(torch.tensor([1.0, math.nan])))


def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 50, generator=generator)
    tuned = base + 0.3 + 0.5 * torch.randn(300, 50, generator=generator)
    intervals = [paired_interval(b, t, draws=300) for b, t in zip(base, tuned, strict=True)]
    covered = sum(low <= 0.3 <= high for low, high in intervals) / 300
    # percentile bootstrap of 50 values: nominally .95, in truth about .94; binomial std over 300 is .013
    assert 0.89 < covered < 0.99
    # the pairing removes the spread of the prompts: unpaired, the width would be 2 * 1.96 * sqrt(2.25 / 50) = .83
    widths = [high - low for low, high in intervals]
    assert sum(widths) / 300 == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(50), rel=0.1)


def test_the_paired_interval_uses_complete_pairs_only_and_is_repeatable():
    base = torch.tensor([0.0, 1.0, math.nan, 2.0])
    tuned = torch.tensor([1.0, 2.0, 9.0, math.nan])
    assert paired_interval(base, tuned) == [1.0, 1.0]
    assert all(math.isnan(x) for x in paired_interval(base[2:], tuned[2:]))
    spread = torch.linspace(0, 1, 20)
    assert paired_interval(spread * 0, spread) == paired_interval(spread * 0, spread)
