"""The sample dataset that quickstart and bench use."""

from pathlib import Path

from cache_pipeline.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
NAME = "lift_sample.hdf5"


def sample_dataset() -> Path:
    """The sample: inside an installed package, or in ``data/`` of a checkout; raises ConfigError without one."""
    places = (PACKAGE / NAME, PACKAGE.parent / "data" / NAME)
    for path in places:
        if path.is_file():
            return path
    raise ConfigError(f"the sample {places[-1]} is not there; name a robomimic file with --dataset")
