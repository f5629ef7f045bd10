"""The commands: each parses, calls one function of the package and prints. Heavy imports happen inside the commands."""

from cache_pipeline.cli.app import app

__all__ = ["app"]
