"""Summaries of robomimic files with all their problems; ``Dataset.open`` stops at the first one."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cache_pipeline.demos import checks
from cache_pipeline.demos.dataset import Paths, distinct_paths
from cache_pipeline.demos.layouts.protocol import HDF5, DemoInfo, FileInfo
from cache_pipeline.demos.layouts.registry import layout_of
from cache_pipeline.demos.numbers import NumbersReport, Statistics, check_numbers, lost_variation
from cache_pipeline.demos.reading import layout_findings
from cache_pipeline.demos.stillness import duplicate_cameras, still_cameras
from cache_pipeline.errors import DatasetError, counted
from cache_pipeline.text import few, listed, shortened

SHOWN, LONGEST_TASK = 12, 100
ALL = "--json lists all"


@dataclasses.dataclass(frozen=True)
class CameraSummary:
    """Image size (pixels), compression, size in bytes as stored and as uint8 rgb."""

    height: int
    width: int
    compression: str
    stored_bytes: int
    raw_bytes: int
    form: str = ""
    """How its frames differ from rgb with channels last, such as ``RGBA, read without alpha``."""


@dataclasses.dataclass(frozen=True)
class ActionSummary:
    """Statistics per dimension over all steps, without non-finite values."""

    dim: int
    min: tuple[float, ...]
    max: tuple[float, ...]
    constant_dims: tuple[int, ...]
    steps_beyond_one: int


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """Summary of one file. ``Dataset.open`` raises for ``problems``; ``notes`` are unusual but allowed."""

    path: str
    bytes: int
    demos: int
    steps: int
    episode_length: tuple[int, float, int]
    """Shortest, median, longest, in steps."""
    cameras: dict[str, CameraSummary]
    low_dim: dict[str, int]
    """Key → values per step."""
    actions: ActionSummary | None
    filter_keys: dict[str, int]
    """Filter key → number of demos, for keys whose demos are all in the file."""
    absent_filter_keys: dict[str, tuple[int, int]]
    """Filter key → (demos in the file, demos that it names), for the other keys."""
    env_args: dict[str, Any] | None
    render_flags: dict[str, Any] | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    layout: str = ""
    """What the dataset was recognised as, such as ``LIBERO HDF5``."""
    tasks: dict[str, int] = dataclasses.field(default_factory=dict)
    """Task in words → number of demos; empty if the dataset does not say any."""
    other_actions: dict[str, int] = dataclasses.field(default_factory=dict)
    """Other arrays that ``--action-key`` can name → values per step."""

    def lines(self) -> list[str]:
        """Returns the lines of a readable table."""
        low, middle, high = self.episode_length
        env = self.env_args or {}
        steps = counted(self.steps, "step")
        rows = [
            ("layout", self.layout),
            ("size", f"{self.bytes / 1e6:.1f} MB"),
            ("demos", f"{self.demos}, {steps}, {low} / {middle:g} / {high} per demo (min / median / max)"),
            *(("camera", line) for line in _camera_lines(self.cameras)),
            ("low-dim", listed(f"{shortened(key)} {width}" for key, width in self.low_dim.items()) or "none"),
            *_action_lines(self.actions, self.other_actions),
            *(("task", line) for line in _task_lines(self.tasks)),
            ("filter keys", listed(f"{shortened(key)} {count}" for key, count in self.filter_keys.items()) or "none"),
            ("environment", f"{env.get('env_name', 'unknown')} {env.get('env_version', '')}".strip()),
        ]
        if self.render_flags is not None:
            rows.append(("render flags", listed(f"{key} {value}" for key, value in self.render_flags.items())))
        for label, findings in (("PROBLEM", self.problems), ("note", self.notes)):
            rows += [(label, line) for line in few(findings, label.lower(), SHOWN, ALL)]
        return [self.path, *(f"  {label:<12}  {text}" for label, text in rows)]


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """Summary of several files as one dataset; ``problems`` and ``notes`` concern differences between the files."""

    files: tuple[FileSummary, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def demos(self) -> int:
        """Number of demos of all files."""
        return sum(file.demos for file in self.files)

    @property
    def steps(self) -> int:
        """Number of steps of all files."""
        return sum(file.steps for file in self.files)

    @property
    def sound(self) -> bool:
        """Whether ``Dataset.open`` accepts the files."""
        return not self.problems and not any(file.problems for file in self.files)

    @property
    def all_problems(self) -> tuple[str, ...]:
        """Returns the problems of each file, with its path, and those between files."""
        return (*(f"{file.path}: {problem}" for file in self.files for problem in file.problems), *self.problems)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object without NaN."""
        return {"sound": self.sound, "demos": self.demos, "steps": self.steps, **dataclasses.asdict(self)}

    def lines(self) -> list[str]:
        """Returns the lines of a readable table."""
        lines = [line for file in self.files for line in file.lines()]
        lines += [f"PROBLEM  {problem}" for problem in self.problems] + [f"note  {note}" for note in self.notes]
        if len(self.files) > 1:
            lines.append(
                f"together: {len(self.files)} files, {counted(self.demos, 'demo')}, {counted(self.steps, 'step')}"
            )
        return [*lines, "sound" if self.sound else "NOT SOUND: see the problems above"]


def inspect_dataset(paths: Paths) -> DatasetSummary:
    """Checks one or several robomimic files: all metadata and values, but only two frames of most demos.

    Raises:
        DatasetError: a file cannot be opened as HDF5 or has no demos. All other problems are in the result.
    """
    infos = [layout_of(path).scan(path) for path in distinct_paths(paths)]
    heads = [info.demos[0]._replace(name=f"{info.path}: {info.demos[0].name}") for info in infos]
    wanted = _default_wanted([demo for info in infos for demo in info.demos])
    problems = tuple(checks.agreement_problems(heads, wanted)) if len(infos) > 1 else ()
    notes = []
    if any(info.env_args != infos[0].env_args for info in infos):
        notes.append("env_args of the files differ, so none are used")
    return DatasetSummary(tuple(_summarise(info, wanted) for info in infos), problems, tuple(notes))


def _default_wanted(demos: Sequence[DemoInfo]) -> checks.Wanted:
    cameras = checks.find_cameras(demos)
    return checks.Wanted(cameras, checks.default_low_dim(demos, with_cameras=bool(cameras)))


def _summarise(info: FileInfo, wanted: checks.Wanted) -> FileSummary:
    lengths = [demo.length for demo in info.demos]
    everything = checks.find_low_dim(info.demos)
    others = checks.Wanted((), tuple(key for key in everything if key not in wanted.low_dim))
    problems = [*info.problems, *_structure(info, wanted), *checks.unused_images(info.demos)]
    optional = [*_structure(info, others)]
    numbers, stillness, told = NumbersReport((), {}), list[str](), list[str]()
    try:
        arrays = [(demo.name, checks.number_paths(demo, everything)) for demo in info.demos]
        numbers = check_numbers(info.source, arrays)
        found, told = layout_findings(info.source, [demo.name for demo in info.demos])
        problems += found
        stillness = still_cameras(info.source, info.demos, wanted.cameras)
        stillness += duplicate_cameras(info.source, info.demos, wanted.cameras)
    except DatasetError as error:  # the file crashes HDF5
        problems.append(str(error).removeprefix(f"{info.path} "))
    used = {"actions", "rewards", "dones", *(f"obs/{key}" for key in wanted.low_dim)}
    for finding in numbers.findings:
        (problems if finding.path in used else optional).append(f"{finding.demo}: {finding.sentence}")
    optional = [f"if asked for: {finding}" for finding in optional if finding not in problems]
    actions = _action_summary(numbers.statistics.get("actions"))
    return FileSummary(
        path=str(info.path),
        bytes=info.size,
        demos=len(info.demos),
        steps=sum(lengths),
        episode_length=(min(lengths), float(np.median(lengths)), max(lengths)),
        cameras={name: _camera_summary(name, info.demos) for name in checks.find_cameras(info.demos)},
        low_dim={key: _low_dim_width(key, info.demos) for key in everything},
        actions=actions,
        filter_keys={key: len(names) for key, names in info.masks.items() if not info.absent(key)},
        absent_filter_keys={
            key: (len(info.present(key)), len(info.masks[key])) for key in info.masks if info.absent(key)
        },
        env_args=info.env_args,
        render_flags=info.render_flags,
        layout=info.kind,
        tasks=dict(Counter(demo.task for demo in info.demos if demo.task is not None)),
        other_actions={key: demo.arrays[key].width for demo in info.demos for key in demo.other_actions},
        problems=tuple(problems),
        notes=(
            *info.notes,
            *([checks.skipped_demos(info)] if info.empty else []),
            *told,
            *stillness,
            *lost_variation(numbers.statistics),
            *_metadata_notes(info),
            *_numbering_notes(info),
            *_action_notes(actions),
            *_low_dim_notes(numbers, wanted.low_dim),
            *optional,
        ),
    )


def _structure(info: FileInfo, wanted: checks.Wanted) -> Iterator[str]:
    yield from checks.structure_problems(info.demos, wanted)
    yield from checks.agreement_problems(info.demos, wanted)


def _camera_summary(name: str, demos: Iterable[DemoInfo]) -> CameraSummary:
    arrays = [info for demo in demos if (info := demo.obs.get(name)) is not None and info.is_image]
    kinds = sorted({info.compression for info in arrays})
    height, width, channels = arrays[0].frame or (0, 0, 0)
    stored, steps = sum(info.stored_bytes for info in arrays), sum(info.shape[0] for info in arrays)
    forms = sorted({info.form for info in arrays if info.form})
    raw = steps * height * width * channels
    return CameraSummary(height, width, " and ".join(kinds), stored, raw, ", ".join(forms))


def _camera_lines(cameras: Mapping[str, CameraSummary]) -> list[str]:
    lines = [f"{shortened(name)} {_camera_line(camera)}" for name, camera in cameras.items()]
    return few(lines, "camera", more=ALL)


def _camera_line(camera: CameraSummary) -> str:
    packed = f", {camera.stored_bytes / 1e6:.1f} MB stored" if camera.compression != "none" else ""
    size = f"{camera.height}×{camera.width}, {camera.raw_bytes / 1e6:.1f} MB"
    form = f", {camera.form}" if camera.form else ""
    return f"{size}, compression {camera.compression}{packed}{form}"


def _low_dim_width(key: str, demos: Iterable[DemoInfo]) -> int:
    shape = next(info.shape for demo in demos if (info := demo.obs.get(key)) is not None and info.is_low_dim)
    return int(np.prod(shape[1:], dtype=np.int64))


def _action_summary(actions: Statistics | None) -> ActionSummary | None:
    if actions is None or not actions.min.size:
        return None
    return ActionSummary(
        dim=len(actions.min),
        min=tuple(float(f"{value:.6g}") for value in actions.min),
        max=tuple(float(f"{value:.6g}") for value in actions.max),
        constant_dims=tuple(np.flatnonzero(actions.min == actions.max).tolist()),
        steps_beyond_one=actions.beyond_one,
    )


def _action_lines(actions: ActionSummary | None, others: Mapping[str, int]) -> list[tuple[str, str]]:
    lines = [("actions", "none are readable")]
    if actions is not None:
        ranges = listed(f"{low:.2f}…{high:.2f}" for low, high in zip(actions.min, actions.max, strict=True))
        lines = [("actions", f"dim {actions.dim}: {ranges}")]
    if others:
        lines.append(("action keys", "others: " + listed(f"{shortened(key)} {width}" for key, width in others.items())))
    return lines


def _task_lines(tasks: Mapping[str, int]) -> list[str]:
    lines = [f"{shortened(task, LONGEST_TASK)} ({counted(count, 'demo')})" for task, count in tasks.items()]
    return few(lines, "task", more=ALL)


def _action_notes(actions: ActionSummary | None) -> Iterator[str]:
    if actions is None:
        return
    if actions.steps_beyond_one:
        dims = [i for i in range(actions.dim) if actions.min[i] < -1 or actions.max[i] > 1]
        yield f"actions are beyond ±1 in {actions.steps_beyond_one} steps (dims {listed(dims)})"
    if actions.constant_dims:
        yield f"actions never change in dims {listed(actions.constant_dims)}"


def _low_dim_notes(numbers: NumbersReport, keys: Iterable[str]) -> Iterator[str]:
    """Yields low-dim obs that are read by default and never change, and quaternions that change their sign."""
    for key in keys:
        found = numbers.statistics.get(f"obs/{key}")
        if found is not None and (still := np.flatnonzero(found.min == found.max).tolist()):
            yield f"obs/{shortened(key)} never changes in dims {listed(still)}"
    for path, demos in numbers.sign_flips:
        yield (
            f"{shortened(path)} changes its sign between steps in {counted(len(demos), 'demo')} "
            f"({listed(demos, limit=3)}): the rotation is the same, but a policy sees a jump"
        )


def _metadata_notes(info: FileInfo) -> Iterator[str]:
    if info.env_args is None:
        yield "no env_args: a rollout needs an environment that you name; everything else works"
    steps = sum(demo.length for demo in info.demos)
    if info.total is not None and info.total != steps:
        yield f"data.attrs total is {info.total}, but there are {steps} steps"
    incomplete = [key for key in info.masks if info.absent(key)]
    if incomplete:
        some = listed([f"{key} {len(info.present(key))} of {len(info.masks[key])}" for key in incomplete], limit=3)
        yield (
            f"{len(incomplete)} of {len(info.masks)} filter keys name demos that are not in the file; "
            f"those in the file are used ({some})"
        )
    empty = [key for key, names in info.masks.items() if not names]
    if empty:
        yield f"filter keys without demos: {listed(empty)}"
    for path in ("rewards", "dones"):
        lacking = [demo.name for demo in info.demos if path not in demo.arrays]
        if lacking:
            yield f"no {path} in {len(lacking)} of {len(info.demos)} demos ({listed(lacking, limit=3)}): read as NaN"
    cameras = checks.find_cameras(info.demos)
    unread = {
        f"{key} {array}": None
        for demo in info.demos[:1]
        for key, array in demo.obs.items()
        if not array.is_low_dim and key not in cameras
    }
    if unread:
        yield f"obs that are neither an rgb image nor low-dim: {listed(unread)}"
    if not cameras:
        yield "no cameras: no features can be extracted"


def _numbering_notes(info: FileInfo) -> Iterator[str]:
    if info.layout != HDF5:
        return
    numbers = [int(found[1]) for demo in info.demos if (found := re.fullmatch(r"demo_([0-9]+)", demo.name))]
    other = [demo.name for demo in info.demos if not re.fullmatch(r"demo_([0-9]+)", demo.name)]
    if other:
        yield f"names that are not demo_<number>: {listed(other, limit=5)}"
    if numbers and max(numbers) - min(numbers) + 1 > len(set(numbers)):
        yield f"demo numbers have gaps: {len(numbers)} demos between {min(numbers)} and {max(numbers)}"
    odd = [demo.name for demo in info.demos if demo.odd_num_samples]
    if odd:
        yield f"num_samples is not a whole number in {len(odd)} of {len(info.demos)} demos ({listed(odd, limit=3)})"
    lacking = [demo.name for demo in info.demos if demo.num_samples is None and not demo.odd_num_samples]
    if lacking:
        yield f"no num_samples in {len(lacking)} of {len(info.demos)} demos ({listed(lacking, limit=3)})"
    wrong = [
        f"{demo.name} says {demo.num_samples} of {demo.length}"
        for demo in info.demos
        if demo.num_samples not in (None, demo.length)
    ]
    if wrong:
        yield f"num_samples is not the number of actions in {len(wrong)} demos ({listed(wrong, limit=3)})"
