"""Diversity of a group's images by their embeddings: closed forms, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.diversity import embedding_diversity, vendi_score

ONE = torch.zeros(8, dtype=torch.long)


def test_equal_images_have_no_embedding_diversity_and_orthogonal_ones_have_one():
    e = torch.eye(4)
    vectors = torch.stack([3 * e[0], e[0], e[1], e[2], -e[3], e[3], 0.1 * e[3]])
    ids = torch.tensor([7, 7, 2, 2, 5, 5, 5])
    # Ascending ids: 2 orthogonal; 5 the pairs -1, -1, +1, so distances 2, 2, 0; 7 parallel, whatever the lengths.
    assert embedding_diversity(vectors, ids).tolist() == pytest.approx([1.0, 4 / 3, 0.0])


def test_embedding_diversity_of_unit_vectors_follows_from_the_length_of_their_mean():
    vectors = torch.nn.functional.normalize(torch.randn(6, 16), dim=-1)
    n = len(vectors)
    # |sum|^2 = n + sum over ordered pairs of the cosine.
    expected = 1 - (float(vectors.double().sum(0).square().sum()) - n) / (n * (n - 1))
    assert embedding_diversity(vectors, torch.zeros(n, dtype=torch.long)).item() == pytest.approx(expected, abs=1e-6)


def test_groups_may_be_interleaved_and_a_single_image_has_no_value():
    vectors, ids = torch.randn(9, 8), torch.tensor([0, 1, 0, 1, 0, 4, 1, 0, 0])
    together = embedding_diversity(vectors, ids)
    alone = [embedding_diversity(vectors[ids == i], ids[ids == i]).item() for i in (0, 1)]
    assert together[:2].tolist() == pytest.approx(alone)
    assert torch.isnan(together[2])


def test_the_effective_number_is_one_for_equal_images_and_their_number_for_orthogonal_ones():
    assert vendi_score(torch.ones(8, 3), ONE).item() == pytest.approx(1.0, abs=1e-9)
    assert vendi_score(torch.eye(8), ONE).item() == pytest.approx(8.0, abs=1e-9)
    # three equal and three others, orthogonal: probabilities 1/2, 1/6, 1/6, 1/6
    e = torch.eye(4)
    six = torch.stack([e[0], e[0], e[0], e[1], e[2], e[3]])
    assert vendi_score(six, ONE[:6]).item() == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(6)))


def test_two_images_at_sixty_degrees_count_as_fewer_than_two():
    pair = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    # eigenvalues 3/4 and 1/4 of half the kernel
    assert vendi_score(pair, ONE[:2]).item() == pytest.approx(1.754765, abs=1e-6)


def test_the_effective_number_knows_neither_lengths_nor_rotations_nor_other_groups():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    ids = torch.tensor([3, 1, 3, 1, 3, 5, 1, 3, 3])
    scores = vendi_score(vectors, ids)
    assert scores[2] == pytest.approx(1.0)  # a single image
    assert [vendi_score(vectors[ids == i], ids[ids == i]).item() for i in (1, 3)] == pytest.approx(scores[:2].tolist())
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    lengths = torch.rand(9, 1, generator=generator) + 0.1
    torch.testing.assert_close(vendi_score(vectors @ turn * lengths, ids), scores, rtol=0, atol=1e-9)


def test_more_copies_of_the_same_images_do_not_change_the_effective_number():
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    once, thrice = vendi_score(vectors, ONE[:4]), vendi_score(vectors.repeat(3, 1), torch.zeros(12, dtype=torch.long))
    assert thrice.item() == pytest.approx(once.item(), rel=1e-9)


@pytest.mark.parametrize("measure", [embedding_diversity, vendi_score])
def test_a_broken_image_spoils_its_own_group_only(measure):
    vectors = torch.eye(4)
    vectors[0] = torch.nan
    assert measure(vectors, torch.tensor([0, 0, 1, 1])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("measure", [embedding_diversity, vendi_score])
def test_a_wrong_number_of_group_ids_is_an_error(measure):
    with pytest.raises(ValueError, match="one group id for each of 3 images"):
        measure(torch.randn(3, 4), torch.zeros(2, dtype=torch.long))
