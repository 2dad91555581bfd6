"""Prompt sources, and the order in which a run visits them."""

from collections import Counter

import pytest

from align.errors import UserError
from align.playground.captions import prompts as playground_prompts
from align.prompts import PLAYGROUND_SPLITS, Prompt, load_prompts, prompt_indices


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n\n  two blue stars \nein grünes Quadrat\n", encoding="utf-8")
    assert load_prompts(str(path)) == [Prompt("a red circle"), Prompt("two blue stars"), Prompt("ein grünes Quadrat")]


def test_a_jsonl_file_carries_metadata(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "metadata": {"n": 2}}\n\n{"prompt": "b"}\n{"prompt": "c", "metadata": null}\n')
    assert load_prompts(str(path)) == [Prompt("a", {"n": 2}), Prompt("b"), Prompt("c")]


@pytest.mark.parametrize("split", PLAYGROUND_SPLITS)
def test_the_playground_splits_come_with_what_the_verifier_needs(split):
    found = load_prompts(f"playground:{split}")
    assert [p.text for p in found] == [row["prompt"] for row in playground_prompts(split)]
    assert all("objects" in p.metadata for p in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', "p.jsonl:3: expected"),
        ("p.jsonl", b'"a"\n', "p.jsonl:1: expected"),
        ("p.jsonl", b'{"prompt": "a", "metadata": [1]}\n', "p.jsonl:1: metadata must be a mapping"),
        ("p.txt", b"\n  \n", "p.txt holds no prompt"),
        ("p.txt", b"a\n\xff\xfe\n", "p.txt is not UTF-8 text"),
    ],
)
def test_bad_files_name_the_file_and_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_prompts(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_and_an_unknown_split_say_what_there_is():
    with pytest.raises(UserError, match=r"no file nowhere.txt .*playground:train"):
        load_prompts("nowhere.txt")
    with pytest.raises(UserError, match=r"no split 'heldout' \(did you mean 'heldout_test'\?\)"):
        load_prompts("playground:heldout")


@pytest.mark.parametrize(("total", "count"), [(12, 4), (12, 5), (7, 3), (5, 5)])
def test_an_epoch_visits_every_prompt_once_before_any_comes_again(total, count):
    visited = [i for iteration in range(3 * total) for i in prompt_indices(total, count, iteration, seed=3)]
    for epoch in range(len(visited) // total):
        assert sorted(visited[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_more_prompts_an_iteration_than_there_are_are_spread_evenly():
    assert set(Counter(prompt_indices(3, 9, iteration=1, seed=0)).values()) == {3}


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    first = prompt_indices(100, 10, iteration=4, seed=0)
    for other in range(12):  # fills and empties the cache of permutations
        prompt_indices(100 + other, 10, iteration=50, seed=other)
    assert prompt_indices(100, 10, iteration=4, seed=0) == first
    assert prompt_indices(100, 10, iteration=4, seed=1) != first
    assert prompt_indices(100, 100, iteration=1, seed=0) != prompt_indices(100, 100, iteration=0, seed=0)
