"""ACTIVE as one of Stable-Baselines3's algorithms."""

from .active import ACTIVE
from .policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["ACTIVE", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
