import torch

from cache_pipeline.encoders.identity import collapse_warning, feature_statistics
from cache_pipeline.encoders.pooling import SpatialSoftmax


def test_near_constant_features_are_warned_of():
    features = torch.rand(1, 16) + 1e-5 * torch.rand(32, 16)
    assert feature_statistics(features).collapsed
    assert "has collapsed" in collapse_warning(feature_statistics(features))


def test_useful_features_are_not_warned_of():
    statistics = feature_statistics(torch.rand(32, 16, generator=torch.Generator().manual_seed(0)))
    assert collapse_warning(statistics) == ""
    assert 0.1 < statistics.spread < 1


def test_zero_and_infinite_features_are_warned_of():
    assert feature_statistics(torch.zeros(4, 3)).collapsed
    assert "not finite" in collapse_warning(feature_statistics(torch.full((4, 3), float("inf"))))


def test_one_frame_has_no_spread_to_warn_of():
    assert not feature_statistics(torch.rand(1, 8)).collapsed


def test_values_that_never_change_are_counted():
    features = torch.rand(8, 4)
    features[:, 0] = 0.5
    assert feature_statistics(features).constant == 0.25


def test_spatial_softmax_finds_the_place_of_a_peak():
    pool = SpatialSoftmax((1, 5, 9), keypoints=1)
    torch.nn.init.ones_(pool.conv.weight)
    torch.nn.init.zeros_(pool.conv.bias)
    features = torch.zeros(1, 1, 5, 9)
    features[0, 0, 4, 2] = 100
    torch.testing.assert_close(pool(features), torch.tensor([[-0.5, 1.0]]))
