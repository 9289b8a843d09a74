"""One run of the study: settings in, a record out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, CappedPenalty, GradientNormPenalty, GradientVariancePenalty, random_partition
from products import use_onednn
from rows import draw_at_once

from c4buffer import load_d4rl

DATA = Path(__file__).parents[2] / "data"
ENVIRONMENTS = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}
# D4RL's reference returns: score 0 and score 100
RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
}
MEASURED = ("mean_q", "td_loss", "total", "within", "between", "correlation", "gradient_norm", "target_gradient_norm")
DIVERGED = 3  # times the largest discounted return in the data


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one arm on one dataset with one seed.

    Args:
        settings: dataset, base, arm, change (the arm's fields), seed, updates, evaluate_every, episodes.

    Returns:
        settings; `config` (the algorithm's, as d3rlpy writes it); versions and commit; `evaluated_at` and, for each,
        `scores`, what `measure` gives and the buffer's `cluster_sizes` (None without clusters); `score` (the mean of
        the last five evaluations); `broke` (the error that ended the run when its critic was no longer finite, None
        otherwise; what was to come scores 0 and measures NaN); `largest_return` (discounted, in the data) and
        `diverged` (broke, or mean Q above three times that, ever); `training_seconds` (processor time of the training
        alone) and `seconds` (of everything, by the clock); `onednn` (whether it made the matrix products) and
        `fused` (whether Adam took its steps in one kernel), by which numbers differ in rounding alone.
    """
    torch.set_num_threads(1)
    onednn = use_onednn()
    started_from = commit()
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
        import gymnasium
    import structlog
    from c4buffer.integrations.d3rlpy import measure, transitions_of

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    started = time.perf_counter()
    data = load_d4rl(DATA / f"{settings['dataset']}-10k.hdf5")
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    dataset = d3rlpy.dataset.MDPDataset(**{name: getattr(data, name).numpy() for name in names})
    draw_at_once(dataset)
    d3rlpy.seed(settings["seed"])
    algo = make_algorithm(d3rlpy, dataset, settings)
    fuse_optimizers(algo)
    transitions = transitions_of(dataset, algo)

    name = settings["dataset"].split("-")[0]
    env = gymnasium.make(ENVIRONMENTS[name])
    env.reset(seed=settings["seed"])
    evaluate = d3rlpy.metrics.EnvironmentEvaluator(env, n_trials=settings["episodes"])
    low, high = RETURNS[name]

    curves: dict[str, list[Any]] = {"evaluated_at": [], "scores": [], "cluster_sizes": []}
    clock = Clock()
    broke, target = None, None
    try:
        for epoch, metrics in algo.fitter(
            dataset,
            n_steps=settings["updates"],
            n_steps_per_epoch=settings["evaluate_every"],
            show_progress=False,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        ):
            clock.stop()
            measured = measure(algo, transitions)
            curves["evaluated_at"].append(epoch * settings["evaluate_every"])
            curves["scores"].append(100 * (evaluate(algo, dataset) - low) / (high - low))
            for quantity, value in measured.items():
                curves.setdefault(quantity, []).append(value)
            buffer = getattr(algo, "c4_buffer", None)
            report = None if buffer is None else buffer.last_report
            curves["cluster_sizes"].append(None if report is None else report.sizes)
            if settings["base"].startswith("active"):
                for quantity in ("temperature", "log_likelihood"):
                    curves.setdefault(quantity, []).append(metrics[quantity])
                target = algo.impl.modules.temperature.target
            clock.start()
    except ValueError as error:
        if is_finite(algo):
            raise
        broke = str(error)
        clock.stop()
        fill(curves, settings["updates"], settings["evaluate_every"])

    rewards = data.rewards.numpy()
    if algo.reward_scaler is not None:
        rewards = algo.reward_scaler.transform_numpy(rewards)
    largest_return = largest_discounted_return(rewards.tolist(), (data.terminals + data.timeouts).tolist())
    return {
        **settings,
        "config": algo.config.serialize_to_dict(),
        **curves,
        "score": sum(curves["scores"][-5:]) / len(curves["scores"][-5:]),
        "largest_return": largest_return,
        **({} if target is None else {"likelihood_target": target}),
        "broke": broke,
        "diverged": not all(value <= DIVERGED * largest_return for value in curves["mean_q"]),
        "training_seconds": clock.seconds,
        "onednn": onednn,
        "fused": True,
        "seconds": time.perf_counter() - started,
        "versions": {package: version(package) for package in ("c4buffer", "d3rlpy", "torch", "gymnasium", "mujoco")},
        "commit": started_from,
    }


class Clock:
    """Processor time between start and stop, summed; it starts when made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start()

    def start(self) -> None:
        self._began: float | None = time.process_time()

    def stop(self) -> None:
        if self._began is not None:
            self.seconds += time.process_time() - self._began
        self._began = None


def is_finite(algo: Any) -> bool:
    """Whether every parameter of the algorithm's Q-functions is."""
    return all(bool(values.isfinite().all()) for values in algo.impl.q_function.parameters())


def fill(curves: dict[str, list[Any]], updates: int, evaluate_every: int) -> None:
    """Make curves that ended early as long as the others: scores of 0, NaN for all that was to be measured."""
    moments = range(evaluate_every, updates + 1, evaluate_every)
    left = len(moments) - len(curves["evaluated_at"])
    curves["evaluated_at"] = list(moments)
    curves["scores"] += [0.0] * left
    curves["cluster_sizes"] += [None] * left
    for quantity in (*MEASURED, *curves):
        curve = curves.setdefault(quantity, [])
        curve += [float("nan")] * (len(moments) - len(curve))


def commit() -> str | None:
    """The commit of the code that runs; None where git does not know it."""
    command = ["git", "-C", str(DATA), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_algorithm(d3rlpy: Any, dataset: Any, settings: dict[str, Any]) -> Any:
    """The base algorithm, scalers fitted and networks built, with the arm's change."""
    from c4buffer.integrations.d3rlpy import ACTIVEConfig, C4Config

    arm = ARMS[settings["arm"]]
    options = {}
    if arm.layer_norm:
        encoder = d3rlpy.models.encoders.VectorEncoderFactory([256, 256], use_layer_norm=True)
        options["critic_encoder_factory"] = encoder
    scaler = d3rlpy.preprocessing.StandardObservationScaler()
    if settings["base"] != "td3_plus_bc":  # rewards as IQL's and SQL's authors scale MuJoCo's: by the span of returns
        options["reward_scaler"] = d3rlpy.preprocessing.ReturnBasedRewardScaler(multiplier=1000.0)
    bases = {
        "td3_plus_bc": d3rlpy.algos.TD3PlusBCConfig,
        "iql": d3rlpy.algos.IQLConfig,
        "active_i": functools.partial(ACTIVEConfig, value_loss="expectile"),
        "active_s": functools.partial(ACTIVEConfig, value_loss="sparse"),
    }
    config = bases[settings["base"]](observation_scaler=scaler, **options, **arm.active)
    if arm.c4 is not None:
        config = C4Config(base=config, seed=settings["seed"], **arm.c4)
    algo = config.create("cpu")
    for each in (algo.observation_scaler, algo.reward_scaler):
        if each is not None:
            each.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)
    algo.build_with_dataset(dataset)
    if arm.target:
        algo.estimate_likelihood_target(dataset, **arm.target)
    if arm.random_partition:
        algo.c4_clusterer = random_partition(config.n_clusters, settings["seed"])
    if arm.gradient_norm:
        algo.impl.c4_penalty = GradientNormPenalty(config.penalty_weight)
    elif arm.gradient_variance:
        algo.impl.c4_penalty = GradientVariancePenalty(config.penalty_weight)
    elif arm.cap is not None:
        algo.impl.c4_penalty = CappedPenalty(config.penalty_weight, cap=arm.cap)
    if arm.buffer:
        algo.c4_buffer_options = arm.buffer
    return algo


def fuse_optimizers(algo: Any) -> None:
    """Let PyTorch take Adam's steps in one kernel, not in a dozen a parameter: a tenth of an update's time or less."""
    for field in dataclasses.fields(algo.impl.modules):
        optimizer = getattr(getattr(algo.impl.modules, field.name), "optim", None)
        if isinstance(optimizer, torch.optim.Adam):
            for group in optimizer.param_groups:
                group["fused"] = True


def largest_discounted_return(rewards: list[float], ends: list[float], gamma: float = 0.99) -> float:
    """Of all the rows of the data, to their episode's end."""
    best, value = 0.0, 0.0
    for reward, last in zip(reversed(rewards), reversed(ends)):
        value = reward + (0.0 if last else gamma * value)
        best = max(best, value)
    return best
