"""k-means whose search for the nearest centre is FAISS's: for many rows or clusters, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .kmeans import centres_of

CHUNK_FLOATS = 1 << 18  # of rows at once, so that they stay in the cache
TRAINING_ROWS = 65_536
TRAINING_ROWS_PER_CLUSTER = 256  # where that is more; FAISS's own limit
FARTHEST = 1e15  # of a row, so that float32 holds its square
SCRATCH_BYTES = 64 << 20  # of the GPU; FAISS would take 1.5 GiB

# (rows [n, E], centres [K, E]) -> which centre is the nearest to each row, [n], int64, and its squared distance, [n]
Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def faiss_kmeans(X: Tensor, n_clusters: int, *, seed: int, iterations: int) -> tuple[Tensor, int]:
    """k-means++ draw and Lloyd steps: labels [N] of the rows of X [N, E], and how many clusters they name.

    The centres are trained on at most 65,536 rows (256 per cluster, where that is more), which the seed draws evenly
    over X; then all rows are labelled, in chunks. FAISS has no float64: it sees float32, less the training rows' means
    and divided by the largest deviation from them, so that neither where X lies nor its unit costs digits. Rows that
    are distinct then are told apart in the draw; in the search, float32 rounding can confuse centres that are closer to
    each other than about 1e-3 of their distance from the mean.

    X on a GPU stays there if FAISS has been built for GPUs, and goes through the host if not. The same seed gives the
    same labels (on one device). FAISS runs on as many threads as the caller has given it.

    Args:
        X: floating and finite.
        n_clusters: K.
        seed: of a private generator; global ones are not touched.
        iterations: Lloyd steps at most; it stops before when no label changes.

    Returns:
        Labels, int64, on the device of X; each of 0 to clusters - 1 is there. `clusters` is K, or the number of rows
        that are distinct in float32 where that is less.

    Raises:
        ImportError: without FAISS.
    """
    faiss = _import_faiss()
    X = X.detach()
    generator = torch.Generator().manual_seed(seed)
    on_gpu = _gpu_serves(faiss, X)
    nearest = _search_on_gpu(faiss) if on_gpu else _search_on_host(faiss)

    def prepared(rows: Tensor) -> Iterator[Tensor]:
        for part in rows.split(max(256, CHUNK_FLOATS // rows.shape[1])):
            part = ((part - mean) / span).clamp(-FARTHEST, FARTHEST).float().contiguous()
            yield part if on_gpu else part.cpu()

    size = max(TRAINING_ROWS, TRAINING_ROWS_PER_CLUSTER * n_clusters)
    drawn = [] if len(X) <= size else [X[_spread(len(X), size, generator).to(X.device)]]
    for sample in [*drawn, X]:
        mean, span = _frame(sample)
        rows = torch.cat(list(prepared(sample)))
        centres = _draw_centres(rows, n_clusters, generator)
        if len(centres) == n_clusters:  # if not, there may be more distinct rows than were drawn
            break
    centres = _moved(centres, rows, nearest, iterations)
    parts = [nearest(part, centres) for part in prepared(X)]
    labels = torch.cat([part[0] for part in parts])
    distances = torch.cat([part[1] for part in parts])
    return _without_gaps(labels, distances, len(centres)).to(X.device), len(centres)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        message = 'k-means by FAISS needs FAISS: pip install "c4buffer[faiss]", or "c4buffer[gpu]" for CUDA'
        raise ImportError(message) from error
    return faiss


def _gpu_serves(faiss: Any, X: Tensor) -> bool:
    return X.is_cuda and faiss.get_num_gpus() > 0


def _search_on_host(faiss: Any) -> Search:
    def nearest(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        distances, labels = faiss.knn(rows.numpy(), centres.numpy(), 1)
        return torch.from_numpy(labels[:, 0]), torch.from_numpy(distances[:, 0])

    return nearest


def _search_on_gpu(faiss: Any) -> Search:
    """By pointers to torch's memory: faiss.contrib.torch_utils would patch FAISS for the whole process."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(SCRATCH_BYTES)
    resources.setPinnedMemory(0)  # nothing comes from the host

    def nearest(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        distances = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        labels = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        search = faiss.GpuDistanceParams()  # float32 rows, int64 labels, squared L2, unless told otherwise
        search.device, search.k, search.dims = rows.device.index, 1, rows.shape[1]
        search.queries, search.numQueries = faiss.cast_integer_to_float_ptr(rows.data_ptr()), len(rows)
        search.vectors, search.numVectors = faiss.cast_integer_to_float_ptr(centres.data_ptr()), len(centres)
        search.outDistances = faiss.cast_integer_to_float_ptr(distances.data_ptr())
        search.outIndices = faiss.cast_integer_to_idx_t_ptr(labels.data_ptr())
        # On torch's stream, FAISS comes after what fills the rows and before what reads the labels.
        stream = torch.cuda.current_stream(rows.device).cuda_stream
        resources.setDefaultStream(rows.device.index, faiss.cast_integer_to_cudastream_t(stream))
        faiss.bfKnn(resources, search)
        return labels, distances

    return nearest


def _spread(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """One row of each of `size` equal stretches of all rows: every row is equally likely."""
    places = torch.arange(size, device="cpu") + torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
    return (places * (rows / size)).long().clamp(max=rows - 1)


def _frame(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Column means [E], and the largest deviation from them, in float64; 1 where all rows are the same."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    span = torch.maximum(rows.amax(dim=0) - mean, mean - rows.amin(dim=0)).max()
    return mean, torch.where(span > 0, span, 1.0)


def _draw_centres(rows: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: rows [K, E], each drawn by its squared distance to those before; fewer where no others are left."""
    drawn = [int(torch.randint(len(rows), (), generator=generator, device="cpu"))]
    nearest = _squared_distances(rows, drawn[0])
    while len(drawn) < n_clusters:
        cumulative = nearest.cpu().double().cumsum(dim=0)  # a GPU would sum in an order of its own each time
        if float(cumulative[-1]) == 0:
            break
        place = torch.rand((), generator=generator, dtype=torch.float64, device="cpu") * cumulative[-1]
        drawn.append(min(int(torch.searchsorted(cumulative, place, right=True)), len(rows) - 1))
        nearest = torch.minimum(nearest, _squared_distances(rows, drawn[-1]))
    return rows[drawn]


def _squared_distances(rows: Tensor, row: int) -> Tensor:
    """To one of the rows, [n]; by differences, so that they are zero for equal rows and no others."""
    return torch.cdist(rows, rows[row : row + 1], compute_mode="donot_use_mm_for_euclid_dist").squeeze(1).square()


def _moved(centres: Tensor, rows: Tensor, nearest: Search, iterations: int) -> Tensor:
    """The centres after so many Lloyd steps, or as many as it takes until no label changes."""
    previous = None
    for _ in range(iterations):
        labels = _without_gaps(*nearest(rows, centres), len(centres))
        if previous is not None and torch.equal(labels, previous):
            break
        centres, previous = centres_of(rows, labels, centres), labels
    return centres


def _without_gaps(labels: Tensor, distances: Tensor, clusters: int) -> Tensor:
    """Labels [n] in which no cluster is empty: one that is gets the row that is farthest from its centre."""
    counts = torch.bincount(labels, minlength=clusters)
    for empty in (counts == 0).nonzero().squeeze(1).tolist():
        row = torch.where(counts[labels] > 1, distances, -1.0).argmax()
        counts[labels[row]] -= 1
        counts[empty] += 1
        labels[row] = empty
    return labels
