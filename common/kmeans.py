"""Balanced k-means: clusters of equal size, for as many points as fit into memory.

Lloyd's two steps, with sizes that differ by at most one:
    assignment   min over assignments a of balanced sizes of sum_i |x_i - m_a(i)|^2: a transportation problem
    update       m_k = mean of the points of cluster k

The assignment is solved exactly, without ever holding all distances. With a price p_k for each cluster, point i goes to
the cluster of least |x_i - m_k|^2 + p_k; by linear programming duality this is the best of all assignments *that have its
sizes*. Prices found on every fourth point, by the same function, come close to equal sizes. What is left moves along
shortest paths between clusters, one point an edge: successive shortest paths (Ahuja, Magnanti and Orlin, "Network Flows",
1993, section 9.7) on a graph whose nodes are the clusters, not the points.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16384  # points whose distances are held at once
COARSEST = 2048  # so few points are assigned without prices from fewer
ITERATIONS = 30  # of Lloyd's steps at most
LISTED = 64  # points kept in order for each pair of clusters


@contextlib.contextmanager
def full_precision():
    """Distances without TF32, whose three digits would not tell clusters apart."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def kmeans(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Plain k-means (Lloyd's): features [N, D] -> cluster of each point, int64 [N]; sizes are whatever they become."""
    return lloyd(features, num_clusters, seed, lambda points, centroids, prices: (nearest(points, centroids), prices))


def balanced_kmeans(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """features [N, D] (any float type, on any device) -> cluster of each point, int64 [N]; sizes differ by at most one.

    The same seed gives the same clusters on the same machine. Raises ValueError unless 1 <= num_clusters <= N.
    """
    return lloyd(features, num_clusters, seed, priced_assignment)


def check_finite(features: Tensor) -> None:
    finite = sum(int(torch.isfinite(points).all(dim=1).sum()) for points in features.split(BLOCK))
    if finite < len(features):
        raise ValueError(f"{len(features) - finite} of {len(features)} points have features that are not finite")


@torch.no_grad()
@full_precision()
def lloyd(features: Tensor, num_clusters: int, seed: int, assign) -> Tensor:
    """Alternate `assign` with means until they settle, on few points first; then go on twice on four times as many, up to all.

    `assign`(points, centroids, prices) -> (clusters, prices), the latter to start from the next time.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"{len(features)} points cannot be put into {num_clusters} clusters")
    check_finite(features)
    generator = torch.Generator().manual_seed(seed)
    centroids = spread_centroids(features, num_clusters, generator)
    prices = centroids.new_zeros(num_clusters)
    strides = [stride for stride in (256, 64, 16, 4, 1) if stride == 1 or len(features) // stride >= max(COARSEST, 128 * num_clusters)]
    for stride in strides:
        points = features[::stride]
        before = float("inf")
        for _ in range(ITERATIONS if stride == strides[0] else 2):
            assignment, prices = assign(points, centroids, prices)
            centroids = means(points, assignment, centroids)
            now = sum_of_squares(points, assignment, centroids)
            if before - now <= 1e-4 * now:
                break
            before = now
    return assignment


def spread_centroids(features: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each centroid a point, drawn with probability ~ distance^2 to the others."""
    sample = features[torch.randperm(len(features), generator=generator)[: max(64 * num_clusters, COARSEST)].to(features.device)]
    sample = sample.to(working_dtype(features))
    chosen = [sample[torch.randint(len(sample), (), generator=generator)]]
    distance = (sample - chosen[0]).square().sum(dim=1)
    while len(chosen) < num_clusters:
        weights = distance.cpu().double()
        if not weights.sum() > 0:  # fewer different points than clusters
            weights = torch.ones_like(weights)
        chosen.append(sample[torch.multinomial(weights, 1, generator=generator).item()])
        distance = torch.minimum(distance, (sample - chosen[-1]).square().sum(dim=1))
    return torch.stack(chosen)


def working_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def costs(points: Tensor, centroids: Tensor) -> Tensor:
    """|x - m|^2 but for a term that is the same for all clusters: points [n, D], centroids [K, D] -> [n, K]."""
    middle = centroids.mean(dim=0)  # far from the origin, the product's rounding would hide distances
    centred = centroids - middle
    return torch.addmm(centred.square().sum(dim=1), points.to(centroids.dtype) - middle, centred.T, alpha=-2)


def means(features: Tensor, assignment: Tensor, centroids: Tensor) -> Tensor:
    """Mean of each cluster's points, [K, D]; the old centroid where a cluster is empty."""
    sums = torch.zeros_like(centroids)
    for points, clusters in zip(features.split(BLOCK), assignment.split(BLOCK)):
        members = F.one_hot(clusters, len(centroids)).to(sums.dtype)  # a product: index_add on GPUs adds in any order
        sums.addmm_(members.T, points.to(sums.dtype))
    sizes = torch.bincount(assignment, minlength=len(centroids)).unsqueeze(1)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)


def sum_of_squares(features: Tensor, assignment: Tensor, centroids: Tensor) -> float:
    """The objective: sum over points of the squared distance to their cluster's centroid."""
    blocks = zip(features.split(BLOCK), assignment.split(BLOCK))
    return sum(float((points.to(centroids.dtype) - centroids[clusters]).square().sum(dtype=torch.float64)) for points, clusters in blocks)


def nearest(features: Tensor, centroids: Tensor, prices: Tensor | float = 0.0) -> Tensor:
    """The cluster of least squared distance + price of each point, int64 [N]."""
    return torch.cat([(costs(points, centroids) + prices).argmin(dim=1) for points in features.split(BLOCK)])


@torch.no_grad()
@full_precision()
def balanced_assignment(features: Tensor, centroids: Tensor) -> Tensor:
    """The balanced assignment with the least sum of squared distances: features [N, D], centroids [K, D] -> int64 [N].

    An exact minimum over all assignments whose sizes are floor(N / K) or ceil(N / K), up to rounding. Raises ValueError for
    features that are not finite.
    """
    check_finite(features)
    return priced_assignment(features, centroids, centroids.new_zeros(len(centroids)))[0]


def priced_assignment(features: Tensor, centroids: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """`balanced_assignment`, and prices [K] at which every point prefers its cluster; `prices`: a first guess."""
    assignment = nearest(features, centroids, prices)
    excess = torch.bincount(assignment, minlength=len(centroids)) - len(features) / len(centroids)
    # Prices of a quarter of the points are wrong by about as much as chance makes its sizes differ.
    if len(features) > COARSEST and float(excess.abs().sum()) > (len(features) * len(centroids)) ** 0.5:
        prices = priced_assignment(features[::4], centroids, prices)[1]
        assignment = nearest(features, centroids, prices)
    moves = Moves(features, centroids, assignment, prices)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of operations too small to share
    try:
        while moves.improve():
            pass
    finally:
        torch.set_num_threads(threads)
    return torch.from_numpy(moves.assignment).to(features.device), torch.from_numpy(moves.prices).to(centroids)


class Moves:
    """The residual graph: nodes are clusters, an edge a -> b is the point of a that would move to b at the least cost.

    For each edge the LISTED cheapest points are known, exactly up to the cost `known_to`; a row of the graph is computed anew
    from all points of its cluster when its list runs out.
    """

    def __init__(self, features: Tensor, centroids: Tensor, assignment: Tensor, prices: Tensor):
        self.features, self.centroids = features, centroids
        self.assignment = assignment.cpu().numpy()
        self.prices = prices.cpu().double().numpy()
        clusters = len(centroids)
        self.sizes = np.bincount(self.assignment, minlength=clusters)
        self.least, rest = divmod(len(features), clusters)
        self.most = self.least + (rest > 0)
        listed = max(4, min(LISTED, 2**23 // clusters**2))
        self.cost = np.full((clusters, clusters, listed), np.inf)  # [a, b, :]: of moving a listed point from a to b
        self.point = np.zeros((clusters, clusters, listed), np.int64)
        self.known_to = np.full((clusters, clusters), np.inf)
        self.edge = np.full((clusters, clusters), np.inf)  # the least of each list
        # One point's cost differs by so much between a block and a row by itself, from the order of additions.
        self.rounding = 256 * torch.finfo(centroids.dtype).eps * float((centroids - centroids.mean(dim=0)).square().sum(dim=1).max())
        if self.unbalanced() or rest:
            for cluster in range(clusters):
                self.list_row(cluster)

    def unbalanced(self) -> bool:
        return bool(self.sizes.max() > self.most or self.sizes.min() < self.least)

    def improve(self) -> bool:
        """Move points along the path that brings sizes closer to balance, or lowers the cost at balance; False at the optimum."""
        balanced = not self.unbalanced()
        if balanced and self.most == self.least:
            return False
        if self.sizes.max() > self.most:
            sources, targets = self.sizes > self.most, self.sizes < self.most
        elif not balanced:
            sources, targets = self.sizes > self.least, self.sizes < self.least
        else:
            sources, targets = self.sizes == self.most, self.sizes == self.least
        # Reduced costs are not negative; rounding may say otherwise.
        reduced = np.maximum(self.edge + self.prices - self.prices[:, None], 0)
        label, before = shortest_paths(reduced, np.where(sources, self.prices, np.inf))
        length = np.where(targets, label - self.prices, np.inf)
        self.prices = self.prices - label
        node = int(length.argmin())
        if balanced and length[node] >= -self.rounding:
            return False
        path = [node]
        while before[path[-1]] >= 0:
            path.append(int(before[path[-1]]))
        self.move(path[:0:-1], path[-2::-1])
        return True

    def move(self, origins: list[int], targets: list[int]) -> None:
        """The cheapest point of each edge changes sides."""
        points = self.point[origins, targets, self.cost[origins, targets].argmin(axis=1)]
        prices = costs(self.features[torch.from_numpy(points).to(self.features.device)], self.centroids).cpu().double().numpy()
        self.assignment[points] = targets
        self.sizes[origins[0]] -= 1
        self.sizes[targets[-1]] += 1
        every = np.arange(len(self.sizes))
        for a, b, point, price in zip(origins, targets, points, prices):
            self.cost[a][self.point[a] == point] = np.inf
            # Into the lists of b, in the place of their costliest points.
            price = price - price[b]
            price[b] = np.inf
            slot = self.cost[b].argmax(axis=1)
            replaced = self.cost[b, every, slot]
            enter = price < replaced
            self.known_to[b] = np.minimum(self.known_to[b], np.maximum(price, replaced))
            self.cost[b, every[enter], slot[enter]] = price[enter]
            self.point[b, every[enter], slot[enter]] = point
        for cluster in {*origins, *targets}:
            self.edge[cluster] = self.cost[cluster].min(axis=1)
            if (self.edge[cluster] > self.known_to[cluster]).any():
                self.list_row(cluster)

    def list_row(self, cluster: int) -> None:
        """The lists of one cluster from all its points."""
        members = np.flatnonzero(self.assignment == cluster)
        self.cost[cluster], self.known_to[cluster] = np.inf, np.inf
        count = min(self.cost.shape[2], len(members))
        if count:
            index = torch.from_numpy(members).to(self.features.device)
            values, points = self.centroids.new_empty(len(self.sizes), 0), index.new_empty(len(self.sizes), 0)
            for part in index.split(BLOCK):
                price = costs(self.features[part], self.centroids)
                values = torch.cat([values, (price - price[:, cluster : cluster + 1]).T], dim=1)
                points = torch.cat([points, part.expand(len(self.sizes), -1)], dim=1)
                values, places = values.topk(min(count, values.shape[1]), dim=1, largest=False)
                points = points.gather(1, places)
            self.cost[cluster, :, :count], self.point[cluster, :, :count] = values.cpu().numpy(), points.cpu().numpy()
            if count < len(members):
                self.known_to[cluster] = self.cost[cluster, :, :count].max(axis=1)
        self.cost[cluster, cluster], self.known_to[cluster, cluster] = np.inf, np.inf
        self.edge[cluster] = self.cost[cluster].min(axis=1)


def shortest_paths(length: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bellman-Ford: lengths [K, K] >= 0 and labels to start from [K] -> labels and each node's predecessor (-1: none)."""
    label, before = start.copy(), np.full(len(start), -1)
    nodes, new = np.arange(len(start)), np.flatnonzero(np.isfinite(start))
    while len(new):
        through = label[new, None] + length[new]
        best = through.argmin(axis=0)
        reached = through[best, nodes]
        shorter = reached < label
        label[shorter], before[shorter] = reached[shorter], new[best[shorter]]
        new = np.flatnonzero(shorter)
    return label, before
