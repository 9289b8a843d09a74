"""C4Config: any supported d3rlpy config with C4 around it, as one of d3rlpy's own configs."""

import dataclasses
from typing import Any, Optional, Union

from d3rlpy.base import DeviceArg, LearnableConfig, register_learnable
from d3rlpy.preprocessing import ActionScaler, ObservationScaler, RewardScaler
from d3rlpy.serializable_config import CONFIG_STORAGE
from dataclasses_json import config as json_config

from c4buffer._checks import check_choice, check_integer, check_number, fail

MIRRORED = {field.name: field for field in dataclasses.fields(LearnableConfig)}
STORAGE = CONFIG_STORAGE[LearnableConfig]  # how d3rlpy writes a config inside a config


class _OfBase:
    """A field of C4Config that every d3rlpy config has: read from the base, and set there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, config: Any, owner: type) -> Any:
        return self if config is None else getattr(config.base, self._name)

    def __set__(self, config: Any, value: Any) -> None:
        setattr(config.base, self._name, value)


def _of_base(name: str) -> Any:
    return dataclasses.field(init=False, default=_OfBase(name), metadata=MIRRORED[name].metadata)


@dataclasses.dataclass
class C4Config(LearnableConfig):
    r"""C4 around a d3rlpy algorithm: single-cluster batches and the covariance penalty in the critic loss.

    .. code-block:: python

        algo = C4Config(base=TD3PlusBCConfig()).create("cuda:0")
        algo.fit(dataset, n_steps=100000)

    Batch size, discount, scalers and the rest of what every d3rlpy config has are those of `base`, read there and set
    there; to load a saved algorithm, import this module first.

    Args:
        base: config of the algorithm: any of d3rlpy's that learns a Q-function, with continuous or discrete actions.
        n_clusters: K. "auto": at each clustering the K of the lowest BIC.
        embedding: what is clustered, "gradients" or "features".
        refresh_interval: updates between clusterings. None: max(1000, N // 10).
        penalty_weight: lambda. 0 turns the penalty off.
        penalty_kind: "gradient" or "feature".
        penalty_scale: "raw", "relative" or "correlation", for the gradient penalty.
        penalty_every: the penalty is added to every k-th critic update, with k times the weight.
        trace_weight: beta, for the gradient penalty.
        next_action: a' of g', from the "dataset" or the "policy".
        seed: of the buffer. None: torch's initial seed.

    The penalty is `CovariancePenalty`'s; `penalty_scale` and `trace_weight` are of the gradient penalty alone.

    Raises:
        ValueError: for values outside their ranges, and for fields that belong to `base`.
    """

    base: Optional[LearnableConfig] = dataclasses.field(
        default=None, metadata=json_config(encoder=STORAGE.encoder, decoder=STORAGE.decoder)
    )
    n_clusters: Union[int, str] = 3
    embedding: str = "gradients"
    refresh_interval: Optional[int] = None
    penalty_weight: float = 0.1
    penalty_kind: str = "gradient"
    penalty_scale: str = "relative"
    penalty_every: int = 4
    trace_weight: float = 1.0
    next_action: str = "dataset"
    seed: Optional[int] = None
    batch_size: int = _of_base("batch_size")
    gamma: float = _of_base("gamma")
    observation_scaler: Optional[ObservationScaler] = _of_base("observation_scaler")
    action_scaler: Optional[ActionScaler] = _of_base("action_scaler")
    reward_scaler: Optional[RewardScaler] = _of_base("reward_scaler")
    compile_graph: bool = _of_base("compile_graph")

    def __new__(cls, *_: Any, **fields: Any) -> Any:
        for name in MIRRORED.keys() & fields.keys():
            fail(name, "to be set on base", repr(fields[name]))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.base, LearnableConfig):
            fail("base", "a d3rlpy config, as TD3PlusBCConfig()", repr(self.base))
        if isinstance(self.base, C4Config):
            fail("base", "a config without C4", "a C4Config")
        if self.n_clusters != "auto":
            self.n_clusters = check_integer("n_clusters", self.n_clusters, minimum=1)
        check_choice("embedding", self.embedding, ("gradients", "features"))
        if self.refresh_interval is not None:
            self.refresh_interval = check_integer("refresh_interval", self.refresh_interval, minimum=1)
        self.penalty_weight = check_number("penalty_weight", self.penalty_weight, minimum=0)
        check_choice("penalty_kind", self.penalty_kind, ("gradient", "feature"))
        check_choice("penalty_scale", self.penalty_scale, ("raw", "relative", "correlation"))
        self.penalty_every = check_integer("penalty_every", self.penalty_every, minimum=1)
        self.trace_weight = check_number("trace_weight", self.trace_weight, minimum=0)
        check_choice("next_action", self.next_action, ("dataset", "policy"))
        if self.seed is not None:
            self.seed = check_integer("seed", self.seed, minimum=0)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self.__dataclass_fields__:
            fail(f"config.{name}", "a field of C4Config; the algorithm's own are set on config.base", "another")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        hint = "" if name.startswith("_") else "; the algorithm's own fields are config.base's"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    @property
    def fewest_rows(self) -> int:
        """Transitions without which there can not be so many clusters."""
        return 1 if isinstance(self.n_clusters, str) else self.n_clusters

    def create(self, device: DeviceArg = False, enable_ddp: bool = False) -> Any:
        """The algorithm of `base` with C4 in it, on `device`."""
        from .algorithm import armed

        assert self.base is not None
        try:
            algo = self.base.create(device, enable_ddp)
        except NotImplementedError:  # of fitted Q evaluation, which is made around an algorithm
            fail("base", "the config of an algorithm", type(self.base).__name__)
        return armed(algo, self)

    @staticmethod
    def get_type() -> str:
        return "c4"


register_learnable(C4Config)
