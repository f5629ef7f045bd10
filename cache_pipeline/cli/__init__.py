"""The commands: each parses options, calls one function of the package and prints. Heavy imports are inside them."""

from cache_pipeline.cli.app import app

__all__ = ["app"]
