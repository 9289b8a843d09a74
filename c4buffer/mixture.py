"""Gaussian mixture by expectation maximisation, in torch, on the device of the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import check_choice, check_finite, check_integer, check_number, fail, shape_of
from .kmeans import kmeans

Covariance = Literal["full", "diag", "tied"]

CHUNK_FLOATS = 1 << 18  # of [K, rows, E] per pass: a megabyte or two, so that a chunk stays in the cache
EMPTY_MASS = 0.5  # a component that explains less than half a row is empty
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class MixtureResult:
    """A fitted mixture sum_z p_z N(mu_z, Omega_z) of K Gaussians in E dimensions, in the units of the data.

    Args:
        weights: p, [K].
        means: mu, [K, E].
        covariances: Omega, [K, E, E] (full), [K, E] (diag) or [E, E] (tied).
        responsibilities: r, [N, K], of the rows it was fitted to (a last E-step).
        log_likelihood: mean over those rows of log sum_z p_z N(x | mu_z, Omega_z).
        iterations: EM steps taken.
        converged: whether the log-likelihood stood still (to the tolerance) before they ran out.
        covariance: the form of `covariances`.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    responsibilities: Tensor
    log_likelihood: float
    iterations: int
    converged: bool
    covariance: Covariance = "full"

    def responsibilities_of(self, X: Tensor) -> Tensor:
        """r_iz = p(z | x_i) of other rows X [M, E]: [M, K]."""
        return self._explain(X)[0]

    def log_likelihood_of(self, X: Tensor) -> float:
        """Mean over the rows of X [M, E] of log sum_z p_z N(x | mu_z, Omega_z)."""
        return self._explain(X)[1]

    def bic(self, X: Tensor) -> float:
        """Bayesian information criterion on X [M, E], -2 log L + (free parameters) log M: the lower, the better."""
        k, e = self.means.shape
        per_covariance = e if self.covariance == "diag" else e * (e + 1) // 2
        free = k - 1 + k * e + per_covariance * (1 if self.covariance == "tied" else k)
        return -2 * len(X) * self.log_likelihood_of(X) + free * math.log(len(X))

    def rescaled(self, shift: Tensor, scale: Tensor) -> MixtureResult:
        """The mixture of shift + scale * x, columns by columns ([E] each), in float64."""
        shift, scale = shift.double(), scale.double()
        outer = scale.square() if self.covariance == "diag" else scale.unsqueeze(1) * scale
        return replace(
            self,
            weights=self.weights.double(),
            means=shift + scale * self.means.double(),
            covariances=self.covariances.double() * outer,
            log_likelihood=self.log_likelihood - float(scale.log().sum()),
        )

    def _explain(self, X: Tensor) -> tuple[Tensor, float]:
        X = _checked_rows(X).to(torch.promote_types(X.dtype, self.means.dtype))
        if X.shape[1] != self.means.shape[1]:
            fail("X", f"{self.means.shape[1]} columns, as many as the mixture has", X.shape[1])
        em = _ExpectationMaximisation(X, self.covariance, regularization=0.0)
        return em.responsibilities(em.parameters_of(self))


class GaussianMixture:
    """EM for a mixture of K Gaussians: the clustering step of C4's Algorithm 1.

    E-step: r_iz = p_z N(x_i | mu_z, Omega_z) / sum_w p_w N(x_i | mu_w, Omega_w), in log space.
    M-step: p_z = sum_i r_iz / N, mu_z = sum_i r_iz x_i / sum_i r_iz,
    Omega_z = sum_i r_iz (x_i - mu_z)(x_i - mu_z)^T / sum_i r_iz + epsilon I.

    Moments are centred and summed in float64, so that float32 data far from zero are no trouble; rows are taken in
    chunks, so that memory beyond X and the responsibilities does not grow with N. Never a NaN: a covariance that is not
    positive definite gets a growing jitter, and a component that explains nothing is re-seeded from the rows that the
    mixture explains worst.

    Args:
        n_components: K.
        covariance: "full" ([K, E, E]), "diag" ([K, E]) or "tied" (one [E, E] for all).
        regularization: epsilon, added to the diagonal; in squared units of the data.
        max_iterations: EM steps at most.
        tolerance: stop when the mean log-likelihood moves by less.
        generator: for the k-means++ start. None: a private one with seed 0 for each fit.

    >>> x = torch.cat([torch.randn(50, 2) - 5, torch.randn(50, 2) + 5])
    >>> sorted(GaussianMixture(2).fit(x).weights.tolist())
    [0.5, 0.5]
    """

    def __init__(
        self,
        n_components: int,
        *,
        covariance: Covariance = "full",
        regularization: float = 1e-6,
        max_iterations: int = 10,
        tolerance: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        self.n_components = check_integer("n_components", n_components, minimum=1)
        check_choice("covariance", covariance, ("full", "diag", "tied"))
        self.covariance: Covariance = covariance
        self.regularization = check_number("regularization", regularization, minimum=0)
        self.max_iterations = check_integer("max_iterations", max_iterations, minimum=0)
        self.tolerance = check_number("tolerance", tolerance, minimum=0)
        self.generator = generator

    def fit(self, X: Tensor, *, initial: Tensor | MixtureResult | None = None) -> MixtureResult:
        """Fit to the rows of X [N, E], floating, on any device.

        Args:
            X: the data.
            initial: None starts from k-means++; responsibilities [N, K] start with an M-step; a MixtureResult is a warm
                start, E-step first.

        Raises:
            ValueError: for X that is empty, not finite or too wide for its squares to be, or an `initial` that does not
                fit X.

        Warns:
            UserWarning: when X has fewer distinct rows than components; K is lowered to their number.
        """
        X = _checked_rows(X)
        spread, limit = float((X.amax(dim=0) - X.amin(dim=0)).max()), (torch.finfo(X.dtype).max / X.numel()) ** 0.5
        if spread > limit:
            fail("X", f"columns that span at most {limit:g}, so that {X.dtype} holds their squares", f"{spread:g}")
        em = _ExpectationMaximisation(X, self.covariance, self.regularization)
        if initial is None:
            parameters = em.maximise_from(self._start(X))
        elif isinstance(initial, MixtureResult):
            if initial.means.shape[1] != X.shape[1] or initial.covariance != self.covariance:
                fail(
                    "initial",
                    f"a {self.covariance!r} mixture in {X.shape[1]} dimensions",
                    f"a {initial.covariance!r} one in {initial.means.shape[1]}",
                )
            parameters = em.parameters_of(initial)
        else:
            parameters = em.maximise_from(self._checked_responsibilities(initial, X))

        iterations, converged, previous = 0, False, -math.inf
        while iterations < self.max_iterations and not converged:
            first_of_warm = iterations == 0 and isinstance(initial, MixtureResult)
            parameters, log_likelihood = (em.step_from_afar if first_of_warm else em.step)(parameters)
            converged = abs(log_likelihood - previous) < self.tolerance
            previous = log_likelihood
            iterations += 1
        responsibilities, log_likelihood = em.responsibilities(parameters)
        return MixtureResult(
            weights=parameters.weights.to(X.dtype),
            means=(parameters.means + em.origin.double()).to(X.dtype),
            covariances=parameters.covariances.to(X.dtype),
            responsibilities=responsibilities,
            log_likelihood=log_likelihood,
            iterations=iterations,
            converged=converged,
            covariance=self.covariance,
        )

    def _start(self, X: Tensor) -> Tensor:
        """One-hot responsibilities [N, K] from k-means."""
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        labels, clusters = kmeans(X, self.n_components, generator=generator)
        if clusters < self.n_components:
            warnings.warn(
                f"n_components: {self.n_components} components for {clusters} distinct rows; "
                f"the mixture has {clusters}.",
                stacklevel=3,
            )
        return torch.nn.functional.one_hot(labels, clusters).to(X.dtype)

    def _checked_responsibilities(self, initial: Tensor, X: Tensor) -> Tensor:
        if initial.shape != (len(X), self.n_components):
            fail("initial", f"responsibilities {[len(X), self.n_components]}", shape_of(initial))
        check_finite("initial", initial)
        worst = float((initial.sum(dim=1) - 1).abs().max())
        if worst > 1e-3 or float(initial.min()) < 0:
            fail("initial", "responsibilities: not negative, rows that sum to one", f"rows that miss it by {worst:g}")
        return initial.to(X)


class _Parameters(NamedTuple):
    """In float64; means [K, E] from the origin of the pass."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


class _ExpectationMaximisation:
    """E- and M-steps over one X in chunks. Data enter as x - origin, so that float32 keeps their spread."""

    def __init__(self, X: Tensor, covariance: Covariance, regularization: float) -> None:
        self.X = X
        self.covariance = covariance
        self.regularization = regularization
        self.origin = X.mean(dim=0, dtype=torch.float64).to(X.dtype)

    def parameters_of(self, mixture: MixtureResult) -> _Parameters:
        means = mixture.means.double() - self.origin.double()
        return _Parameters(mixture.weights.double(), means, mixture.covariances.double())

    def responsibilities(self, parameters: _Parameters) -> tuple[Tensor, float]:
        """An E-step: [N, K], and the mean log-likelihood."""
        responsibilities = self.X.new_empty(len(self.X), len(parameters.weights))
        total = self.X.new_zeros((), dtype=torch.float64)
        factors = self._factors(parameters)
        for rows, chunk in self._chunks(len(parameters.weights)):
            r, log_density = self._expect(self._differences(chunk, parameters.means), factors)
            responsibilities[rows] = r.T
            total += log_density.sum(dtype=torch.float64)
        return responsibilities, float(total) / len(self.X)

    def step(self, parameters: _Parameters) -> tuple[_Parameters, float]:
        """An E-step and the M-step after it, in one pass; the log-likelihood is that of the parameters given."""
        moments = _Moments.zeros(parameters.means, self.covariance)
        total = self.X.new_zeros((), dtype=torch.float64)
        factors = self._factors(parameters)
        for _, chunk in self._chunks(len(parameters.weights)):
            differences = self._differences(chunk, parameters.means)
            r, log_density = self._expect(differences, factors)
            moments.add(r, differences)
            total += log_density.sum(dtype=torch.float64)
        log_likelihood = float(total) / len(self.X)
        return self._maximise(moments, parameters.means, parameters), log_likelihood

    def step_from_afar(self, parameters: _Parameters) -> tuple[_Parameters, float]:
        """The same in three passes, for means that may be far from all rows: moments around those are all rounding."""
        responsibilities, log_likelihood = self.responsibilities(parameters)
        return self.maximise_from(responsibilities, parameters), log_likelihood

    def maximise_from(self, responsibilities: Tensor, previous: _Parameters | None = None) -> _Parameters:
        """An M-step from given responsibilities [N, K], those of `previous` where there is one."""
        mass = responsibilities.sum(dim=0, dtype=torch.float64)
        sums = torch.zeros(len(mass), self.X.shape[1], dtype=torch.float64, device=self.X.device)
        for rows, chunk in self._chunks(1):
            sums += (responsibilities[rows].T @ (chunk - self.origin)).double()
        centres = sums / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(1)
        moments = _Moments.zeros(centres, self.covariance)
        for rows, chunk in self._chunks(len(mass)):
            moments.add(responsibilities[rows].T, self._differences(chunk, centres))
        return self._maximise(moments, centres, previous)

    def _maximise(self, moments: _Moments, centres: Tensor, previous: _Parameters | None) -> _Parameters:
        """The M-step from moments that were taken around `centres` [K, E]."""
        mass = moments.mass.clamp(min=torch.finfo(moments.mass.dtype).tiny)
        step = moments.first / mass.unsqueeze(1)  # mu_z - centre_z
        per_row = mass.view(-1, 1) if self.covariance == "diag" else mass.view(-1, 1, 1)
        covariances = moments.second / per_row
        if self.covariance == "diag":
            covariances = (covariances - step.square()).clamp(min=0) + self.regularization
        else:
            covariances = covariances - step.unsqueeze(2) * step.unsqueeze(1)
            if self.covariance == "tied":
                covariances = (moments.mass.view(-1, 1, 1) * covariances).sum(dim=0) / moments.mass.sum()
            covariances.diagonal(dim1=-2, dim2=-1).add_(self.regularization)
        parameters = _Parameters(moments.mass / moments.mass.sum(), centres + step, covariances)
        empty = moments.mass < min(EMPTY_MASS, 0.5 * len(self.X) / len(mass))
        return self._reseed(parameters, empty, previous) if bool(empty.any()) else parameters

    def _reseed(self, parameters: _Parameters, empty: Tensor, previous: _Parameters | None) -> _Parameters:
        """Empty components start again, each at one of the worst-explained rows, with the spread of all the data."""
        vacant = empty.nonzero().squeeze(1)
        if previous is None:
            explained = torch.cat([-(chunk - self.origin).square().sum(dim=1) for _, chunk in self._chunks(1)])
        else:
            factors = self._factors(previous)
            explained = torch.cat(
                [
                    self._expect(self._differences(chunk, previous.means), factors)[1]
                    for _, chunk in self._chunks(len(previous.weights))
                ]
            )
        worst = explained.topk(min(len(vacant), len(explained)), largest=False).indices
        worst = worst[torch.arange(len(vacant), device=worst.device) % len(worst)]
        means, weights = parameters.means.clone(), parameters.weights.clone()
        means[vacant] = (self.X[worst] - self.origin).double()
        weights[vacant] = 1 / len(weights)
        covariances = parameters.covariances
        if self.covariance != "tied":
            whole = _Moments.zeros(means[:1], self.covariance)
            for _, chunk in self._chunks(1):
                whole.add(chunk.new_ones(1, len(chunk)), (chunk - self.origin).unsqueeze(0))
            covariances = covariances.clone()
            covariances[vacant] = whole.second[0] / len(self.X)
            if self.covariance == "full":
                covariances[vacant] += self.regularization * torch.eye(len(self.origin)).to(covariances)
            else:
                covariances[vacant] += self.regularization
        return _Parameters(weights / weights.sum(), means, covariances)

    def _factors(self, parameters: _Parameters) -> tuple[Tensor, Tensor]:
        """What the E-step multiplies x - mu with, and the log of p_z times the normalising constant, [K, 1]."""
        dimensions = self.X.shape[1]
        if self.covariance == "diag":
            variances = parameters.covariances.clamp(min=torch.finfo(torch.float64).tiny)
            whiten = variances.rsqrt().unsqueeze(1)  # [K, 1, E]
            log_determinant = -0.5 * variances.log().sum(dim=1)
        else:
            # Omega = L L^T, so (x - mu)^T Omega^-1 (x - mu) = |(x - mu) L^-T|^2
            lower = _cholesky(parameters.covariances.reshape(-1, dimensions, dimensions))
            identity = torch.eye(dimensions, dtype=lower.dtype, device=lower.device).expand_as(lower)
            whiten = torch.linalg.solve_triangular(lower, identity, upper=False).mT  # [K or 1, E, E]
            log_determinant = -lower.diagonal(dim1=-2, dim2=-1).log().sum(dim=1)
        log_scale = parameters.weights.log() + log_determinant - 0.5 * dimensions * LOG_2PI
        reach = torch.finfo(self.X.dtype).max ** 0.5
        return whiten.clamp(-reach, reach).to(self.X.dtype).contiguous(), log_scale.to(self.X.dtype).unsqueeze(1)

    def _expect(self, differences: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """r [K, n] and log sum_z p_z N(x | mu_z, Omega_z) [n] for differences [K, n, E]."""
        whiten, log_scale = factors
        whitened = differences * whiten if self.covariance == "diag" else differences @ whiten
        # Where squares or their sum over the rows could overflow, one component is as far as the next.
        far = 1e-12 * torch.finfo(whitened.dtype).max
        squared = torch.linalg.vector_norm(whitened, dim=2).square_().nan_to_num_(nan=far).clamp_(max=far)
        log_joint = squared.mul_(-0.5).add_(log_scale)
        # Not exp(log_joint - log_density): far out, the rounding of these two is no longer small against one.
        return log_joint.softmax(dim=0), log_joint.logsumexp(dim=0)

    def _differences(self, chunk: Tensor, means: Tensor) -> Tensor:
        """x - mu_z, [K, n, E]."""
        return (chunk - self.origin).unsqueeze(0) - means.to(chunk.dtype).unsqueeze(1)

    def _chunks(self, components: int) -> Iterator[tuple[slice, Tensor]]:
        size = max(256, CHUNK_FLOATS // (components * self.X.shape[1]))
        for start in range(0, len(self.X), size):
            rows = slice(start, min(start + size, len(self.X)))
            yield rows, self.X[rows]


class _Moments(NamedTuple):
    """Mass [K], first [K, E] and second ([K, E, E], or [K, E] for diag) moments around given centres, in float64."""

    mass: Tensor
    first: Tensor
    second: Tensor

    @staticmethod
    def zeros(centres: Tensor, covariance: Covariance) -> _Moments:
        k, e = centres.shape
        second = centres.new_zeros(k, e) if covariance == "diag" else centres.new_zeros(k, e, e)
        return _Moments(centres.new_zeros(k), torch.zeros_like(centres), second)

    def add(self, responsibilities: Tensor, differences: Tensor) -> None:
        """Add a chunk: responsibilities [K, n] and differences to the centres [K, n, E]."""
        weighted = differences * responsibilities.unsqueeze(2)
        self.mass.add_(responsibilities.sum(dim=1, dtype=torch.float64))
        self.first.add_(weighted.sum(dim=1, dtype=torch.float64))
        if self.second.ndim == 2:
            self.second.add_((weighted * differences).sum(dim=1, dtype=torch.float64))
        else:
            self.second.add_(weighted.mT @ differences)


def _cholesky(covariances: Tensor) -> Tensor:
    """Lower factors of [K, E, E]; what is not positive definite gets a jitter that grows tenfold until it is."""
    lower, info = torch.linalg.cholesky_ex(covariances)
    scale = covariances.diagonal(dim1=-2, dim2=-1).mean(dim=1).abs().clamp(min=torch.finfo(covariances.dtype).tiny)
    eye = torch.eye(covariances.shape[1], dtype=covariances.dtype, device=covariances.device)
    jitter, amount = 1e-12, torch.zeros_like(scale)
    while bool((info != 0).any()):
        check_finite("covariances", covariances)  # no jitter would ever help
        amount = torch.where(info != 0, jitter * scale, amount)  # what has enough keeps it
        lower, info = torch.linalg.cholesky_ex(covariances + amount.view(-1, 1, 1) * eye)
        jitter *= 10
    factors: Tensor = lower
    return factors


def _checked_rows(X: Tensor) -> Tensor:
    if not isinstance(X, Tensor) or not X.is_floating_point() or X.ndim != 2 or 0 in X.shape:
        got = f"{X.dtype} {shape_of(X)}" if isinstance(X, Tensor) else type(X).__name__
        fail("X", "a floating tensor [N, E] with at least one row and column", got)
    check_finite("X", X)
    return X.detach()
