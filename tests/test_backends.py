"""Clusterers by FAISS and scikit-learn: what they are given, what they make of it, and what they refuse."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import HDBSCAN, AgglomerativeClustering, Birch, KMeans, MeanShift, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.pipeline import make_pipeline
from torch import Tensor

from c4buffer import ClusteredReplayBuffer, Critics, FaissClusterer, SklearnClusterer, Transitions
from c4buffer.faiss_kmeans import faiss_kmeans

few_examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def blobs(rows: int = 300, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Three blobs [N, 4] that standardising makes plain, and their labels [N]: the widest column tells nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    noise = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    centres = torch.tensor([[0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 8.0, 0.0], [0.0, 8.0, 8.0, 0.0]]).double()
    unit = torch.tensor([1.0, 1e-3, 1e-3, 1e3])
    return ((centres[labels] + noise) * unit).to(dtype), labels


def standardised(X: Tensor) -> np.ndarray:
    X = X.double()
    return ((X - X.mean(dim=0)) / X.std(dim=0, correction=0)).numpy()


def assert_same_partition(found: Tensor, expected: Tensor | np.ndarray) -> None:
    assert adjusted_rand_score(np.asarray(expected), found.argmax(dim=1)) == 1


def estimators() -> list[Any]:
    """One of each kind: soft, with `labels_` and `predict`, with `labels_` only, with `predict` only."""
    return [
        GaussianMixture(3, random_state=0),
        BayesianGaussianMixture(n_components=3, random_state=0),
        KMeans(3, random_state=0),
        MiniBatchKMeans(3, random_state=0),
        Birch(n_clusters=3),
        HDBSCAN(copy=True),
        AgglomerativeClustering(3),
        make_pipeline(PCA(3), KMeans(3, random_state=0)),
    ]


def name_of(value: Any) -> str:
    return type(getattr(value, "estimator", value)).__name__


# FAISS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_faiss_gives_each_row_to_one_cluster_of_the_standardised_embeddings(dtype: torch.dtype) -> None:
    X, truth = blobs(dtype=dtype)
    responsibilities = FaissClusterer(3)(X)
    assert responsibilities.dtype == dtype
    assert responsibilities.shape == (300, 3)
    assert responsibilities.sum(dim=0).tolist() == [100, 100, 100]
    assert responsibilities.max(dim=1).values.tolist() == [1] * 300
    assert_same_partition(responsibilities, truth)


def test_faiss_is_k_means_with_the_steps_and_the_seed_given() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 4, generator=generator) * torch.tensor([1.0, 1e3, 1e-3, 1.0])
    labels, _ = faiss_kmeans(torch.from_numpy(standardised(X)), 5, seed=3, iterations=2)
    assert FaissClusterer(5, iterations=2, seed=3)(X).argmax(dim=1).tolist() == labels.tolist()
    assert not torch.equal(FaissClusterer(5, iterations=2, seed=4)(X), FaissClusterer(5, iterations=2, seed=3)(X))
    assert not torch.equal(FaissClusterer(5, iterations=99, seed=3)(X), FaissClusterer(5, iterations=2, seed=3)(X))


def test_faiss_starts_anew_at_each_call() -> None:
    X, _ = blobs()
    clusterer = FaissClusterer(5)
    first = clusterer(X)
    clusterer(blobs(90, seed=1)[0], first)
    assert torch.equal(clusterer(X, first), first)


@few_examples
@given(
    shift=st.lists(st.floats(-100, 100), min_size=4, max_size=4),
    exponents=st.lists(st.integers(-8, 8), min_size=4, max_size=4),
)
def test_clusters_do_not_depend_on_where_columns_lie_or_what_they_are_measured_in(
    shift: list[float], exponents: list[int]
) -> None:
    X, truth = blobs(90)
    moved = (X / X.std(dim=0) + torch.tensor(shift).double()) * 10.0 ** torch.tensor(exponents).double()
    assert_same_partition(FaissClusterer(3)(moved), truth)
    assert_same_partition(SklearnClusterer(KMeans(3, random_state=0))(moved), truth)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e5, 1e20, 1e-30])
def test_a_constant_column_changes_nothing(value: float) -> None:
    X, truth = blobs(dtype=torch.float32)
    X[:, 3] = value
    assert_same_partition(FaissClusterer(3)(X), truth)
    assert_same_partition(SklearnClusterer(GaussianMixture(3, random_state=0))(X), truth)


def test_fewer_distinct_rows_than_clusters_lower_k_with_a_warning() -> None:
    X = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).repeat(20, 1)
    message = "n_clusters: 5 clusters for 2 distinct rows; there are 2."
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        responsibilities = FaissClusterer(5)(X)
    assert caught[0].filename == __file__
    assert responsibilities.shape == (40, 2)
    assert_same_partition(responsibilities, X[:, 0].numpy())
    with pytest.warns(UserWarning, match="3 clusters for 1 distinct rows"):
        assert FaissClusterer()(torch.full((4, 2), 0.1)).tolist() == [[1]] * 4


def test_one_cluster_holds_everything() -> None:
    X, _ = blobs(30)
    assert FaissClusterer(1)(X).tolist() == [[1]] * 30
    assert SklearnClusterer(KMeans(1))(X).tolist() == [[1]] * 30
    assert SklearnClusterer(GaussianMixture(1))(X).tolist() == [[1]] * 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters: expected an integer of at least 1, got 0"),
        ({"n_clusters": "auto"}, "n_clusters: expected an integer of at least 1, got 'auto'"),
        ({"iterations": 0}, "iterations: expected an integer of at least 1, got 0"),
        ({"iterations": 2.5}, "iterations: expected an integer of at least 1, got 2.5"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"seed": True}, "seed: expected an integer of at least 0, got True"),
    ],
)
def test_faiss_options_are_checked_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FaissClusterer(**options)


def test_without_faiss_it_can_be_made_but_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    clusterer = FaissClusterer(2)
    with pytest.raises(ImportError, match=re.escape('pip install "c4buffer[faiss]"')):
        clusterer(torch.zeros(4, 2))


# Both

MATRIX = "embeddings: expected a floating tensor [N, E] with at least one row and column"


@pytest.mark.parametrize("clusterer", [FaissClusterer(2), SklearnClusterer(KMeans(2))], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ([[0.0]], f"{MATRIX}, got list"),
        (torch.zeros(4), f"{MATRIX}, got torch.float32 [4]"),
        (torch.zeros(4, 2).long(), f"{MATRIX}, got torch.int64 [4, 2]"),
        (torch.zeros(0, 2), f"{MATRIX}, got torch.float32 [0, 2]"),
        (torch.zeros(4, 0), f"{MATRIX}, got torch.float32 [4, 0]"),
        (
            torch.tensor([[0.0], [1.0], [torch.inf]]),
            "embeddings: expected finite values, got inf in row 2 (1 of 3 rows are bad)",
        ),
        (
            torch.tensor([[0.0], [torch.nan], [torch.nan]]),
            "embeddings: expected finite values, got nan in row 1 (2 of 3 rows are bad)",
        ),
    ],
)
def test_embeddings_are_checked(clusterer: Any, embeddings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        clusterer(embeddings)


def test_embeddings_may_need_gradients_and_are_not_written_to() -> None:
    X, _ = blobs(dtype=torch.float32)
    for clusterer in (FaissClusterer(3), SklearnClusterer(KMeans(3, random_state=0, copy_x=False))):
        responsibilities = clusterer(X.clone().requires_grad_())
        assert not responsibilities.requires_grad
        assert torch.equal(clusterer(X), responsibilities)
        assert torch.equal(X, blobs(dtype=torch.float32)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_responsibilities_are_on_the_embeddings_device() -> None:
    X, truth = blobs(dtype=torch.float32)
    for clusterer in (FaissClusterer(3), SklearnClusterer(KMeans(3, random_state=0))):
        responsibilities = clusterer(X.cuda())
        assert responsibilities.is_cuda
        assert_same_partition(responsibilities.cpu(), truth)


# scikit-learn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", estimators(), ids=name_of)
def test_scikit_learn_finds_what_it_finds_by_itself_in_the_standardised_embeddings(
    estimator: Any, dtype: torch.dtype
) -> None:
    X, truth = blobs(dtype=dtype)
    clusterer = SklearnClusterer(estimator)
    assert clusterer.estimator_ is None
    responsibilities = clusterer(X)
    assert responsibilities.dtype == dtype
    torch.testing.assert_close(responsibilities.sum(dim=1), torch.ones(300, dtype=dtype))
    rows = standardised(X)
    if hasattr(estimator, "predict_proba"):
        expected = estimator.fit(rows).predict_proba(rows)
        np.testing.assert_allclose(responsibilities, expected, atol=1e-6)
    else:
        labels = estimator.fit_predict(rows)
        clustered = labels >= 0
        assert responsibilities[clustered].argmax(dim=1).tolist() == labels[clustered].tolist()
    assert adjusted_rand_score(truth, responsibilities.argmax(dim=1)) > 0.95
    assert type(clusterer.estimator_) is type(estimator)


@pytest.mark.parametrize("estimator", [KMeans(3, n_init=1), make_pipeline(PCA(3), GaussianMixture(3))])
def test_an_estimator_without_a_seed_leaves_the_global_generator_alone(estimator: Any) -> None:
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    first = SklearnClusterer(estimator)(blobs()[0])
    assert np.random.rand() == expected
    assert torch.equal(SklearnClusterer(estimator)(blobs()[0]), first)


def test_the_estimator_is_never_touched_and_each_call_fits_a_fresh_copy() -> None:
    estimator = KMeans(3, random_state=0)
    before = dict(vars(estimator))
    clusterer = SklearnClusterer(estimator)
    first = clusterer(blobs()[0])
    fitted = clusterer.estimator_
    assert vars(estimator) == before
    assert clusterer.estimator is estimator
    assert fitted.cluster_centers_.shape == (3, 4)
    clusterer(10 + blobs(90, seed=1)[0], first)
    assert clusterer.estimator_ is not fitted
    assert torch.equal(clusterer(blobs()[0], first), first)


def test_a_random_state_that_has_moved_on_is_left_where_it_is() -> None:
    state = np.random.RandomState(0)
    clusterer = SklearnClusterer(GaussianMixture(5, random_state=state, max_iter=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert torch.equal(clusterer(blobs()[0]), clusterer(blobs()[0]))
    assert state.rand() == np.random.RandomState(0).rand()


def test_embeddings_of_low_rank_are_no_trouble_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1000, 5, generator=generator) @ torch.randn(5, 40, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert SklearnClusterer(GaussianMixture(3, random_state=0))(X).dtype == torch.float32


class Stub:
    """Not of scikit-learn: keeps what it is given and answers what it has been told."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.seen: list[np.ndarray] = []

    def fit(self, X: np.ndarray) -> None:
        self.seen.append(X)
        if "labels_" in self.answers:
            self.labels_ = self.answers["labels_"]


class StubWithPredict(Stub):
    def predict(self, X: np.ndarray) -> Any:
        self.seen.append(X)
        return self.answers["predict"]


class StubWithProbabilities(StubWithPredict):
    def predict_proba(self, X: np.ndarray) -> Any:
        self.seen.append(X)
        return self.answers["predict_proba"]


def test_it_gets_standardised_float64_arrays_with_divisor_n() -> None:
    X = torch.tensor([[1.0, 3.7], [3.0, 3.7], [5.0, 3.7], [7.0, 3.7]])
    clusterer = SklearnClusterer(StubWithPredict(predict=[0, 0, 1, 1]))
    clusterer(X)
    expected = np.array([[-3, 0], [-1, 0], [1, 0], [3, 0]]) / [5**0.5, 1]
    assert len(clusterer.estimator_.seen) == 2
    for seen in clusterer.estimator_.seen:
        assert seen.dtype == np.float64
        np.testing.assert_allclose(seen, expected, atol=1e-15)
    assert clusterer.estimator.seen == []


def test_shares_are_not_negative_and_sum_to_one() -> None:
    given_shares = [[0.5, 0.25], [-0.1, 3.0], [1.0, 1.0]]
    found = SklearnClusterer(StubWithProbabilities(predict_proba=given_shares))(torch.randn(3, 2).double())
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3], [0.0, 1.0], [0.5, 0.5]]).double())


def test_columns_are_the_labels_in_their_order_and_noise_is_spread_as_the_others_are() -> None:
    found = SklearnClusterer(Stub(labels_=np.array([7, -1, 2, 7, 7, -1])))(torch.randn(6, 2))
    noise = [0.25, 0.75]
    assert found.tolist() == [[0, 1], noise, [1, 0], [0, 1], [0, 1], noise]
    assert found.mean(dim=0).tolist() == noise


def test_probabilities_come_before_labels_and_labels_before_predictions() -> None:
    X, labels = torch.randn(2, 2), np.array([0, 1])
    every = {"predict_proba": [[0.5, 0.5]] * 2, "labels_": labels, "predict": [1, 0]}
    assert SklearnClusterer(StubWithProbabilities(**every))(X).tolist() == [[0.5, 0.5]] * 2
    assert SklearnClusterer(StubWithPredict(**every))(X).tolist() == [[1, 0], [0, 1]]
    assert SklearnClusterer(StubWithPredict(predict=[1, 0]))(X).tolist() == [[0, 1], [1, 0]]


def test_rows_that_mean_shift_leaves_out_are_noise() -> None:
    X = torch.cat([blobs()[0], torch.tensor([[90.0, 0.0, 0.0, 0.0]]).double()])
    clusterer = SklearnClusterer(MeanShift(bandwidth=1.0, cluster_all=False, min_bin_freq=5, bin_seeding=True))
    responsibilities = clusterer(X)
    lost = clusterer.estimator_.labels_ == -1
    assert lost[-1]
    others = responsibilities[torch.from_numpy(~lost)].mean(dim=0)
    torch.testing.assert_close(responsibilities[torch.from_numpy(lost)], others.repeat(int(lost.sum()), 1))


def test_without_scikit_learn_the_estimator_is_copied_as_any_object_is(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = KMeans(3, random_state=0)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    clusterer = SklearnClusterer(estimator)
    X, truth = blobs()
    assert_same_partition(clusterer(X), truth)
    assert not hasattr(estimator, "labels_")


@pytest.mark.parametrize(
    ("estimator", "got"),
    [
        (KMeans, "the class KMeans"),
        ("kmeans", "str"),
        (None, "NoneType"),
        (lambda X: X, "function"),
    ],
)
def test_what_can_not_be_fitted_is_refused(estimator: Any, got: str) -> None:
    message = f"estimator: expected an object with a method fit, such as KMeans(3), got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        SklearnClusterer(estimator)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Stub(), "estimator: expected predict_proba, labels_ or predict, once fitted, got Stub"),
        (
            StubWithProbabilities(predict_proba=[[1.0]] * 3),
            "estimator.predict_proba: expected probabilities [N, K] with N = 4, got [3, 1]",
        ),
        (
            StubWithProbabilities(predict_proba=[1.0] * 4),
            "estimator.predict_proba: expected probabilities [N, K] with N = 4, got [4]",
        ),
        (
            StubWithProbabilities(predict_proba=np.zeros((4, 0))),
            "estimator.predict_proba: expected probabilities [N, K] with N = 4, got [4, 0]",
        ),
        (
            StubWithProbabilities(predict_proba=[[1.0, 0.0]] * 3 + [[np.nan, 1.0]]),
            "estimator.predict_proba: expected finite values, got nan in row 3 (1 of 4 rows are bad)",
        ),
        (
            StubWithProbabilities(predict_proba=[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]),
            "estimator.predict_proba: expected a positive probability in each row, got none in row 1",
        ),
        (
            Stub(labels_=np.zeros(3, dtype=int)),
            "estimator.labels_: expected an integer label for each of 4 rows, got int64 [3]",
        ),
        (
            StubWithPredict(predict=[[0], [1], [0], [1]]),
            "estimator.predict: expected an integer label for each of 4 rows, got int64 [4, 1]",
        ),
        (
            StubWithPredict(predict=[0.0, 1.0, 0.0, 1.0]),
            "estimator.predict: expected an integer label for each of 4 rows, got float64 [4]",
        ),
        (
            Stub(labels_=np.full(4, -1)),
            "estimator.labels_: expected at least one cluster, got noise (-1) in all 4 rows",
        ),
    ],
)
def test_answers_that_are_no_clustering_are_refused_by_name(estimator: Any, message: str) -> None:
    clusterer = SklearnClusterer(estimator)
    with pytest.raises(ValueError, match=re.escape(message)):
        clusterer(torch.randn(4, 2))
    assert clusterer.estimator_ is None


def test_what_the_estimator_raises_comes_through_and_the_last_fit_stays() -> None:
    clusterer = SklearnClusterer(KMeans(3, random_state=0))
    clusterer(blobs()[0])
    fitted = clusterer.estimator_
    with pytest.raises(ValueError, match="n_samples=2 should be >= n_clusters=3"):
        clusterer(torch.randn(2, 4))
    assert clusterer.estimator_ is fitted


# In the buffer


def buffer_with(clusterer: Any, **options: Any) -> ClusteredReplayBuffer:
    """Three behaviours in the critic's gradients, and a few rows that are like none."""
    generator = torch.Generator().manual_seed(0)
    centre = 6.0 * (torch.arange(90) % 3 - 1).unsqueeze(1)
    centre[::29] = 50.0 * torch.randn(4, 1, generator=generator)
    data = Transitions(
        observations=torch.randn(90, 3, generator=generator) + centre,
        actions=torch.randn(90, 2, generator=generator) + centre,
        rewards=torch.zeros(90),
        next_observations=torch.randn(90, 3, generator=generator) + centre,
        terminals=torch.zeros(90),
    )
    critic = torch.nn.Bilinear(3, 2, 1, bias=False)
    torch.nn.init.normal_(critic.weight, generator=generator)
    buffer = ClusteredReplayBuffer.from_transitions(data, clusterer=clusterer, seed=0, **options)
    buffer.attach(Critics(critic, critic))
    return buffer


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize(
    "clusterer", [FaissClusterer(3), *map(SklearnClusterer, estimators())], ids=lambda value: name_of(value)
)
def test_the_buffer_stays_uniform_with_any_of_them(clusterer: Any, assignment: Any) -> None:
    buffer = buffer_with(clusterer, assignment=assignment)
    batches = [buffer.sample(1) for _ in range(30)]  # of one row: no cluster is too small
    report = buffer.last_report
    assert report is not None
    assert report.iterations == 0
    assert len(report.sizes) > 1
    r, p = buffer.responsibilities.double(), buffer.probabilities
    assert all(r[batch.indices, batch.cluster] > 0 for batch in batches)
    # sum_z p_z r_iz / sum_j r_jz = 1 / N
    sums = r.sum(dim=0)
    filled = sums > 0
    share = (p[filled] * r[:, filled] / sums[filled]).sum(dim=1)
    np.testing.assert_allclose(share, 1 / 90, rtol=1e-5)


def test_fewer_rows_than_clusters_are_no_reason_to_fail_in_the_buffer() -> None:
    buffer = buffer_with(FaissClusterer(200))
    with pytest.warns(UserWarning, match="200 clusters for 90 distinct rows"):
        buffer.refresh()
    assert buffer.cluster_sizes.tolist() == [1] * 90
