"""C4 inside d3rlpy: `C4Config(base=TD3PlusBCConfig()).create()`, or `wrap(algo)`."""

from .algorithm import wrap
from .config import C4Config
from .dataset import transitions_of
from .measuring import measure
from .reading import critics_of

__all__ = ["C4Config", "critics_of", "measure", "transitions_of", "wrap"]
