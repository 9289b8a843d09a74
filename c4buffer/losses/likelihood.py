"""Where ACTIVE's constraint E[log pi(a | s)] >= H_D may stand: H_D from the data alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_fraction, check_integer, check_number, fail, is_finite_number, shape_or_type
from ..inference import noise_of_its_own, outside_inference_mode
from ..memory import parts_of
from ..transitions import Transitions

EVALUATIONS = 20  # of the held-out likelihood while the policy is fitted
CHUNK_ROWS = 1024  # judged at once: images are large


@outside_inference_mode
def estimate_log_likelihood_target(
    transitions: Transitions,
    make_policy: Callable[[], Any],
    *,
    method: Literal["quantile", "fraction"] | None = None,
    quantile: float | None = None,
    fraction: float | None = None,
    action_bounds: tuple[float, float] = (-1.0, 1.0),
    held_out: float = 0.1,
    updates: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> float:
    """H_D of Eq. 12, in nats per action vector, from what behaviour cloning reaches on rows that it has not seen.

    The paper sets H_D by data set and leaves its values unpublished; both ways here are ours. A policy of the family
    that will be trained is fitted to the data's actions by maximum likelihood, and its best held-out moment is kept: on
    what it has seen, a network can be as likely as it likes. With L its held-out log-likelihood by row:

        quantile: H_D = the quantile of L by row. The median is the default: it does not see the few rows, many with
            actions at the edge of their box, that draw the mean down by nats.
        fraction: H_D = L_0 + fraction (mean L - L_0), where L_0 = -A log(high - low) is that of the uniform policy:
            how far the policy has to go from knowing nothing to the behaviour.

    Args:
        transitions: with continuous actions [N, A], scaled as the policy will see them.
        make_policy: makes a new policy, on the transitions' device: a module with `log_prob(observations, actions) ->
            [B]`, summed over action dimensions. The random numbers of its initialisation are of `seed`.
        method: "quantile" or "fraction". None: "fraction" where that is given, else "quantile".
        quantile, fraction: from 0 to 1, one of them; None: 0.5, and 0.8.
        action_bounds: of each action dimension, for "fraction".
        held_out: the share of rows, drawn at random, on which the policy is judged.
        updates, batch_size, learning_rate: of the fit, by Adam.
        seed: global generators are left as they are.

    Raises:
        ValueError: for discrete actions, values outside their ranges, and a policy whose likelihoods are not
            finite, or not [B].
    """
    method = method or ("quantile" if fraction is None else "fraction")
    check_choice("method", method, ("quantile", "fraction"))
    for other, name, value in (("fraction", "quantile", quantile), ("quantile", "fraction", fraction)):
        if value is not None:
            check_fraction(name, value)
            if method == other:
                fail(name, f"None where the method is {other!r}", repr(value))
    check_fraction("held_out", held_out, open_ends=True)
    for name, count in (("updates", updates), ("batch_size", batch_size)):
        check_integer(name, count, minimum=1)
    check_number("learning_rate", learning_rate, minimum=0, exclusive=True)
    seed = check_integer("seed", seed, minimum=0)
    pair = isinstance(action_bounds, (tuple, list)) and len(action_bounds) == 2
    if not pair or not all(map(is_finite_number, action_bounds)) or not action_bounds[0] < action_bounds[1]:
        fail("action_bounds", "(low, high), finite, with low below high", repr(action_bounds))
    if not isinstance(transitions, Transitions):
        fail("transitions", "a Transitions record", type(transitions).__name__)
    if isinstance(make_policy, nn.Module) or not callable(make_policy):
        fail("make_policy", "a callable that makes a policy, as `lambda: Policy(...)`", type(make_policy).__name__)
    if not transitions.actions.is_floating_point():
        fail("transitions", "continuous actions, which have a density", "discrete ones")
    if len(transitions) < 2:
        fail("transitions", "at least two, one to fit and one to judge by", len(transitions))
    uniform = -transitions.actions.shape[1] * math.log(action_bounds[1] - action_bounds[0])
    likelihoods = _held_out_likelihoods(transitions, make_policy, held_out, updates, batch_size, learning_rate, seed)
    if method == "quantile":
        return float(torch.quantile(likelihoods, 0.5 if quantile is None else quantile))
    return uniform + (0.8 if fraction is None else fraction) * (float(likelihoods.mean()) - uniform)


def _held_out_likelihoods(
    transitions: Transitions,
    make_policy: Callable[[], Any],
    held_out: float,
    updates: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Tensor:
    """log pi(a | s) of the rows that were held out, by the policy at its best moment, float64."""
    device = transitions.actions.device
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(transitions), generator=generator, device="cpu")
    judged = max(1, min(len(order) - 1, round(held_out * len(order))))
    unseen, seen = transitions[order[:judged].to(device)], order[judged:]
    with noise_of_its_own(device, seed=seed), torch.enable_grad():
        policy = make_policy()
        if not (isinstance(policy, nn.Module) and callable(getattr(policy, "log_prob", None))):
            fail("make_policy", "a module with log_prob(observations, actions)", type(policy).__name__)
        log_prob_of: Any = policy.log_prob
        optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
        best: Tensor | None = None
        for update in range(updates + 1):
            if update % max(1, updates // EVALUATIONS) == 0 or update == updates:
                found = _judged(policy, unseen)
                if not bool(torch.isfinite(found).all()):
                    expected = "a policy with finite log-likelihoods (a squashed one has none at its actions' bounds)"
                    fail("make_policy", expected, f"{float(found.sum())} in all")
                if best is None or found.mean() > best.mean():
                    best = found
            if update == updates:
                break
            drawn = torch.randint(len(seen), (batch_size,), generator=generator, device="cpu")
            rows = transitions[seen[drawn].to(device)]
            optimizer.zero_grad()
            (-log_prob_of(rows.observations, rows.actions).mean()).backward()
            optimizer.step()
    assert best is not None
    return best


def _judged(policy: Any, transitions: Transitions) -> Tensor:
    """log pi(a | s) of each row, float64, by the policy as it acts."""
    policy.eval()
    parts = [transitions[start:stop] for start, stop in parts_of(len(transitions), CHUNK_ROWS)]
    found = []
    with torch.no_grad():
        for part in parts:
            log_prob = policy.log_prob(part.observations, part.actions)
            if not isinstance(log_prob, Tensor) or log_prob.shape != part.rewards.shape:
                got = shape_or_type(log_prob)
                expected = f"a policy whose log_prob is [B], B = {len(part)}, summed over action dimensions"
                fail("make_policy", expected, got)
            found.append(log_prob.cpu().double())
    policy.train()
    return torch.cat(found)
