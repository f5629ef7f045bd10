"""A small dataset and its caches, made once for all tests of this folder."""

from training_runs import cache, dataset, frontier

__all__ = ["cache", "dataset", "frontier"]
