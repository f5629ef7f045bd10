import base64
import io
import re
import shutil
import time
from pathlib import Path
from urllib.parse import unquote

import h5py
import matplotlib.image
import numpy as np
import pytest
from fakes import make_dataset

from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.extract.pipeline import extract_features
from cache_pipeline.files import write_json
from cache_pipeline.reports import plots
from cache_pipeline.reports.run_report import principal, write_report
from cache_pipeline.reports.view_sheet import write_view_sheet
from cache_pipeline.sim.results import wilson_interval
from cache_pipeline.sim.video import read_frames, write_video
from cache_pipeline.training.config import SavingConfig, TrainConfig
from cache_pipeline.training.train import train

TINY = f"{Path(__file__).parents[1] / 'cli' / 'tiny_encoder.py'}:make"


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


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run with 60 cameras and 200 action dims."""
    folder = tmp_path_factory.mktemp("large")
    cameras = {f"cam{number:02d}_image": (8, 8, 3) for number in range(60)}
    return folder, trained_on(folder, make_dataset(folder / "data.hdf5", cameras=cameras, action_dim=200))


def trained_on(folder, dataset):
    """Extracts with a tiny encoder and trains two steps; returns the run."""
    common = {"device": "cpu"}
    extract = ExtractConfig(datasets=(dataset,), out=folder / "data.zarr", encoders=EncoderSpec(factory=TINY), **common)
    extract_features(extract, progress=False)
    config = TrainConfig(cache=folder / "data.zarr", out=folder / "run", steps=2, encoder_factory=TINY, **common)
    return train(config, progress=False).run


def pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page.read_text())
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png") for data in found]


def test_sixty_cameras_and_200_action_dims_are_shown_in_pictures_of_a_sensible_size(large):
    _, run = large
    started = time.process_time()
    page = write_report(run, encoder=TINY)
    assert time.process_time() - started < 10
    text = page.read_text()
    assert "The first 16 of 200 action dimensions are drawn." in text
    assert "The first 8 of 60 cameras are drawn. One frame of each of the other 52" in text
    assert "cam59_image" in text
    drawn = pictures(page)
    assert len(drawn) == 6  # curves, actions, difference, features, frames, other cameras
    assert max(picture.shape[0] for picture in drawn) < 2500


def test_a_sheet_of_views_of_sixty_cameras_draws_the_first_ones_and_says_so(large, caplog):
    folder, _ = large
    with caplog.at_level("INFO", logger="cache_pipeline"):
        sheet = write_view_sheet(folder / "data.zarr", folder / "views.png")
    assert matplotlib.image.imread(sheet).shape[0] < 3000
    assert "the first 10 of 60 cameras are drawn" in caplog.text


def test_a_run_on_constant_actions_has_a_report_that_says_so(tmp_path):
    dataset = make_dataset(tmp_path / "data.hdf5", cameras={"eye_image": (8, 8, 3)})
    with h5py.File(dataset, "r+") as file:
        for demo in file["data"].values():
            demo["actions"][...] = 0.0
    page = write_report(trained_on(tmp_path, dataset), encoder=TINY).read_text()
    assert "the held-out actions are all equal to the mean action" in page
    assert "Actions that never change in this demo: action[0], action[1]" in page


def test_a_report_shows_the_settings_of_each_rollout(trained):
    folder = trained / "run" / "rollouts"
    result = {"episodes": 4, "successes": 3, "ci95": [0.3, 0.95], "records": []}
    folder.mkdir(exist_ok=True)
    write_json(folder / "seed_1_4.json", {**result, "settings": {"checkpoint": "step_0000004", "horizon": 50}})
    page = write_report(trained / "run")
    (folder / "seed_1_4.json").unlink()
    assert "checkpoint step_0000004, horizon 50" in page.read_text()


WRONG = ["", "[]", "{}", '{"episodes": 4, "successes": 3, "records": []}', '{"episodes": "4"}', "[" * 100_000]
WRONG += ['{"episodes": 4, "successes": 3, "ci95": [0.3], "records": []}']
WRONG += ['{"episodes": 4, "successes": 3, "ci95": [0.3, NaN], "records": []}']
WRONG += ['{"episodes": 4, "successes": 3, "ci95": [0.3, 0.9], "records": [3]}']


def test_a_rollout_that_cannot_be_read_is_left_out_with_a_warning(trained, caplog):
    folder = trained / "run" / "rollouts"
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(WRONG):
        (folder / f"seed_{number}_9.json").write_text(content)
    gone = {"episodes": 4, "successes": 3, "ci95": [0.3, 0.95], "records": [{"video": "x\0.mp4"}, {"video": "y" * 300}]}
    write_json(folder / "seed_77_4.json", gone)
    page = write_report(trained / "run")
    for file in folder.iterdir():
        file.unlink()
    assert [f"seed_{number}_9.json is not shown" in caplog.text for number in range(len(WRONG))] == [True] * len(WRONG)
    assert "Rollouts seed_77_4" in page.read_text()
    assert "_9<" not in page.read_text()


def linked(page):
    return re.findall(r'<a href="(.*?)">(.*?)</a>', page.read_text())


def written_result(folder, name, records, **settings):
    (folder / "rollouts").mkdir(exist_ok=True)
    successes = sum(record["success"] for record in records)
    ci95 = wilson_interval(successes, len(records))
    result = {"episodes": len(records), "successes": successes, "ci95": list(ci95), "records": records}
    write_json(folder / "rollouts" / f"{name}.json", {**result, "settings": settings})


def test_success_is_drawn_over_steps_and_a_video_is_a_strip_beside_a_link(trained, tmp_path):
    run = tmp_path / "a run" / "lift"
    shutil.copytree(trained / "run", run)
    frames = [np.full((240, 320, 3), shade, np.uint8) for shade in range(0, 240, 12)]
    films = tmp_path / "films #1"
    video = write_video(films / "episode_000_success", frames, 20)
    damaged = films / f"episode_001_failure{video.suffix}"
    damaged.write_bytes(video.read_bytes()[:200])
    records = [
        {"success": True, "steps": 20, "video": str(video)},
        {"success": False, "steps": 9, "video": str(damaged)},
        {"success": True, "steps": 30, "video": str(films / "gone.mp4")},
    ]
    written_result(run, "seed_0_3", records, checkpoint="step_0000004")
    before = len(pictures(write_report(trained / "run", tmp_path / "without.html")))
    page = write_report(run, tmp_path / "pages" / "lift.html")
    text = page.read_text()
    assert headings(page)[-3:] == ["Success in simulation", "Rollouts seed_0_3", "Command and versions"]
    assert "<b>25</b>steps of a success (median)" in text
    assert len(pictures(page)) == before + 2  # the curve and one strip
    names = [f"episode 0: success after 20 steps; play {video.name}"]
    names += [f"episode 1: failure after 9 steps; play {damaged.name}"]
    assert [name for _, name in linked(page)] == names
    assert "data:video" not in text
    for (link, _), file in zip(linked(page), (video, damaged), strict=True):
        assert (page.parent / unquote(link)).resolve() == file.resolve()
        assert ":" not in link  # relative


def test_success_during_training_is_drawn_with_its_intervals(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    shutil.rmtree(run / "rollouts", ignore_errors=True)
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    for step, rate in ((2, 0.5), (4, 0.9)):
        given = {"step": step, "rollout/success_rate": rate, "rollout/episodes": 10}
        lines.append(",".join(str(given.get(name, "")) for name in columns))
    (run / "metrics.csv").write_text("\n".join([header, *lines, ""]))
    drawn = []
    draw = plots.success_rates
    monkeypatch.setattr(plots, "success_rates", lambda *rates: drawn.append(rates) or draw(*rates))
    assert "Success in simulation" in headings(write_report(run))
    ((training, later),) = drawn
    assert [rate[:2] for rate in training] == [(2, 0.5), (4, 0.9)]
    assert training[1][2:] == pytest.approx((0.5958, 0.9821, 10), abs=1e-4)
    assert later == []


def test_a_file_that_is_no_video_is_never_decoded(tmp_path):
    playlist = tmp_path / "x.mp4"
    playlist.write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    with pytest.raises(ValueError, match="not a video"):
        read_frames(playlist, 3)
