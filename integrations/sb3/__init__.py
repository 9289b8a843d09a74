"""C4 inside Stable-Baselines3: clustered replay buffers, and a callback that binds them and adds the penalty."""

from .buffers import (
    ClusteredDictReplayBuffer,
    ClusteredHerReplayBuffer,
    ClusteredNStepReplayBuffer,
    ClusteredReplayBuffer,
)
from .callback import C4Callback, attached
from .offline import learn_offline
from .reading import critics_of

__all__ = [
    "C4Callback",
    "ClusteredDictReplayBuffer",
    "ClusteredHerReplayBuffer",
    "ClusteredNStepReplayBuffer",
    "ClusteredReplayBuffer",
    "attached",
    "critics_of",
    "learn_offline",
]
