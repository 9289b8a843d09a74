"""The d3rlpy adapter against formulas written out on the host's own networks, with targets unlike the critics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import d3rlpy
import gymnasium
import pytest
import torch
from c4buffer.integrations.d3rlpy import C4Config, wrap
from d3rlpy.algos import DiscreteCQLConfig, DiscreteSACConfig, DQNConfig, SACConfig, TD3Config
from d3rlpy.dataset import MixedReplayBuffer, ReplayBuffer, create_fifo_replay_buffer
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.models.q_functions import IQNQFunctionFactory, MeanQFunctionFactory, QRQFunctionFactory
from d3rlpy.models.torch import DiscreteQFunction
from d3rlpy.preprocessing import MinMaxActionScaler, StandardObservationScaler
from d3rlpy.torch_utility import TorchMiniBatch
from torch import Tensor, nn

from c4buffer import Transitions

from .test_d3rlpy import ALL, DISCRETE, QUIET, built, data_for, dataset_of, drawn, episodes, mini_batch, small, state_of

__all__ = ["drawn"]  # a fixture
WEIGHT, TRACE_WEIGHT, EVERY = 0.7, 0.5, 3
ROWS = range(40, 72)  # of `data_for`, the end of a terminated episode among them
ENCODERS = {
    "dropout": VectorEncoderFactory([16, 16], dropout_rate=0.3),
    "batch-norm": VectorEncoderFactory([16, 16], use_batch_norm=True),
    "layer-norm": VectorEncoderFactory([16, 16], use_layer_norm=True),
}
OF_A_REFRESH = {
    "c4_cross_covariance": "total",
    "c4_within_cross_covariance": "within",
    "c4_between_cross_covariance": "between",
    "c4_log_likelihood": "log_likelihood",
    "c4_refresh_seconds": "seconds",
}


def two_critics(config: type, **fields: Any) -> Any:
    """A small config, with two critics where their number can be chosen."""
    names = {field.name for field in dataclasses.fields(config)}
    return small(config, **dict.fromkeys(names & {"n_critics"}, 2), **fields)


def trained(config: Any, dataset: ReplayBuffer) -> Any:
    """The algorithm after three updates, each target moved its own way from its critic."""
    algo = built(config, dataset)
    for i in range(3):
        algo.update(mini_batch(dataset, range(20 * i, 20 * i + 16)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in algo.impl.modules.targ_q_funcs.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return algo


def scaled_batch(algo: Any, dataset: ReplayBuffer, rows: Any = ROWS) -> TorchMiniBatch:
    """Rows as the networks see them."""
    return TorchMiniBatch.from_batch(
        batch=mini_batch(dataset, rows),
        gamma=0.99,
        compute_returns_to_go=True,
        device="cpu:0",
        observation_scaler=algo.observation_scaler,
        action_scaler=algo.action_scaler,
        reward_scaler=algo.reward_scaler,
    )


def predicted_actions(algo: Any, dataset: ReplayBuffer, rows: Any = ROWS) -> Tensor:
    """What `predict` answers to the rows' next observations, as the networks see it, [B, A] or [B, 1]."""
    actions = algo.predict(mini_batch(dataset, rows).next_observations)
    if algo.action_scaler is not None:
        actions = algo.action_scaler.transform_numpy(actions)
    return torch.as_tensor(actions).reshape(len(rows), -1)


def value_and_gradient(network: Any, observations: Tensor, actions: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Q(x) [B] and its gradient by x = (s, a), or by s for discrete actions, [B, D]."""
    observations = observations.clone().requires_grad_()
    if isinstance(network, DiscreteQFunction):
        output = network(observations)
        table = output.q_value if output.quantiles is None else output.quantiles.mean(dim=2)
        value, inputs = table.gather(1, actions.long()).squeeze(1), [observations]
    else:
        actions = actions.clone().requires_grad_()
        output = network(observations, actions)
        value = output.q_value.squeeze(1) if output.quantiles is None else output.quantiles.mean(dim=1)
        inputs = [observations, actions]
    return value, torch.cat(torch.autograd.grad(value.sum(), inputs, **options), dim=1)


def pairs_by_hand(algo: Any, batch: TorchMiniBatch, next_actions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Q_target(x'), g' and g of each critic and its own target."""
    algo.impl.modules.set_eval()
    for critic, target in zip(algo.impl.modules.q_funcs, algo.impl.modules.targ_q_funcs):
        _, g = value_and_gradient(critic, batch.observations, batch.actions, create_graph=True)
        next_q, next_g = value_and_gradient(target, batch.next_observations, next_actions)
        yield next_q.detach(), next_g * (1 - batch.terminals), g


def penalty_by_hand(
    algo: Any, batch: TorchMiniBatch, scale: str = "relative", next_actions: Tensor | None = None
) -> Tensor:
    """weight * sum over the critics of ||C||^2 + beta (tr C)^2, scaled."""
    total = torch.zeros(())
    for next_q, next_g, g in pairs_by_hand(algo, batch, batch.next_actions if next_actions is None else next_actions):
        c = (next_g - next_g.mean(dim=0)).T @ (g - g.mean(dim=0)) / (len(g) - 1)
        term = c.square().sum() + TRACE_WEIGHT * c.trace() ** 2
        if scale != "raw":
            spread = g.var(dim=0).sum()
            spread = spread.detach() if scale == "relative" else spread
            term = term / (next_g.var(dim=0).sum() * spread) * next_q.var()
        total = total + term
    return WEIGHT * total


def features_by_hand(algo: Any, batch: TorchMiniBatch, next_actions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """f' and f: the output of each target's and of each critic's encoder."""
    algo.impl.modules.set_eval()
    next_inputs, inputs = (batch.next_observations, next_actions), (batch.observations, batch.actions)
    found: list[list[Tensor]] = []
    with torch.no_grad():
        for networks, x in ((algo.impl.modules.targ_q_funcs, next_inputs), (algo.impl.modules.q_funcs, inputs)):
            discrete = isinstance(networks[0], DiscreteQFunction)
            found.append([network.encoder(x[0]) if discrete else network.encoder(*x) for network in networks])
    return found[0], found[1]


def critic_loss(algo: Any, config: type, batch: TorchMiniBatch) -> Tensor:
    """The first half of an update, from the same random numbers each time."""
    d3rlpy.seed(1)
    algo.impl.modules.set_train()
    compute = algo.impl.compute_loss if config in DISCRETE[:-1] else algo.impl.compute_critic_loss
    loss: Any = compute(batch, algo.impl.compute_target(batch))
    total: Tensor = loss
    if not isinstance(loss, Tensor):  # as DiscreteSAC's is
        total = loss.critic_loss if hasattr(loss, "critic_loss") else loss.loss
    return total


def gradients_by_critic(algo: Any, loss: Tensor) -> list[Tensor]:
    parameters = list(algo.impl.q_function.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found)]


def q_function_cases() -> Iterator[Any]:
    fields = {"q_func_factory": MeanQFunctionFactory(share_encoder=True)}
    yield pytest.param(TD3Config, fields, "relative", id="TD3Config-shared-encoder")
    factories = (
        QRQFunctionFactory(n_quantiles=8),
        IQNQFunctionFactory(n_quantiles=8, n_greedy_quantiles=8, embed_size=8),
    )
    for config in (TD3Config, SACConfig, DQNConfig, DiscreteCQLConfig, DiscreteSACConfig):
        for factory in factories:
            yield pytest.param(
                config, {"q_func_factory": factory}, "relative", id=f"{config.__name__}-{factory.get_type()}"
            )


def encoder_cases() -> Iterator[Any]:
    for name, encoder in ENCODERS.items():
        yield pytest.param(TD3Config, {"critic_encoder_factory": encoder}, "relative", id=f"TD3Config-{name}")


@pytest.mark.parametrize(
    ("config", "fields", "scale"),
    [
        *(pytest.param(config, {}, "relative", id=config.__name__) for config in ALL),
        *(pytest.param(TD3Config, {}, scale, id=f"TD3Config-{scale}") for scale in ("raw", "correlation")),
        *q_function_cases(),
        *encoder_cases(),
    ],
)
def test_the_critics_gradient_gains_that_of_the_penalty_written_out_on_the_networks(
    config: type, fields: dict[str, Any], scale: str
) -> None:
    dataset = data_for(config)
    plain, algo = (trained(two_critics(config, **fields), dataset) for _ in range(2))
    batch = scaled_batch(algo, dataset)
    assert batch.terminals.any()
    wrap(algo, penalty_weight=WEIGHT, trace_weight=TRACE_WEIGHT, penalty_scale=scale, penalty_every=EVERY)
    algo.impl._c4_due = True
    losses = [critic_loss(each, config, batch) for each in (plain, algo)]
    without, with_it = (gradients_by_critic(each, loss) for each, loss in zip((plain, algo), losses))
    expected = penalty_by_hand(algo, batch, scale)
    rounding = 2e-6 * abs(losses[0].item())
    torch.testing.assert_close(losses[1] - losses[0], EVERY * expected, rtol=1e-4, atol=rounding)
    added = gradients_by_critic(algo, EVERY * expected)
    size = max(float(gradient.abs().max()) for gradient in added)
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in without)
    assert size > 100 * rounding
    for before, after, gradient in zip(without, with_it, added):
        torch.testing.assert_close(after - before, gradient, rtol=1e-4, atol=1e-5 * size + rounding)


@pytest.mark.parametrize("config", [TD3Config, DQNConfig])
def test_the_feature_penalty_is_the_mean_product_of_the_encoders_outputs(config: type) -> None:
    dataset = data_for(config)
    algo = trained(two_critics(config), dataset)
    wrap(algo, penalty_weight=WEIGHT, penalty_kind="feature", penalty_every=EVERY)
    batch = scaled_batch(algo, dataset)
    next_features, features = features_by_hand(algo, batch, batch.next_actions)
    assert len(features) == 2
    expected = WEIGHT * sum(float((f * next_f).sum(dim=1).mean()) for f, next_f in zip(features, next_features))
    assert algo.update(mini_batch(dataset, ROWS))["c4_penalty"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", ALL)
def test_the_metric_is_the_penalty_without_the_factor_of_the_updates_left_out(config: type) -> None:
    dataset = data_for(config)
    algo = trained(two_critics(config), dataset)
    wrap(algo, penalty_weight=WEIGHT, trace_weight=TRACE_WEIGHT, penalty_every=EVERY)
    expected = float(penalty_by_hand(algo, scaled_batch(algo, dataset)).detach())
    assert algo.update(mini_batch(dataset, ROWS))["c4_penalty"] == pytest.approx(expected, rel=1e-4)


def with_scalers(config: type) -> Any:
    scalers: dict[str, Any] = {"observation_scaler": StandardObservationScaler()}
    if config not in DISCRETE:
        scalers["action_scaler"] = MinMaxActionScaler()
    return two_critics(config, **scalers)


@pytest.mark.parametrize("config", [TD3Config, SACConfig, DQNConfig])
def test_the_penalty_takes_the_next_action_that_predict_gives(config: type) -> None:
    dataset = data_for(config)
    algo = trained(with_scalers(config), dataset)
    wrap(algo, penalty_weight=WEIGHT, trace_weight=TRACE_WEIGHT, penalty_every=EVERY, next_action="policy")
    batch = scaled_batch(algo, dataset)
    expected = penalty_by_hand(algo, batch, next_actions=predicted_actions(algo, dataset))
    of_the_data = penalty_by_hand(algo, batch)
    metrics = algo.update(mini_batch(dataset, ROWS))
    assert metrics["c4_penalty"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert metrics["c4_penalty"] != pytest.approx(float(of_the_data.detach()), rel=1e-2)


@pytest.mark.parametrize("next_action", ["dataset", "policy"])
@pytest.mark.parametrize("embedding", ["gradients", "features"])
@pytest.mark.parametrize("config", [TD3Config, SACConfig, DQNConfig])
def test_what_is_clustered_is_the_stack_written_out_on_the_networks(
    config: type, embedding: str, next_action: str
) -> None:
    dataset = data_for(config)
    algo = wrap(trained(with_scalers(config), dataset), n_clusters=2, embedding=embedding, next_action=next_action)
    seen: list[Tensor] = []

    def halves(embeddings: Tensor, previous: Any) -> Tensor:
        seen.append(embeddings.clone())
        return torch.full((len(embeddings), 2), 0.5)

    algo.c4_clusterer = halves
    rows = range(dataset.transition_count)
    batch = scaled_batch(algo, dataset, rows)
    next_actions = predicted_actions(algo, dataset, rows) if next_action == "policy" else batch.next_actions
    if embedding == "features":
        next_parts, parts = features_by_hand(algo, batch, next_actions)
        expected = torch.cat([*next_parts, *parts], dim=1)
    else:
        _, next_g, g = zip(*pairs_by_hand(algo, batch, next_actions))
        expected = torch.cat([torch.stack(next_g).mean(dim=0), torch.stack(g).mean(dim=0)], dim=1).detach()
    algo.fit(dataset, n_steps=1, n_steps_per_epoch=1, **QUIET)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)


def test_a_refresh_is_logged_with_the_update_after_it_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    algo = C4Config(base=small(TD3Config), n_clusters=3, refresh_interval=4, penalty_every=2, seed=0).create()
    logged: list[tuple[dict[str, float], Any]] = []
    update = algo.update

    def keep(batch: Any) -> dict[str, float]:
        metrics: dict[str, float] = update(batch)
        logged.append((metrics, algo.c4_buffer.last_report))
        return metrics

    monkeypatch.setattr(algo, "update", keep)
    algo.fit(data_for(TD3Config), n_steps=10, n_steps_per_epoch=10, **QUIET)
    assert len({id(report) for _, report in logged}) == 3
    for step, (metrics, report) in enumerate(logged):
        names = {name for name in metrics if name.startswith("c4_")}
        assert names - {"c4_penalty"} == ({*OF_A_REFRESH, "c4_smallest_probability"} if step % 4 == 0 else set())
        assert ("c4_penalty" in names) == (step % 2 == 0)
        if step % 4 == 0:
            assert {name: metrics[name] for name in OF_A_REFRESH} == {
                name: getattr(report, field) for name, field in OF_A_REFRESH.items()
            }
            assert metrics["c4_smallest_probability"] == min(report.probabilities) < max(report.probabilities)
            assert len({report.total, report.within, report.between}) == 3


def row_numbers(batch: Transitions) -> list[int]:
    assert batch.indices is not None
    numbers: list[int] = batch.indices.tolist()
    return numbers


def rows_drawn(drawn: list[Transitions], *, torch_seed: int, seed: int | None) -> list[list[int]]:
    """The rows of the batches of a fit whose clusters do not depend on the networks."""
    d3rlpy.seed(torch_seed)
    algo = C4Config(base=small(TD3Config), n_clusters=2, seed=seed).create()
    algo.c4_clusterer = lambda embeddings, previous: torch.eye(2)[torch.arange(len(embeddings)) % 2]
    drawn.clear()
    algo.fit(data_for(TD3Config), n_steps=3, n_steps_per_epoch=3, **QUIET)
    return [row_numbers(batch) for batch in drawn]


def test_a_seed_decides_the_batches_and_without_one_torchs_does(drawn: list[Transitions]) -> None:
    first = rows_drawn(drawn, torch_seed=0, seed=7)
    assert rows_drawn(drawn, torch_seed=1, seed=7) == first
    assert rows_drawn(drawn, torch_seed=0, seed=8) != first
    assert rows_drawn(drawn, torch_seed=7, seed=None) == first
    assert rows_drawn(drawn, torch_seed=1, seed=None) != first


def test_the_two_buffers_of_a_mixed_one_draw_different_rows(drawn: list[Transitions]) -> None:
    one, other = data_for(TD3Config), data_for(TD3Config)
    algo = built(C4Config(base=small(TD3Config), n_clusters=1, seed=0), one)
    algo.fit(MixedReplayBuffer(one, other, secondary_mix_ratio=0.5), n_steps=3, n_steps_per_epoch=3, **QUIET)
    for primary, secondary in zip(drawn[::2], drawn[1::2]):
        assert row_numbers(primary) != row_numbers(secondary)


def test_wrapping_a_built_algorithm_keeps_to_every_kth_update() -> None:
    dataset = data_for(TD3Config)
    algo = wrap(trained(two_critics(TD3Config), dataset), penalty_every=EVERY)
    assert ["c4_penalty" in algo.update(mini_batch(dataset, ROWS)) for _ in range(4)] == [True, False, False, True]


def test_clusters_online_wait_for_as_many_rows_as_there_are_clusters(drawn: list[Transitions]) -> None:
    env = gymnasium.make("Pendulum-v1", max_episode_steps=100)
    env.reset(seed=0)
    env.action_space.seed(0)
    d3rlpy.seed(0)
    host = create_fifo_replay_buffer(100, env=env)
    held: list[int] = []
    algo = C4Config(base=small(TD3Config), n_clusters=40, seed=0).create()

    def keep(algo: Any, epoch: int, step: int) -> None:
        if algo.c4_buffer is not None:
            held.append(host.transition_count)

    algo.fit_online(env, host, n_steps=50, n_steps_per_epoch=50, random_steps=50, callback=keep, **QUIET)
    assert held[0] < 20
    assert [batch.cluster >= 0 for batch in drawn] == [rows >= 40 for rows in held]
    assert drawn[-1].cluster >= 0


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({}, 1),
        ({"critic_encoder_factory": ENCODERS["layer-norm"]}, 1),
        ({"critic_encoder_factory": ENCODERS["dropout"]}, 2),
        ({"critic_encoder_factory": ENCODERS["batch-norm"]}, 2),
        ({"q_func_factory": QRQFunctionFactory(n_quantiles=8)}, 2),
    ],
    ids=["plain", "layer-norm", "dropout", "batch-norm", "quantiles"],
)
def test_loss_and_penalty_share_a_forward_pass_unless_the_networks_differ_in_training(
    fields: dict[str, Any], passes: int
) -> None:
    dataset = data_for(TD3Config)
    # update 3 leaves the actor alone, which looks at a critic as well
    algo = wrap(trained(two_critics(TD3Config, update_actor_interval=2, **fields), dataset), penalty_every=EVERY)
    counts = [0, 0]

    def counting(member: int) -> Any:
        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            counts[member] += 1

        return count

    for member, network in enumerate(algo.impl.modules.q_funcs):
        network.encoder.register_forward_hook(counting(member))
    metrics = algo.update(mini_batch(dataset, ROWS))
    assert "c4_penalty" in metrics
    assert "actor_loss" not in metrics
    assert counts == [passes, passes]


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", ALL)
def test_a_wrong_field_is_refused_by_name_and_the_algorithm_stays_as_it_was(config: type) -> None:
    message = "n_clusters: expected an integer of at least 1, got 0"
    with pytest.raises(ValueError, match=message):
        C4Config(base=small(config), n_clusters=0)
    algo = built(small(config), data_for(config))
    kinds, before = (type(algo), type(algo.impl)), state_of(algo)
    with pytest.raises(ValueError, match=message):
        wrap(algo, n_clusters=0)
    assert (type(algo), type(algo.impl)) == kinds
    assert same_state(before, state_of(algo))


@pytest.mark.parametrize("config", ALL)
def test_a_dataset_without_transitions_is_refused(config: type) -> None:
    step = episodes(1, steps=1, discrete=config in DISCRETE)[0]
    empty = dataset_of([dataclasses.replace(step, terminated=False)])
    assert empty.transition_count == 0
    for algo in (C4Config(base=small(config)).create(), built(C4Config(base=small(config)), data_for(config))):
        with pytest.raises(ValueError, match="dataset: expected at least one transition, got an empty dataset"):
            next(algo.fitter(empty, n_steps=1, n_steps_per_epoch=1, **QUIET))  # PRDC's `fit` reads the rows before
