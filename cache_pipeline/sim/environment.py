"""Wraps the robosuite task of ``env_args``; obs have the keys and layout of robomimic's files."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_pipeline.errors import ConfigError, available
from cache_pipeline.sim.collect_config import IMAGE_SUFFIX
from cache_pipeline.sim.model_xml import fitted_model, with_poses
from cache_pipeline.sim.opengl import load_robosuite

logger = logging.getLogger("cache_pipeline")

Obs = dict[str, NDArray]
ROBOSUITE_ENV_TYPE = 1
"""robomimic's number for robosuite in ``env_args["type"]``."""


class Step(NamedTuple):
    """Result of one action."""

    obs: Obs
    reward: float
    success: bool


class Environment:
    """One robosuite task. Use as a context manager, or call ``close``.

    Obs: each camera uint8 (H, W, 3), upright; ``object`` and all ``robot0_…`` keys float64, with robomimic's names.
    The obs of an episode depend only on the seed and the actions.
    The model is built once, because building leaks memory in robosuite. Sizes that a task draws while building, such as
    Lift's cube of 40 to 44 mm, come from ``MODEL_SEED`` in every episode.

    Attributes:
        cameras: rgb obs key → (H, W).
        render_flags: MuJoCo scene flags that differ from MuJoCo's defaults.
        fitted: whether the present model is one of another robosuite release, fitted to the installed one.
    """

    MODEL_SEED = 0
    over, horizon = False, None
    """robosuite does not end an episode itself: ``ignore_done`` is set."""

    def __init__(
        self, task: Any, cameras: Mapping[str, tuple[int, int]], render_flags: Mapping[str, bool] | None
    ) -> None:
        """Wraps a robosuite task; most callers use ``from_env_args``."""
        self._task = task
        self._installed_xml = self._model_xml = _last_model_xml(task)
        self._built_poses = _poses(task)
        self.fitted = False
        self.cameras = dict(cameras)
        self.render_flags = dict(render_flags or {})
        self._scene_flags = {_scene_flag(name): bool(on) for name, on in self.render_flags.items()}
        _check_cameras(self.cameras, task.sim.model.camera_names)
        for name in task.observation_names:
            if "joint_pos" in name or "eef_vel" in name:
                task.modify_observable(observable_name=name, attribute="active", modifier=True)
        low, high = task.action_spec
        self.action_low: NDArray[np.float64] = np.asarray(low, dtype=np.float64)
        self.action_high: NDArray[np.float64] = np.asarray(high, dtype=np.float64)

    @classmethod
    def from_env_args(
        cls,
        env_args: Mapping[str, Any],
        cameras: Mapping[str, tuple[int, int]],
        render_flags: Mapping[str, bool] | None = None,
    ) -> Environment:
        """Builds the task of a dataset's ``env_args``.

        Args:
            env_args: robomimic's {"env_name", "type", "env_kwargs"}; controllers of robosuite before 1.5 are converted.
                "model_file", if given, is the XML of the model: images rendered again from states have one.
            cameras: rgb obs key → (H, W); empty: nothing is rendered.
            render_flags: MuJoCo scene flags that differ from the defaults, such as {"shadow": False}.

        Raises:
            ConfigError: not a robosuite task, or an unknown camera or flag.
            MissingExtraError: robosuite is not installed.
            OpenGLError: this machine has no OpenGL backend.
        """
        if env_args.get("type", ROBOSUITE_ENV_TYPE) != ROBOSUITE_ENV_TYPE:
            raise ConfigError(
                f"env_args has type {env_args['type']!r}, which is not a robosuite task; only type 1 can run"
            )
        name = env_args.get("env_name")
        robosuite = load_robosuite()
        if name not in robosuite.ALL_ENVIRONMENTS:
            raise ConfigError(f"env_args names the task {name!r}; {available(robosuite.ALL_ENVIRONMENTS, str(name))}")
        _warn_of_another_release(env_args.get("env_version"), robosuite.__version__)
        task_class = robosuite.environments.base.REGISTERED_ENVS[name]
        kwargs = _task_kwargs(task_class, env_args.get("env_kwargs", {}), offscreen=bool(cameras))
        env = cls(robosuite.make(name, **kwargs, seed=cls.MODEL_SEED), cameras, render_flags)
        if "model_file" in env_args:
            env._load_model(env_args["model_file"])
        return env

    @property
    def action_dim(self) -> int:
        return len(self.action_low)

    def reset(self, seed: int) -> Obs:
        """Starts the episode of ``seed`` and returns its first obs."""
        # Set in place, because the task's placement samplers share this generator.
        self._task.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        return self._obs(self._task.reset())

    def step(self, action: NDArray, *, images: bool = True) -> Step:
        """Executes ``action`` (A,), clipped to the limits of the task. Without ``images`` nothing is rendered.

        Raises:
            ConfigError: a wrong shape or NaN.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_low.shape or not np.isfinite(action).all():
            raise ConfigError(f"the task takes {self.action_dim} finite numbers as an action, not {action.tolist()}")
        raw, reward, _, _ = self._task.step(np.clip(action, self.action_low, self.action_high))
        success = self.success()  # before the images, which bring poses up to date
        return Step(self._obs(raw, images=images), float(reward), success)

    def success(self) -> bool:
        """Whether robosuite reports success."""
        answer = self._task._check_success()
        return bool(answer["task"] if isinstance(answer, dict) else answer)

    def state(self) -> NDArray[np.float64]:
        """Returns MuJoCo's time, positions and velocities as one vector, as in ``data/<demo>/states``."""
        return np.array(self._task.sim.get_state().flatten())

    def model_xml(self) -> str:
        """Returns the XML for a demo's ``model_file``; paths start at ``robosuite/``, which robosuite resolves.

        Poses that the task drew for bodies without a joint, such as Door's frame, are those of the episode.
        """
        poses = _poses(self._task)
        moved = {name: pose for name, pose in poses.items() if pose != self._built_poses[name]}
        return with_poses(self._model_xml, moved) if moved else self._model_xml

    def restore(self, state: NDArray, model_xml: str | None = None) -> Obs:
        """Sets a recorded state, in the recorded model if given, and returns its obs.

        The controllers are reset: recorded actions that are replayed from this state drift by millimetres.

        Raises:
            ConfigError: the state or the model is that of another task or robot.
        """
        if model_xml is not None:
            self._load_model(model_xml)
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (size := self.state().shape):
            raise ConfigError(
                f"the model of {type(self._task).__name__} takes states of {size[0]} numbers, not of shape "
                f"{state.shape}; env_args must name the task and the robot of the states"
            )
        self._task.sim.reset()
        self._task.sim.set_state_from_flattened(state)
        self._task.sim.forward()
        return self._obs(self._task._get_observations(force_update=True))

    def compile_again(self) -> None:
        """Compiles the present model from its XML, which rounds numbers to 6 digits.

        Models that are restored come from XML, but for one that is the present one already. After this call all do, so
        an image of a state does not depend on the models that were restored before.
        """
        self._compile(self.model_xml())

    def _load_model(self, model_xml: str) -> None:
        """Makes a recorded model the present one; a model that is the present one already is not compiled again."""
        if model_xml == self.model_xml():
            self._task.deterministic_reset = True  # else the task would draw new poses
            self._task.reset()
            self._task.deterministic_reset = False
        else:
            self._compile(model_xml)

    def _compile(self, model_xml: str) -> None:
        recorded = self._task.edit_model_xml(model_xml)
        model = fitted_model(recorded, self._task.edit_model_xml(self._installed_xml))
        self._task.reset_from_xml_string(model)
        self._model_xml, self._built_poses = model_xml, _poses(self._task)
        self.fitted = model != recorded

    def close(self) -> None:
        """Frees the simulation and its OpenGL context."""
        self._task.close()

    def __enter__(self) -> Environment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _obs(self, raw: Mapping[str, Any], *, images: bool = True) -> Obs:
        cameras = self.cameras if images else {}
        if cameras:
            self._update_poses()
        obs = {camera: self._image(camera, *size) for camera, size in cameras.items()}
        if "object-state" in raw:
            obs["object"] = np.array(raw["object-state"], dtype=np.float64)
        for robot in self._task.robots:
            prefix = robot.robot_model.naming_prefix
            for key, value in raw.items():
                if key.startswith(prefix) and not key.endswith(("proprio-state", IMAGE_SUFFIX)):
                    obs[key] = np.array(value, dtype=np.float64)
        return obs

    def _update_poses(self) -> None:
        """Computes poses from the state. After a step they are those of 2 ms before, and so would be the images."""
        import mujoco

        model, data = self._task.sim.model._model, self._task.sim.data._data
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_camlight(model, data)

    def _image(self, camera: str, height: int, width: int) -> NDArray[np.uint8]:
        context = self._task.sim._render_context_offscreen
        context.gl_ctx.make_current()
        for flag, on in self._scene_flags.items():
            context.scn.flags[flag] = on
        pixels = self._task.sim.render(width=width, height=height, camera_name=camera.removesuffix(IMAGE_SUFFIX))
        return np.ascontiguousarray(pixels[::-1])  # OpenGL's first row is the bottom one


def _warn_of_another_release(recorded: str | None, installed: str) -> None:
    if recorded is not None and recorded.split(".")[:2] != installed.split(".")[:2]:
        logger.warning(
            "the dataset was made with robosuite %s; motion and images differ slightly in %s", recorded, installed
        )


def _task_kwargs(task_class: type, recorded: Mapping[str, Any], *, offscreen: bool) -> dict[str, Any]:
    """Returns the arguments of the robosuite task: the recorded settings with our rendering and resets."""
    kwargs = copy.deepcopy(dict(recorded))
    for name in [name for name in kwargs if name.startswith(("camera_", "render_")) or name == "seed"]:
        del kwargs[name]
    kwargs.update(
        has_renderer=False,
        has_offscreen_renderer=offscreen,
        use_camera_obs=False,
        use_object_obs=True,
        ignore_done=True,
        hard_reset=False,
        renderer="mujoco",
    )
    unknown = sorted(set(kwargs) - _arguments(task_class))
    if unknown:
        raise ConfigError(
            f"env_args has env_kwargs that robosuite's {task_class.__name__} does not take: {', '.join(unknown)}; "
            "remove them from a copy of env_args and pass it with --env-args FILE"
        )
    controller = kwargs.get("controller_configs")
    if isinstance(controller, dict):
        kwargs["controller_configs"] = _controller(controller, kwargs.get("robots", "Panda"))
    return kwargs


def _arguments(task_class: type) -> set[str]:
    """Returns the names of the class's arguments. PickPlaceCan and others pass **kwargs on to their parent."""
    names: set[str] = set()
    for parent in task_class.__mro__:
        parameters = inspect.signature(parent).parameters
        names.update(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names


def _controller(config: dict[str, Any], robots: str | list[str]) -> dict[str, Any]:
    """Returns controller settings in the form of robosuite 1.5; earlier releases describe one arm."""
    from robosuite.controllers.composite.composite_controller_factory import refactor_composite_controller_config

    robot = robots if isinstance(robots, str) else robots[0]
    return dict(refactor_composite_controller_config(config, robot, ["right", "left"]))


def _last_model_xml(task: Any) -> str:
    """Returns the XML of the last compiled model, which must be that of ``task``."""
    import mujoco
    import robosuite

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        mujoco.mj_saveLastXML(str(path), task.sim.model._model)
        return path.read_text(encoding="utf-8").replace(f"{Path(robosuite.__file__).parents[1]}/", "")


def _poses(task: Any) -> dict[str, tuple[float, ...]]:
    """Returns body → its position and quaternion in the body that holds it."""
    model = task.sim.model
    return {
        name: (*model.body_pos[index].tolist(), *model.body_quat[index].tolist())
        for index, name in enumerate(model.body_names)
    }


def _check_cameras(cameras: Mapping[str, tuple[int, int]], names: tuple[str, ...]) -> None:
    keys = [name + IMAGE_SUFFIX for name in names]
    for camera, (height, width) in cameras.items():
        if camera not in keys:
            raise ConfigError(f"the task has no camera {camera!r}; {available(keys, camera)}")
        if min(height, width) < 1:
            raise ConfigError(f"camera {camera} cannot be rendered at {height}x{width}")


def _scene_flag(name: str) -> int:
    """Returns the index of a MuJoCo scene flag, such as ``shadow`` for mjRND_SHADOW."""
    import mujoco

    names = [flag.removeprefix("mjRND_").lower() for flag in mujoco.mjtRndFlag.__members__ if flag != "mjNRNDFLAG"]
    if name not in names:
        raise ConfigError(f"MuJoCo has no render flag {name!r}; {available(names, name)}")
    return int(mujoco.mjtRndFlag.__members__[f"mjRND_{name.upper()}"])
