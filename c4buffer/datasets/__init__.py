"""Datasets: one file per format -> Transitions."""
