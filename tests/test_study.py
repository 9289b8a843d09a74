"""The study's harness: what a kill leaves behind, and the statistics of its report."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from c4buffer import Critics, Transitions, covariance_penalty, stacked_gradients

STUDY = Path(__file__).parent.parent / "benchmarks" / "study"
TIMES = ("training_seconds", "seconds")


def start(results: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(STUDY / "run.py"), "toy", "--arms", "plain", "c4", "--results", str(results)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def children_of(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in listed.split()]


def records(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for record in found:
        for name in TIMES:
            assert record.pop(name) > 0
    keyed = {(record["arm"], record["seed"]): record for record in found}
    assert len(keyed) == len(found), "a run was repeated"
    return keyed


def test_a_grid_that_was_killed_and_resumed_leaves_the_same_file_as_one_that_ran_through(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=240) == 0

    killed = start(broken)
    deadline = time.monotonic() + 240
    path = broken / "toy.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 1):
        assert time.monotonic() < deadline, "no run was finished"
        time.sleep(0.2)
    workers = children_of(killed.pid)
    assert workers
    killed.kill()  # the command alone; its workers must go with it
    killed.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker stayed behind"
        time.sleep(0.1)
    with path.open("ab") as file:  # the worst that a kill can leave: half a line
        file.write(b'{"dataset": "hopper-med')
    assert start(broken).wait(timeout=240) == 0

    assert records(path) == records(whole / "toy.jsonl")
    assert len(records(path)) == 4


TRAINING = """
def train(settings):
    if settings["seed"] == 0:
        raise RuntimeError("no data")
    return {**settings, "score": 1.0}
"""


def test_a_run_that_fails_is_told_and_the_others_are_kept(tmp_path: Path) -> None:
    for name in ("run.py", "arms.py"):
        shutil.copy(STUDY / name, tmp_path)
    (tmp_path / "training.py").write_text(TRAINING)
    command = [sys.executable, str(tmp_path / "run.py"), "toy", "--arms", "plain", "c4", "--results", str(tmp_path)]
    for kept in ("0 of 4", "2 of 4"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1
        assert done.stdout.startswith(f"{kept} runs are done")
        assert "2 of " in done.stderr
        assert "runs failed" in done.stderr
    found = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert sorted((record["arm"], record["seed"]) for record in found) == [("c4", 1), ("plain", 1)]


def test_a_critic_that_breaks_ends_its_run_as_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("d3rlpy")
    pytest.importorskip("mujoco")
    from c4buffer.integrations import d3rlpy as adapter

    monkeypatch.syspath_prepend(str(STUDY))
    training, run, arms = (importlib.import_module(name) for name in ("training", "run", "arms"))
    monkeypatch.setattr(training, "use_onednn", lambda: False)
    measure, calls = adapter.measure, []

    def measure_and_break(algo: Any, transitions: Transitions) -> dict[str, float]:
        calls.append(algo)
        if len(calls) == 2:
            next(iter(algo.impl.q_function.parameters())).data[0, 0] = float("nan")
        return measure(algo, transitions)

    monkeypatch.setattr(adapter, "measure", measure_and_break)
    threads = torch.get_num_threads()
    try:
        record = training.train(run.settings_of(arms.GRIDS["toy"])[0])
    finally:
        torch.set_num_threads(threads)
    assert "finite" in record["broke"]
    assert record["diverged"] is True
    assert record["evaluated_at"] == [20, 40, 60]
    assert record["scores"][1:] == [0.0, 0.0]
    assert record["score"] == pytest.approx(record["scores"][0] / 3)
    for name in training.MEASURED:
        assert np.isfinite(record[name]).tolist() == [True, False, False]


def test_a_run_is_another_one_when_its_arm_means_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY))
    run, arms = importlib.import_module("run"), importlib.import_module("arms")
    settings = run.settings_of(arms.GRIDS["toy"])[-1]
    older = json.loads(json.dumps(settings))
    del older["change"]["target"]  # a field that came later
    assert run.key_of(older) == run.key_of(settings)
    older["change"]["c4"]["n_clusters"] = 7
    assert run.key_of(older) != run.key_of(settings)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDY))
    import report

    return report


def record(dataset: str, arm: str, seed: int, score: float) -> dict[str, Any]:
    return {"dataset": dataset, "base": "td3_plus_bc", "arm": arm, "seed": seed, "score": score, "diverged": seed == 0}


def test_differences_are_paired_by_dataset_and_seed(report: Any) -> None:
    runs = [record("a", "plain", s, 10.0 * s) for s in range(3)] + [record("a", "c4", s, 10.0 * s + 5) for s in (2, 0)]
    runs += [record("b", "plain", 0, 1.0), record("b", "c4", 0, 3.0), record("b", "c4", 7, 99.0)]
    strata = [sorted(values.tolist()) for values in report.paired_differences(runs, "c4")]
    assert sorted(strata) == [[2.0], [5.0, 5.0]]


def test_interquartile_mean_and_probability_of_improvement_by_hand(report: Any) -> None:
    assert report.interquartile_mean(np.array([-100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0])) == pytest.approx(3.5)
    runs = [record("a", "plain", s, float(s)) for s in range(2)] + [record("a", "c4", s, 1.0) for s in range(2)]
    assert report.probability_of_improvement(runs, "c4") == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)


@pytest.mark.parametrize(("pairs", "least", "most"), [(3, 0.70, 0.93), (15, 0.87, 1.0)])
def test_the_interval_holds_the_true_mean_about_as_often_as_it_says(
    report: Any, pairs: int, least: float, most: float
) -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(80):
        low, high = report.interval([generator.normal(3.0, 1.0, size=pairs) for _ in range(2)])
        held += low <= 3.0 <= high
    assert least <= held / 80 <= most


def test_the_interval_is_far_too_narrow_where_the_datasets_disagree(report: Any) -> None:
    generator = np.random.default_rng(0)
    normals = ((45.0, 15.0), (-10.0, 2.7))  # as a penalty's differences on two datasets
    truth = report.interquartile_mean(np.concatenate([generator.normal(*each, size=200_000) for each in normals]))
    held = 0
    for _ in range(80):
        low, high = report.interval([generator.normal(*each, size=3) for each in normals])
        held += low <= truth <= high
    assert 0.45 <= held / 80 <= 0.75


def test_no_interval_is_given_from_two_pairs(report: Any) -> None:
    assert np.isnan(report.interval([np.arange(3.0), np.arange(2.0)])).all()


def quantities(dataset: str, arm: str, seed: int, score: float, mean_q: list[float]) -> dict[str, Any]:
    names = ("td_loss", "total", "within", "between", "correlation", "gradient_norm")
    curves = {name: [0.0, 10.0 * seed + i] for i, name in enumerate(names)}
    base = record(dataset, arm, seed, score)
    return {**base, "mean_q": mean_q, "largest_return": 50.0, "diverged": max(mean_q) > 150, **curves}


def test_quantities_are_medians_and_values_are_ranked_against_scores(report: Any) -> None:
    runs = [quantities("a", "plain", seed, 10.0 * seed, [200.0 - 50 * seed, 1.0]) for seed in range(3)]
    lines = report.table_of_quantities(runs, ("c4", "plain"))
    assert lines[2:] == ["| a | plain | 3 | 3 | 10 | 11 | 12 | 13 | 14 | 15 |"]
    lines = report.table_of_values_and_scores(runs)
    assert lines[2].startswith("| a | 3 | -1.00 |")
    assert lines[2].endswith("| 0 (1) | 15 (2) |")


def test_differences_of_a_dataset_have_students_interval(report: Any) -> None:
    from scipy.stats import t

    runs = [record("a", "plain", s, 0.0) for s in range(3)] + [record("a", "c4", s, 10.0 * s) for s in range(3)]
    runs += [record("b", "plain", 0, 1.0), record("b", "c4", 0, 3.0)]
    low, high = t.interval(0.95, 2, loc=10, scale=10 / np.sqrt(3))
    assert report.table_by_dataset(runs, ("plain", "sampler", "c4"))[2:] == [
        "| sampler | not run |  |  | not run |  |  |",
        f"| c4 | +10.0 (3) | {low:+.0f} to {high:+.0f} | 0.83 | +2.0 (1) | too few | 1.00 |",
    ]


def test_a_correlation_between_arms_is_told_from_one_within(report: Any) -> None:
    # between the arms a large Q goes with a low score, within each with a high one
    points = {"x": [(1, 21), (2, 22), (3, 23)], "y": [(11, 11), (12, 12), (13, 13)], "z": [(21, 1), (22, 2), (23, 3)]}
    runs = [{"arm": arm} for arm, values in points.items() for _ in values]
    found = report.rank_correlations(runs, np.array([value for values in points.values() for value in values], float))
    assert found[0] < -0.7
    assert found[1:] == pytest.approx([-1, 1])
    few = report.rank_correlations(runs[:2], np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert few == [None, None, None]


def test_the_q_of_a_broken_run_is_not_low(report: Any) -> None:
    assert report.largest_q({"mean_q": [1.0, float("nan")], "largest_return": 2.0, "broke": "no"}) == np.inf
    assert report.largest_q({"mean_q": [1.0, 3.0], "largest_return": 2.0, "broke": None}) == 1.5


def test_the_chance_in_an_evaluation_is_that_of_neighbours_in_the_second_half(report: Any) -> None:
    rng = np.random.default_rng(0)
    noisy = [{"scores": [0.0] * 400 + list(50 + np.linspace(0, 10, 400) + 7 * rng.standard_normal(400))}] * 2
    assert report.evaluation_noise(noisy) == pytest.approx(7, rel=0.1)
    runs = [
        {"dataset": "hopper", "arm": "plain", "seed": seed, "scores": [0.0, 10.0, 20.0, 30.0 + 10 * seed]}
        for seed in (1, 0)
    ]
    assert report.table_of_evaluations(runs, ["plain", "c4"])[2:] == [
        "| plain | 5 / 5 | 25 / 30 |",
        "| c4 | not run | not run |",
    ]
    assert [run["score"] for run in report.early(runs)] == [5, 5]


def test_the_table_names_what_was_not_run(report: Any) -> None:
    runs = [record("a", arm, seed, 1.0) for arm in ("plain", "c4") for seed in range(2)] + [
        record("b", "plain", 0, 2.0)
    ]
    lines = report.table(runs, ("plain", "sampler", "c4"))
    assert lines[2].startswith("| plain | 1 / 1 | 2 |")
    assert lines[3].startswith("| c4 | 1 / 1 | not run | +0.0 / none | +0.0 (2 pairs) |")
    assert lines[3].endswith("| 0.50 | 1 of 2 |")


PRODUCTS = """
import torch
from products import use_onednn

generator = torch.Generator().manual_seed(0)
left, right, bias = (torch.randn(*shape, generator=generator) for shape in ((70, 80), (80, 90), (90,)))


def results():
    found = []
    for rows, columns in ((70, 90), (3, 90), (70, 1)):
        inputs = [values.clone().requires_grad_() for values in (left[:rows], right[:, :columns], bias[:columns])]
        outputs = [
            inputs[0] @ inputs[1],
            torch.nn.functional.linear(inputs[0], inputs[1].t(), inputs[2]),
            torch.addmm(inputs[2], inputs[0], inputs[1], beta=0.5, alpha=2.0),
            torch.nn.functional.linear(inputs[0].double(), inputs[1].t().double()),
        ]
        found += outputs + list(torch.autograd.grad(sum(output.square().sum() for output in outputs), inputs))
    return found


before = results()
assert use_onednn() == torch.backends.mkldnn.is_available()
for one, other in zip(before, results()):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
"""


def test_products_by_onednn_are_those_of_torch() -> None:
    """In a process of its own: it takes over the operators of the whole process."""
    subprocess.run([sys.executable, "-c", PRODUCTS], check=True, env={**os.environ, "PYTHONPATH": str(STUDY)})


def test_batches_drawn_at_once_are_those_of_d3rlpy_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    d3rlpy = pytest.importorskip("d3rlpy")
    monkeypatch.syspath_prepend(str(STUDY))
    generator = np.random.default_rng(0)
    ends = np.zeros((2, 50))
    ends[0, [10, 30, 49]] = ends[1, 20] = 1  # terminals, and a timeout in the middle of an episode's rows
    dataset = d3rlpy.dataset.MDPDataset(
        observations=generator.normal(size=(50, 4)).astype(np.float32),
        actions=generator.normal(size=(50, 2)).astype(np.float32),
        rewards=generator.normal(size=50),
        terminals=ends[0],
        timeouts=ends[1],
    )
    state = np.random.get_state()
    np.random.seed(3)
    expected = [dataset.sample_transition_batch(size) for size in (7, 64)]
    importlib.import_module("rows").draw_at_once(dataset)
    np.random.seed(3)
    for batch in expected:
        drawn = dataset.sample_transition_batch(len(batch))
        for name in vars(batch).keys() - {"transitions"}:
            assert getattr(drawn, name).dtype == np.float32
            np.testing.assert_array_equal(getattr(drawn, name), getattr(batch, name))
        for one, other in zip(drawn.transitions, batch.transitions, strict=True):
            np.testing.assert_array_equal(one.next_observation, other.next_observation)
    np.random.set_state(state)


def test_fused_optimizers_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    d3rlpy = pytest.importorskip("d3rlpy")
    monkeypatch.syspath_prepend(str(STUDY))
    fuse_optimizers = importlib.import_module("training").fuse_optimizers
    generator = np.random.default_rng(0)
    rows = d3rlpy.dataset.TransitionMiniBatch(
        observations=generator.normal(size=(32, 4)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(32, 2)).astype(np.float32),
        rewards=generator.normal(size=(32, 1)).astype(np.float32),
        next_observations=generator.normal(size=(32, 4)).astype(np.float32),
        next_actions=generator.uniform(-1, 1, size=(32, 2)).astype(np.float32),
        terminals=np.zeros((32, 1), np.float32),
        intervals=np.ones((32, 1), np.float32),
        transitions=[],
    )
    trained = []
    for fused in (False, True):
        d3rlpy.seed(0)
        algo = d3rlpy.algos.TD3PlusBCConfig().create("cpu")
        algo.create_impl((4,), 2)
        if fused:
            fuse_optimizers(algo)
        for _ in range(20):
            algo.update(rows)
        optimizers = (algo.impl.modules.actor_optim.optim, algo.impl.modules.critic_optim.optim)
        assert all(bool(group["fused"]) is fused for optimizer in optimizers for group in optimizer.param_groups)
        trained.append([*algo.impl.policy.parameters(), *algo.impl.q_function.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module("arms")


def controls() -> tuple[Critics, Transitions]:
    torch.manual_seed(0)
    q = [torch.nn.Bilinear(3, 2, 1).double() for _ in range(2)]
    rows = [torch.randn(16, width, dtype=torch.float64) for width in (3, 2, 3)]
    zeros = torch.zeros(16, dtype=torch.float64)
    batch = Transitions(
        observations=rows[0], actions=rows[1], rewards=zeros, next_observations=rows[2], terminals=zeros
    )
    return Critics(q, q), batch


def test_the_capped_penalty_is_the_raw_one_below_a_ceiling(arms: Any) -> None:
    critics, batch = controls()
    embeddings = [stacked_gradients(Critics(q, q), batch) for q in critics.critic]
    raw = torch.stack([covariance_penalty(*values.chunk(2, dim=1)) for values in embeddings])
    for cap in (1e6, 1.0, 0.01):
        expected = 0.5 * (cap * torch.tanh(raw / cap)).sum()
        torch.testing.assert_close(arms.CappedPenalty(0.5, cap=cap)(critics, batch), expected)


def test_the_variance_control_follows_the_trace_and_has_the_targets_units(arms: Any) -> None:
    critics, batch = controls()
    penalty = arms.GradientVariancePenalty(0.5)(critics, batch)
    found = torch.autograd.grad(penalty, [q.weight for q in critics.critic])
    for q, gradient in zip(critics.critic, found):
        weight = q.weight.detach().requires_grad_()
        g = torch.cat([batch.actions @ weight[0].T, batch.observations @ weight[0]], dim=1)
        trace = g.var(dim=0).sum()
        scale = q(*critics.next_inputs(batch)).detach().var()
        expected = torch.autograd.grad(0.5 * trace / trace.detach() * scale, weight)[0]
        torch.testing.assert_close(gradient, expected)


def test_the_variance_control_leaves_gradients_alone_that_differ_in_rounding_only(arms: Any) -> None:
    critics, batch = controls()
    rounded = batch.replace(
        observations=batch.observations[:1] + 1e-16 * batch.observations,
        actions=batch.actions[:1] + 1e-16 * batch.actions,
    )
    assert len(stacked_gradients(Critics(critics.critic[:1], critics.target[:1]), rounded).unique(dim=0)) > 1
    penalty = arms.GradientVariancePenalty(0.5)(critics, rounded)
    assert penalty == 0
    for gradient in torch.autograd.grad(penalty, [q.weight for q in critics.critic]):
        assert not gradient.any()


def test_every_arm_of_every_grid_is_defined(arms: Any) -> None:
    for grid in arms.GRIDS.values():
        assert set(grid.arms) <= set(arms.ARMS)
        assert set(grid.beside) <= set(arms.GRIDS)


def test_base_algorithms_are_compared_as_arms_are(report: Any) -> None:
    records = [
        {"dataset": "a", "base": base, "arm": "plain", "seed": seed, "score": score, "diverged": False}
        for base, scores in (("iql", (10, 20)), ("active_i", (15, 40)))
        for seed, score in enumerate(scores)
    ]
    together = report.of_bases(records)
    assert report.paired_differences(together, "active_i", "iql")[0].tolist() == [5, 20]
    assert report.probability_of_improvement(together, "active_i", "iql") == 0.75
    lines = report.table(together, ["iql", "active_i"], "iql")
    assert "difference to iql" in lines[0]
    assert lines[3].startswith("| active_i | 15 / 40 | +12.5 | +12.5 (2 pairs)")
