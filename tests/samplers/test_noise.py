"""Keyed noise: a function of its names only, and standard normal."""

import pytest
import torch

from samplers.noise import keyed_normal


def draw(samples, **names):
    return keyed_normal((4, 8), **{"seed": 1, "iteration": 2, "step": 3, **names}, samples=samples)


def test_a_sample_has_the_same_noise_in_every_batch_split_and_order():
    whole = draw([0, 1, 2, 3, 4])
    assert whole.shape == (5, 4, 8)
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat([draw([0, 1]), draw([2]), draw([3, 4])]), whole)
    assert torch.equal(draw([4, 2, 0, 3, 1]), whole[[4, 2, 0, 3, 1]])
    assert torch.equal(draw([7, 7])[0], draw([7, 7])[1])


def test_every_name_changes_the_noise():
    base = draw([5])
    others = [draw([6])] + [draw([5], **{name: 9}) for name in ("seed", "iteration", "step", "stream")]
    rows = torch.cat([base, *others]).flatten(1)
    for i in range(len(rows)):
        for j in range(i):
            assert not torch.equal(rows[i], rows[j])


def test_names_do_not_stand_in_for_each_other():
    assert not torch.equal(draw([3], step=5), draw([5], step=3))
    assert not torch.equal(draw([3], iteration=5), draw([5], iteration=3))
    assert not torch.equal(draw([0], seed=0, stream=1), draw([0], seed=1, stream=0))


@pytest.mark.parametrize("name", ["seed", "iteration", "sample", "step", "stream"])
def test_neighbouring_names_do_not_share_a_shifted_sequence(name):
    """A counter-based generator started one block further would give the same numbers, a few places on."""
    names = {"seed": 1, "iteration": 2, "sample": 3, "step": 4, "stream": 0}

    def numbers(sample, **others):
        return set(keyed_normal((2000,), samples=[sample], **others)[0].tolist())

    shared = numbers(**names) & numbers(**{**names, name: names[name] + 1})
    # Chance puts fewer than one common float32 into two independent sets of 2000.
    assert len(shared) < 20


def test_noise_is_standard_normal_and_uncorrelated_across_names():
    n = 100_000

    def one(sample, step):
        return keyed_normal((n,), seed=0, iteration=0, samples=[sample], step=step)[0].double()

    a, next_sample, next_step = one(0, 0), one(1, 0), one(0, 1)
    # Each estimate below has a standard error of about 1/sqrt(n) (moments 2 and 4: sqrt(2/n), sqrt(96/n)); 5 of them.
    assert abs(a.mean().item()) < 5 / n**0.5
    assert abs(a.var().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs(a.pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5
    assert abs((a * next_sample).mean().item()) < 5 / n**0.5
    assert abs((a * next_step).mean().item()) < 5 / n**0.5
    assert abs((a[1:] * a[:-1]).mean().item()) < 5 / n**0.5


def test_other_dtypes_round_the_same_numbers():
    assert torch.equal(draw([1, 2], dtype=torch.bfloat16), draw([1, 2]).bfloat16())


def test_empty_batch_and_bad_names():
    assert draw([]).shape == (0, 4, 8)
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\^64\), got -1"):
        draw([0], seed=-1)
