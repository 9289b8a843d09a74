"""Two captured graphs in place of d3rlpy's one, with a stand-in for CUDA's capture that has its traps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config, graphs
from d3rlpy.algos import DiscreteSACConfig, DQNConfig, IQLConfig, TD3PlusBCConfig
from d3rlpy.logging import NoopAdapterFactory

from .test_d3rlpy import assert_same_state, built, data_for, mini_batch, small, state_of

WARM_UP = 3


class FakeGraph:
    """What is captured: code that runs on the first batch's memory and writes into the tensors of its capture."""

    def __init__(self, compute: Callable[[Any], Any], batch: Any, impl: Any) -> None:
        self.compute, self.batch, self.notes = compute, batch, impl._c4_penalties
        self.parameters = [p for group in impl.q_function_optim.param_groups for p in group["params"]]
        self.out = compute(batch)
        self.noted = self.notes[-1:]
        self.gradients = [parameter.grad for parameter in self.parameters]
        for gradient in self.gradients:
            gradient.fill_(float("nan"))  # capturing computes nothing

    def replay(self) -> None:
        held, notes = [parameter.grad for parameter in self.parameters], list(self.notes)
        computed = self.compute(self.batch)
        for noted, note in zip(self.noted, self.notes[-1:]):
            noted.copy_(note)
        self.notes[:] = notes  # Python does not run
        for gradient, parameter, before in zip(self.gradients, self.parameters, held):
            gradient.copy_(parameter.grad)
            parameter.grad = before
        for name, value in entries(self.out).items():
            value.data.copy_(entries(computed)[name].data)


def entries(out: Any) -> dict[str, torch.Tensor]:
    return out if isinstance(out, dict) else vars(out)


class FakeWrapper:
    """d3rlpy's CudaGraphWrapper, as it does it."""

    impl: Any  # set by the test
    made: list[FakeWrapper]

    def __init__(self, compute: Callable[[Any], Any], warmup_steps: int = WARM_UP, compile_func: bool = True) -> None:
        self._compute = compute
        self._graph: FakeGraph | None = None
        self._step = 0
        self.compiled = compile_func
        self.made.append(self)

    def __call__(self, batch: Any) -> Any:
        out = self._compute(batch) if self._step < WARM_UP else None
        if self._step == WARM_UP - 1:
            self._graph = FakeGraph(self._compute, batch, self.impl)
            self._out = self._graph.out
        if self._step >= WARM_UP:
            self._graph.batch.copy_(batch)
            self._graph.replay()
            out = self._out
        self._step += 1
        return out


@pytest.mark.parametrize("config", [TD3PlusBCConfig, IQLConfig, ACTIVEConfig, DQNConfig, DiscreteSACConfig])
def test_two_graphs_train_as_the_eager_algorithm_does(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CudaGraphWrapper", FakeWrapper)
    monkeypatch.setattr(FakeWrapper, "made", [], raising=False)
    dataset = data_for(config)
    fields = {TD3PlusBCConfig: {"target_smoothing_sigma": 0.0}, ACTIVEConfig: {"likelihood_target": -1.0}}
    base = small(config, **fields.get(config, {}))
    options = {"penalty_weight": 0.5, "penalty_every": 2, "seed": 0}
    eager = built(C4Config(base=base, **options), dataset)
    graphed = built(C4Config(base=base, **options), dataset)
    for optimizer in ("critic_optim", "optim"):  # as where d3rlpy compiles: gradients are dropped, not zeroed
        if hasattr(graphed.impl.modules, optimizer):
            monkeypatch.setattr(getattr(graphed.impl.modules, optimizer), "_compiled", True)
    monkeypatch.setattr(FakeWrapper, "impl", graphed.impl, raising=False)
    for holder, method in graphs.CAPTURED.items():
        if hasattr(graphed.impl, holder):
            setattr(graphed.impl, holder, FakeWrapper(getattr(graphed.impl, method)))
    if config is ACTIVEConfig:
        graphed.impl._compiled = True
    FakeWrapper.made.clear()
    graphs.capture_twice(graphed.impl)
    assert sorted(wrapper.compiled for wrapper in FakeWrapper.made) == [False, True]

    for i in range(20):
        batch = mini_batch(dataset, range(i, i + 16))
        metrics = []
        for algo in (eager, graphed):
            torch.manual_seed(i)
            metrics.append(algo.update(batch))
        assert metrics[0].keys() == metrics[1].keys()
        assert ("c4_penalty" in metrics[0]) == (i % 2 == 0)
        for name in metrics[0]:
            assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5, abs=1e-7), (i, name)
    assert all(wrapper._step == 10 for wrapper in FakeWrapper.made)
    for name, value in state_of(eager).items():
        torch.testing.assert_close(state_of(graphed)[name], value, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_warm_up_stay_where_an_actors_graph_may_have_found_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "CudaGraphWrapper", FakeWrapper)
    monkeypatch.setattr(FakeWrapper, "made", [], raising=False)
    dataset = data_for(TD3PlusBCConfig)
    algo = built(C4Config(base=small(TD3PlusBCConfig), penalty_every=4, seed=0), dataset)
    monkeypatch.setattr(FakeWrapper, "impl", algo.impl, raising=False)
    monkeypatch.setattr(algo.impl.modules.critic_optim, "_compiled", True)
    algo.impl._compute_critic_grad = FakeWrapper(algo.impl.compute_critic_grad)
    graphs.capture_twice(algo.impl)
    parameters = list(algo.impl.q_function.parameters())
    found = []
    for i in range(8):
        algo.update(mini_batch(dataset, range(i, i + 16)))
        found += [weakref.ref(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gc.collect()
    assert all(reference() is not None for reference in found)


def test_without_compilation_there_are_no_graphs() -> None:
    dataset = data_for(TD3PlusBCConfig)
    asked = built(C4Config(base=small(TD3PlusBCConfig, compile_graph=True), seed=0), dataset)  # on a CPU: ignored
    plain = built(C4Config(base=small(TD3PlusBCConfig), seed=0), dataset)
    for algo in (asked, plain):
        torch.manual_seed(1)
        algo.fit(dataset, n_steps=3, n_steps_per_epoch=3, show_progress=False, logger_adapter=NoopAdapterFactory())
        assert not isinstance(algo.impl._compute_critic_grad, graphs.TwoGraphs)
    assert_same_state(asked, plain)
