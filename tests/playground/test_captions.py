"""Captions: the parser inverts every paraphrase, and the prompt sets are fixed, disjoint and true to their split."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.playground.captions import (
    MAX_TOKENS,
    SPLITS,
    WORDS,
    caption,
    has_held_out_pair,
    make_spec,
    parse,
    prompts,
    spec_of,
    tokens,
)
from align.playground.scenes import CATEGORIES, sample_scene


def test_parse_inverts_every_caption_within_the_vocabulary_and_the_token_limit():
    rng = np.random.default_rng(0)
    used: set[str] = set()
    for _ in range(3000):
        scene = sample_scene(rng, held_out=None)
        text = caption(scene, rng)
        assert parse(text) == spec_of(scene)
        words = tokens(text)
        assert len(words) <= MAX_TOKENS
        used.update(words)
    assert used == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


def test_paraphrases_of_each_category():
    rng = np.random.default_rng(1)
    for category in CATEGORIES:
        scene = sample_scene(rng, category=category)
        assert len({caption(scene, rng) for _ in range(100)}) >= 3


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a red circle", make_spec("single", [("red", "circle")])),
        ("There is an orange ring.", make_spec("single", [("orange", "ring")])),
        ("a picture of three blue stars", make_spec("count", [("blue", "star")], 3)),
        ("a red star with a blue star", make_spec("two", [("blue", "star"), ("red", "star")])),
        ("a red star under a blue star", make_spec("relation", [("red", "star"), ("blue", "star")], relation="below")),
        (
            "a red ring is to the left of a green ring",
            make_spec("relation", [("red", "ring"), ("green", "ring")], relation="left"),
        ),
        (
            "a red circle, a green square and a blue star",
            make_spec("three", [("blue", "star"), ("green", "square"), ("red", "circle")]),
        ),
    ],
)
def test_parse_examples(text: str, spec: dict):
    assert parse(text) == spec


def test_order_matters_only_for_relations():
    assert parse("a red star and a blue ring") == parse("a blue ring and a red star")
    assert parse("a red star above a blue ring") != parse("a blue ring above a red star")


@pytest.mark.parametrize(
    "text",
    ["", "a photo of a cat", "five red circles", "two red circle", "a red circle and", "a red circle and a red circle",
     "a pink circle", "a red circle left of a green ring and a blue star"],
)  # fmt: skip
def test_text_outside_the_grammar_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match="three blue stars"):
        parse(text)


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)))
def test_parse_returns_a_spec_or_raises_value_error(text: str):
    try:
        spec = parse(text)
    except ValueError:
        return
    assert spec["category"] in CATEGORIES


@pytest.mark.parametrize("split", SPLITS)
def test_prompt_sets_are_fixed_distinct_and_prefixes_of_each_other(split: str):
    rows = prompts(split, 120)
    assert rows == prompts(split, 120)
    assert prompts(split, 30) == rows[:30]
    assert len({r["prompt"] for r in rows}) == 120
    assert {r["metadata"]["category"] for r in rows[:10]} == set(CATEGORIES)
    for row in rows:
        assert parse(row["prompt"]) == row["metadata"] == json.loads(json.dumps(row["metadata"]))
        assert has_held_out_pair(row["metadata"]) == (split == "heldout_test")


def test_default_sizes_and_disjoint_splits():
    sets = {split: prompts(split) for split in SPLITS}
    assert {split: len(rows) for split, rows in sets.items()} == {
        "train": 1024,
        "seen_test": 256,
        "heldout_test": 256,
    }
    train, test = ({r["prompt"] for r in sets[s]} for s in ("train", "seen_test"))
    assert not train & test

    def contents(split: str) -> set[str]:
        return {json.dumps(r["metadata"]) for r in sets[split] if r["metadata"]["category"] != "single"}

    assert not contents("train") & contents("seen_test")


def test_a_relation_and_its_converse_are_in_the_same_split():
    inverse = {"left": "right", "right": "left", "above": "below", "below": "above"}

    def key(spec: dict) -> str:
        return json.dumps([spec["objects"], spec["relation"]])

    train = {key(r["metadata"]) for r in prompts("train") if r["metadata"]["relation"]}
    for row in prompts("seen_test"):
        spec = row["metadata"]
        if spec["relation"]:
            assert key({"objects": spec["objects"][::-1], "relation": inverse[spec["relation"]]}) not in train


def test_unknown_split_and_impossible_size_are_refused():
    with pytest.raises(ValueError, match="train, seen_test, heldout_test"):
        prompts("test")
