"""Edits MuJoCo models as text: models recorded with another release of robosuite, and poses of single bodies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from cache_pipeline.errors import ConfigError

GRIPPER, ROBOT = "gripper", "robot"
NAMED_BY_ROBOSUITE = ("body", "joint", "freejoint", "site")
VISUAL_GROUP = "1"
PLACE = ("pos", "quat")


def with_poses(xml: str, poses: Mapping[str, Sequence[float]]) -> str:
    """Returns a model in which some bodies have another position and quaternion (7,)."""
    root = _parsed(xml)
    for body in root.iter("body"):
        pose = poses.get(body.get("name", ""))
        if pose is not None:
            body.set("pos", " ".join(map(repr, pose[:3])))
            body.set("quat", " ".join(map(repr, pose[3:])))
    return ElementTree.tostring(root, encoding="unicode")


def fitted_model(recorded: str, installed: str) -> str:
    """Returns a recorded model in a form that the installed release of robosuite can load and control.

    A model that has all names and files of the installed one is returned as it is. Otherwise the result is the
    installed model with the lights, cameras, poses, sizes, materials and colours of the recorded one.

    Args:
        recorded, installed: models of the same task and robot, with absolute paths of their files.

    Raises:
        ConfigError: the joints differ, so the states have another meaning.
    """
    theirs, ours = _parsed(recorded), _parsed(installed)
    if _required_names(ours) <= _required_names(theirs) and all(map(_has_file, theirs.iterfind("asset/*"))):
        return recorded
    _check_joints(theirs, ours)
    _take_materials(theirs, ours)
    _take_lights(theirs, ours)
    _take_places(theirs, ours)
    _take_colours(theirs, ours)
    return ElementTree.tostring(ours, encoding="unicode")


def _parsed(xml: str) -> Element:
    try:
        return ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ConfigError(f"the recorded model is not XML ({error}); copy the file of the states again") from error


def _required_names(root: Element) -> set[tuple[str, str]]:
    """Returns (tag, name) of what robosuite looks up by name."""
    found = [*root.iterfind("actuator/*"), *root.iterfind("sensor/*")]
    for tag in NAMED_BY_ROBOSUITE:
        found += root.iter(tag)
    return {(item.tag, name) for item in found if (name := item.get("name"))}


def _has_file(asset: Element) -> bool:
    file = asset.get("file")
    return file is None or Path(file).is_file()


def _joints(root: Element) -> Iterator[tuple[str, str]]:
    """Yields (name, type) in the order of a state. Names of grippers differ between releases and are left out."""
    for item in root.iterfind("worldbody//*"):
        if item.tag in ("joint", "freejoint"):
            name = item.get("name", "")
            kind = "free" if item.tag == "freejoint" else item.get("type", "hinge")
            yield (GRIPPER if name.startswith(GRIPPER) else name), kind


def _check_joints(theirs: Element, ours: Element) -> None:
    recorded, installed = list(_joints(theirs)), list(_joints(ours))
    if recorded == installed:
        return
    pairs = zip([*recorded, ("no joint", "")], [*installed, ("no joint", "")], strict=False)
    one, other = next((one[0], other[0]) for one, other in pairs if one != other)
    raise ConfigError(
        f"the recorded model has {len(recorded)} joints and that of the installed robosuite {len(installed)}: "
        f"{one} is {other} there; env_args must name the task and the robot of the states"
    )


def _named(root: Element, tag: str) -> dict[str, Element]:
    return {name: item for item in root.iter(tag) if (name := item.get("name"))}


def _take_materials(theirs: Element, ours: Element) -> None:
    """Takes textures whose file exists, and materials."""
    assets = ours.find("asset")
    assert assets is not None
    for tag in ("texture", "material"):
        there = _named(assets, tag)
        for name, item in _named(theirs, tag).items():
            if not _has_file(item):
                continue
            if name in there:
                assets.remove(there[name])
            assets.append(copy.copy(item))
    textures = _named(assets, "texture")
    for material in assets.iterfind("material"):
        if material.get("texture") not in textures:
            material.attrib.pop("texture", None)


def _take_lights(theirs: Element, ours: Element) -> None:
    there, here = theirs.find("worldbody"), ours.find("worldbody")
    assert there is not None
    assert here is not None
    for light in here.findall("light"):
        here.remove(light)
    here.extend(copy.copy(light) for light in there.iterfind("light"))


def _take_places(theirs: Element, ours: Element) -> None:
    """Takes cameras, poses of bodies, and poses, sizes and materials of geoms that are no meshes, by name."""
    for tag, attributes in (
        ("camera", (*PLACE, "fovy")),
        ("body", PLACE),
        ("geom", (*PLACE, "size", "rgba", "material")),
    ):
        recorded = _named(theirs, tag)
        for name, item in _named(ours, tag).items():
            if name in recorded and "mesh" not in item.attrib:
                _take(recorded[name], item, attributes)


def _take(theirs: Element, ours: Element, attributes: Sequence[str]) -> None:
    for name in attributes:
        ours.attrib.pop(name, None)
        if name in theirs.attrib:
            ours.set(name, theirs.attrib[name])


def _take_colours(theirs: Element, ours: Element) -> None:
    """Paints links of robots that had one colour; later releases have more detailed meshes, with colours of parts."""
    recorded = _named(theirs, "body")
    for name, body in _named(ours, "body").items():
        if not name.startswith(ROBOT) or name not in recorded:
            continue
        visual = [geom for geom in recorded[name].iterfind("geom") if geom.get("group") == VISUAL_GROUP]
        if len(visual) == 1 and "material" not in visual[0].attrib:
            for geom in body.iterfind("geom"):
                if geom.get("group") == VISUAL_GROUP:
                    _take(visual[0], geom, ("rgba", "material"))
