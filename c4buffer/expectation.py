"""The E- and M-steps of a Gaussian mixture over one X, in chunks, with centred moments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import check_finite
from .collective import Group, gathered, rows_in, total
from .memory import floats_at_once
from .products import Buffers, product
from .scaling import column_scaling, column_sums

Covariance = Literal["full", "diag", "tied"]

CHUNK_FLOATS = 5 << 16  # of [K, rows, E] per pass: little more than a megabyte, so that a chunk stays in the cache
FEWEST_ROWS = 512  # in a chunk, or a matrix product is too small to be fast
BLOCK = 64  # columns of a product with a triangular or into a symmetric matrix: what is zero or known is left out
BLOCKS_FROM = 128  # columns from which blocks pay
FAR = 3  # deviations that a mean may move by; if more, the moments around it are taken again, as digits are lost
LARGEST_JITTER = 1e6  # times each variance: any matrix of correlations is positive definite before
COPIES = 16  # badly explained rows that are looked at for each that is wanted, as some may be equal
EMPTY_MASS = 0.5  # a component that explains less than half a row is empty
LOG_2PI = math.log(2 * math.pi)


class Parameters(NamedTuple):
    """p [K], mu [K, E] and Omega ([K, E, E], [K, E] for diag, [E, E] for tied), float64, in units of the pass.

    Of covariance matrices, only the lower triangle is meant.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def whole_covariances(self, covariance: Covariance) -> Tensor:
        """Omega with its upper triangle."""
        if covariance == "diag":
            return self.covariances
        return self.covariances.tril() + self.covariances.tril(-1).mT


class ExpectationMaximisation:
    """E- and M-steps over one X [N, E]. Data enter as u = (x - origin) / scale, so that float32 keeps their spread.

    Rows lie along the last dimension of a chunk ([E, n], [K, E, n]): what is the same for all columns of a row, or for
    all rows of a column, is then applied to many numbers at once. A chunk lives in buffers until the next is asked for.

    Args:
        X: the rows; of a process group, this rank's.
        covariance: "full", "diag" or "tied".
        regularization: epsilon, added to the diagonal of Omega in units of u.
        standardize: scale is the columns' standard deviation, not 1.
        process_group: whose ranks hold the other rows; moments are summed over them.
    """

    def __init__(
        self,
        X: Tensor,
        covariance: Covariance,
        regularization: float,
        *,
        standardize: bool = False,
        process_group: Group | None = None,
    ) -> None:
        self.X = X.detach()
        self.buffers = Buffers(X)
        self.covariance = covariance
        self.regularization = regularization
        self.group = process_group
        self.rows = rows_in(X, process_group)
        if standardize:
            mean, scale = column_scaling(X, process_group=process_group)
            self.scale: Tensor | None = scale.to(X.dtype)
        else:
            mean = total(column_sums(X), process_group) / self.rows
            self.scale = None
        self.origin = mean.to(X.dtype)

    def rows_at(self, rows: slice | Tensor) -> Tensor:
        """u of some rows."""
        centred = self.X[rows] - self.origin
        return centred if self.scale is None else centred.div_(self.scale)

    def one_hot_nearest(self, centres: Tensor) -> Tensor:
        """Responsibilities [N, K]: each row is its nearest centre's, [K, E] in units of u."""
        responsibilities = self.X.new_zeros(len(self.X), len(centres))
        for rows, chunk in self._chunks(len(centres)):
            nearest = self._differences(chunk, centres).square_().sum(dim=1).argmin(dim=0)
            responsibilities[rows].scatter_(1, nearest.unsqueeze(1), 1)
        return responsibilities

    def responsibilities(self, parameters: Parameters) -> tuple[Tensor, float]:
        """An E-step: [N, K], and the mean log-likelihood of u."""
        responsibilities = self.X.new_empty(len(self.X), len(parameters.weights))
        summed = self.X.new_zeros((), dtype=torch.float64)
        factors = self._factors(parameters)
        for rows, chunk in self._chunks(len(parameters.weights)):
            r, log_density = self._expect(self._differences(chunk, parameters.means), factors)
            responsibilities[rows] = r.T
            summed += log_density.sum(dtype=torch.float64)
        return responsibilities, float(total(summed, self.group)) / self.rows

    def step(self, parameters: Parameters) -> tuple[Parameters, float]:
        """An E-step and the M-step after it, in one pass; the log-likelihood is that of the parameters given."""
        moments = _Moments.zeros(parameters.means, self.covariance)
        summed = self.X.new_zeros((), dtype=torch.float64)
        factors = self._factors(parameters)
        for _, chunk in self._chunks(len(parameters.weights)):
            differences = self._differences(chunk, parameters.means)
            r, log_density = self._expect(differences, factors)
            moments.add(r, differences, self.buffers)
            summed += log_density.sum(dtype=torch.float64)
        log_likelihood = float(total(summed, self.group)) / self.rows
        moments = moments.over(self.group)
        if moments.far_off(self.regularization):
            return self.step_from_afar(parameters)
        return self._maximise(moments, parameters.means, parameters), log_likelihood

    def step_from_afar(self, parameters: Parameters) -> tuple[Parameters, float]:
        """The same in three passes, for means that may be far from all rows: moments around those are all rounding."""
        responsibilities, log_likelihood = self.responsibilities(parameters)
        return self.maximise_from(responsibilities, parameters), log_likelihood

    def maximise_from(self, responsibilities: Tensor, previous: Parameters | None = None) -> Parameters:
        """An M-step from given responsibilities [N, K], those of `previous` where there is one."""
        mass = total(column_sums(responsibilities), self.group)
        sums = torch.zeros(len(mass), self.X.shape[1], dtype=torch.float64, device=self.X.device)
        for rows, chunk in self._chunks(1):
            sums += (chunk @ responsibilities[rows]).T
        centres = total(sums, self.group) / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(1)
        moments = _Moments.zeros(centres, self.covariance)
        for rows, chunk in self._chunks(len(mass)):
            moments.add(responsibilities[rows].T, self._differences(chunk, centres), self.buffers)
        return self._maximise(moments.over(self.group), centres, previous)

    def _maximise(self, moments: _Moments, centres: Tensor, previous: Parameters | None) -> Parameters:
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
        parameters = Parameters(moments.mass / moments.mass.sum(), centres + step, covariances)
        empty = moments.mass < min(EMPTY_MASS, 0.5 * self.rows / len(mass))
        return self._reseed(parameters, empty, previous) if bool(empty.any()) else parameters

    def _reseed(self, parameters: Parameters, empty: Tensor, previous: Parameters | None) -> Parameters:
        """Empty components start again, each at one of the worst-explained rows, with the spread of all the data."""
        vacant = empty.nonzero().squeeze(1)
        means, weights = parameters.means.clone(), parameters.weights.clone()
        worst = self._worst_explained(len(vacant), previous)
        means[vacant] = worst[torch.arange(len(vacant), device=worst.device) % len(worst)].double()
        weights[vacant] = 1 / len(weights)
        covariances = parameters.covariances
        if self.covariance != "tied":
            whole = _Moments.zeros(means[:1], self.covariance)
            for _, chunk in self._chunks(1):
                whole.add(chunk.new_ones(1, chunk.shape[1]), chunk.unsqueeze(0), self.buffers)
            covariances = covariances.clone()
            covariances[vacant] = whole.over(self.group).second[0] / self.rows
            if self.covariance == "full":
                covariances[vacant] += self.regularization * torch.eye(len(self.origin), device="cpu").to(covariances)
            else:
                covariances[vacant] += self.regularization
        return Parameters(weights / weights.sum(), means, covariances)

    def _worst_explained(self, count: int, previous: Parameters | None) -> Tensor:
        """u of the rows that `previous` explains worst, of those farthest from the origin where there is none."""
        if previous is None:
            parts = [-chunk.square_().sum(dim=0) for _, chunk in self._chunks(1)]
        else:
            factors = self._factors(previous)
            differences = (self._differences(chunk, previous.means) for _, chunk in self._chunks(len(previous.weights)))
            parts = [self._expect(part, factors)[1] for part in differences]
        explained, rows = torch.cat(parts).topk(min(COPIES * count, len(self.X)), largest=False)
        candidates = gathered(self.rows_at(rows), self.group)
        candidates = candidates[gathered(explained, self.group).argsort(stable=True)]
        which = torch.unique(candidates, dim=0, return_inverse=True)[1]  # two at equal rows would stay one for ever
        first = which.new_full((len(which),), len(which)).scatter_reduce_(
            0, which, torch.arange(len(which), device=which.device), "amin"
        )
        return candidates[first[first < len(which)].sort().values[:count]]

    def _factors(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """What the E-step multiplies u - mu with, and the log of p_z times the normalising constant, [K, 1]."""
        dimensions = self.X.shape[1]
        if self.covariance == "diag":
            variances = parameters.covariances.clamp(min=torch.finfo(torch.float64).tiny)
            whiten = variances.rsqrt().unsqueeze(2)  # [K, E, 1]
            log_determinant = -0.5 * variances.log().sum(dim=1)
        else:
            # Omega = L L^T, so (u - mu)^T Omega^-1 (u - mu) = |L^-1 (u - mu)|^2
            lower = cholesky(parameters.covariances.reshape(-1, dimensions, dimensions))
            identity = torch.eye(dimensions, dtype=lower.dtype, device=lower.device).expand_as(lower)
            whiten = torch.linalg.solve_triangular(lower, identity, upper=False)  # [K or 1, E, E], lower triangular
            log_determinant = -lower.diagonal(dim1=-2, dim2=-1).log().sum(dim=1)
        log_scale = parameters.weights.log() + log_determinant - 0.5 * dimensions * LOG_2PI
        reach = torch.finfo(self.X.dtype).max ** 0.5
        return whiten.clamp(-reach, reach).to(self.X.dtype).contiguous(), log_scale.to(self.X.dtype).unsqueeze(1)

    def _expect(self, differences: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """r [K, n] and log sum_z p_z N(u | mu_z, Omega_z) [n] for differences [K, E, n]."""
        whiten, log_scale = factors
        log_joint = self._squared_distances(differences, whiten).mul_(-0.5).add_(log_scale)
        # Not exp(log_joint - log_density): far out, the rounding of these two is no longer small against one.
        nearest = log_joint.amax(dim=0)
        # Below the smallest normal number, where arithmetic is ten times slower, r is zero.
        least = math.log(torch.finfo(log_joint.dtype).tiny) + 4
        r = torch.threshold_(log_joint.sub_(nearest).clamp_(min=least).exp_(), math.exp(least + 1), 0)
        summed = r.sum(dim=0)
        return r.div_(summed), summed.log().add_(nearest)

    def _squared_distances(self, differences: Tensor, whiten: Tensor) -> Tensor:
        """Squared Mahalanobis distances, [K, n]."""
        components, dimensions, rows = differences.shape
        # Where squares or their sum over the rows could overflow, one component is as far as the next.
        far = 1e-12 * torch.finfo(differences.dtype).max
        squared = differences.new_zeros(components, rows)
        for a, b in _blocks(dimensions):
            whitened = self.buffers.products(components, b - a, rows)
            if self.covariance == "diag":
                torch.mul(differences[:, a:b], whiten[:, a:b], out=whitened)
            else:
                factor = whiten[:, a:b, :b].expand(components, -1, -1)
                product(factor, differences[:, :b], out=whitened)
            squared += whitened.square_().sum(dim=1).nan_to_num_(nan=far)
        return squared.clamp_(max=far)

    def _differences(self, chunk: Tensor, means: Tensor) -> Tensor:
        """u - mu_z, [K, E, n], in a buffer."""
        differences = self.buffers.differences(len(means), *chunk.shape)
        return torch.sub(chunk.unsqueeze(0), means.to(chunk.dtype).unsqueeze(2), out=differences)

    def _chunk_rows(self, components: int) -> int:
        floats = floats_at_once(self.X.device, cached=CHUNK_FLOATS)
        return min(len(self.X), max(FEWEST_ROWS, floats // (components * self.X.shape[1])))

    def _chunks(self, components: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their u, [E, n] in a buffer: as many at once as the device takes well."""
        size = self._chunk_rows(components)
        for start in range(0, len(self.X), size):
            rows = slice(start, min(start + size, len(self.X)))
            columns = self.X[rows].T
            chunk = torch.sub(columns, self.origin.unsqueeze(1), out=self.buffers.chunk(*columns.shape))
            yield rows, chunk if self.scale is None else chunk.div_(self.scale.unsqueeze(1))


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

    def add(self, responsibilities: Tensor, differences: Tensor, buffers: Buffers) -> None:
        """Add a chunk: responsibilities [K, n] and differences to the centres [K, E, n].

        With many columns, only the lower triangle of `second`: the Cholesky factor needs no more.
        """
        self.mass.add_(responsibilities.sum(dim=1, dtype=torch.float64))
        weighted = buffers.products(*differences.shape)
        torch.mul(differences, responsibilities.unsqueeze(1), out=weighted)
        self.first.add_(weighted.sum(dim=2))
        if self.second.ndim == 2:
            self.second.add_(weighted.mul_(differences).sum(dim=2))
        else:
            for a, b in _blocks(differences.shape[1]):
                self.second[:, a:b, :b].add_(product(weighted[:, a:b], differences[:, :b].mT))

    def far_off(self, regularization: float) -> bool:
        """Whether a mean is so many deviations from its centre that the second moment holds little but that."""
        mass = self.mass.clamp(min=torch.finfo(self.mass.dtype).tiny).unsqueeze(1)
        squares = self.second if self.second.ndim == 2 else self.second.diagonal(dim1=1, dim2=2)
        step = (self.first / mass).square()
        return bool((FAR**2 * (squares / mass - step + regularization) < step).any())

    def over(self, group: Group | None) -> _Moments:
        """Those of all ranks together."""
        return _Moments(*(total(moment, group) for moment in self))


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    """Of rows of a triangular or symmetric matrix; few columns are one block."""
    size = columns if columns < BLOCKS_FROM else BLOCK
    for start in range(0, columns, size):
        yield start, min(start + size, columns)


def cholesky(covariances: Tensor) -> Tensor:
    """Lower factors of [K, E, E]; what is not positive definite gets a jitter that grows tenfold until it is.

    The jitter is relative to each variance (and to 1 where that is zero), so that it depends on no column's unit. Where
    none helps, the variances alone are left.
    """
    lower, info = torch.linalg.cholesky_ex(covariances)
    variances = covariances.diagonal(dim1=-2, dim2=-1).abs()
    scale = torch.where(variances > 0, variances, torch.ones_like(variances))
    jitter, amount = 1e-12, torch.zeros_like(scale)
    while bool((info != 0).any()):
        check_finite("covariances", covariances)  # no jitter would ever help
        bad = (info != 0).unsqueeze(1)
        if jitter > LARGEST_JITTER:  # not the correlations of anything: rounding has left no more than variances
            covariances, jitter = torch.where(bad.unsqueeze(2), scale.diag_embed(), covariances), 0.0
        amount = torch.where(bad, jitter * scale, amount)  # what has enough keeps it
        lower, info = torch.linalg.cholesky_ex(covariances + amount.diag_embed())
        jitter *= 10
    factors: Tensor = lower
    return factors
