"""How fast is EM? Against scikit-learn, a plain loop over components in torch, and the bare matrix products.

    python benchmarks/mixture.py [--threads 1] [--device cpu] [--turns 7]

K = 3, full covariances, ten EM steps without an early stop, all from the same starting responsibilities. One row a
size: the median over turns of the time of each, taken in turn. `floor` is the time of the matrix products
alone, which no implementation of EM can avoid: X times a whitening matrix and the weighted X^T X, for each component.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from c4buffer import GaussianMixture

K, STEPS, REGULARIZATION = 3, 10, 1e-6
Run = tuple[Callable[[], Any], Callable[[Any], float]]  # what is timed, and its mean log-likelihood
SIZES = ((10_000, 28), (10_000, 46), (10_000, 256), (100_000, 28), (100_000, 46), (100_000, 256))


def three_clusters(rows: int, dimensions: int, *, device: str) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussians with covariances of their own, standardised, and responsibilities to start from."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % K
    mixing = torch.randn(K, dimensions, dimensions, generator=generator) / math.sqrt(dimensions)
    X = torch.randn(rows, dimensions, generator=generator)
    X = torch.cat([X[labels == z] @ mixing[z] + 0.5 * z for z in range(K)])
    X = (X - X.mean(dim=0)) / X.std(dim=0)
    start = torch.rand(rows, K, generator=generator) + torch.nn.functional.one_hot(labels.sort().values, K)
    return X.to(device), (start / start.sum(dim=1, keepdim=True)).to(device)


def ours(X: Tensor, start: Tensor) -> Run:
    mixture = GaussianMixture(K, regularization=REGULARIZATION, max_iterations=STEPS, tolerance=0)
    return lambda: mixture.fit(X, initial=start), lambda result: result.log_likelihood


def loop_over_components(X: Tensor, start: Tensor) -> Run:
    return lambda: em_by_loop(X, start), float


def em_by_loop(X: Tensor, r: Tensor) -> Tensor:
    """EM as one would write it down: a loop over components, all rows at once; the mean log-likelihood."""
    rows, dimensions = X.shape
    eye = torch.eye(dimensions, device=X.device)
    for _ in range(STEPS + 1):
        log_joint = torch.empty(rows, K, device=X.device)
        for z in range(K):
            mass = r[:, z].sum()
            mean = r[:, z] @ X / mass
            difference = X - mean
            covariance = (r[:, z : z + 1] * difference).T @ difference / mass + REGULARIZATION * eye
            lower = torch.linalg.cholesky(covariance)
            whitened = torch.linalg.solve_triangular(lower, difference.T, upper=False)
            log_joint[:, z] = (
                torch.log(mass / rows)
                - 0.5 * (dimensions * math.log(2 * math.pi) + whitened.square().sum(dim=0))
                - lower.diagonal().log().sum()
            )
        log_density = log_joint.logsumexp(dim=1, keepdim=True)
        r = (log_joint - log_density).exp()
    return log_density.mean()


def scikit_learn(X: Tensor, start: Tensor) -> Run:
    from sklearn.mixture import GaussianMixture as Sklearn

    data, r = X.numpy(), start.numpy()
    mass = r.sum(axis=0)
    means = (r.T @ data) / mass[:, None]
    precisions = []
    for z in range(K):
        difference = data - means[z]
        covariance = (r[:, z, None] * difference).T @ difference / mass[z]
        covariance.flat[:: len(covariance) + 1] += REGULARIZATION
        precision = torch.linalg.inv(torch.from_numpy(covariance).double())
        precisions.append((0.5 * (precision + precision.T)).float().numpy())
    mixture = Sklearn(
        K,
        reg_covar=REGULARIZATION,
        max_iter=STEPS,
        tol=0,
        init_params="random",  # not used, as all that it could find is given
        weights_init=mass / mass.sum(),
        means_init=means,
        precisions_init=precisions,
    )
    return lambda: mixture.fit(data), lambda fitted: float(fitted.score(data))


def matrix_products(X: Tensor, start: Tensor) -> Run:
    return lambda: products(X), lambda _: math.nan


def products(X: Tensor) -> None:
    """The floor: those of STEPS + 1 E-steps and M-steps."""
    rows, dimensions = X.shape
    size = max(512, (1 << 18) // (K * dimensions))
    whiten = torch.eye(dimensions, device=X.device).expand(K, -1, -1).contiguous()
    differences = X[:size].expand(K, -1, -1).contiguous()
    second = torch.empty(K, dimensions, dimensions, device=X.device)
    whitened = torch.empty_like(differences)
    for _ in range(STEPS + 1):
        for first in range(0, rows, size):
            n = min(size, rows - first)
            torch.bmm(differences[:, :n], whiten, out=whitened[:, :n] if n < size else whitened)
            torch.bmm(differences[:, :n].mT, differences[:, :n], out=second)


def time_of(run: Run, device: str) -> tuple[float, float]:
    fit, score = run
    began = time.perf_counter()
    result = fit()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, score(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", help="only these N")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import sklearn.mixture  # noqa: F401  # its libraries must be there to be limited

    warnings.simplefilter("ignore")  # scikit-learn's, that ten steps are not convergence
    try:
        from threadpoolctl import threadpool_limits

        threadpool_limits(arguments.threads)
    except ImportError:
        print("threadpoolctl is missing: scikit-learn takes as many threads as it likes")

    runs = {"ours": ours, "scikit-learn": scikit_learn, "loop": loop_over_components, "floor": matrix_products}
    print(f"torch {torch.__version__}, {arguments.device}, float32, {arguments.threads} threads, seconds")
    print(f"{'N':>8} {'E':>4} " + " ".join(f"{name:>12}" for name in runs), end="")
    print(f" {'sklearn/ours':>12} {'loop/ours':>10} {'floor/ours':>10}   log-likelihoods")
    for rows, dimensions in SIZES:
        if arguments.rows and rows not in arguments.rows:
            continue
        X, start = three_clusters(rows, dimensions, device=arguments.device)
        times: dict[str, list[float]] = {name: [] for name in runs}
        found: dict[str, float] = {}
        for turn in range(arguments.turns + 1):
            for name, run in runs.items():
                # scikit-learn runs on the processor, whatever the device
                pair = (X.cpu(), start.cpu()) if name == "scikit-learn" else (X, start)
                seconds, found[name] = time_of(run(*pair), arguments.device)
                if turn > 0:  # the first warms up
                    times[name].append(seconds)
        ratio = {name: statistics.median(b / a for a, b in zip(times["ours"], taken)) for name, taken in times.items()}
        print(f"{rows:8d} {dimensions:4d} " + " ".join(f"{statistics.median(t):12.4f}" for t in times.values()), end="")
        print(f" {ratio['scikit-learn']:12.2f} {ratio['loop']:10.2f} {ratio['floor']:10.2f}  ", end=" ")
        print(" ".join(f"{found[name]:.7g}" for name in ("ours", "scikit-learn", "loop")), flush=True)


if __name__ == "__main__":
    main()
