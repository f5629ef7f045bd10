from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_pipeline.policies.normalizer import ROUNDING, Normalizer


def test_minmax_maps_each_dimension_to_plus_minus_one() -> None:
    rows = np.array([[0.0, -4.0], [10.0, 4.0], [5.0, 0.0]], np.float32)
    out = Normalizer((2,)).fit(rows, "minmax")(torch.from_numpy(rows))
    assert out.min(0).values.tolist() == [-1, -1]
    assert out.max(0).values.tolist() == [1, 1]


def test_gaussian_gives_mean_zero_and_deviation_one() -> None:
    rows = np.random.default_rng(0).normal(3, 5, (500, 4)).astype(np.float32)
    out = Normalizer((4,)).fit(rows, "gaussian")(torch.from_numpy(rows))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)


def test_a_constant_dimension_maps_to_zero_and_comes_back_as_its_constant() -> None:
    rows = np.array([[1.0, 7.0], [2.0, 7.0]], np.float32)
    for mode in ("minmax", "gaussian"):
        normalizer = Normalizer((2,)).fit(rows, mode)
        assert normalizer(torch.from_numpy(rows))[:, 1].tolist() == [0, 0]
        assert normalizer.invert(torch.zeros(2))[1] == 7


def test_variation_below_the_rounding_of_the_store_counts_as_constant() -> None:
    rows = np.array([[1.0], [1.0004]], np.float32)
    assert Normalizer((1,)).fit(rows, "gaussian", ROUNDING["float16"]).scale.item() == 1
    assert Normalizer((1,)).fit(rows, "gaussian").scale.item() > 1000


def test_none_leaves_values_as_they_are() -> None:
    rows = np.array([[5.0], [9.0]], np.float32)
    assert Normalizer((1,)).fit(rows, "none")(torch.tensor([5.0])) == 5


@given(hnp.arrays(np.float32, (7, 3), elements=st.floats(-100, 100, width=32)), st.sampled_from(["minmax", "gaussian"]))
def test_invert_undoes_forward(rows: np.ndarray, mode: str) -> None:
    normalizer, values = Normalizer((3,)).fit(rows, mode), torch.from_numpy(rows)
    torch.testing.assert_close(normalizer.invert(normalizer(values)), values, atol=1e-3, rtol=1e-4)


def test_statistics_travel_with_the_weights() -> None:
    fitted, fresh = Normalizer((2,)).fit(np.array([[0.0, 1.0], [4.0, 3.0]]), "minmax"), Normalizer((2,))
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(torch.ones(2)), fitted(torch.ones(2)))
    assert not list(fitted.parameters())


def test_joined_normalizers_act_as_their_parts_side_by_side() -> None:
    left, right = Normalizer((2,)).fit(np.eye(2), "minmax"), Normalizer((3, 1)).fit(np.ones((2, 3, 1)), "gaussian")
    joined = Normalizer((5,))
    joined.join([left, right])
    values = torch.arange(5.0)
    expected = torch.cat([left(values[:2]), right(values[2:].view(3, 1)).flatten()])
    assert torch.equal(joined(values), expected)


def test_a_constant_action_dimension_ignores_the_policys_output() -> None:
    rows = np.stack([np.linspace(-1, 1, 9), np.full(9, 0.25)], axis=1)
    for mode in ("minmax", "gaussian"):
        normalizer = Normalizer((2,)).fit(rows, mode)
        back = normalizer.invert(torch.tensor([[0.0, 0.9], [0.0, -0.4]]))
        assert back[:, 1].tolist() == [0.25, 0.25]
