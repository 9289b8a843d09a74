"""C4 inside d3rlpy: `C4Config(base=TD3PlusBCConfig()).create()`, or `wrap(algo)`; and ACTIVE as an algorithm of its."""

from .active_config import ACTIVEConfig
from .algorithm import wrap
from .config import C4Config
from .dataset import transitions_of
from .episodes import dataset_of
from .measuring import measure
from .reading import critics_of

__all__ = ["ACTIVEConfig", "C4Config", "critics_of", "dataset_of", "measure", "transitions_of", "wrap"]
