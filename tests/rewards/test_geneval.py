"""GenEval's scoring from detections, and a genuine Mask2Former and CLIP, tiny and untrained, behind it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from rewards import RewardError, checked_score
from rewards.conformance import FAIL, check, sample_batch
from rewards.detector import ColorNamer, Instance
from rewards.geneval import COLORS, Clause, Found, GenEvalReward, geneval_score, read_clauses, relations

CPU, FP32 = torch.device("cpu"), torch.float32
LEFT, RIGHT = (0, 40, 20, 60), (80, 40, 100, 60)


def some(count: int, *colors: str) -> list[Found]:
    return [Found(LEFT, color) for color in (*colors, *[None] * count)][:count]


def test_a_wrong_number_costs_its_share_and_far_too_many_go_below_zero():
    clauses = [Clause("cat", 3)]
    found = {n: geneval_score({"cat": some(n)}, clauses) for n in (0, 2, 3, 4, 7)}
    assert {n: score.dense for n, score in found.items()} == pytest.approx({0: 0, 2: 2 / 3, 3: 1, 4: 2 / 3, 7: -1 / 3})
    assert [n for n, score in found.items() if score.strict] == [3]


@pytest.mark.parametrize(
    ("cats", "terms"),
    [
        (some(2, "red", "red"), (1.0, 1.0)),
        (some(2, "red", "blue"), (1.0, 0.5)),
        (some(1, "red"), (0.5, 0.0)),  # the number is wrong: one 0 for the colour
        ([], (0.0, 0.0)),
    ],
)
def test_colour_counts_only_where_the_number_is_right(cats, terms):
    score = geneval_score({"cat": cats}, [Clause("cat", 2, "red")])
    assert score.terms == terms
    assert score.dense == pytest.approx(sum(terms) / 2)
    assert score.strict == (terms == (1.0, 1.0))


CAT_LEFT_OF_DOG = [Clause("dog"), Clause("cat", position=("left of", 0))]


def test_a_wrong_relation_gives_one_0_and_in_the_released_servers_way_also_a_1():
    wrong = {"dog": [Found(LEFT)], "cat": [Found(RIGHT)]}
    assert geneval_score(wrong, CAT_LEFT_OF_DOG).terms == (1.0, 1.0, 0.0)
    assert geneval_score(wrong, CAT_LEFT_OF_DOG).dense == pytest.approx(2 / 3)
    compatible = geneval_score(wrong, CAT_LEFT_OF_DOG, compat_position_bug=True)
    assert compatible.terms == (1.0, 1.0, 0.0, 1.0)
    assert compatible.dense == pytest.approx(0.75)
    assert not compatible.strict
    right = {"dog": [Found(RIGHT)], "cat": [Found(LEFT)]}
    for bug in (False, True):
        assert geneval_score(right, CAT_LEFT_OF_DOG, bug).terms == (1.0, 1.0, 1.0)
        assert geneval_score(right, CAT_LEFT_OF_DOG, bug).strict


def test_a_relation_to_a_clause_that_is_not_met_does_not_hold():
    for bug in (False, True):
        score = geneval_score({"cat": [Found(LEFT)]}, CAT_LEFT_OF_DOG, bug)
        assert score.terms == (0.0, 1.0, 0.0)
    colour = [Clause("dog"), Clause("cat", 1, "red", ("left of", 0))]
    blue = {"dog": [Found(RIGHT)], "cat": [Found(LEFT, "blue")]}
    assert geneval_score(blue, colour).terms == (1.0, 1.0, 0.0)  # no term for the position of a wrong colour


def test_a_relation_must_hold_between_all_pairs():
    clauses = [Clause("dog"), Clause("cat", 2, position=("left of", 0))]
    dog = [Found((45, 40, 55, 60))]
    assert geneval_score({"dog": dog, "cat": [Found(LEFT), Found((5, 40, 25, 60))]}, clauses).strict
    assert not geneval_score({"dog": dog, "cat": [Found(LEFT), Found(RIGHT)]}, clauses).strict


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        ((40, 0, 60, 20), (40, 80, 60, 100), {"above"}),
        ((40, 80, 60, 100), (40, 0, 60, 20), {"below"}),
        ((0, 0, 10, 10), (90, 90, 100, 100), {"left of", "above"}),
        (LEFT, LEFT, set()),
        # Centres 8 apart, sizes 20: 8 - 0.1 * 40 = 4, and 4 / 8 is not beyond 0.5; with 8.2 apart it is.
        ((0, 0, 20, 20), (8, 0, 28, 20), set()),
        ((0, 0, 20, 20), (8.2, 0, 28.2, 20), {"left of"}),
    ],
)
def test_relation_of_two_boxes(a, b, expected):
    assert relations(a, b) == expected


def test_clauses_of_a_prompt_file_are_read():
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "color": "red", "position": ["above", 0]}]
    assert read_clauses({"tag": "position", "include": include}) == [
        Clause("dog"),
        Clause("cat", 2, "red", ("above", 0)),
    ]


@pytest.mark.parametrize(
    ("include", "reason"),
    [
        (None, "no include"),
        ([], "no include"),
        ([{"count": 1}], "names no class"),
        ([{"class": "cat", "count": 0}], "positive integer"),
        ([{"class": "cat", "color": "teal"}], "color must be one of red"),
        ([{"class": "cat", "position": ["left of", 0]}], "index of an earlier entry"),
        ([{"class": "dog"}, {"class": "cat", "position": ["behind", 0]}], "position must be"),
    ],
)
def test_clauses_that_make_no_sense_are_told(include, reason):
    with pytest.raises(ValueError, match=reason):
        read_clauses({} if include is None else {"include": include})


def test_wrong_arguments_and_a_missing_package_are_named():
    with pytest.raises(RewardError, match="did you mean 'strict'"):
        GenEvalReward("strikt")
    with pytest.raises(RewardError, match="clip takes model, pretrained and config, not seed"):
        GenEvalReward(clip={"seed": 3})
    if find_spec("scipy") is None:
        with pytest.raises(RewardError, match=r"'geneval' needs scipy for its detector: pip install 'flow-align\[geneval\]'"):
            GenEvalReward().setup(CPU, FP32)


def test_an_object_is_named_from_its_own_pixels_alone(clip_config):
    namer = ColorNamer(COLORS, {"config": clip_config, "pretrained": "random"})
    namer.setup("geneval", CPU)
    image = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(24, 20, dtype=torch.bool)
    mask[4:14, 3:9] = True
    other = torch.where(mask, image, 1 - image)
    instance = Instance((3, 4, 9, 14), 0.9, mask)
    (color,) = namer(image, [instance], "circle")
    assert color in COLORS
    assert namer(other, [instance, instance], "circle") == [color, color]


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    """A Mask2Former of two classes with random weights, in the format of transformers."""
    pytest.importorskip("scipy")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label={0: "cat", 1: "mouse"}, label2id={"cat": 0, "mouse": 1},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("detector")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight.mul_(40)  # decided enough to find something
    network.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(detector_folder, clip_config):
    return {
        "detector": str(detector_folder),
        "clip": {"config": clip_config, "pretrained": "random"},
        "threshold": 0.05,
    }


def test_detections_of_a_real_network_are_scored(arguments):
    reward = GenEvalReward(**arguments)
    reward.setup(CPU, FP32)
    batch = sample_batch()
    found = reward.detector(batch.images, 0.05)
    assert any(found), "the untrained network finds nothing: the test says nothing"
    for objects in found:
        for instance in (one for group in objects.values() for one in group):
            left, top, right, bottom = instance.box
            assert bool(instance.mask[top:bottom, left:right].any())
            assert int(instance.mask.sum()) == int(instance.mask[top:bottom, left:right].sum())
    batch.metadata[0] = {"include": [{"class": "computer mouse", "count": 2, "color": "red"}]}
    batch.metadata[1] = {"include": [{"class": "cat", "count": 1}]}
    batch.metadata[2] = {"include": [{"class": "catt", "count": 1}]}
    output = checked_score(reward, batch)
    cats = len(found[1].get("cat", []))
    assert output.scores[1] == pytest.approx(1 - abs(1 - cats))
    mice = len(found[0].get("mouse", []))
    assert (1 - abs(2 - mice) / 2) / 2 <= output.scores[0] <= (1 - abs(2 - mice) / 2) / 2 + 0.5
    assert output.valid.tolist() == [True, True, False, True, True, True]
    assert output.info["problem"][2] == "the detector knows no 'catt'; did you mean 'cat'?"


def test_it_keeps_the_contract(arguments):
    assert [(v.point, v.detail) for v in check(GenEvalReward(**arguments)) if v.status == FAIL] == []


def test_missing_weights_are_told(detector_folder, tmp_path):
    with pytest.raises(
        RewardError, match="'geneval': the detector .* cannot be loaded: download https://huggingface.co"
    ):
        GenEvalReward(detector=str(tmp_path)).setup(CPU, FP32)
