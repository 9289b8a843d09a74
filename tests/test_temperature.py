"""The cloning temperature: the sign of its steps, its fixed point, its bounds and its state."""

from __future__ import annotations

import math
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from c4buffer import TemperatureController


def test_a_step_by_hand_and_its_sign() -> None:
    controller = TemperatureController(-2.0, learning_rate=0.1, initial=1.0)
    controller.step(torch.tensor([-3.0, -5.0]))  # too little likelihood
    assert controller.beta.item() == pytest.approx(1.2)
    controller.step(torch.tensor([1.0, 1.0]))  # too much
    assert controller.beta.item() == pytest.approx(0.9)


def test_the_loss_is_equation_14_and_its_gradient_reaches_beta_only() -> None:
    controller = TemperatureController(-1.0, initial=0.5)
    log_prob = torch.tensor([-2.0, -4.0], requires_grad=True)
    loss = controller.loss(log_prob)
    assert loss.item() == pytest.approx(0.5 * (-3 + 1))
    loss.backward()
    assert controller.beta.grad is not None
    assert controller.beta.grad.item() == pytest.approx(-2)
    assert log_prob.grad is None


def test_a_step_is_gradient_descent_on_the_loss() -> None:
    log_prob = torch.randn(20, generator=torch.Generator().manual_seed(0))
    stepped, other = (TemperatureController(-0.5, learning_rate=0.2, initial=2.0) for _ in range(2))
    stepped.step(log_prob)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.2)
    other.loss(log_prob).backward()
    optimizer.step()
    torch.testing.assert_close(stepped.beta, other.beta)


def test_beta_stays_between_zero_and_its_maximum() -> None:
    controller = TemperatureController(0.0, learning_rate=1.0, initial=0.5, maximum=3.0)
    controller.step(torch.tensor([10.0]))
    assert controller.beta.item() == 0
    controller.step(torch.tensor([-10.0]))
    assert controller.beta.item() == 3


@pytest.mark.parametrize("initial", [0.0, 0.3, 5.0])
def test_from_every_start_the_likelihood_comes_to_the_target(initial: float) -> None:
    # a Gaussian policy N(mu, 1) that is paid for going away from the data's action 0:
    # maximise mu + beta log pi(0), so mu = 1 / beta and log pi(0) = -mu^2 / 2 - log sqrt(2 pi)
    target = -0.5 * 0.7**2 - 0.5 * math.log(2 * math.pi)  # where mu = 0.7, and so beta = 1 / 0.7
    controller = TemperatureController(target, learning_rate=0.02, initial=initial)
    mu = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([mu], lr=0.02)
    for _ in range(20_000):
        log_prob = -0.5 * mu.square() - 0.5 * math.log(2 * math.pi)
        loss = -mu.mean() - controller.beta.detach() * log_prob.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step(log_prob.detach())
    assert mu.item() == pytest.approx(0.7, abs=1e-3)
    assert controller.beta.item() == pytest.approx(1 / 0.7, rel=1e-3)


def test_a_target_out_of_reach_is_warned_of_once() -> None:
    controller = TemperatureController(5.0, learning_rate=1.0, initial=1.0, maximum=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(999):
            controller.step(torch.tensor([-3.0]))
    expected = (
        r"beta has been at its maximum, 2, for 1,000 steps; the mean log-likelihood is -3 and the target 5: lower"
    )
    with pytest.warns(UserWarning, match=expected) as warned:
        controller.step(torch.tensor([-3.0]))
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2000):
            controller.step(torch.tensor([-3.0]))


@pytest.mark.parametrize("maximum", [0.3, 0.7, 0.9])
def test_a_maximum_that_float32_rounds_down_is_warned_of_too(maximum: float) -> None:
    controller = TemperatureController(5.0, learning_rate=1.0, initial=0.0, maximum=maximum)
    for _ in range(999):
        controller.step(torch.tensor([-3.0]))
    with pytest.warns(UserWarning, match=f"at its maximum, {maximum}"):
        controller.step(torch.tensor([-3.0]))


def test_target_and_beta_are_saved() -> None:
    controller = TemperatureController(-1.5, learning_rate=0.5)
    controller.step(torch.tensor([0.0]))
    other = TemperatureController(None)
    other.load_state_dict(controller.state_dict())
    assert other.target == -1.5
    assert other.beta.item() == controller.beta.item() == 0.25
    assert [name for name, _ in other.named_parameters()] == ["beta"]


def test_casting_the_module_leaves_its_target_as_it_was() -> None:
    target = -5.123456789012345
    controller = TemperatureController(target).half()
    other = TemperatureController(None).bfloat16()
    other.load_state_dict(controller.state_dict())
    assert controller.target == other.target == target


def test_the_loss_compiles_without_a_break() -> None:
    controller = TemperatureController(-1.5, initial=2.0)
    loss = torch.compile(controller.loss, fullgraph=True, backend="eager")(torch.tensor([0.0, 1.0]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.item(), controller.beta.grad) == (4.0, torch.tensor(2.0))


def test_values_that_are_not_finite_leave_beta_as_it_was() -> None:
    controller = TemperatureController(-1.0)
    with pytest.raises(ValueError, match="log_prob: expected finite values, got nan .*has the training diverged"):
        controller.step(torch.tensor([0.0, math.nan]))
    assert controller.beta.item() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TemperatureController(math.nan), "target: expected a finite number or None, got nan"),
        (lambda: TemperatureController("auto"), "target: expected a finite number or None, got 'auto'"),
        (lambda: TemperatureController(True), "target: expected a finite number or None, got True"),
        (lambda: TemperatureController(0.0, learning_rate=-1), "learning_rate: expected a finite number at least 0"),
        (lambda: TemperatureController(0.0, initial=-1), "initial: expected a finite number at least 0, got -1"),
        (lambda: TemperatureController(0.0, maximum=0), "maximum: expected a finite number above 0, got 0"),
        (lambda: TemperatureController(0.0, initial=2, maximum=1), "initial: expected at most maximum, 1, got 2"),
        (lambda: TemperatureController(0.0).step(torch.zeros(2, 1)), r"log_prob: expected \[B\] with .*, got \[2, 1\]"),
        (lambda: TemperatureController(0.0).step(torch.zeros(0)), r"log_prob: expected \[B\] with at least one row"),
        (lambda: TemperatureController(None).step(torch.zeros(2)), "target: expected H_D to be set before"),
        (lambda: TemperatureController(None).loss(torch.zeros(2)), "target: expected H_D to be set before"),
    ],
)
def test_wrong_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _step_on_rank(rank: int, port: int, folder: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    controller = TemperatureController(0.0, learning_rate=0.5, process_group=group)
    controller.step(torch.tensor([-1.0, -1.0] if rank == 0 else [-4.0]))
    torch.save(controller.beta.detach(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_step_by_the_mean_of_their_likelihoods(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_step_on_rank, args=(port, str(tmp_path)), nprocs=2)
    betas = [torch.load(tmp_path / f"{rank}.pt").item() for rank in range(2)]
    assert betas == [pytest.approx(1 + 0.5 * 2.5)] * 2


def test_only_steps_in_a_row_at_the_maximum_count_and_the_warning_comes_once() -> None:
    controller = TemperatureController(5.0, learning_rate=1.0, initial=1.0, maximum=2.0)

    def steps(count: int, log_prob: float = -3.0) -> None:
        for _ in range(count):
            controller.step(torch.tensor([log_prob]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(999)
        steps(1, 6.0)  # below it for once
        steps(999)
    with pytest.warns(UserWarning, match="beta has been at its maximum, 2, for 1,000 steps"):
        steps(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(1, 6.0)
        steps(1001)


def test_beta_may_start_at_its_maximum() -> None:
    assert TemperatureController(0.0, initial=2.0, maximum=2.0).beta.item() == 2


def test_a_target_that_is_not_known_is_saved_as_such() -> None:
    controller = TemperatureController(-1.5)
    controller.load_state_dict(TemperatureController(None).state_dict())
    assert controller.target is None
