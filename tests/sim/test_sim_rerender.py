"""Datasets whose states are rendered again: what is copied, what is new, and what is refused. Without a simulator."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from kills import killed_at

from cache_pipeline.errors import CachePipelineError, ConfigError, DatasetError
from cache_pipeline.sim import rerender as module
from cache_pipeline.sim.collect_config import RerenderConfig
from cache_pipeline.sim.rerender import rerender

EYE, SIDE = "eye_image", "side_image"
ENV_ARGS = {"env_name": "Lift", "type": 1, "env_version": "1.5.2", "env_kwargs": {"control_freq": 20}}
STEPS = {"demo_0": 5, "demo_2": 7, "demo_10": 4}


def write_source(path: Path, *, images: bool = False, env_args: bool = True) -> Path:
    """A robomimic file with states, and things that only a copy can bring along."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(STEPS.values())
        if env_args:
            data.attrs["env_args"] = json.dumps(ENV_ARGS)
        for number, (name, steps) in enumerate(STEPS.items()):
            demo = data.create_group(name)
            demo.attrs["num_samples"], demo.attrs["model_file"] = steps, f"<mujoco model='{number}'/>"
            demo["states"] = np.arange(steps * 3.0).reshape(steps, 3) + 10 * number
            demo["actions"], demo["rewards"] = np.full((steps, 7), number / 4), np.zeros(steps)
            for obs in ("obs", "next_obs"):
                demo[f"{obs}/object"] = np.full((steps, 10), number / 2)
                if images:
                    demo[f"{obs}/{EYE}"] = np.full((steps, 4, 4, 3), 9, np.uint8)
                    demo[f"{obs}/old_image"] = np.full((steps, 4, 4, 3), 9, np.uint8)
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
        file["mask/valid"] = np.array([b"demo_2"])
    return path


class Painter:
    """Stands in for the simulator: an image shows the first number of the state, a flag and the number of the model."""

    fitted = False
    seconds = 0.0
    made: list[float] | None = None

    def __init__(self, env_args: Mapping[str, Any], cameras: Mapping[str, tuple[int, int]], flags: dict) -> None:
        self.cameras, self.flags = cameras, flags

    def restore(self, state: np.ndarray, model_xml: str | None = None) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        if self.made is not None:
            self.made.append(state[0])
        if state.shape != (3,):
            raise ConfigError("the model of Lift takes states of 3 numbers")
        if model_xml is not None:
            self.model = int(model_xml.split("'")[1])
        pixel = (int(state[0]), int(self.flags["shadow"]), self.model)
        return {camera: np.broadcast_to(np.uint8(pixel), (*size, 3)) for camera, size in self.cameras.items()}

    def compile_again(self) -> None:
        pass

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(autouse=True)
def painter(monkeypatch: pytest.MonkeyPatch) -> type[Painter]:
    monkeypatch.setattr(module, "load_robosuite", lambda: None)
    monkeypatch.setattr(module.Environment, "from_env_args", Painter)
    for name in ("fitted", "seconds", "made"):  # restored after a test that changes them
        monkeypatch.setattr(Painter, name, getattr(Painter, name))
    return Painter


def contents(path: Path) -> dict[str, Any]:
    """Path → (attributes, values) of everything in a file."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        values = item[()] if isinstance(item, h5py.Dataset) else None
        found[name] = (dict(item.attrs), None if values is None else (values.dtype, values.tobytes()))

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def test_images_are_those_of_the_states_and_all_else_is_copied(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "low_dim.hdf5"), tmp_path / "image.hdf5"
    config = RerenderConfig(source=source, out=out, cameras=(EYE, SIDE), image_size=8, render_flags={"shadow": True})
    result = rerender(config, progress=False)
    assert (result.demos, result.steps, result.images) == (3, 16, 32)
    assert "3 demos, 16 steps, 32 images" in result.lines()[0]
    with h5py.File(out) as file:
        for number, (name, steps) in enumerate(STEPS.items()):
            for camera in (EYE, SIDE):
                images = file[f"data/{name}/obs/{camera}"][:]
                assert images.shape == (steps, 8, 8, 3)
                pixels = np.array([(10 * number + 3 * step, 1, number) for step in range(steps)])
                np.testing.assert_array_equal(images, np.broadcast_to(pixels[:, None, None], images.shape))
        data = file["data"].attrs
        assert json.loads(data["render_flags"]) == {"shadow": True, "reflection": False}
        env_args = json.loads(data["env_args"])
        assert env_args["env_kwargs"] == {
            "control_freq": 20,
            "has_offscreen_renderer": True,
            "use_camera_obs": True,
            "camera_names": ["eye", "side"],
            "camera_heights": 8,
            "camera_widths": 8,
        }
        assert {key: env_args[key] for key in env_args if key != "env_kwargs"} == {
            key: ENV_ARGS[key] for key in ENV_ARGS if key != "env_kwargs"
        }
    old, new = contents(source), contents(out)
    assert new["data"][0]["total"] == old["data"][0]["total"]
    assert {key: value for key, value in new.items() if key != "data" and not key.endswith((EYE, SIDE))} == {
        key: value for key, value in old.items() if key != "data"
    }


def test_other_images_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_source(tmp_path / "old.hdf5", images=True)
    before = source.read_bytes()
    out = rerender(RerenderConfig(source=source, out=tmp_path / "x.hdf5", cameras=(EYE,)), progress=False).out
    with h5py.File(out) as file:
        assert sorted(file["data/demo_0/obs"]) == [EYE, "object"]
        assert sorted(file["data/demo_0/next_obs"]) == ["object"]
        assert file["data/demo_0/obs"][EYE].shape == (5, 84, 84, 3)
    assert [record.getMessage() for record in caplog.records] == [
        f"next_obs/eye_image, next_obs/old_image, obs/old_image of {source} are left out, since they may be rendered "
        "otherwise; --cameras names those to render"
    ]
    assert source.read_bytes() == before


def test_flags_of_the_source_are_kept_unless_they_are_changed(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.hdf5")
    with h5py.File(source, "r+") as file:
        file["data"].attrs["render_flags"] = json.dumps({"shadow": True, "fog": False})
    for flags, expected in (({}, {"shadow": True, "fog": False}), ({"fog": True}, {"shadow": True, "fog": True})):
        config = RerenderConfig(
            source=source, out=tmp_path / "b.hdf5", cameras=(EYE,), render_flags=flags, overwrite=True
        )
        with h5py.File(rerender(config, progress=False).out) as file:
            assert json.loads(file["data"].attrs["render_flags"]) == expected


def test_env_args_of_a_file_of_the_users_serve_a_source_without_them(tmp_path: Path) -> None:
    source = write_source(tmp_path / "cut.hdf5", env_args=False)
    config = RerenderConfig(source=source, out=tmp_path / "b.hdf5", cameras=(EYE,))
    with pytest.raises(ConfigError, match=r"cut\.hdf5 has no env_args.*give --env-args FILE"):
        rerender(config, progress=False)
    env_args = tmp_path / "env.json"
    env_args.write_text(json.dumps(ENV_ARGS))
    config = RerenderConfig(source=source, out=tmp_path / "b.hdf5", cameras=(EYE,), env_args=env_args)
    with h5py.File(rerender(config, progress=False).out) as file:
        assert json.loads(file["data"].attrs["env_args"])["env_version"] == "1.5.2"


def test_a_model_of_another_release_is_recorded_for_rollouts(tmp_path: Path, painter: type[Painter]) -> None:
    painter.fitted = True
    source = write_source(tmp_path / "a.hdf5")
    out = rerender(RerenderConfig(source=source, out=tmp_path / "b.hdf5", cameras=(EYE,)), progress=False).out
    with h5py.File(out) as file:
        assert json.loads(file["data"].attrs["env_args"])["model_file"] == "<mujoco model='0'/>"


@pytest.mark.parametrize("fitted", [False, True])
def test_a_command_that_is_killed_goes_on_and_demos_that_changed_are_rendered_again(
    tmp_path: Path, painter: type[Painter], fitted: bool
) -> None:
    source = write_source(tmp_path / "a.hdf5")
    painter.fitted = fitted
    whole = rerender(RerenderConfig(source=source, out=tmp_path / "whole.hdf5", cameras=(EYE,)), progress=False).out
    config = RerenderConfig(source=source, out=tmp_path / "b.hdf5", cameras=(EYE,))
    painter.seconds = 0.02
    killed_at(rerender, config, 2)
    painter.seconds, painter.made = 0, []
    rerender(config, progress=False)
    assert painter.made == [20, 23, 26, 29], "demos that were finished were rendered again"
    assert config.out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf5", "b.hdf5", "whole.hdf5"]

    config.out.unlink()
    painter.seconds, painter.made = 0.02, None
    killed_at(rerender, config, 2)
    with h5py.File(source, "r+") as file:
        file["data/demo_0/states"][2, 0] = 99
    painter.seconds, painter.made = 0, []
    rerender(config, progress=False)
    assert painter.made == [0, 3, 99, 9, 12, 20, 23, 26, 29]


def refused(source: Path, tmp_path: Path, **options: Any) -> str:
    options = {"out": tmp_path / "out.hdf5", "cameras": (EYE,), **options}
    with pytest.raises(CachePipelineError) as caught:
        rerender(RerenderConfig(source=source, **options), progress=False)
    assert not list(tmp_path.glob(".*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_rendered_is_one_line(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.hdf5")
    text = tmp_path / "notes.hdf5"
    text.write_text("notes")
    other = tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["values"] = 1
    assert "there is no file" in refused(tmp_path / "gone.hdf5", tmp_path)
    assert "is not an HDF5 file" in refused(text, tmp_path)
    assert "has no demos in a group 'data' (it holds values)" in refused(other, tmp_path)
    assert "is an input of this command" in refused(source, tmp_path, out=source, overwrite=True)
    taken = write_source(tmp_path / "taken.hdf5")
    assert "replace it with --overwrite" in refused(source, tmp_path, out=taken)
    assert "left alone even with --overwrite" in refused(source, tmp_path, out=text, overwrite=True)
    assert "no cameras are given" in refused(source, tmp_path, cameras=())
    with h5py.File(source, "r+") as file:
        del file["data/demo_2/states"]
    assert "demo_2 has no states of the simulator, only actions, next_obs, obs, rewards" in refused(source, tmp_path)
    with h5py.File(source, "r+") as file:
        file["data/demo_2/states"] = np.zeros((6, 3))
    assert "demo_2 has 6 states, but 7 actions" in refused(source, tmp_path)
    with h5py.File(source, "r+") as file:
        del file["data/demo_2/states"], file["data/demo_0/states"]
        file["data/demo_0/states"], file["data/demo_2/states"] = np.zeros((5, 4)), np.zeros((7, 4))
    assert f"{source}: demo_0: the model of Lift takes states of 3 numbers" in refused(source, tmp_path)


def test_a_damaged_source_is_a_dataset_error(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.hdf5")
    source.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(DatasetError, match="cut off"):
        rerender(RerenderConfig(source=source, out=tmp_path / "b.hdf5", cameras=(EYE,)), progress=False)
