"""C4 inside TorchRL: a sampler of single-cluster batches, and what reads its batches and its losses' critics."""

from .reading import critics_of
from .rows import Keys, tensordict_of, transitions_of
from .sampler import ClusterSampler

__all__ = ["ClusterSampler", "Keys", "critics_of", "tensordict_of", "transitions_of"]
