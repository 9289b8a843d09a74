"""What a d3rlpy algorithm's critics make of the data: for comparing runs with and without C4 by the same yardstick."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from d3rlpy.models.torch.q_functions.iqn_q_function import ContinuousIQNQFunction, DiscreteIQNQFunction

from c4buffer import MixtureClusterer, ReducedClusterer, Transitions, decompose_cross_covariance, stacked_gradients
from c4buffer._checks import fail
from c4buffer.inference import noise_of_its_own
from c4buffer.losses.covariance import span_of
from c4buffer.networks import evaluating

from .dataset import has_images, scaled_observations, to_mini_batch
from .reading import critics_of, is_discrete, networks_of

CHUNK_ROWS = 4096  # of data at once; algorithms sample many actions of each row


def measure(algo: Any, transitions: Transitions, *, n_clusters: int = 3) -> dict[str, float]:
    """Value, loss and cross-covariance over all the data; the training's random numbers are not used.

    Args:
        algo: a built algorithm, wrapped or not.
        transitions: `transitions_of(dataset, algo)`, scaled as the networks see them; images may be stored ones, and
            some hundred of them, as `transitions[:500]`, are enough and take 2 MB each.
        n_clusters: K of the mixture that splits the cross-covariance; fitted anew each time, to whatever algorithm.
            Gradients of more than 256 columns, as those by pixels, are reduced for it alone (see `ReducedClusterer`).

    Returns:
        mean_q: mean over data and members of Q(s, a).
        td_loss: mean over data and members of the critic's loss against the algorithm's own target.
        total, within, between: Frobenius norms of C = Cov(g', g), E[C_Z] and Cov(mu'_Z, mu_Z) (Theorem 2).
        correlation: ||C||_F / sqrt(tr Sigma' tr Sigma), from 0 to 1 (Eq. 10).
        gradient_norm, target_gradient_norm: root mean square of |g| and |g'|.
    """
    if not isinstance(transitions, Transitions):
        fail("transitions", "Transitions, as transitions_of(dataset, algo)", type(transitions).__name__)
    critics = critics_of(algo)
    if has_images(transitions.observations):  # as a buffer stores them
        columns = dict(transitions.columns())
        for name in ("observations", "next_observations"):
            columns[name] = scaled_observations(columns[name], algo.observation_scaler)
        transitions = Transitions.unchecked(columns)
    embeddings = stacked_gradients(critics, transitions)
    responsibilities = ReducedClusterer(MixtureClusterer(n_clusters))(embeddings, None)
    target_g, g = embeddings.double().chunk(2, dim=1)
    basis = span_of(target_g, g)
    if basis is not None:
        target_g, g = target_g @ basis, g @ basis
    parts = decompose_cross_covariance(target_g, g, responsibilities.double())
    total, within, between = (float(torch.linalg.matrix_norm(part)) for part in parts)
    bound = float((target_g.var(dim=0, correction=0).sum() * g.var(dim=0, correction=0).sum()).sqrt())
    with evaluating(networks_of(algo.impl).modules()):  # the target reads more of them than the critics
        mean_q, td_loss = _value_and_loss(algo, transitions)
    return {
        "mean_q": mean_q,
        "td_loss": td_loss,
        "total": total,
        "within": within,
        "between": between,
        "correlation": total / bound if bound > 0 else 0.0,
        "gradient_norm": float(g.square().sum(dim=1).mean().sqrt()),
        "target_gradient_norm": float(target_g.square().sum(dim=1).mean().sqrt()),
    }


def _value_and_loss(algo: Any, transitions: Transitions) -> tuple[float, float]:
    impl = algo.impl
    q_sum, loss_sum = 0.0, 0.0
    with torch.no_grad(), noise_of_its_own(torch.device(algo._device)):
        for start in range(0, len(transitions), CHUNK_ROWS):
            part = transitions[start : start + CHUNK_ROWS]
            batch = to_mini_batch(part, algo)
            actions = batch.actions
            if is_discrete(impl):
                actions = actions.long()
                q = impl._q_func_forwarder.compute_expected_q(batch.observations, "mean").gather(1, actions)
            else:
                q = impl._q_func_forwarder.compute_expected_q(batch.observations, actions, "mean")
            with _as_many_quantiles_as_in_training(impl):
                loss = impl._q_func_forwarder.compute_error(
                    observations=batch.observations,
                    actions=actions,
                    rewards=batch.rewards,
                    target=impl.compute_target(batch),
                    terminals=batch.terminals,
                    gamma=impl._gamma**batch.intervals,
                )
            q_sum += float(q.sum())
            loss_sum += float(loss) * len(part)
    members = len(impl._q_func_forwarder.forwarders)
    return q_sum / len(transitions), loss_sum / len(transitions) / members


@contextlib.contextmanager
def _as_many_quantiles_as_in_training(impl: Any) -> Iterator[None]:
    """An implicit quantile network has fewer when it evaluates, and its loss wants those of training."""
    implicit = (ContinuousIQNQFunction, DiscreteIQNQFunction)
    networks = [*impl.modules.q_funcs.modules(), *impl.modules.targ_q_funcs.modules()]
    changed = [network for network in networks if isinstance(network, implicit) and not network.training]
    for network in changed:
        network.training = True  # its own flag: dropout below it stays off
    try:
        yield
    finally:
        for network in changed:
            network.training = False
