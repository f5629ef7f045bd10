"""The command line of cache_pipeline, runnable from a checkout: ``uv run cli.py --help``."""

from cache_pipeline.cli import app

if __name__ == "__main__":
    app()
