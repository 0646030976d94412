"""common/kmeans.py against every balanced assignment there is, two solvers, k-means-constrained, and prices that prove an optimum."""

import itertools

import numpy as np
import pytest
import torch

from common import kmeans


def sizes_of(assignment, clusters):
    assert assignment.dtype == torch.int64 and assignment.ndim == 1
    return np.bincount(assignment.cpu().numpy(), minlength=clusters)


def is_balanced(assignment, clusters):
    sizes = sizes_of(assignment, clusters)
    return len(sizes) == clusters and sizes.max() - sizes.min() <= 1


def squared_distances(features, centroids):
    features, centroids = (part.detach().cpu().double().numpy() for part in (features, centroids))
    return ((features[:, None] - centroids) ** 2).sum(axis=2)


def objective(features, assignment, centroids):
    return squared_distances(features, centroids)[np.arange(len(features)), assignment.cpu().numpy()].sum()


def spread_within(features, assignment):
    """The sum of squared distances to the mean of each cluster."""
    features, assignment = features.double().numpy(), np.asarray(assignment)
    members = [features[assignment == cluster] for cluster in np.unique(assignment)]
    return sum(((points - points.mean(axis=0)) ** 2).sum() for points in members)


def same_partition(assignment, groups):
    """Equal but for the names of the clusters."""
    pairs = set(zip(assignment.tolist(), groups.tolist()))
    return len(pairs) == len(set(assignment.tolist())) == len(set(groups.tolist()))


def least_of_all(distance):
    """The optimum by trying every balanced assignment."""
    points, clusters = distance.shape
    every = np.array(list(itertools.product(range(clusters), repeat=points)))
    sizes = (every[:, :, None] == np.arange(clusters)).sum(axis=1)
    every = every[sizes.max(axis=1) - sizes.min(axis=1) <= 1]
    return distance[np.arange(points), every].sum(axis=1).min()


def least_by_matching(distance):
    """The optimum by scipy: a column for each place in a cluster, and rows that take the places which stay free."""
    optimize = pytest.importorskip("scipy.optimize", reason="compares with scipy's solver")
    points, clusters = distance.shape
    least, rest = divmod(points, clusters)
    if not rest:
        places = np.repeat(distance, least, axis=1)
    else:
        free = np.concatenate([np.full((clusters - rest, clusters * least), np.inf), np.zeros((clusters - rest, clusters))], axis=1)
        places = np.concatenate([np.concatenate([np.repeat(distance, least, axis=1), distance], axis=1), free])
    return places[optimize.linear_sum_assignment(places)].sum()


def least_on_a_line(features, centroids):
    """The optimum for points on a line, where clusters are runs of the sorted points: dynamic programming over which are larger."""
    points, centers = np.sort(features.double().numpy()[:, 0]), np.sort(centroids.double().numpy()[:, 0])
    least, rest = divmod(len(points), len(centers))
    best = {0: 0.0}  # number of larger clusters so far -> cost
    for cluster, center in enumerate(centers):
        longer = {}
        for larger, cost in best.items():
            start = cluster * least + larger
            for more in (0, 1):
                if larger + more <= rest:
                    total = cost + ((points[start : start + least + more] - center) ** 2).sum()
                    longer[larger + more] = min(longer.get(larger + more, np.inf), total)
        best = longer
    return best[rest]


def assert_optimal(features, centroids, optimum, far=1e-9):
    kept = features.clone(), centroids.clone()
    assignment = kmeans.balanced_assignment(features, centroids)
    assert torch.equal(features, kept[0]) and torch.equal(centroids, kept[1])
    assert assignment.shape == (len(features),) and is_balanced(assignment, len(centroids))
    assert objective(features, assignment, centroids) == pytest.approx(optimum, rel=far, abs=1e-9)
    return assignment


def draw(seed, points, clusters, channels=2, dtype=torch.float64):
    """Points and centroids far from balance: centroids near the middle of the points and away from it."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(points, channels, generator=generator, dtype=dtype)
    scale = 0.3 + 2 * torch.rand(clusters, 1, generator=generator, dtype=dtype)
    return features, torch.randn(clusters, channels, generator=generator, dtype=dtype) * scale + 0.5


def draw_groups(seed, sizes, channels=3, dtype=torch.float32):
    """Groups 20 apart and about 1 wide, in random order, and the group of each point."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=generator)]
    corners = torch.tensor(list(itertools.product((0.0, 20.0), repeat=channels)))[torch.randperm(2**channels, generator=generator)]
    return (corners[groups] + 0.3 * torch.randn(len(groups), channels, generator=generator)).to(dtype), groups


def record(monkeypatch, name, noted):
    """The list of noted(*arguments) of every call of kmeans.<name> from now on; `name` may be Class.method."""
    holder, notes = kmeans, []
    for part in name.split(".")[:-1]:
        holder = getattr(holder, part)
    function = getattr(holder, name.split(".")[-1])
    monkeypatch.setattr(holder, name.split(".")[-1], lambda *arguments: notes.append(noted(*arguments)) or function(*arguments))
    return notes


@pytest.mark.parametrize("points, clusters", [(1, 1), (5, 1), (6, 2), (7, 2), (5, 5), (6, 3), (7, 3), (8, 3), (6, 4), (7, 4), (6, 5)])
def test_no_balanced_assignment_is_better(points, clusters):
    for seed in range(6):
        features, centroids = draw(seed, points, clusters)
        if seed % 3 == 2:  # ties
            features, centroids = features.round(), centroids.round()
        assert_optimal(features, centroids, least_of_all(squared_distances(features, centroids)))


@pytest.mark.parametrize("points, clusters", [(2, 3), (3, 5)])
def test_fewer_points_than_clusters_get_a_cluster_each(points, clusters):
    for seed in range(4):
        features, centroids = draw(seed, points, clusters)
        assert_optimal(features, centroids, least_of_all(squared_distances(features, centroids)))


@pytest.mark.parametrize("points, clusters", [(40, 40), (57, 1), (90, 2), (91, 2), (120, 8), (125, 8), (127, 8), (211, 20)])
def test_the_objective_is_the_one_of_a_matching(points, clusters):
    for channels in (1, 2, 5):
        features, centroids = draw(points + channels, points, clusters, channels)
        assert_optimal(features, centroids, least_by_matching(squared_distances(features, centroids)))


@pytest.mark.parametrize("points, clusters", [(60, 6), (64, 6), (65, 6), (100, 9), (33, 32)])
def test_a_surplus_at_one_end_of_a_line_moves_to_the_other(points, clusters):
    generator = torch.Generator().manual_seed(points)
    centroids = torch.arange(clusters, dtype=torch.float64).unsqueeze(1)
    order = torch.arange(points) % clusters
    order[order == clusters - 1] = 0  # the last is left without points, the first has twice as many
    features = (order + 0.8 * torch.rand(points, generator=generator, dtype=torch.float64) - 0.4).unsqueeze(1)
    assignment = assert_optimal(features, centroids, least_on_a_line(features, centroids))
    arrived = assignment[assignment != order]
    assert set(arrived.tolist()) == set(range(1, clusters))  # each hands points on to the next


def test_points_and_centroids_that_occur_several_times():
    for seed in range(4):
        features, centroids = draw(seed, 15, 4)
        features = features[torch.randint(15, (53,), generator=torch.Generator().manual_seed(seed))]
        for among in (centroids, centroids[[0, 1, 1, 1, 2, 0]], centroids[[3, 3, 3]]):
            assert_optimal(features, among, least_by_matching(squared_distances(features, among)))
    features, centroids = torch.ones(61, 2, dtype=torch.float64), draw(4, 1, 5)[1]
    one_each = np.sort(squared_distances(features[:1], centroids)[0])
    assert_optimal(features, centroids, 12 * one_each.sum() + one_each[0])


def test_prices_from_every_fourth_point_do_not_change_the_optimum(monkeypatch):
    counts = record(monkeypatch, "priced_assignment", lambda points, *_: len(points))
    for points in (2600, 3003):
        features, centroids = draw(points, points, 13, channels=1)
        assert_optimal(features, centroids, least_on_a_line(features, centroids))
        assert counts == [points, (points + 3) // 4]
        counts.clear()
    monkeypatch.setattr(kmeans, "COARSEST", 20)
    for points, clusters in ((330, 5), (333, 7)):
        features, centroids = draw(points, points, clusters, channels=3)
        assert_optimal(features, centroids, least_by_matching(squared_distances(features, centroids)))
        assert len(counts) > 2
        counts.clear()
    features = features[features[:332, 0].argsort().view(4, 83).T.reshape(-1)]  # every fourth: all from one side
    assert_optimal(features, centroids, least_by_matching(squared_distances(features, centroids)))


@pytest.mark.parametrize("listed", [1, 4, 9])
def test_lists_that_run_out_are_made_anew(monkeypatch, listed):
    monkeypatch.setattr(kmeans, "LISTED", listed)
    rows = record(monkeypatch, "Moves.list_row", lambda moves, cluster: cluster)
    for points, clusters in ((200, 5), (203, 5), (150, 11)):
        features, centroids = draw(points, points, clusters, channels=3)
        centroids[1:] += 6  # every point is nearest to the first
        rows.clear()
        assert_optimal(features, centroids, least_by_matching(squared_distances(features, centroids)))
        assert len(rows) > 2 * clusters
    features, centroids = draw(5, 400, 7, channels=1)
    centroids[1:] += 6
    assert_optimal(features, centroids, least_on_a_line(features, centroids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_of_fewer_digits(dtype):
    for points, clusters in ((210, 7), (215, 7), (90, 30)):
        features, centroids = draw(points, points, clusters, channels=8)
        features, centroids = features.to(dtype), centroids.float()
        assert_optimal(features, centroids, least_by_matching(squared_distances(features, centroids)), far=1e-5)


@pytest.mark.parametrize("points, clusters, dtype", [(96, 12, "float64"), (300, 7, "float64"), (5005, 20, "float64"), (4999, 9, "float32")])
def test_prices_prove_the_optimum(points, clusters, dtype):
    """By duality: cost >= sum_i min_k(cost_ik + p_k) - sum_k p_k n_k for any sizes n. Equal where no point would rather go elsewhere.

    Where sizes may differ by one, no others have a lower bound if the larger clusters are those of the highest prices.
    """
    features, centroids = draw(points, points, clusters, 4, getattr(torch, dtype))
    assignment, prices = kmeans.priced_assignment(features, centroids, centroids.new_zeros(clusters))
    assert is_balanced(assignment, clusters) and prices.shape == (clusters,) and prices.dtype == features.dtype
    rounding, far = (1e-9, 1e-9) if dtype == "float64" else (1e-4, 1e-5)
    priced = squared_distances(features, centroids) + prices.double().numpy()
    assert (priced[np.arange(points), assignment] - priced.min(axis=1)).max() <= rounding
    larger = sizes_of(assignment, clusters) > points // clusters
    if larger.any():
        assert prices[torch.from_numpy(larger)].min() >= prices[torch.from_numpy(~larger)].max() - rounding
    assert not torch.equal(assignment, kmeans.nearest(features, centroids))  # there was something to pay for
    again = kmeans.priced_assignment(features, centroids, prices)[0]
    assert objective(features, again, centroids) == pytest.approx(objective(features, assignment, centroids), rel=far)


def test_a_wrong_guess_of_prices_does_no_harm():
    for points, clusters in ((120, 6), (125, 6)):
        features, centroids = draw(points, points, clusters)
        optimum = least_by_matching(squared_distances(features, centroids))
        for guess in (torch.linspace(-9, 9, clusters).double(), torch.eye(clusters).double()[1] * -1e4):
            kept = guess.clone()
            assignment = kmeans.priced_assignment(features, centroids, guess)[0]
            assert is_balanced(assignment, clusters) and torch.equal(guess, kept)
            assert objective(features, assignment, centroids) == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("points, clusters", [(31, 2), (121, 6), (123, 6), (65, 9)])
def test_which_clusters_are_larger_is_chosen_at_balance(points, clusters):
    """Prices of the first points are right for equal sizes; the last points then go wherever they like."""
    least, rest = divmod(points, clusters)
    for seed in range(6):
        features, centroids = draw(seed, points, clusters)
        optimum = least_by_matching(squared_distances(features, centroids))
        prices = kmeans.priced_assignment(features[rest:], centroids, centroids.new_zeros(clusters))[1]
        assignment = kmeans.priced_assignment(features, centroids, prices)[0]
        assert is_balanced(assignment, clusters)
        assert objective(features, assignment, centroids) == pytest.approx(optimum, rel=1e-9)


def test_never_worse_than_an_assignment_of_k_means_constrained():
    peer = pytest.importorskip("k_means_constrained", reason="compares with k-means-constrained")
    for points, clusters in ((120, 4), (205, 6), (150, 11)):
        features = draw(points, points, clusters, channels=4)[0]
        sizes = dict(size_min=points // clusters, size_max=-(-points // clusters))
        model = peer.KMeansConstrained(clusters, **sizes, n_init=1, max_iter=1, random_state=0).fit(features.numpy())
        centroids, theirs = torch.from_numpy(model.cluster_centers_), torch.from_numpy(model.predict(features.numpy())).long()
        assert is_balanced(theirs, clusters)
        ours = kmeans.balanced_assignment(features, centroids)
        assert objective(features, ours, centroids) <= (1 + 1e-6) * objective(features, theirs, centroids)


def test_clusters_as_good_as_those_of_k_means_constrained():
    peer = pytest.importorskip("k_means_constrained", reason="compares with k-means-constrained")
    for sizes in ((70,) * 5, (60, 66, 54, 61, 59, 64)):
        features = draw_groups(len(sizes), sizes)[0]
        points, clusters = len(features), len(sizes)
        limits = dict(size_min=points // clusters, size_max=-(-points // clusters))
        theirs = peer.KMeansConstrained(clusters, **limits, n_init=3, random_state=1).fit(features.double().numpy()).labels_
        ours = min(spread_within(features, kmeans.balanced_kmeans(features, clusters, seed)) for seed in range(3))
        assert ours <= 1.02 * spread_within(features, theirs)


@pytest.mark.parametrize("points, clusters", [(1, 1), (9, 1), (9, 2), (9, 9), (10, 9), (100, 7), (199, 64), (1000, 3), (2500, 8), (9001, 6)])
def test_sizes_differ_by_at_most_one(points, clusters):
    features = draw(points, points, 1, channels=3, dtype=torch.float32)[0].exp()
    assignment = kmeans.balanced_kmeans(features, clusters, seed=points)
    assert assignment.shape == (points,) and assignment.dtype == torch.int64 and is_balanced(assignment, clusters)


@pytest.mark.parametrize("cluster", [kmeans.balanced_kmeans, kmeans.kmeans])
def test_a_seed_decides_and_nothing_else_changes(cluster):
    features = draw(8, 900, 1, channels=4, dtype=torch.float32)[0]
    kept, torch_state, numpy_state = features.clone(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    runs = [cluster(features, 6, seed) for seed in (0, 0, 1, 2, 3)]
    torch.manual_seed(99)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], cluster(features, 6, 0))
    assert any(not same_partition(runs[0], other) for other in runs[2:])
    torch.random.set_rng_state(torch_state)
    cluster(features, 6, 4)
    assert torch.equal(torch.random.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(features, kept)


def test_equal_groups_are_found():
    for seed in range(8):
        features, groups = draw_groups(seed, (40,) * 7)
        assert same_partition(kmeans.balanced_kmeans(features, 7, seed), groups)
    features, groups = draw_groups(9, (2100,) * 4, dtype=torch.float64)  # so many that a fourth of them comes first
    assert same_partition(kmeans.balanced_kmeans(features, 4, 9), groups)


def test_half_precision_is_computed_in_single():
    for points in (300, 2100):
        features = draw(points, points, 1, channels=5)[0].half()
        assert torch.equal(kmeans.balanced_kmeans(features, 6, 2), kmeans.balanced_kmeans(features.float(), 6, 2))
        assert torch.equal(kmeans.kmeans(features, 6, 2), kmeans.kmeans(features.float(), 6, 2))


def test_features_that_are_not_contiguous():
    features, groups = draw_groups(3, (30,) * 6)
    between = torch.stack([features, -7 * features], dim=2)[:, :, 0]
    for view in (features.T.contiguous().T, between, features.repeat_interleave(2, dim=0)[::2]):
        assert not view.is_contiguous() and torch.equal(view, features)
        assert same_partition(kmeans.balanced_kmeans(view, 6, 3), groups)
        assert is_balanced(kmeans.balanced_assignment(view, features[:7]), 7)
    centroids = torch.stack([features[:7], features[:7]], dim=1)[:, 0]
    assert torch.equal(kmeans.balanced_assignment(features, centroids), kmeans.balanced_assignment(features, centroids.contiguous()))


@pytest.mark.parametrize("cluster", [kmeans.balanced_kmeans, kmeans.kmeans])
def test_what_cannot_be_clustered_is_refused(cluster):
    features = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for points, clusters in ((3, 4), (3, 0), (3, -1), (0, 1)):
        with pytest.raises(ValueError, match=rf"^{points} points.* {clusters} clusters"):
            cluster(features[:points], clusters, 0)
    for value in (float("nan"), float("inf"), -float("inf")):
        features[1, 1] = value
        with pytest.raises(ValueError, match="not finite"):
            cluster(features, 2, 0)


def test_plain_k_means_finds_groups_of_any_size_and_costs_less():
    for seed in range(5):
        features, groups = draw_groups(seed, (8, 30, 50, 112))
        plain, balanced = kmeans.kmeans(features, 4, seed), kmeans.balanced_kmeans(features, 4, seed)
        assert same_partition(plain, groups) and sorted(sizes_of(plain, 4)) == [8, 30, 50, 112]
        assert sorted(sizes_of(balanced, 4)) == [50] * 4
        assert spread_within(features, plain) < spread_within(features, balanced)


def test_plain_k_means_gives_each_point_to_the_nearest_of_the_last_centroids(monkeypatch):
    centroids = record(monkeypatch, "nearest", lambda points, centroids: centroids.clone())
    features = draw(6, 700, 1, channels=3)[0]
    assignment = kmeans.kmeans(features, 8, 6)
    assert np.array_equal(assignment, squared_distances(features, centroids[-1]).argmin(axis=1))
    for before, after in zip(centroids, centroids[1:]):
        members = squared_distances(features, before).argmin(axis=1)
        expected = np.stack([features.numpy()[members == cluster].mean(axis=0) for cluster in range(8)])
        np.testing.assert_allclose(after, expected, rtol=0, atol=1e-9)
    assert 3 < len(centroids) <= kmeans.ITERATIONS


def test_steps_on_few_points_come_first_and_no_step_costs_more():
    for points, strides in ((2000, (1,)), (9001, (4, 1)), (33000, (16, 4, 1))):
        features, seen = draw(points, points, 1, channels=2)[0], []

        def assign(part, centroids, prices):
            assignment = kmeans.nearest(part, centroids)
            seen.append((len(part), objective(part, assignment, centroids)))
            return assignment, prices

        assert len(kmeans.lloyd(features, 4, 1, assign)) == points
        counts = [count for count, _ in seen]
        assert list(dict.fromkeys(counts)) == [len(features[::stride]) for stride in strides]
        assert all(counts.count(count) <= 2 for count in set(counts[1:]) - {counts[0]})
        for (count, before), (next_count, after) in zip(seen, seen[1:]):
            assert count != next_count or after <= before * (1 + 1e-12)


@pytest.mark.parametrize("block", [7, 64, 16384])
def test_means_sums_and_nearest_equal_numpy(monkeypatch, block):
    monkeypatch.setattr(kmeans, "BLOCK", block)
    features, centroids = draw(11, 150, 6, channels=4)
    distance = squared_distances(features, centroids)
    assert np.array_equal(kmeans.nearest(features, centroids), distance.argmin(axis=1))
    prices = torch.linspace(-3, 3, 6, dtype=torch.float64)
    assert np.array_equal(kmeans.nearest(features, centroids, prices), (distance + prices.numpy()).argmin(axis=1))
    assignment = torch.randint(5, (150,), generator=torch.Generator().manual_seed(0))
    assignment[assignment == 2] = 4  # 2 and 5 are empty
    expected = centroids.numpy().copy()
    for cluster in (0, 1, 3, 4):
        expected[cluster] = features[assignment == cluster].numpy().mean(axis=0)
    total = objective(features, assignment, centroids)
    for dtype, far in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-2)):
        working = torch.promote_types(dtype, torch.float32)
        points, around = features.to(dtype), centroids.to(working)
        found = kmeans.means(points, assignment, around)
        assert found.dtype == working and torch.equal(found[[2, 5]], around[[2, 5]])
        np.testing.assert_allclose(found, expected, rtol=0, atol=far)
        assert kmeans.sum_of_squares(points, assignment, around) == pytest.approx(total, rel=far)


def test_distances_are_held_a_block_at_a_time(monkeypatch):
    features, centroids = draw(12, 2200, 6, channels=3)
    whole = kmeans.balanced_kmeans(features, 6, 1), kmeans.kmeans(features, 6, 1), kmeans.balanced_assignment(features, centroids)
    counts = record(monkeypatch, "costs", lambda points, centroids: len(points))
    monkeypatch.setattr(kmeans, "BLOCK", 100)
    blocks = kmeans.balanced_kmeans(features, 6, 1), kmeans.kmeans(features, 6, 1), kmeans.balanced_assignment(features, centroids)
    assert max(counts) == 100
    assert all(torch.equal(one, other) for one, other in zip(whole, blocks))


def test_distances_never_use_tf32_and_leave_its_setting(monkeypatch):
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    try:
        for allowed in (True, False):
            settings.allow_tf32 = allowed
            with monkeypatch.context() as patch:
                seen = record(patch, "costs", lambda *_: settings.allow_tf32)
                kmeans.balanced_kmeans(torch.arange(8.0).unsqueeze(1), 3, 0)
                kmeans.balanced_assignment(torch.arange(8.0).unsqueeze(1), torch.arange(3.0).unsqueeze(1))
            assert seen and not any(seen) and settings.allow_tf32 == allowed
            with pytest.raises(ValueError):
                kmeans.balanced_kmeans(torch.ones(1, 1), 2, 0)
            assert settings.allow_tf32 == allowed
    finally:
        settings.allow_tf32 = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_cuda_gives_balanced_clusters_and_the_same_ones_twice(dtype):
    features = draw(13, 20001, 1, channels=16, dtype=torch.float32)[0].to("cuda", dtype)
    assignment = kmeans.balanced_kmeans(features, 12, 3)
    assert assignment.device == features.device and is_balanced(assignment, 12)
    assert torch.equal(assignment, kmeans.balanced_kmeans(features, 12, 3))
    points, centroids = features[:1001], features[:7].to(kmeans.working_dtype(features))
    on_gpu, on_cpu = kmeans.balanced_assignment(points, centroids), kmeans.balanced_assignment(points.cpu(), centroids.cpu())
    assert on_gpu.device == features.device and is_balanced(on_gpu, 7)
    assert objective(points, on_gpu, centroids) == pytest.approx(objective(points, on_cpu, centroids), rel=1e-5)
    separated, groups = draw_groups(3, (40,) * 7)
    assert same_partition(kmeans.balanced_kmeans(separated.to("cuda", dtype), 7, 0).cpu(), groups)
