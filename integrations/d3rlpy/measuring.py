"""What a d3rlpy algorithm's critics make of the data: for comparing runs with and without C4 by the same yardstick."""

from typing import Any

import torch

from c4buffer import MixtureClusterer, Transitions, decompose_cross_covariance, stacked_gradients

from .dataset import to_mini_batch
from .reading import critics_of, is_discrete


def measure(algo: Any, transitions: Transitions, *, n_clusters: int = 3) -> dict[str, float]:
    """Value, loss and cross-covariance over all the data; the training's random numbers are not used.

    Args:
        algo: a built algorithm, wrapped or not.
        transitions: `transitions_of(dataset, algo)`, scaled as the networks see them.
        n_clusters: K of the mixture that splits the cross-covariance; fitted anew each time, to whatever algorithm.

    Returns:
        mean_q: mean over data and members of Q(s, a).
        td_loss: mean over data and members of the critic's loss against the algorithm's own target.
        total, within, between: Frobenius norms of C = Cov(g', g), E[C_Z] and Cov(mu'_Z, mu_Z) (Theorem 2).
        correlation: ||C||_F / sqrt(tr Sigma' tr Sigma), from 0 to 1 (Eq. 10).
        gradient_norm, target_gradient_norm: root mean square of |g| and |g'|.
    """
    critics = critics_of(algo)
    embeddings = stacked_gradients(critics, transitions)
    responsibilities = MixtureClusterer(n_clusters)(embeddings)
    target_g, g = embeddings.double().chunk(2, dim=1)
    parts = decompose_cross_covariance(target_g, g, responsibilities.double())
    total, within, between = (float(torch.linalg.matrix_norm(part)) for part in parts)
    bound = float((target_g.var(dim=0, correction=0).sum() * g.var(dim=0, correction=0).sum()).sqrt())
    with critics.evaluating():
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
    impl, batch = algo.impl, to_mini_batch(transitions, algo)
    devices = [torch.device(algo._device)] if "cuda" in algo._device else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        actions = batch.actions
        if is_discrete(impl):
            actions = actions.long()
            q = impl._q_func_forwarder.compute_expected_q(batch.observations, "mean").gather(1, actions)
        else:
            q = impl._q_func_forwarder.compute_expected_q(batch.observations, actions, "mean")
        loss = impl._q_func_forwarder.compute_error(
            observations=batch.observations,
            actions=actions,
            rewards=batch.rewards,
            target=impl.compute_target(batch),
            terminals=batch.terminals,
            gamma=impl._gamma**batch.intervals,
        )
    return float(q.mean()), float(loss) / len(impl._q_func_forwarder.forwarders)
