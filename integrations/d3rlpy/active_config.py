"""ACTIVEConfig: ACTIVE's settings, as one of d3rlpy's own configs."""

import dataclasses
import math
from typing import Any, Optional, Union

from d3rlpy.base import DeviceArg, LearnableConfig, register_learnable
from d3rlpy.models.encoders import EncoderFactory, make_encoder_field
from d3rlpy.optimizers import OptimizerFactory, make_optimizer_field

from c4buffer import TemperatureController, VEnsembleAdvantage
from c4buffer._checks import check_choice, check_fraction, check_integer, check_number, fail, is_finite_number


@dataclasses.dataclass
class ACTIVEConfig(LearnableConfig):
    r"""ACTIVE: an ensemble of V-functions whose minimum is the TD target, and a cloning temperature that adapts.

    .. code-block:: python

        algo = ACTIVEConfig(value_loss="expectile").create("cuda:0")  # ACTIVE-I; "sparse" is ACTIVE-S
        algo.fit(dataset, n_steps=100000)

    With one member, `q_weight=0` and `likelihood_target=None` it is IQL ("expectile") or SQL's value learning with
    advantage-weighted regression ("sparse").

    Args:
        value_loss: f of Eq. 3, "expectile" (IQL's) or "sparse" (SQL's).
        n_members: m, the number of V-functions.
        tau: the expectile, for "expectile"; above 0 and below 1. (d3rlpy's `tau` of other algorithms is `eta` here.)
        alpha: the weight of the implicit regularisation, for "sparse"; above 0.
        quantile: c of Eq. 7, from 0 to 1.
        temperature: of the weights w = exp(A / temperature); above 0.
        max_weight: where w is clipped.
        likelihood_target: H_D of Eq. 12, in nats per action vector. "auto": estimated from the dataset before the first
            update, as `estimate_log_likelihood_target` does. None: beta stays at `initial_beta`.
        initial_beta: beta at the start.
        beta_learning_rate: lambda of beta.
        max_beta: its upper bound; None for none.
        q_weight: of the term -E[Q(s, a_pi)] in Eq. 13; 0 leaves it out.
        eta: the rate of the target network's moving average.
        n_critics: the number of Q-functions, whose targets' minimum is Q.
        actor_learning_rate, critic_learning_rate: lambda of policy, and of Q- and V-functions.
        actor_optim_factory, critic_optim_factory: their optimizers.
        actor_encoder_factory, critic_encoder_factory, value_encoder_factory: their networks.
        batch_size, gamma: of the updates, and of the return.

    Raises:
        ValueError: for values outside their ranges.
    """

    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    actor_optim_factory: OptimizerFactory = make_optimizer_field()
    critic_optim_factory: OptimizerFactory = make_optimizer_field()
    actor_encoder_factory: EncoderFactory = make_encoder_field()
    critic_encoder_factory: EncoderFactory = make_encoder_field()
    value_encoder_factory: EncoderFactory = make_encoder_field()
    batch_size: int = 256
    gamma: float = 0.99
    eta: float = 0.005
    n_critics: int = 2
    value_loss: str = "expectile"
    n_members: int = 4
    tau: float = 0.9
    alpha: float = 1.0
    quantile: float = 0.5
    temperature: float = 1.0
    max_weight: float = 100.0
    likelihood_target: Union[str, float, None] = "auto"
    initial_beta: float = 1.0
    beta_learning_rate: float = 3e-3
    max_beta: Optional[float] = None
    q_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("value_loss", self.value_loss, ("expectile", "sparse"))
        self.n_members = check_integer("n_members", self.n_members, minimum=1)
        self.n_critics = check_integer("n_critics", self.n_critics, minimum=1)
        self.tau = check_fraction("tau", self.tau, open_ends=True)
        self.eta = check_number("eta", self.eta, minimum=0, exclusive=True)
        if self.eta > 1:
            fail("eta", "a number above 0 and at most 1", repr(self.eta))
        self.alpha = check_number("alpha", self.alpha, minimum=0, exclusive=True)
        self.q_weight = check_number("q_weight", self.q_weight, minimum=0)
        target = self.likelihood_target
        if isinstance(target, str):
            check_choice("likelihood_target", target, ("auto",))
        elif target is not None:
            if not is_finite_number(target):
                fail("likelihood_target", "a finite number, 'auto' or None", repr(target))
            self.likelihood_target = float(target)
        self.beta_learning_rate = check_number("beta_learning_rate", self.beta_learning_rate, minimum=0)
        if self.max_beta is not None:
            self.max_beta = check_number("max_beta", self.max_beta, minimum=0, exclusive=True)
        self.initial_beta = check_number("initial_beta", self.initial_beta, minimum=0)
        if self.initial_beta > (self.max_beta or math.inf):
            fail("initial_beta", f"at most max_beta, {self.max_beta!r}", repr(self.initial_beta))
        VEnsembleAdvantage(quantile=self.quantile, temperature=self.temperature, max_weight=self.max_weight)
        for name in ("quantile", "temperature", "max_weight"):
            setattr(self, name, float(getattr(self, name)))

    def make_controller(self, process_group: Any = None) -> TemperatureController:
        """The temperature of these settings, its target None where it is still to be estimated."""
        target = self.likelihood_target
        return TemperatureController(
            None if isinstance(target, str) else target,
            learning_rate=self.beta_learning_rate,
            initial=self.initial_beta,
            maximum=self.max_beta,
            process_group=process_group,
        )

    def create(self, device: DeviceArg = False, enable_ddp: bool = False) -> Any:
        """The algorithm, on `device`."""
        from .active import ACTIVE

        return ACTIVE(self, device, enable_ddp)

    @staticmethod
    def get_type() -> str:
        return "active"


register_learnable(ACTIVEConfig)
