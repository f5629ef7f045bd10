import numpy as np
import pytest

from cache_pipeline.reports.probe import (
    BOTH,
    FEATURES,
    PROPRIOCEPTION,
    RANDOM,
    ProbeScore,
    nearest,
    r_squared,
    ridge,
    verdict,
)


@pytest.fixture
def linear_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 30))
    y = x @ rng.normal(size=(30, 2)) + 3.0
    return x[:150], y[:150], x[150:], y[150:]


def test_ridge_reads_a_linear_target_and_not_noise(linear_data):
    x, y, x_valid, y_valid = linear_data
    assert r_squared(ridge(x, y, x_valid), y_valid) > 0.99
    noise = np.random.default_rng(1).normal(size=y.shape)
    assert r_squared(ridge(x, noise, x_valid), noise[:50]) < 0.1


def test_ridge_with_more_features_than_rows_equals_the_primal_solution():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 50)), rng.normal(size=(20, 1))
    from cache_pipeline.reports.probe import _fit

    penalty = 0.1
    mean = y.mean(0)
    primal = np.linalg.solve(x.T @ x + penalty * 20 * np.eye(50), x.T @ (y - mean))
    np.testing.assert_allclose(_fit(x, y, penalty)(x), x @ primal + mean, atol=1e-8)


def test_nearest_gives_the_mean_of_the_nearest_rows():
    x = np.array([[0.0], [1.0], [10.0], [11.0]])
    y = np.array([[0.0], [2.0], [20.0], [22.0]])
    np.testing.assert_allclose(nearest(x, y, np.array([[0.4], [10.6]]), neighbours=2), [[1.0], [21.0]])


def test_r_squared_leaves_out_constant_dimensions():
    truth = np.stack([np.arange(10.0), np.zeros(10)], axis=1)
    assert r_squared(truth, truth) == 1.0
    assert r_squared(np.broadcast_to(truth.mean(0), truth.shape), truth) == 0.0


def scores(features, proprioception, random):
    rows = {FEATURES: features, PROPRIOCEPTION: proprioception, RANDOM: random, BOTH: max(features, proprioception)}
    return [ProbeScore(name, target, r2, -1.0) for target in ("actions", "object") for name, r2 in rows.items()]


def test_the_verdict_says_when_features_will_do():
    words = verdict(scores(0.8, 0.1, 0.5))
    assert "they should do" in words
    assert "pretraining shows" in words


def test_the_verdict_says_when_features_add_nothing():
    assert "add nothing" in verdict(scores(0.1, 0.3, 0.1))
