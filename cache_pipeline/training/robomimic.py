"""Trains robomimic's algorithms in this package's loop: their windows, updates and state on disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_pipeline.demos.windows import Windows, WindowSpec
from cache_pipeline.encoders.precision import computing_in
from cache_pipeline.errors import CheckpointError, ConfigError
from cache_pipeline.policies.batch import Batch
from cache_pipeline.policies.robomimic.config import (
    RobomimicConfig,
    default_config,
    read_config,
    with_horizons,
)
from cache_pipeline.policies.robomimic.policy import STD_FLOOR, RobomimicPolicy
from cache_pipeline.runs.checkpoint import State
from cache_pipeline.training.config import TrainConfig
from cache_pipeline.training.data.rows import RunRows
from cache_pipeline.training.data.source import Source, SplitRows, Splits

logger = logging.getLogger("cache_pipeline")

# Obs keys of a dataset contain no slash, so these names cannot clash with one.
REWARDS, DONES = "/rewards", "/dones"
ROWS_AT_ONCE = 4096
SCALE_FLOOR = 1e-6
"""Actions that vary less are not scaled."""

# Names under which robomimic reports the losses of its algorithms.
LOSSES = re.compile(r"(actor|action_sampler)/loss|critic/critic\d+_loss|vf/v_loss")
COUNTERS = ("actor_update_counter", "_num_batch_steps")
OPTIMIZER, RATE, SCHEDULE, COUNTER, RANDOM = "optimizer/", "lr/", "schedule/", "counter/", "random/"


def robomimic_config(config: TrainConfig) -> RobomimicConfig:
    """Returns the robomimic config of a run; options on the command line override the file.

    Raises:
        ConfigError: unknown algorithm, a file that robomimic or this package cannot use, or several processes.
        MissingExtraError: robomimic is not installed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ConfigError("robomimic's algorithms train in one process; start them without torchrun")
    if config.robomimic_config is None:
        chosen = default_config(config.policy)
    else:
        chosen = read_config(config.robomimic_config)
        if config.policy not in (TrainConfig.policy, chosen.name):
            raise ConfigError(
                f"{config.robomimic_config} is a config of {chosen.name}, but --policy is {config.policy}; give one"
            )
    return with_horizons(
        chosen, frame_stack=config.obs_horizon, seq_length=config.action_horizon, batch_size=config.batch_size
    )


def robomimic_splits(config: RobomimicConfig, rows: RunRows, device: torch.device) -> Splits:
    """Returns the windows to train on and the windows for the held-out action error.

    Training windows are those of ``SequenceDataset``: frame_stack - 1 + seq_length steps of both obs and actions. For
    RL algorithms, next obs follow the obs of the steps, and rewards and dones follow the low-dim obs.
    Held-out windows hold the inputs of the policy when it acts: the whole window of a recurrent policy, the context
    of a transformer, else one step.

    Raises:
        ConfigError: the algorithm is an RL algorithm, but the data have no rewards or dones.
    """
    train = sequence_windows(rows, config)
    assert train is not None
    train_rows = rows
    if config.rl:
        _check_rewards(rows)
        train = train._replace(obs_rows=np.concatenate([train.obs_rows, next_rows(rows, train.obs_rows)], axis=1))
        train_rows = rows._replace(low_dim={**rows.low_dim, REWARDS: rows.rewards, DONES: rows.dones})
    if config.recurrent:
        valid = sequence_windows(rows, config, valid=True)
    else:
        valid = rows.windows(WindowSpec(config.obs_horizon, 1), valid=True)
    if config.action_normalization is None:
        _warn_of_range(rows)
    return SplitRows(train, train_rows, device), None if valid is None else SplitRows(valid, rows, device)


def sequence_windows(rows: RunRows, config: RobomimicConfig, *, valid: bool = False) -> Windows | None:
    """Makes the windows of robomimic's ``SequenceDataset``: obs and actions share rows; the mask is its pad_mask."""
    pad_start, pad_end = config.pads
    spec = WindowSpec(config.frame_stack, config.seq_length, pad_start=pad_start, pad_end=pad_end)
    windows = rows.windows(spec, valid=valid)
    if windows is None:
        return None
    steps = np.concatenate([windows.obs_rows, windows.action_rows[:, 1:]], axis=1)
    mask = np.concatenate([np.diff(windows.obs_rows, axis=1) > 0, windows.action_mask], axis=1)
    return Windows(steps, steps, mask, windows.demo)


def next_rows(rows: RunRows, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the row after each of ``steps``; the last row of a demo is followed by itself."""
    last = np.cumsum(rows.lengths) - 1
    return np.minimum(steps + 1, last[np.searchsorted(last, steps)])


def fit_robomimic(policy: RobomimicPolicy, rows: RunRows, source: Source) -> None:
    """Computes mean and deviation of every obs key over the clean train rows, as robomimic's ``hdf5_normalize_obs``."""
    _fit_actions(policy, rows)
    if not policy.mean:
        return
    total = {key: np.zeros((2, *shape)) for key, shape in policy.shapes.items()}
    for start in range(0, rows.train_rows, ROWS_AT_ONCE):
        part = np.arange(start, min(rows.train_rows, start + ROWS_AT_ONCE))
        features = {camera: values.double().numpy() for camera, values in source.features_of(part).items()}
        for key, shape in policy.shapes.items():
            values = features[key] if key in features else rows.low_dim[key][part].astype(np.float64)
            values = values.reshape(len(part), *shape)
            total[key] += [values.sum(0), np.square(values).sum(0)]
    for key, (first, second) in total.items():
        mean = first / rows.train_rows
        deviation = np.sqrt(np.maximum(second / rows.train_rows - mean**2, 0)) + STD_FLOOR
        policy.mean[key] = torch.from_numpy(mean).float().to(policy.device)
        policy.std[key] = torch.from_numpy(deviation).float().to(policy.device)


def _fit_actions(policy: RobomimicPolicy, rows: RunRows) -> None:
    """Computes centre and scale of the train rows' actions, as ``train.action_config`` asks for: to ±1, or gaussian."""
    kind, actions = policy.config.action_normalization, rows.actions[: rows.train_rows].astype(np.float64)
    if kind is None:
        return
    low, high = actions.min(0), actions.max(0)
    center, scale = (low + high) / 2, (high - low) / 2
    if kind == "gaussian":
        center, scale = actions.mean(0), actions.std(0)
    policy.action_center.copy_(torch.from_numpy(center))
    policy.action_scale.copy_(torch.from_numpy(np.where(scale > SCALE_FLOOR, scale, 1.0)))


class RobomimicLearner:
    """Updates a robomimic algorithm through its ``train_on_batch``, with its own optimisers and schedules.

    robomimic draws from torch's global generator. During a step its state is the learner's; it is restored afterwards.

    Args:
        policy: the policy that learns.
        windows: number of training windows; sets the length of an epoch if the config has None.
        seed: seed of the algorithm's random numbers.
        precision: ``fp32`` or ``tf32``.
    """

    def __init__(self, policy: RobomimicPolicy, *, windows: int, seed: int, precision: str = "fp32") -> None:
        self._policy, self._algo, self._precision = policy, policy.algo, precision
        self._epoch_steps = policy.config.epoch_steps or max(1, windows // policy.config.batch_size)
        self._cuda = policy.device.type == "cuda"
        with self._forked():
            torch.manual_seed(seed)
            self._random = self._random_state()

    def step(self, batch: Batch, number: int) -> Tensor:
        """Makes update ``number``, counted from 0; returns the sum of the losses as a scalar on the device."""
        epoch = number // self._epoch_steps + 1
        with self._own_random(), computing_in(self._precision, self._policy.device):
            with self._policy.device if self._cuda else nullcontext():
                prepared = self._algo.process_batch_for_training(self.robomimic_batch(batch))
            info = self._algo.train_on_batch(prepared, epoch)
        if (number + 1) % self._epoch_steps == 0:
            self._algo.on_epoch_end(epoch)
        if "losses" in info:
            return info["losses"]["action_loss"]
        losses = [value.detach().reshape(1) for name, value in info.items() if LOSSES.fullmatch(name)]
        return torch.cat(losses).sum()

    def robomimic_batch(self, batch: Batch) -> dict[str, Any]:
        """Converts a batch to the form of robomimic's loader: (B,T,…) obs, actions; for RL next_obs, rewards, dones."""
        steps = batch.actions.shape[1]
        if not self._policy.config.rl:
            return {"obs": self._policy.prepare(batch.obs, steps), "actions": self._policy.normalized(batch.actions)}
        both = self._policy.prepare(batch.obs, 2 * steps)
        return {
            "obs": {key: values[:, :steps] for key, values in both.items()},
            "next_obs": {key: values[:, steps:] for key, values in both.items()},
            "actions": self._policy.normalized(batch.actions),
            "rewards": batch.obs[REWARDS][:, :steps],
            "dones": batch.obs[DONES][:, :steps],
        }

    def rates(self) -> dict[str, float]:
        """Returns the learning rate of the algorithm's first optimiser."""
        first = next(iter(_parts(self._algo.optimizers).values()))
        return {"training/lr": first.param_groups[0]["lr"]}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Does nothing: robomimic has no averaged weights."""
        yield

    def state(self) -> State:
        return State(self._policy.tensors(), {}, self._resume_tensors())

    def _resume_tensors(self) -> dict[str, Tensor]:
        tensors = {RANDOM + name: state for name, state in self._random.items()}
        for name, optimizer in _parts(self._algo.optimizers).items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{OPTIMIZER}{name}/{index}/{moment}": value for moment, value in state.items()}
            rates = [group["lr"] for group in optimizer.param_groups]
            tensors[RATE + name] = torch.tensor(rates, dtype=torch.float64)
        for name, schedule in _parts(self._algo.lr_schedulers).items():
            tensors[SCHEDULE + name] = torch.tensor([schedule.last_epoch, schedule._step_count])
        for name in COUNTERS:
            if hasattr(self._algo, name):
                tensors[COUNTER + name] = torch.tensor(getattr(self._algo, name))
        return tensors

    def load(self, state: State) -> None:
        resume = state.resume
        self._policy.load_tensors(state.model)
        try:
            self._load_optimizers(resume)
            self._random = {name: resume[RANDOM + name] for name in self._random}
            for name in COUNTERS:
                if hasattr(self._algo, name):
                    setattr(self._algo, name, int(resume[COUNTER + name]))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the optimiser's state does not fit ({error}); start a new run") from error

    def _load_optimizers(self, resume: Mapping[str, Tensor]) -> None:
        for name, optimizer in _parts(self._algo.optimizers).items():
            state: dict[int, dict[str, Tensor]] = {}
            prefix = f"{OPTIMIZER}{name}/"
            for key, value in resume.items():
                if key.startswith(prefix):
                    index, moment = key.removeprefix(prefix).split("/")
                    state.setdefault(int(index), {})[moment] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            for group, rate in zip(optimizer.param_groups, resume[RATE + name].tolist(), strict=True):
                group["lr"] = rate
        for name, schedule in _parts(self._algo.lr_schedulers).items():
            schedule.last_epoch, schedule._step_count = resume[SCHEDULE + name].tolist()

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        with self._forked():
            torch.set_rng_state(self._random["cpu"])
            if self._cuda:
                torch.cuda.set_rng_state(self._random["cuda"], self._policy.device)
            yield
            self._random = self._random_state()

    def _forked(self) -> Any:
        return torch.random.fork_rng([self._policy.device] if self._cuda else [])

    def _random_state(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        return states | {"cuda": torch.cuda.get_rng_state(self._policy.device)} if self._cuda else states


def _parts(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns robomimic's optimisers or schedules by name; numbers those of an ensemble, skips None."""
    found = {}
    for name, value in named.items():
        members = (
            [(f"{name}.{i}", member) for i, member in enumerate(value)] if isinstance(value, list) else [(name, value)]
        )
        found.update({key: member for key, member in members if member is not None})
    return found


def _check_rewards(rows: RunRows) -> None:
    for name, values in (("rewards", rows.rewards), ("dones", rows.dones)):
        if np.isnan(values[: rows.train_rows]).any():
            raise ConfigError(f"the data have no {name}, which RL algorithms need; use one of robomimic:bc…")


def _warn_of_range(rows: RunRows) -> None:
    most = float(np.abs(rows.actions[: rows.train_rows]).max())
    if most > 1:
        logger.warning("actions reach ±%.3g; robomimic's policies expect actions between -1 and 1", most)
