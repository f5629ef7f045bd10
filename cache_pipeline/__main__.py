"""``python -m cache_pipeline``: the command line."""

from cache_pipeline.cli import app

if __name__ == "__main__":
    app()
