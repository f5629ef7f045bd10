"""The obs history."""

from __future__ import annotations

import numpy as np
import pytest

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.history import ObsHistory


def test_the_first_obs_is_repeated_until_the_history_is_full() -> None:
    history = ObsHistory(["x"], 3)
    history.start({"x": np.array([1.0]), "unused": np.array([9.0])})
    stacks = [history.stack()["x"].ravel().tolist()]
    for value in (2.0, 3.0, 4.0):
        history.add({"x": np.array([value])})
        stacks.append(history.stack()["x"].ravel().tolist())
    assert stacks == [[1, 1, 1], [1, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_a_new_episode_forgets_the_last_one() -> None:
    history = ObsHistory(["x"], 2)
    history.start({"x": np.array([1.0])})
    history.add({"x": np.array([2.0])})
    history.start({"x": np.array([7.0])})
    assert history.stack()["x"].ravel().tolist() == [7, 7]


def test_images_keep_their_type_and_get_a_time_axis_in_front() -> None:
    history = ObsHistory(["eye_image"], 2)
    history.start({"eye_image": np.zeros((4, 5, 3), np.uint8)})
    stacked = history.stack()["eye_image"]
    assert stacked.shape == (2, 4, 5, 3)
    assert stacked.dtype == np.uint8


def test_an_obs_that_the_environment_lacks_is_an_error_that_lists_the_available_obs() -> None:
    with pytest.raises(ConfigError, match=r"no obs 'robot0_eef_po'.*did you mean robot0_eef_pos"):
        ObsHistory(["robot0_eef_po"], 2).start({"robot0_eef_pos": np.zeros(3)})
