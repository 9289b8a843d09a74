"""Gaussian mixture by expectation maximisation, in torch, on the device of the data."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ._checks import check_choice, check_finite, check_integer, check_matrix, check_number, fail, shape_or_type
from .collective import Group, from_first, gathered, ranks_in
from .expectation import Covariance, ExpectationMaximisation, Parameters
from .faiss_kmeans import faiss_kmeans
from .inference import in_full_precision
from .kmeans import LLOYD_STEPS, centres_of, draw_centres, kmeans

Start = Literal["k-means++", "faiss"]

START_ROWS = 1 << 16  # rows that k-means looks at; of more, so many are drawn


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
        return -2 * len(X) * self.log_likelihood_of(X) + self.free_parameters * math.log(len(X))

    @property
    def free_parameters(self) -> int:
        """How many numbers can be chosen freely: K - 1 weights, the means, and half of each symmetric covariance."""
        k, e = self.means.shape
        per_covariance = e if self.covariance == "diag" else e * (e + 1) // 2
        return k - 1 + k * e + per_covariance * (1 if self.covariance == "tied" else k)

    def rescaled(self, shift: Tensor, scale: Tensor) -> MixtureResult:
        """The mixture of shift + scale * x, columns by columns ([E] each), in float64."""
        shift, scale = shift.double(), scale.double()
        outer = scale.square() if self.covariance == "diag" else scale.unsqueeze(1) * scale
        return replace(
            self,
            weights=self.weights.double(),
            means=shift + scale * self.means.double(),
            covariances=self.covariances.double() * outer,
            log_likelihood=self.log_likelihood - float(scale.abs().log().sum()),
        )

    @in_full_precision
    def _explain(self, X: Tensor) -> tuple[Tensor, float]:
        X = _checked_rows(X).to(torch.promote_types(X.dtype, self.means.dtype))
        if X.shape[1] != self.means.shape[1]:
            fail("X", f"{self.means.shape[1]} columns, as many as the mixture has", X.shape[1])
        em = ExpectationMaximisation(X, self.covariance, regularization=0.0)
        return em.responsibilities(_parameters_for(em, self))


class GaussianMixture:
    """EM for a mixture of K Gaussians: the clustering step of C4's Algorithm 1.

    E-step: r_iz = p_z N(x_i | mu_z, Omega_z) / sum_w p_w N(x_i | mu_w, Omega_w), in log space.
    M-step: p_z = sum_i r_iz / N, mu_z = sum_i r_iz x_i / sum_i r_iz,
    Omega_z = sum_i r_iz (x_i - mu_z)(x_i - mu_z)^T / sum_i r_iz + epsilon I.

    Moments are centred, and chunks of them summed in float64, so that float32 data far from zero are no trouble; rows
    are taken in chunks, so that memory beyond X and the responsibilities does not grow with N. Never a NaN: a
    covariance that is not positive definite gets a growing jitter, and a component that explains nothing is re-seeded
    from the rows that the mixture explains worst.

    Args:
        n_components: K.
        covariance: "full" ([K, E, E]), "diag" ([K, E]) or "tied" (one [E, E] for all).
        regularization: epsilon, added to the diagonal; in squared units of the data.
        max_iterations: EM steps at most.
        tolerance: stop when the mean log-likelihood moves by less.
        generator: for the start. None: a private one with seed 0 for each fit.
        start: k-means on at most 65,536 rows (of more, so many are drawn): "k-means++" with five Lloyd steps, or
            "faiss", which needs FAISS.
        standardize: run EM on columns of mean 0 and standard deviation 1 (divisor N; constant columns are divided by
            1). The regularisation is then in squared units of those; the result is in X's units, in float64.
        process_group: a torch.distributed group whose ranks each hold some of the rows and all call `fit`. The moments
            are summed over the ranks, and each ends with the mixture of the union and its own rows' responsibilities.
            All ranks must start alike (`initial`), and an error on one leaves the others waiting.

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
        start: Start = "k-means++",
        standardize: bool = False,
        process_group: Group | None = None,
    ) -> None:
        self.n_components = check_integer("n_components", n_components, minimum=1)
        check_choice("covariance", covariance, ("full", "diag", "tied"))
        self.covariance: Covariance = covariance
        self.regularization = check_number("regularization", regularization, minimum=0)
        self.max_iterations = check_integer("max_iterations", max_iterations, minimum=0)
        self.tolerance = check_number("tolerance", tolerance, minimum=0)
        self.generator = generator
        check_choice("start", start, ("k-means++", "faiss"))
        self.start: Start = start
        self.standardize = standardize
        self.process_group = process_group

    @in_full_precision
    def fit(self, X: Tensor, *, initial: Tensor | MixtureResult | None = None) -> MixtureResult:
        """Fit to the rows of X [N, E], floating, on any device.

        Args:
            X: the data.
            initial: None starts from k-means++; responsibilities [N, K] start with an M-step; a MixtureResult is a warm
                start, E-step first, whose number of components is kept.

        Raises:
            ValueError: for X that is empty, not finite or too wide for its squares to be, or an `initial` that does not
                fit X.

        Warns:
            UserWarning: when X has fewer distinct rows than components; K is lowered to their number.
        """
        X = _checked_rows(X)
        largest = torch.finfo(X.dtype).max
        # standardised columns span at most sqrt(N), but their variance is taken in float64
        squares = torch.finfo(torch.float64).max if self.standardize else largest
        limit = min(largest / 4, (squares / X.numel()) ** 0.5)
        lowest, highest = X.aminmax()
        spread = float(highest - lowest)
        if spread > limit:  # of one column perhaps not, but that takes longer to find out
            spread = float((X.amax(dim=0) - X.amin(dim=0)).max())
        if spread > limit:
            held = "them" if self.standardize else "their squares"
            fail("X", f"columns that span at most {limit:g}, so that {X.dtype} holds {held}", f"{spread:g}")
        em = ExpectationMaximisation(
            X, self.covariance, self.regularization, standardize=self.standardize, process_group=self.process_group
        )
        if initial is None:
            parameters = em.maximise_from(em.one_hot_nearest(self._centres(em)))
        elif isinstance(initial, MixtureResult):
            if initial.means.shape[1] != X.shape[1] or initial.covariance != self.covariance:
                fail(
                    "initial",
                    f"a {self.covariance!r} mixture in {X.shape[1]} dimensions",
                    f"a {initial.covariance!r} one in {initial.means.shape[1]}",
                )
            if len(initial.means) > self.n_components:
                fail("initial", f"at most {self.n_components} components", len(initial.means))
            parameters = _parameters_for(em, initial)
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
        found = MixtureResult(
            weights=parameters.weights,
            means=parameters.means,
            covariances=parameters.whole_covariances(self.covariance),
            responsibilities=responsibilities,
            log_likelihood=log_likelihood,
            iterations=iterations,
            converged=converged,
            covariance=self.covariance,
        )
        if em.scale is not None:
            return found.rescaled(em.origin, em.scale)
        return replace(
            found,
            weights=found.weights.to(X.dtype),
            means=(found.means + em.origin.double()).to(X.dtype),
            covariances=found.covariances.to(X.dtype),
        )

    def _centres(self, em: ExpectationMaximisation) -> Tensor:
        """Where the components start: [K, E] in the units of EM."""
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        most = START_ROWS // ranks_in(self.process_group)
        rows: slice | Tensor = slice(None)
        if len(em.X) > most:
            drawn = (torch.rand(most, generator=generator, dtype=torch.float64, device="cpu") * len(em.X)).long()
            rows = drawn.unique().to(em.X.device)
        sample = gathered(em.rows_at(rows), self.process_group)
        centres = self._centres_of(sample, generator)
        if len(centres) < self.n_components and len(sample) < em.rows:
            # Among the rows that were not drawn there may be others.
            centres = self._centres_of(torch.cat([sample, self._distinct(em, generator)]), generator)
        if len(centres) < self.n_components:
            warnings.warn(
                f"n_components: {self.n_components} components for {len(centres)} distinct rows; "
                f"the mixture has {len(centres)}.",
                stacklevel=4,
            )
        return from_first(centres, self.process_group)

    def _centres_of(self, sample: Tensor, generator: torch.Generator) -> Tensor:
        if self.start == "k-means++":
            return kmeans(sample, self.n_components, generator=generator)
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device="cpu"))
        labels, clusters = faiss_kmeans(sample, self.n_components, seed=seed, iterations=LLOYD_STEPS)
        return centres_of(sample, labels, sample[:clusters])

    def _distinct(self, em: ExpectationMaximisation, generator: torch.Generator) -> Tensor:
        """Up to K rows of each rank that differ, in the units of EM; fewer only where there are no more."""
        found = em.rows_at(slice(0, 0))
        for start in range(0, len(em.X), START_ROWS):
            part = em.rows_at(slice(start, start + START_ROWS))
            found = draw_centres(torch.cat([found, part]), self.n_components, generator=generator)
        return gathered(found, self.process_group)

    def _checked_responsibilities(self, initial: Tensor, X: Tensor) -> Tensor:
        if not isinstance(initial, Tensor) or initial.shape != (len(X), self.n_components):
            got = shape_or_type(initial)
            fail("initial", f"responsibilities {[len(X), self.n_components]}", got)
        check_finite("initial", initial)
        initial = initial.detach()
        worst = float((initial.sum(dim=1) - 1).abs().max())
        if worst > 1e-3 or float(initial.min()) < 0:
            fail("initial", "responsibilities: not negative, rows that sum to one", f"rows that miss it by {worst:g}")
        return initial.to(X)


def _parameters_for(em: ExpectationMaximisation, mixture: MixtureResult) -> Parameters:
    """The mixture's, in the units of EM."""
    scale = torch.ones_like(em.origin) if em.scale is None else em.scale
    inner = mixture.rescaled(-em.origin.double() / scale.double(), 1 / scale.double())
    return Parameters(inner.weights, inner.means, inner.covariances)


def _checked_rows(X: Tensor) -> Tensor:
    X = check_matrix("X", X)
    return X.detach().float() if X.dtype in (torch.float16, torch.bfloat16) else X.detach()
