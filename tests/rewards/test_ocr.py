"""The OCR reward: its arithmetic, what has no score, and a real OCR program where one is installed."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import RewardConfig, RewardError, build_reward, checked_score
from rewards.conformance import FAIL, check
from rewards.ocr import OCRReward, edit_distance, ocr_score, paddle_lines, quoted_text

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.mark.parametrize(
    ("recognised", "loose", "strict"),
    [
        ("HELO", 0.8, 0.8),
        ("Hell0 ", 0.8, 0.8),
        ("h e l l o", 1.0, 1.0),
        ("xx hello yy", 1.0, 0.2),  # four letters too many cost only without the exemption
        ("", 0.0, 0.0),
        ("q" * 19, 0.0, 0.0),  # capped, never negative
    ],
)
def test_score_is_one_minus_the_share_of_letters_to_change(recognised, loose, strict):
    assert ocr_score(recognised, "HELLO") == pytest.approx(loose)
    assert ocr_score(recognised, "HELLO", substring_ok=False) == pytest.approx(strict)


def test_an_empty_target_has_no_score():
    assert math.isnan(ocr_score("hello", ""))
    assert math.isnan(ocr_score("hello", "  "))


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN" and "NOW"', "OPEN"),
        ("a sign that says “Don't stop”", "Don't stop"),
        ('a sign that says ""', ""),
        ("a sign that says 'OPEN'", None),
        ('a 5" screen', None),
    ],
)
def test_target_stands_between_the_first_pair_of_double_quotes(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("a", "a", 0)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance
    assert edit_distance(b, a) == distance


def test_both_forms_of_paddles_answer_are_read():
    box = [[0, 0], [9, 0], [9, 9], [0, 9]]
    assert paddle_lines([[[box, ("OPEN", 0.9)], [box, ("NOW", 0.4)]]]) == [("OPEN", 0.9), ("NOW", 0.4)]
    assert paddle_lines([{"rec_texts": ["OPEN"], "rec_scores": np.array([0.9])}]) == [("OPEN", 0.9)]
    assert paddle_lines([None]) == []
    assert paddle_lines(None) == []


def test_wrong_arguments_and_a_missing_program_are_named():
    with pytest.raises(RewardError, match="did you mean 'tesseract'"):
        OCRReward(engine="teseract")
    with pytest.raises(RewardError, match="language needs engine"):
        OCRReward(language="de")
    if find_spec("pytesseract") is None:
        with pytest.raises(RewardError, match=r"'ocr': pytesseract is not installed: pip install 'flow-align\[ocr\]'"):
            OCRReward(engine="tesseract").setup(CPU, FP32)
    with pytest.raises(RewardError, match="before setup"):
        OCRReward().score(_signs(["OPEN"]))


def _signs(texts, **changes):
    from rewards import RewardBatch

    images = []
    for text in texts:
        image = Image.new("RGB", (320, 96), "white")
        ImageDraw.Draw(image).text((20, 20), text, fill="black", font=ImageFont.load_default(48))
        images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255)
    values = {
        "images": torch.stack(images),
        "prompts": ['a sign that says "OPEN"'] * len(texts),
        "metadata": [{} for _ in texts],
        "group_ids": torch.zeros(len(texts), dtype=torch.int64),
    }
    return RewardBatch(**(values | changes))


@pytest.fixture(scope="module")
def reader() -> OCRReward:
    if find_spec("rapidocr_onnxruntime") is None:
        pytest.skip("rapidocr_onnxruntime is not installed")
    reward = build_reward("text", RewardConfig("ocr"))
    assert isinstance(reward, OCRReward)
    reward.setup(CPU, FP32)
    return reward


def test_a_real_program_reads_a_sign(reader):
    output = checked_score(reader, _signs(["OPEN", "OPEM", ""]))
    assert output.scores.tolist() == pytest.approx([1.0, 0.75, 0.0])
    assert output.info["text"][0] == "OPEN"


def test_metadata_wins_over_the_prompt_and_what_has_no_target_has_no_score(reader):
    batch = _signs(["OPEN"] * 4, prompts=['a sign that says "SHUT"', "a sign", 'a "" sign', 'a sign that says "OPEN"'])
    batch.metadata[0]["text"] = "Open"
    batch.images[3, :, 0, 0] = torch.nan
    output = checked_score(reader, batch)
    assert output.valid.tolist() == [True, False, False, False]
    assert output.scores[0] == 1.0
    assert output.info["problem"][1:] == ["the prompt has no text in double quotes"] * 2 + ["pixels are not finite"]


@pytest.mark.slow
def test_it_keeps_the_contract(reader):
    verdicts = check(OCRReward(), _signs(["OPEN", "SHUT"]))
    assert [(v.point, v.detail) for v in verdicts if v.status == FAIL] == []
