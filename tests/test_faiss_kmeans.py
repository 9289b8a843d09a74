"""k-means by FAISS: hand values, two independent oracles, what it makes of hard data, and where FAISS searches."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import c4buffer.faiss_kmeans
from c4buffer.faiss_kmeans import faiss_kmeans
from c4buffer.kmeans import kmeans, nearest_centres

few_examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def blobs(
    rows: int = 300, *, dimensions: int = 4, clusters: int = 3, seed: int = 0, apart: float = 12.0
) -> tuple[Tensor, Tensor]:
    """Round blobs of unit spread [N, E], float64, centred on corners of a grid, and their labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (rows,), generator=generator)
    labels[:clusters] = torch.arange(clusters)
    corners = apart * torch.stack([labels // 3**axis % 3 for axis in range(dimensions)], dim=1)
    return corners + torch.randn(rows, dimensions, generator=generator, dtype=torch.float64), labels


def clustered(X: Tensor, n_clusters: int, *, seed: int = 0, iterations: int = 20) -> Tensor:
    """Labels, checked for what is always promised."""
    labels, clusters = faiss_kmeans(X, n_clusters, seed=seed, iterations=iterations)
    assert labels.dtype == torch.int64
    assert labels.device == X.device
    assert labels.shape == (len(X),)
    assert labels.unique().tolist() == list(range(clusters))
    return labels


def assert_same_partition(found: Tensor, expected: Tensor) -> None:
    assert adjusted_rand_score(expected.cpu(), found.cpu()) == 1


def inertia(X: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the means of the clusters."""
    return sum(float((X[labels == z] - X[labels == z].mean(dim=0)).square().sum()) for z in labels.unique())


# What it finds


@pytest.mark.parametrize("seed", range(5))
def test_two_pairs_of_points_are_two_clusters(seed: int) -> None:
    labels = clustered(torch.tensor([[0.0], [10.0], [1.0], [11.0]]), 2, seed=seed)
    assert labels.tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])


@few_examples
@given(
    seed=st.integers(0, 2**32),
    dimensions=st.integers(2, 6),
    clusters=st.integers(1, 5),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_blobs_that_are_far_apart_are_found_as_by_kmeans_in_torch(
    seed: int, dimensions: int, clusters: int, dtype: torch.dtype
) -> None:
    X, truth = blobs(200, dimensions=dimensions, clusters=clusters, seed=seed, apart=600)
    assert_same_partition(clustered(X.to(dtype), clusters, seed=seed), truth)
    centres = kmeans(X, clusters, generator=torch.Generator().manual_seed(seed))
    assert_same_partition(nearest_centres(X, centres), truth)


def test_overlapping_blobs_end_where_every_row_is_nearest_to_its_own_mean() -> None:
    X, _ = blobs(2000, apart=2)
    labels = clustered(X, 3, iterations=500)
    means = torch.stack([X[labels == z].mean(dim=0) for z in range(3)])
    assert torch.equal(torch.cdist(X, means).argmin(dim=1), labels)


def test_lloyd_steps_are_those_of_scikit_learn_from_the_same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    X, _ = blobs(2000, clusters=5, apart=2)
    start = X[:5]
    monkeypatch.setattr(c4buffer.faiss_kmeans, "_draw_centres", lambda rows, *_: rows[:5])
    oracle = KMeans(5, init=start.numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(X.numpy())
    assert clustered(X, 5, iterations=300).tolist() == oracle.labels_.tolist()


def test_its_own_start_ends_as_well_as_the_best_of_scikit_learn() -> None:
    X, _ = blobs(2000, clusters=5, apart=6)
    oracle = KMeans(5, n_init=10, random_state=0).fit(X.numpy())
    best = min(inertia(X, clustered(X, 5, seed=seed)) for seed in range(10))
    assert best == pytest.approx(oracle.inertia_, rel=1e-6)


def test_more_steps_never_fit_worse() -> None:
    X, _ = blobs(1000, clusters=5, apart=1)
    fits = [inertia(X, clustered(X, 5, iterations=steps)) for steps in (1, 2, 4, 8, 16, 200)]
    assert fits == sorted(fits, reverse=True)
    assert fits[0] > fits[-1]


def test_it_takes_no_more_steps_than_asked_and_stops_when_no_label_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    search = c4buffer.faiss_kmeans._search_on_host(faiss)

    def counting(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        searched.append(len(rows))
        return search(rows, centres)

    monkeypatch.setattr(c4buffer.faiss_kmeans, "_search_on_host", lambda _: counting)
    X, _ = blobs(1000, clusters=5, apart=1)
    clustered(X, 5, iterations=3)
    assert len(searched) == 3 + 1  # and once for the labels
    searched.clear()
    clustered(blobs(apart=60)[0], 3, iterations=1000)
    assert len(searched) < 10


# Where the data lie


@few_examples
@given(
    shift=st.floats(-1e6, 1e6),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 100),
)
def test_it_does_not_depend_on_where_the_data_lie_or_what_they_are_measured_in(
    shift: float, exponent: int, seed: int
) -> None:
    X, _ = blobs(120, clusters=4, seed=seed)
    assert_same_partition(clustered((X + shift) * 10.0**exponent, 4, seed=seed), clustered(X, 4, seed=seed))


def test_float64_far_from_zero_keeps_its_digits() -> None:
    X, truth = blobs(apart=60)
    far = X + 1e12
    assert len(far.float().unique(dim=0)) == 1  # to FAISS as they are, all rows are the same
    assert_same_partition(clustered(far, 3), truth)


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_float32_whose_squares_are_out_of_range_is_no_trouble(scale: float) -> None:
    X, truth = blobs(apart=60)
    assert_same_partition(clustered((scale * X).float(), 3), truth)


def test_rows_may_lie_in_memory_as_they_like_and_are_not_written_to() -> None:
    X, truth = blobs(apart=60)
    before = X.clone()
    columns_first = X.T.contiguous().T
    assert torch.equal(clustered(columns_first, 3), clustered(X, 3))
    assert torch.equal(clustered(X.repeat_interleave(2, dim=0)[::2], 3), clustered(X, 3))
    assert torch.equal(X, before)
    assert_same_partition(clustered(X.requires_grad_(), 3), truth)


# Few rows, empty clusters


@pytest.mark.parametrize("n_clusters", [1, 2, 7])
def test_one_distinct_row_is_one_cluster(n_clusters: int) -> None:
    assert clustered(torch.full((50, 3), 0.1), n_clusters).tolist() == [0] * 50
    assert clustered(torch.full((1, 3), 0.1), n_clusters).tolist() == [0]


@few_examples
@given(
    rows=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=40),
    n_clusters=st.integers(1, 50),
    seed=st.integers(0, 100),
)
@example(rows=[(0, 0)] * 39 + [(1, 0)], n_clusters=2, seed=0)
def test_as_many_clusters_as_asked_or_as_there_are_distinct_rows(
    rows: list[tuple[int, int]], n_clusters: int, seed: int
) -> None:
    X = torch.tensor(rows, dtype=torch.float64)
    _, distinct = X.unique(dim=0, return_inverse=True)
    labels, clusters = faiss_kmeans(X, n_clusters, seed=seed, iterations=20)
    assert clusters == min(n_clusters, int(distinct.max()) + 1)
    assert labels.unique().tolist() == list(range(clusters))
    if n_clusters > int(distinct.max()):
        assert_same_partition(labels, distinct)
    assert clusters == len(kmeans(X, n_clusters, generator=torch.Generator().manual_seed(seed)))


def test_an_empty_cluster_takes_the_row_that_is_farthest_from_its_centre() -> None:
    distances = torch.tensor([1.0, 4.0, 9.0, 2.0])
    fill = c4buffer.faiss_kmeans._without_gaps
    assert fill(torch.tensor([0, 0, 1, 0]), distances, 2).tolist() == [0, 0, 1, 0]
    # row 2 is farther than row 1, but would leave cluster 1 empty
    assert fill(torch.tensor([0, 0, 1, 0]), distances, 3).tolist() == [0, 2, 1, 0]
    assert fill(torch.tensor([0, 0, 1, 0]), distances, 4).tolist() == [0, 2, 1, 3]
    assert fill(torch.tensor([1, 1, 1, 1]), torch.zeros(4), 2).unique().tolist() == [0, 1]


def test_centres_that_attract_no_row_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c4buffer.faiss_kmeans, "_draw_centres", lambda *_: torch.tensor([[0.0], [90.0]]))
    labels = clustered(torch.tensor([[0.0], [10.0], [0.0], [10.0]]), 2)
    assert labels.tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])


# Many rows


def test_many_rows_are_clustered_by_a_sample_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    X, truth = blobs(5000, apart=60)
    monkeypatch.setattr(c4buffer.faiss_kmeans, "TRAINING_ROWS", 60)
    monkeypatch.setattr(c4buffer.faiss_kmeans, "TRAINING_ROWS_PER_CLUSTER", 1)
    trained: list[int] = []
    draw = c4buffer.faiss_kmeans._draw_centres

    def counting(rows: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
        trained.append(len(rows))
        return draw(rows, n_clusters, generator)

    monkeypatch.setattr(c4buffer.faiss_kmeans, "_draw_centres", counting)
    assert_same_partition(clustered(X, 3), truth)
    assert trained == [60]
    monkeypatch.setattr(c4buffer.faiss_kmeans, "TRAINING_ROWS_PER_CLUSTER", 100)
    assert_same_partition(clustered(X, 3), truth)
    assert trained == [60, 300]


def test_distinct_rows_that_the_sample_missed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c4buffer.faiss_kmeans, "TRAINING_ROWS", 8)
    monkeypatch.setattr(c4buffer.faiss_kmeans, "TRAINING_ROWS_PER_CLUSTER", 1)
    X = torch.zeros(1000, 2)
    X[500], X[700] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])
    labels = clustered(X, 3)
    assert labels.bincount().sort().values.tolist() == [1, 1, 998]


def test_a_row_far_beyond_the_sample_is_labelled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c4buffer.faiss_kmeans, "TRAINING_ROWS", 60)
    monkeypatch.setattr(c4buffer.faiss_kmeans, "TRAINING_ROWS_PER_CLUSTER", 1)
    X, truth = blobs(5000, apart=60)
    X[1234] = 1e200
    others = torch.arange(5000) != 1234
    assert_same_partition(clustered(X, 3)[others], truth[others])


def test_labels_do_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    X, _ = blobs(3000, clusters=5, apart=6)
    expected = clustered(X, 5)
    monkeypatch.setattr(c4buffer.faiss_kmeans, "CHUNK_FLOATS", 1)  # 256 rows at once
    assert_same_partition(clustered(X, 5), expected)


def test_the_sample_is_one_row_of_each_equal_stretch_and_every_row_is_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([c4buffer.faiss_kmeans._spread(10, 4, generator) for _ in range(20_000)])
    stretch = 2.5 * torch.arange(4)
    assert bool((draws >= stretch.floor()).all())
    assert bool((draws <= stretch + 2.5).all())
    share = draws.flatten().bincount(minlength=10) / draws.numel()
    np.testing.assert_allclose(share, 0.1, atol=5 * (0.1 * 0.9 / draws.numel()) ** 0.5)


# Randomness, noise, threads


def test_the_seed_decides_and_global_generators_are_left_alone() -> None:
    X, _ = blobs(400, apart=0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(clustered(X, 6, seed=1, iterations=2), clustered(X, 6, seed=1, iterations=2))
    assert not torch.equal(clustered(X, 6, seed=1, iterations=2), clustered(X, 6, seed=2, iterations=2))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_few_rows_per_cluster_are_no_reason_to_print(capfd: pytest.CaptureFixture[str]) -> None:
    clustered(blobs(30)[0], 20)
    assert capfd.readouterr() == ("", "")


def test_threads_stay_as_they_were() -> None:
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    clustered(blobs()[0], 3)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


@pytest.mark.parametrize("first", ["faiss", "torch"])
def test_faiss_and_torch_share_a_process_and_faiss_is_not_patched(first: str) -> None:
    code = (
        f"import {first}, sys, torch\nfrom c4buffer.faiss_kmeans import faiss_kmeans\n"
        "torch.set_num_threads(2)\nX = torch.randn(3000, 8)\n(X @ X.T).exp().sum()\n"
        "labels, clusters = faiss_kmeans(X, 3, seed=0, iterations=3)\n(X @ X.T).exp().sum()\n"
        "print(clusters, 'faiss.contrib.torch_utils' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.split() == ["3", "False"]
    assert run.stderr == ""


# Where FAISS searches


def test_without_faiss_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = 'needs FAISS: pip install "c4buffer[faiss]", or "c4buffer[gpu]" for CUDA'
    with pytest.raises(ImportError, match=re.escape(message)):
        faiss_kmeans(torch.zeros(4, 2), 2, seed=0, iterations=1)


@pytest.mark.parametrize(
    ("is_cuda", "gpus", "expected"), [(True, 1, True), (True, 0, False), (False, 1, False), (False, 0, False)]
)
def test_a_gpu_serves_data_that_are_on_one_when_faiss_has_been_built_for_it(
    is_cuda: bool, gpus: int, expected: bool
) -> None:
    library, X = SimpleNamespace(get_num_gpus=lambda: gpus), SimpleNamespace(is_cuda=is_cuda)
    assert c4buffer.faiss_kmeans._gpu_serves(library, X) is expected


class GpuFaiss:
    """FAISS as it is built for GPUs, whose GPU is the host: its brute-force search follows the same pointers."""

    METRIC_L2 = faiss.METRIC_L2
    cast_integer_to_float_ptr = staticmethod(faiss.cast_integer_to_float_ptr)
    cast_integer_to_idx_t_ptr = staticmethod(faiss.cast_integer_to_idx_t_ptr)

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def StandardGpuResources(self) -> Any:  # noqa: N802
        def record(name: str) -> Any:
            return lambda *arguments: self.calls.append((name, arguments))

        return SimpleNamespace(
            **{name: record(name) for name in ("setTempMemory", "setPinnedMemory", "setDefaultStream")}
        )

    def GpuDistanceParams(self) -> Any:  # noqa: N802
        return SimpleNamespace()

    def cast_integer_to_cudastream_t(self, stream: int) -> str:
        return f"stream {stream}"

    def bfKnn(self, resources: Any, search: Any) -> None:  # noqa: N802
        self.calls.append(("bfKnn", (search.numQueries, search.numVectors, search.dims, search.device)))
        arguments = (search.dims, search.numQueries, search.numVectors, search.k)
        faiss.knn_L2sqr(search.queries, search.vectors, *arguments, search.outDistances, search.outIndices)


def test_the_gpu_search_hands_over_pointers_on_torchs_stream_and_finds_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    X, _ = blobs(1000, clusters=5, apart=6)
    expected = clustered(X, 5)
    library = GpuFaiss()
    monkeypatch.setattr(c4buffer.faiss_kmeans, "_import_faiss", lambda: library)
    monkeypatch.setattr(c4buffer.faiss_kmeans, "_gpu_serves", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    assert torch.equal(clustered(X, 5), expected)
    assert library.calls[:2] == [
        ("setTempMemory", (c4buffer.faiss_kmeans.SCRATCH_BYTES,)),
        ("setPinnedMemory", (0,)),
    ]
    assert library.calls[2::2] == [("setDefaultStream", (None, "stream 7"))] * len(library.calls[2::2])
    assert library.calls[3::2] == [("bfKnn", (1000, 5, 4, None))] * len(library.calls[2::2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_labels_are_those_of_the_host() -> None:
    X, truth = blobs(100_000, clusters=5, apart=20)
    for dtype in (torch.float32, torch.float64):
        labels = clustered(X.to(dtype).cuda(), 5)
        assert_same_partition(labels, truth)
        assert torch.equal(clustered(X.to(dtype).cuda(), 5), labels)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert_same_partition(clustered(X.cuda(), 5), truth)
