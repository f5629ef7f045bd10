import re

import numpy as np
import pytest
from fakes import make_dataset

from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.files import write_json
from cache_pipeline.reports.run_report import principal, write_report
from cache_pipeline.training.config import SavingConfig, TrainConfig
from cache_pipeline.training.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    dataset = make_dataset(folder / "data.hdf5", lengths=(8, 9, 10))
    extract = ExtractConfig(
        datasets=(dataset,),
        out=folder / "data.zarr",
        encoders=EncoderSpec(weights="random"),
        preprocess=Preprocess(imagenet_norm=False),
        device="cpu",
        precision="fp32",
    )
    extract_features(extract, progress=False)
    config = TrainConfig(
        cache=folder / "data.zarr",
        out=folder / "run",
        steps=6,
        batch_size=4,
        device="cpu",
        saving=SavingConfig(eval_every=2, log_every=2),
    )
    train(config, progress=False)
    return folder


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page.read_text())


def test_a_report_shows_curves_actions_features_and_frames(trained):
    page = write_report(trained / "run", stages={"read": 0.1, "encode": 1.0, "write": 0.1})
    assert page == trained / "run" / "report.html"
    assert headings(page) == [
        "Training",
        "Actions",
        "Features",
        "Extraction time per stage",
        "Frames",
        "Command and versions",
    ]
    assert page.read_text().count("<img ") == 5


def test_a_report_without_its_cache_and_dataset_still_shows_the_curves(trained, tmp_path):
    hidden = [(trained / name, tmp_path / name) for name in ("data.zarr", "data.hdf5")]
    for path, away in hidden:
        path.rename(away)
    try:
        page = write_report(trained / "run", tmp_path / "report.html")
    finally:
        for path, away in hidden:
            away.rename(path)
    assert headings(page) == ["Training", "Command and versions"]


def test_a_report_tells_how_rollouts_went(trained, tmp_path):
    records = [{"seed": 1, "success": True, "steps": 9, "seconds": 1.0, "video": None}]
    folder = trained / "run" / "rollouts"
    folder.mkdir()
    result = {
        "episodes": 4,
        "successes": 3,
        "success_rate": 0.75,
        "ci95": [0.3, 0.95],
        "seconds": 4,
        "records": records,
    }
    write_json(folder / "seed_0_4.json", result)
    text = write_report(trained / "run", tmp_path / "report.html").read_text()
    assert "3 of 4" in text
    assert "30%" in text


def test_principal_components_keep_the_direction_of_most_variance():
    line = np.outer(np.linspace(-1, 1, 20), [3.0, 0.0, 4.0])
    (mapped,) = principal([line])
    assert mapped.shape == (20, 2)
    np.testing.assert_allclose(np.abs(mapped[:, 0]), np.abs(np.linspace(-5, 5, 20)), atol=1e-9)
    np.testing.assert_allclose(mapped[:, 1], 0, atol=1e-9)
