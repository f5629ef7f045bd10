"""Models of another robosuite release, fitted to the installed one. Without a simulator."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from cache_pipeline.errors import ConfigError
from cache_pipeline.sim.model_xml import fitted_model, with_poses

INSTALLED = """
<mujoco>
  <asset>
    <texture name="floor" type="2d" builtin="flat" rgb1="0 0 0"/>
    <material name="floor_mat" texture="floor"/>
    <material name="dark" rgba="0.2 0.2 0.2 1"/>
    <mesh name="link_a" file="{folder}/new.obj"/>
  </asset>
  <worldbody>
    <geom name="ground" type="plane" size="3 3 1" group="1" material="floor_mat"/>
    <light pos="1 1 1.5" type="directional"/>
    <camera name="agentview" pos="0.5 0 1.3" fovy="45"/>
    <body name="robot0_link1">
      <joint name="robot0_joint1"/>
      <geom name="robot0_g1_vis" type="mesh" mesh="link_a" group="1" material="dark"/>
      <geom name="robot0_g1_col" type="mesh" mesh="link_a" rgba="0 0.5 0 1"/>
      <body name="gripper0_right_finger">
        <joint name="gripper0_right_finger_joint" type="slide"/>
      </body>
    </body>
    <body name="cube_main" pos="0 0 0">
      <freejoint name="cube_joint"/>
      <geom name="cube_g0" size="0.02 0.02 0.02" type="box"/>
    </body>
  </worldbody>
  <actuator><motor name="robot0_torq" joint="robot0_joint1"/></actuator>
</mujoco>
"""
RECORDED = """
<mujoco>
  <asset>
    <texture name="floor" type="2d" builtin="checker" rgb1="1 1 1"/>
    <texture name="gone" type="2d" file="{folder}/gone.png"/>
    <material name="floor_mat" texture="floor" shininess="0.5"/>
    <material name="wall_mat" texture="gone"/>
    <mesh name="link_a" file="{folder}/old.stl"/>
  </asset>
  <worldbody>
    <geom name="ground" type="plane" size="2 2 1" material="floor_mat"/>
    <light name="one" pos="1 1 4"/>
    <light name="two" pos="-3 -3 4"/>
    <camera name="agentview" pos="0.6 0 1.4"/>
    <body name="robot0_link1" pos="0 0 0.1">
      <joint name="robot0_joint1" type="hinge"/>
      <geom name="robot0_link1_visual" type="mesh" mesh="link_a" group="1" rgba="1 1 1 1"/>
      <body name="gripper0_finger">
        <joint name="gripper0_finger_joint" type="slide"/>
      </body>
    </body>
    <body name="cube_main" pos="0 0 0">
      <joint name="cube_joint" type="free"/>
      <geom name="cube_g0" size="0.03 0.02 0.01" type="box"/>
    </body>
  </worldbody>
  <actuator><motor name="robot0_torq" joint="robot0_joint1"/></actuator>
</mujoco>
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "new.obj").write_text("")
    return tmp_path


def test_a_model_that_the_release_can_load_stays_as_it_is(folder: Path) -> None:
    installed = INSTALLED.format(folder=folder)
    recorded = installed.replace("0.02 0.02 0.02", "0.03 0.02 0.01")
    assert fitted_model(recorded, installed) is recorded


def test_the_installed_robot_stands_in_the_recorded_scene(folder: Path) -> None:
    fitted = ElementTree.fromstring(fitted_model(RECORDED.format(folder=folder), INSTALLED.format(folder=folder)))

    def one(path: str) -> dict[str, str]:
        found = fitted.findall(f".//{path}")
        assert len(found) == 1, path
        return dict(found[0].attrib)

    assert one("geom[@name='cube_g0']")["size"] == "0.03 0.02 0.01"
    assert one("camera")["pos"] == "0.6 0 1.4"
    assert "fovy" not in one("camera")
    assert [light.get("pos") for light in fitted.iter("light")] == ["1 1 4", "-3 -3 4"]
    assert one("body[@name='robot0_link1']")["pos"] == "0 0 0.1"
    assert one("geom[@name='ground']") | {"type": ""} == {
        "name": "ground", "type": "", "size": "2 2 1", "group": "1", "material": "floor_mat",
    }  # fmt: skip
    assert one("texture[@name='floor']")["builtin"] == "checker"
    assert one("material[@name='floor_mat']")["shininess"] == "0.5"
    assert "texture" not in one("material[@name='wall_mat']"), "its file is missing"
    assert not fitted.findall(".//texture[@name='gone']")
    assert one("geom[@name='robot0_g1_vis']") | {"type": ""} == {
        "name": "robot0_g1_vis", "type": "", "mesh": "link_a", "group": "1", "rgba": "1 1 1 1",
    }  # fmt: skip
    assert one("geom[@name='robot0_g1_col']")["rgba"] == "0 0.5 0 1"
    assert one("mesh")["file"].endswith("new.obj")
    assert fitted.findall(".//joint[@name='gripper0_right_finger_joint']")


def test_other_joints_mean_other_states_and_are_refused(folder: Path) -> None:
    recorded = RECORDED.format(folder=folder).replace('name="cube_joint"', 'name="nut_joint"')
    with pytest.raises(ConfigError, match="3 joints and that of the installed robosuite 3: nut_joint is cube_joint"):
        fitted_model(recorded, INSTALLED.format(folder=folder))
    fewer = RECORDED.format(folder=folder).replace('<joint name="cube_joint" type="free"/>', "")
    with pytest.raises(ConfigError, match="has 2 joints and that of the installed robosuite 3: no joint is cube_joint"):
        fitted_model(fewer, INSTALLED.format(folder=folder))


def test_a_model_that_is_no_xml_is_refused() -> None:
    with pytest.raises(ConfigError, match="recorded model is not XML"):
        fitted_model("<mujoco", "<mujoco/>")


def test_poses_of_single_bodies_are_replaced(folder: Path) -> None:
    changed = with_poses(INSTALLED.format(folder=folder), {"cube_main": (1.0, 2.0, 0.1 + 0.2, 1.0, 0.0, 0.0, 0.0)})
    body = ElementTree.fromstring(changed).find(".//body[@name='cube_main']")
    assert body is not None
    assert body.attrib == {"name": "cube_main", "pos": "1.0 2.0 0.30000000000000004", "quat": "1.0 0.0 0.0 0.0"}
