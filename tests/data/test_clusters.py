import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.clusters import canonical, clusters, compared, plane, spherical_kmeans
from accord.errors import DataError

RULES = ("image", "text", "joint", "cross")


def blobs(labels, width, seed, noise=0.05):
    """Vectors near one of three orthogonal directions, of lengths that say nothing."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, 3, generator=g)).Q.T
    length = 1 + torch.rand(len(labels), 1, generator=g)
    return length * (axes[labels] + noise * torch.randn(len(labels), width, generator=g))


@pytest.fixture
def paired():
    """Sixty items of three kinds by picture, twenty each, and of three others by text, thirty, twenty and ten."""
    return torch.arange(60) % 3, torch.tensor([0] * 30 + [1] * 20 + [2] * 10)


def partition(labels):
    return {frozenset((labels == k).nonzero().flatten().tolist()) for k in labels.unique()}


def cosines(unit, labels):
    """The objective, from its definition."""
    return sum(float(unit[labels == k].sum(dim=0).norm()) for k in labels.unique())


def test_directions_are_clustered_and_lengths_are_not():
    """Two directions; the long vector of the first is nearer to its own than to anything of its length."""
    x = torch.tensor([[1.0, 0.1], [9.0, 0.0], [0.1, 1.0], [0.0, 9.0]])
    assert partition(spherical_kmeans(x, 2, seed=0)) == {frozenset({0, 1}), frozenset({2, 3})}


def test_no_partition_of_a_few_items_is_better():
    """All 2^6 ways of halving seven items, beside that of the search."""
    unit = torch.nn.functional.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).double())
    best = max(cosines(unit, torch.tensor([0, *rest])) for rest in itertools.product((0, 1), repeat=6))
    assert cosines(unit, spherical_kmeans(unit, 2, seed=0)) == pytest.approx(best)


@given(st.integers(1, 6), st.integers(6, 20), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_no_cluster_is_empty(count, items, seed):
    x = torch.randn(items, 2, generator=torch.Generator().manual_seed(seed))
    assert sorted(spherical_kmeans(x, count, seed=seed).unique().tolist()) == list(range(count))


def test_items_whose_cosines_tell_no_difference_are_dealt_out_all_the_same():
    """They differ by 1e-6, and their cosines by 1e-12."""
    nearly = torch.tensor([[1.0, 0.0], [1.0, 1e-6], [1.0, 2e-6], [1.0, 3e-6]], dtype=torch.float64)
    assert sorted(spherical_kmeans(nearly, 4, seed=0).tolist()) == [0, 1, 2, 3]


def test_as_many_clusters_as_items_that_differ_and_no_more():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    assert partition(spherical_kmeans(x, 3, seed=0)) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4})}
    with pytest.raises(DataError, match="4 clusters need as many items that differ, and of 5 items 3 do; ask for few"):
        spherical_kmeans(x, 4, seed=0)
    with pytest.raises(DataError, match="of 0 items 0 do"):
        spherical_kmeans(x[:0], 1, seed=0)


def test_each_rule_finds_its_own_kinds(paired):
    """Pictures and texts are of unrelated kinds; joint similarity finds the nine pairs of them."""
    of_picture, of_text = paired
    image, text = blobs(of_picture, 8, 0), blobs(of_text, 6, 1)
    assert partition(clusters(image, None, "image", 3, seed=0)) == partition(of_picture)
    assert partition(clusters(None, text, "text", 3, seed=0)) == partition(of_text)
    assert partition(clusters(image, text, "joint", 9, seed=0)) == partition(3 * of_picture + of_text)


def test_the_largest_cluster_is_the_first(paired):
    found = clusters(None, blobs(paired[1], 6, 1), "text", 3, seed=0)
    assert torch.bincount(found).tolist() == [30, 20, 10]
    assert torch.equal(found, paired[1])


def test_joint_similarity_is_the_sum_of_both(paired):
    image, text = blobs(paired[0], 8, 0), blobs(paired[1], 6, 1)
    x, t, both = (compared(image, text, rule)[0] for rule in ("image", "text", "joint"))
    assert torch.allclose(both @ both.T, x @ x.T + t @ t.T)


def test_a_picture_goes_where_texts_like_it_are():
    """Pictures and texts are of the same three kinds, but for one picture of kind 2 with a text of kind 0."""
    kinds = torch.arange(90) % 3
    of_text = kinds.clone()
    of_text[89] = 0
    found = clusters(blobs(kinds, 8, 0), blobs(of_text, 6, 1), "cross", 3, seed=0)
    assert partition(found) == partition(kinds)


def test_canonical_variates_are_correlated_pairwise_only():
    """Both views show one hidden variable, and noise of their own: the first pair is correlated, and no two others."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 1, generator=g)
    views = [torch.cat([hidden, torch.randn(400, 3, generator=g)], dim=1) for _ in range(2)]
    u, v = canonical(*views)
    cross = torch.corrcoef(torch.cat([u, v], dim=1).T)[:4, 4:]
    assert cross[0, 0] > 0.99
    assert (cross - cross.diag().diag()).abs().max() < 0.05
    assert u[:, 0].std() > 10 * u[:, 1:].std()  # what both show counts most


@pytest.mark.parametrize("rule", RULES)
def test_one_seed_one_result_whatever_the_global_generator(paired, rule):
    image, text = blobs(paired[0], 8, 0, noise=0.5), blobs(paired[1], 6, 1, noise=0.5)
    torch.manual_seed(1)
    first = clusters(image, text, rule, 5, seed=3)
    torch.manual_seed(2)
    assert torch.equal(clusters(image, text, rule, 5, seed=3), first)
    assert len(first.unique()) == 5


@pytest.mark.parametrize("rule", RULES)
def test_a_feature_that_is_no_number_is_told(paired, rule):
    image, text = blobs(paired[0], 8, 0), blobs(paired[1], 6, 1)
    image[7, 2] = text[7, 3] = float("nan")
    with pytest.raises(DataError, match="item 7 of 60 has a feature that is not finite"):
        clusters(image, text, rule, 3, seed=0)


def test_the_plane_is_that_of_largest_spread():
    """Points on a line through 3-space, 1 apart: its first axis has their distances, its second nothing."""
    x = torch.arange(5.0)[:, None] * torch.tensor([[0.0, 0.6, 0.8]])
    assert torch.allclose(plane(x), torch.stack([torch.arange(5.0) - 2, torch.zeros(5)], dim=1), atol=1e-5)
    assert plane(x[:, 2:]).shape == (5, 2)
