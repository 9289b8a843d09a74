"""C4 and ACTIVE inside Stable-Baselines3: clustered replay buffers, a callback, an algorithm, and what moves data."""

from .active import ACTIVE
from .buffers import (
    ClusteredDictReplayBuffer,
    ClusteredHerReplayBuffer,
    ClusteredNStepReplayBuffer,
    ClusteredReplayBuffer,
)
from .callback import C4Callback, attached
from .conversion import fill_replay_buffer, transitions_of
from .offline import learn_offline
from .reading import critics_of
from .storing import load_replay_buffer, save_replay_buffer

__all__ = [
    "ACTIVE",
    "C4Callback",
    "ClusteredDictReplayBuffer",
    "ClusteredHerReplayBuffer",
    "ClusteredNStepReplayBuffer",
    "ClusteredReplayBuffer",
    "attached",
    "critics_of",
    "fill_replay_buffer",
    "learn_offline",
    "load_replay_buffer",
    "save_replay_buffer",
    "transitions_of",
]
