import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from hcsmoe_core import cut, linkage
from hcsmoe_core.clustering import LINKAGES, by_first_appearance, cuts


@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("experts", [2, 8, 60, 128, 512])
def test_partitions_are_scipys_and_scikit_learns(method, experts):
    points = np.random.default_rng(experts).normal(size=(experts, 5))
    tree = linkage(pdist(points), method)
    for groups in {1, 2, experts // 4, experts // 2, experts - 1, experts} - {0}:
        got = cut(tree, groups)
        assert got.max() + 1 == groups
        assert np.array_equal(
            got,
            by_first_appearance(hierarchy.fcluster(hierarchy.linkage(points, method), groups, "maxclust")),
        )
        other = AgglomerativeClustering(groups, linkage=method).fit_predict(points)
        assert adjusted_rand_score(got, other) == 1


def test_planted_families_are_found():
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(6), 4)
    points = rng.normal(size=(6, 20))[family] + 0.05 * rng.normal(size=(24, 20))
    shuffled = rng.permutation(24)
    for method in LINKAGES:
        assert adjusted_rand_score(cut(linkage(pdist(points[shuffled]), method), 6), family[shuffled]) == 1


def test_ties_still_give_the_number_asked_for():
    tree = linkage(np.ones(28), "average")
    for groups in range(1, 9):
        assert cut(tree, groups).max() + 1 == groups


def test_average_is_not_wards():
    """Points of the reference notes on which an unsquared Ward joins 10 with 13 and Ward's own criterion
    does not.
    """
    points = np.array([0, 0.01, 0.02, 0.03, 0.04, 1, 1.01, 1.02, 1.03, 1.04, 10, 13])[:, None]
    assert cut(linkage(pdist(points), "ward"), 3).tolist() == [0] * 10 + [1, 2]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
@settings(deadline=None)
def test_labels_are_numbered_by_first_appearance(labels):
    got = by_first_appearance(labels)
    seen = list(dict.fromkeys(labels))
    assert got.tolist() == [seen.index(label) for label in labels]


def test_one_expert_is_one_group():
    assert cut(linkage(np.empty(0)), 1).tolist() == [0]


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError,
        match='"linkage" argument must be one of "average", "complete", "single", "ward"; not \'avg\'',
    ):
        linkage(np.ones(3), "avg")
    with pytest.raises(ValueError, match='linkage "ward" needs Euclidean distances, but these are cosine'):
        linkage(np.ones(3), "ward", metric="cosine")
    for bad in (np.ones((3, 3)), np.ones(4)):
        with pytest.raises(ValueError, match="must be condensed"):
            linkage(bad)
    for bad in ([1, np.nan, 1], [1, -1, 1], [1, np.inf, 1]):
        with pytest.raises(ValueError, match="finite distances of at least 0"):
            linkage(bad)
    for groups in (0, 4, 1.5, True):
        with pytest.raises(ValueError, match='"groups" argument must be a whole number from 1 to 3'):
            cut(linkage(np.ones(3)), groups)


@pytest.mark.parametrize("method", LINKAGES)
def test_all_cuts_at_once_are_those_one_by_one(method):
    for points in (np.random.default_rng(1).normal(size=(60, 4)), np.zeros((9, 2))):
        tree = linkage(pdist(points), method)
        for groups, labels in enumerate(cuts(tree), 1):
            scipys = hierarchy.cut_tree(tree, groups)[:, 0]
            assert np.array_equal(labels, cut(tree, groups))
            assert np.array_equal(labels, by_first_appearance(scipys))
    assert cuts(linkage(np.empty(0))).tolist() == [[0]]
