"""The same mixture over the ranks of a process group as in one process, and on any number of threads.

Run as a script (`rank ranks folder`), this file is one of so many ranks, and rank 0 fits on one thread and on two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

import c4buffer.mixture
from c4buffer import (
    Critics,
    GaussianMixture,
    MixtureClusterer,
    MixtureResult,
    ReducedClusterer,
    Transitions,
    stacked_gradients,
)
from c4buffer.collective import from_first, gathered, ranks_in, total
from c4buffer.scaling import column_scaling

ROWS = 90
SHARES = {0: slice(0, 50), 1: slice(50, 80), 2: slice(80, 90)}  # of the ranks
GROUPS = {"three ranks": (0, 1, 2), "the last two": (1, 2)}
FORMS: tuple[Any, ...] = ("full", "diag", "tied")
FORMS_OF: dict[str, tuple[Any, ...]] = {"three ranks": FORMS, "the last two": ("full",)}
OUTLIER = 85
SHARED = ("weights", "means", "covariances", "log_likelihood", "iterations", "converged")

Found = dict[str, Any]


def data() -> tuple[Tensor, Tensor]:
    """Overlapping blobs [ROWS, 3], float64, in no order and in units of their own; soft responsibilities [ROWS, 3]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(3, (ROWS,), generator=generator)
    X = 3 * normal(3, 3)[labels] + (normal(ROWS, 1, 3) @ normal(3, 3, 3)[labels]).squeeze(1)
    return X * torch.tensor([1.0, 100.0, 0.01]) + 5, (2 * torch.eye(3)[labels] + normal(ROWS, 3)).softmax(dim=1)


def fits(rows: slice, group: Any, forms: tuple[Any, ...] = FORMS) -> dict[str, Found]:
    """What becomes of some rows, with those of the other ranks if there is a group."""
    X, start = (part[rows] for part in data())
    index = torch.arange(ROWS)[rows]
    outlier = torch.where(index.unsqueeze(1) == OUTLIER, 1e3, X)
    found: dict[str, Found] = {}

    def keep(name: str, result: MixtureResult) -> None:
        found[name] = {field: getattr(result, field) for field in (*SHARED, "responsibilities")}

    for form in forms:
        mixture = partial(GaussianMixture, covariance=form, process_group=group)
        first = mixture(3, max_iterations=2, tolerance=0).fit(X, initial=start)
        keep(f"{form}, from responsibilities", first)
        keep(f"{form}, from k-means, standardised", mixture(3, standardize=True, max_iterations=2).fit(X))
        # nothing is left to the second component: at once, and after a step
        empty = torch.eye(2, dtype=X.dtype)[torch.zeros(len(X), dtype=torch.int64)]
        keep(f"{form}, empty", mixture(2, max_iterations=0).fit(outlier, initial=empty))
        away = torch.where(torch.arange(3).unsqueeze(1) == 1, -1e5, first.means)
        keep(f"{form}, lost", mixture(3, max_iterations=1).fit(outlier, initial=replace(first, means=away)))
    mixture = partial(GaussianMixture, 3, covariance=first.covariance, process_group=group, max_iterations=2)
    keep("from k-means", mixture().fit(X))
    keep("from a mixture", mixture().fit(1.1 * X, initial=first))
    keep("from a mixture, standardised", mixture(standardize=True).fit(1.1 * X, initial=first))
    keep("float32", mixture(standardize=True).fit(X.float()))

    distinct = (index >= 50) & (index < 80)  # on no rank both
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = GaussianMixture(4, process_group=group).fit(distinct.to(X).unsqueeze(1).repeat(1, 2))
    keep("fewer distinct rows", result)
    found["fewer distinct rows"]["warned"] = [
        str(warning.message) == "n_components: 4 components for 2 distinct rows; the mixture has 2."
        for warning in caught
    ]

    wide = X @ torch.arange(15.0, dtype=X.dtype).sin().reshape(3, 5)
    options = partial(MixtureClusterer, process_group=group, max_iterations=2)
    clusterers: dict[str, Any] = {
        "clusterer": options(3),
        "clusterer, auto": options("auto", max_clusters=3),
        "projection": ReducedClusterer(options(2), max_dim=2),
        "pca": ReducedClusterer(options(2), max_dim=2, reduction="pca"),
    }
    for name, clusterer in clusterers.items():
        clusterer(wide if isinstance(clusterer, ReducedClusterer) else X, None)
        keep(name, clusterer.mixture)
    found["scaling"] = dict(zip(("mean", "scale"), column_scaling(X, process_group=group)))
    return found


def only_in_groups(rank: int, group: Any) -> dict[str, Any]:
    """What has no like in one process."""
    share = torch.arange(rank + 1).double().unsqueeze(1)  # as many rows as the rank's number, and one
    most, c4buffer.mixture.START_ROWS = c4buffer.mixture.START_ROWS, 30
    generator = torch.Generator().manual_seed(rank)
    X = 20 * torch.eye(3)[torch.arange(200) % 3] + torch.randn(200, 3, generator=generator)
    drawn = GaussianMixture(3, process_group=group, generator=generator).fit(X)
    apart = torch.zeros(200, 2)
    apart[70 + rank] = torch.eye(2)[rank % 2]  # which the start does not draw
    outlying = GaussianMixture(3, process_group=group).fit(apart)
    c4buffer.mixture.START_ROWS = most
    return {
        "ranks": ranks_in(group),
        "total": total(torch.tensor([1.0, rank]), group),
        "total of columns": total(torch.tensor([[1.0, rank], [2.0, rank]]).T, group),
        "gathered": gathered(share, group),
        "nothing gathered": gathered(share[: 0 if rank else 1], group),
        "from first": from_first(share.new_full((2, 2), rank).T, group),
        "start of drawn rows": {name: getattr(drawn, name) for name in SHARED},
        "distinct rows that were not drawn": {name: getattr(outlying, name) for name in SHARED},
    }


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    groups = {name: torch.distributed.new_group(list(members)) for name, members in GROUPS.items()}
    found = {
        name: {**fits(SHARES[rank], group, FORMS_OF[name]), **only_in_groups(rank, group)}
        for name, group in groups.items()
        if rank in GROUPS[name]
    }
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# --- threads -------------------------------------------------------------------------------------------------------


def thread_cases() -> dict[str, Callable[[], Tensor]]:
    """What is fitted on one thread and on two; responsibilities or embeddings."""
    generator = torch.Generator().manual_seed(0)

    def blobs(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        X = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        X += 4 * torch.randn(3, width, generator=generator, dtype=torch.float64)[torch.arange(rows) % 3] / width**0.5
        return X.to(dtype)

    def fitted(X: Tensor, **options: Any) -> Tensor:
        result = GaussianMixture(3, max_iterations=3, tolerance=0, **options).fit(X)
        parts = (result.weights, result.means, result.covariances, result.responsibilities)
        return torch.cat([part.flatten().double() for part in parts])

    def network() -> nn.Module:
        layers = nn.Sequential(nn.Linear(14, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
        for parameter in layers.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        return layers

    networks = [network() for _ in range(4)]
    critics, targets = (
        [lambda s, a, q=q: q(torch.cat([s, a], dim=1)) for q in pair] for pair in (networks[:2], networks[2:])
    )
    batch = Transitions(
        observations=torch.randn(4500, 11, generator=generator),
        actions=torch.randn(4500, 3, generator=generator),
        rewards=torch.zeros(4500),
        next_observations=torch.randn(4500, 11, generator=generator),
        terminals=torch.zeros(4500),
    )

    def embeddings() -> Tensor:
        return stacked_gradients(Critics(critics, targets), batch, chunk_size=4096)

    narrow, wide = blobs(20_000, 28, torch.float32), blobs(2000, 256, torch.float64)
    return {
        "narrow": lambda: fitted(narrow),
        "narrow, standardised": lambda: fitted(narrow, standardize=True),
        "narrow, float64": lambda: fitted(narrow.double()),
        "two columns": lambda: fitted(narrow[:, :2].contiguous()),
        "wide": lambda: fitted(wide.float()),
        "wide, float64": lambda: fitted(wide),
        "gradients": embeddings,
        "clusters": lambda: MixtureClusterer(3)(embeddings()),
    }


def run_threads(folder: Path) -> None:
    found = {}
    for name, case in thread_cases().items():
        answers = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(case())
        found[name] = answers
    torch.save(found, folder / "threads.pt")


if __name__ == "__main__":
    this, of, where = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if of > 0:
        run_rank(this, of, where)
    if this == 0:
        run_threads(where)


# --- the tests -----------------------------------------------------------------------------------------------------


def script(*arguments: object) -> subprocess.Popen[bytes]:
    """This file as a script, on one thread unless it sets more; threads that wait leave the processor to others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every rank and the threads found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    ranks = len(SHARES) if gloo else 0
    processes = [script(rank, ranks, folder) for rank in range(max(1, ranks))]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output.decode()
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(params=GROUPS)
def group(request: pytest.FixtureRequest, saved: Path) -> str:
    """The name of a group of ranks."""
    if not (saved / "0.pt").exists():
        pytest.skip("this build of torch has no gloo")
    name: str = request.param
    return name


@pytest.fixture
def found(group: str, saved: Path) -> list[dict[str, Any]]:
    """What each rank of the group found."""
    return [torch.load(saved / f"{rank}.pt")[group] for rank in GROUPS[group]]


def test_every_rank_ends_with_the_same_bits(found: list[dict[str, Any]]) -> None:
    first, *others = found
    cases = [name for name, case in first.items() if isinstance(case, dict)]
    assert len(cases) > 12
    for name in cases:
        for field in set(first[name]) - {"responsibilities"}:
            expected = torch.as_tensor(first[name][field])
            for other in others:
                assert torch.equal(torch.as_tensor(other[name][field]), expected), (name, field)


def test_that_is_the_mixture_of_all_their_rows(group: str, found: list[dict[str, Any]]) -> None:
    rows = slice(SHARES[GROUPS[group][0]].start, SHARES[GROUPS[group][-1]].stop)
    for name, whole in fits(rows, None, FORMS_OF[group]).items():
        accuracy = 1e-3 if name == "float32" else 1e-10
        if "responsibilities" in whole:  # each rank has those of its own rows
            parts = torch.cat([each[name]["responsibilities"] for each in found])
            torch.testing.assert_close(parts, whole["responsibilities"], rtol=0, atol=accuracy, msg=name)
        for field in set(whole) - {"responsibilities"}:
            got, expected = torch.as_tensor(found[0][name][field]), torch.as_tensor(whole[field])
            size = accuracy * max(1.0, expected.double().abs().max().item())
            torch.testing.assert_close(got, expected, rtol=0, atol=size, msg=f"{name}, {field}")


def test_an_empty_component_starts_again_at_the_worst_row_of_any_rank(group: str, found: list[dict[str, Any]]) -> None:
    for each in found:
        for form in FORMS_OF[group]:
            for case in ("empty", "lost"):
                assert each[f"{form}, {case}"]["means"][1].tolist() == pytest.approx([1e3] * 3), (form, case)


def test_fewer_distinct_rows_than_components_on_all_ranks_together_lower_k(found: list[dict[str, Any]]) -> None:
    for each in found:
        case = each["fewer distinct rows"]
        assert case["warned"] == [True]
        assert sorted(case["means"][:, 0].tolist()) == pytest.approx([0, 1])


def test_a_start_from_drawn_rows_finds_what_is_far_apart(found: list[dict[str, Any]]) -> None:
    for each in found:
        distances = torch.cdist(20 * torch.eye(3), each["start of drawn rows"]["means"])
        assert float(distances.amin(dim=1).max()) < 1


def test_rows_that_no_rank_drew_for_the_start_count_as_distinct(found: list[dict[str, Any]]) -> None:
    for each in found:
        means = each["distinct rows that were not drawn"]["means"]
        assert sorted(means.round(decimals=2).tolist()) == [[0, 0], [0, 1], [1, 0]]


def test_sums_and_rows_over_the_ranks_by_hand(group: str, found: list[dict[str, Any]]) -> None:
    members = GROUPS[group]
    for each in found:
        assert each["ranks"] == len(members)
        assert each["total"].tolist() == [len(members), sum(members)]
        assert each["total of columns"].tolist() == [[len(members), 2 * len(members)], [sum(members)] * 2]
        assert each["gathered"].squeeze(1).tolist() == [row for rank in members for row in range(rank + 1)]
        assert each["nothing gathered"].shape == (members.count(0), 1)
        assert each["from first"].tolist() == [[members[0]] * 2] * 2


def test_without_a_group_there_is_one_rank() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ranks_in(None) == 1
    for same in (total(values, None), gathered(values, None), from_first(values, None)):
        assert same is values


@pytest.fixture(scope="module")
def on_threads(saved: Path) -> dict[str, list[Tensor]]:
    """What was found on one thread, and on two."""
    found: dict[str, list[Tensor]] = torch.load(saved / "threads.pt")
    return found


@pytest.mark.parametrize(
    "case", ["narrow", "narrow, standardised", "narrow, float64", "two columns", "wide", "gradients", "clusters"]
)
def test_one_thread_and_two_give_the_same_bits(case: str, on_threads: dict[str, list[Tensor]]) -> None:
    one, two = on_threads[case]
    assert torch.equal(one, two)


def test_one_thread_and_two_differ_by_no_more_than_the_rounding_of_a_cholesky_factor(
    on_threads: dict[str, list[Tensor]],
) -> None:
    # LAPACK splits the factors of wide matrices among threads; float32 does not see what float64 does.
    one, two = on_threads["wide, float64"]
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    r, other = (answer[-6000:].reshape(2000, 3) for answer in (one, two))
    assert torch.equal(r.argmax(dim=1), other.argmax(dim=1))
