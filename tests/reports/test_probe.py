import json

import matplotlib.image
import numpy as np
import pytest
from fakes import make_dataset
from typer.testing import CliRunner

from cache_pipeline.cli import app
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
    from cache_pipeline.reports.probe import _ridge_of

    penalty = 0.1
    mean = y.mean(0)
    primal = np.linalg.solve(x.T @ x + penalty * 20 * np.eye(50), x.T @ (y - mean))
    np.testing.assert_allclose(_ridge_of(x, y)(penalty)(x), x @ primal + mean, atol=1e-8)


def test_nearest_gives_the_mean_of_the_nearest_rows():
    x = np.array([[0.0], [1.0], [10.0], [11.0]])
    y = np.array([[0.0], [2.0], [20.0], [22.0]])
    np.testing.assert_allclose(nearest(x, y, np.array([[0.4], [10.6]]), neighbours=2), [[1.0], [21.0]])


def test_r_squared_leaves_out_constant_dimensions():
    truth = np.stack([np.arange(10.0), np.zeros(10)], axis=1)
    assert r_squared(truth, truth) == 1.0
    assert r_squared(np.broadcast_to(truth.mean(0), truth.shape), truth) == 0.0
    assert r_squared(-9 * truth, truth) == 0.0


def scores(features, proprioception, random):
    rows = {FEATURES: features, PROPRIOCEPTION: proprioception, RANDOM: random, BOTH: max(features, proprioception)}
    return [ProbeScore(name, target, r2, -1.0) for target in ("actions", "object") for name, r2 in rows.items()]


def test_the_verdict_says_when_features_suffice():
    words = verdict(scores(0.8, 0.1, 0.5))
    assert "they should suffice" in words
    assert "pretraining helps" in words


def test_the_verdict_says_when_features_add_nothing():
    assert "add nothing" in verdict(scores(0.1, 0.3, 0.1))


def run(*args):
    result = CliRunner().invoke(app, ["--quiet", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result


def test_probe_prints_the_scores_of_features_and_draws_them(tmp_path):
    dataset = make_dataset(tmp_path / "data.hdf5", lengths=(12, 11, 13, 12))
    cache, picture = tmp_path / "data.zarr", tmp_path / "probe.png"
    run(
        "extract-features", dataset, "--out", cache, "--no-pretrained-encoder", "--device", "cpu", "--precision", "fp32"
    )
    value = json.loads(run("probe", cache, "--out", picture, "--json").stdout)
    asked = {(score["target"], score["inputs"]) for score in value["scores"]}
    inputs = {FEATURES, PROPRIOCEPTION, BOTH, RANDOM}
    assert asked == {(target, name) for target in ("actions", "object") for name in inputs}
    best = {(s["target"], s["inputs"]): max(s["ridge_r2"], s["knn_r2"]) for s in value["scores"]}
    assert best["object", FEATURES] == pytest.approx(best["object", RANDOM], rel=0.02)
    assert "heuristic" in run("probe", cache).stdout
    assert matplotlib.image.imread(picture).std() > 0.05
