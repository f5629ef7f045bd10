from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cache_pipeline.errors import ConfigError
from cache_pipeline.options import slices
from cache_pipeline.policies.normalizer import ActionNormalizer
from cache_pipeline.policies.rotations import RotationSlices, axis_angle_from_6d, axis_angle_to_6d


def rotations(count: int, most: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    axes = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    return axes * torch.rand(count, 1, generator=generator) * most


@pytest.mark.parametrize("most", [1e-4, 0.5, math.pi - 1e-2])
def test_axis_angles_up_to_half_a_turn_come_back(most: float) -> None:
    given = rotations(200, most)
    torch.testing.assert_close(axis_angle_from_6d(axis_angle_to_6d(given)), given, atol=2e-4, rtol=1e-3)


def test_no_rotation_and_half_turns_come_back() -> None:
    given = torch.tensor([[0, 0, 0], [math.pi, 0, 0], [0, math.pi, 0], [0, 0, math.pi]])
    torch.testing.assert_close(axis_angle_from_6d(axis_angle_to_6d(given)).abs(), given, atol=1e-3, rtol=0)


def test_the_six_numbers_are_the_first_two_columns_of_the_matrix() -> None:
    quarter = axis_angle_to_6d(torch.tensor([0, 0, math.pi / 2]))
    torch.testing.assert_close(quarter, torch.tensor([0.0, 1, 0, -1, 0, 0]), atol=1e-6, rtol=0)


def test_six_numbers_off_the_rotations_go_to_the_nearest() -> None:
    given = rotations(50, 2.0)
    torch.testing.assert_close(axis_angle_from_6d(3 * axis_angle_to_6d(given)), given, atol=1e-4, rtol=1e-3)


def test_an_action_normaliser_with_rotations_gives_actions_back() -> None:
    actions = torch.cat((torch.rand(64, 3), rotations(64, 1.0), torch.rand(64, 1), rotations(64, 2.0)), dim=1)
    slices = RotationSlices(((7, 10), (3, 6)), 10)
    stage = ActionNormalizer(slices)
    stage.fit(actions.numpy(), "minmax")
    seen = stage(actions)
    assert seen.shape == (64, 16) == (64, slices.encoded_width)
    assert float(seen.abs().max()) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(stage.invert(seen), actions, atol=1e-4)


@pytest.mark.parametrize(
    ("slices", "message"),
    [(((3, 7),), "3:7 is not an axis-angle"), (((5, 8),), "three of the 7"), (((0, 3), (2, 5)), "overlap")],
)
def test_slices_that_are_not_rotations_are_refused(slices: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RotationSlices(slices, 7)


def test_slices_are_read_from_text() -> None:
    assert slices("3:6,10:13") == ((3, 6), (10, 13))
    with pytest.raises(ConfigError, match="START:STOP"):
        slices("3-6")
