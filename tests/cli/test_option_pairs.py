"""No option is dropped silently: alone and beside every other one it changes what is run, or it is refused.

Each command is parsed up to the one function that it calls, whose config is kept. ``effective`` leaves of a config what
can change a result; an option without which that is the same was dropped. All pairs of options are tried on each base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from typer.testing import CliRunner

from cache_pipeline.cli import app
from cache_pipeline.encoders.image_encoder import EncoderSpec
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.errors import ConfigError, OptionError
from cache_pipeline.extract.config import ExtractConfig
from cache_pipeline.training.config import OWN_POLICY_OPTIONS, FinetuneConfig, TrainConfig
from cache_pipeline.training.update.unfreezing import parse_unfreezing

GROUP: Any = typer.main.get_command(app)

# A value that is not the default for each option, as it is typed.
SAMPLES: dict[str, list[str]] = {
    "action_key": ["--action-key", "actions_abs"],
    "allow_other_device": ["--allow-other-device"],
    "devices": ["--devices", "cuda:0,cuda:1"],
    "engine": ["--engine", "ray"],
    "finish": ["--finish"],
    "part": ["--part", "2/3"],
    "ray_address": ["--ray-address", "head:6379"],
    "workers": ["--workers", "2"],
    "action_steps": ["--action-steps", "2"],
    "demos": ["--demos", "3"],
    "noise": ["--noise", "0.2"],
    "next_obs": ["--next-obs"],
    "render_flag": ["--render-flag", "shadow=on"],
    "valid_fraction": ["--valid-fraction", "0.2"],
    "env": ["--env", "envs.py:make"],
    "env_args": ["--env-args", "env.json"],
    "episodes": ["--episodes", "3"],
    "from_states": ["--from-states", "c.hdf5"],
    "horizon": ["--horizon", "9"],
    "image_mean": ["--image-mean", "0.5,0.4,0.3"],
    "image_std": ["--image-std", "1/255,1/255,1/255"],
    "image_size": ["--image-size", "32"],
    "integrity": ["--integrity"],
    "rows": ["--rows", "9"],
    "seconds": ["--seconds", "0.5"],
    "task": ["--task", "Stack"],
    "video": ["--video", "films"],
    "brightness": ["--brightness", "0.1"],
    "config": ["--config", "settings.json"],
    "contrast": ["--contrast", "0.1"],
    "ema": ["--ema", "none"],
    "eval_windows": ["--eval-windows", "9"],
    "grad_clip": ["--grad-clip", "0.5"],
    "hue": ["--hue", "0.1"],
    "log_every": ["--log-every", "3"],
    "min_lr_ratio": ["--min-lr-ratio", "0.1"],
    "policy_option": ["--policy-option", "hidden=[8]"],
    "pooling": ["--pooling", "spatial_softmax"],
    "random_crop": ["--no-random-crop"],
    "saturation": ["--saturation", "0.1"],
    "warmup_steps": ["--warmup-steps", "3"],
    "weight_decay": ["--weight-decay", "0.1"],
    "videos": ["--videos", "2"],
    "accumulate": ["--accumulate", "2"],
    "action_horizon": ["--action-horizon", "5"],
    "action_normalization": ["--action-normalization", "gaussian"],
    "augment": ["--augment"],
    "batch_size": ["--batch-size", "32"],
    "camera_encoder": ["--camera-encoder", "front_image=resnet34"],
    "cameras": ["--cameras", "front_image"],
    "crop_shape": ["--crop-shape", "20,20"],
    "cut": ["--cut", "layer3"],
    "dataset": ["--dataset", "more.hdf5"],
    "deep": ["--deep"],
    "device": ["--device", "cuda:1"],
    "dry_run": ["--dry-run"],
    "emb_dim": ["--emb-dim", "7"],
    "encoder": ["--encoder", "nets.py:make"],
    "encoder_from": ["--encoder-from", "other_run"],
    "encoder_lr": ["--encoder-lr", "0.5"],
    "eval_every": ["--eval-every", "3"],
    "feature_dropout": ["--feature-dropout", "0.1"],
    "feature_noise": ["--feature-noise", "0.1"],
    "flip": ["--flip"],
    "filter_key": ["--filter-key", "good"],
    "freeze": ["--freeze", "bn*"],
    "freeze_encoder": ["--no-freeze-encoder"],
    "from_cache": ["--from-cache", "other.zarr"],
    "gradient_checkpointing": ["--gradient-checkpointing"],
    "imagenet_norm": ["--no-imagenet-norm"],
    "json": ["--json"],
    "keep_best": ["--keep-best", "4"],
    "live_encoder": ["--live-encoder"],
    "low_dim_keys": ["--low-dim-keys", "pose"],
    "lr": ["--lr", "0.5"],
    "max_memory": ["--max-memory", "1GiB"],
    "obs_horizon": ["--obs-horizon", "5"],
    "order": ["--order", "block"],
    "out": ["--out", "elsewhere"],
    "overwrite": ["--overwrite"],
    "policy": ["--policy", "gmm"],
    "precision": ["--precision", "bf16"],
    "precision_bound": ["--precision-bound", "0.2"],
    "pretrained_encoder": ["--no-pretrained-encoder"],
    "resize_shape": ["--resize-shape", "30,30"],
    "resume": ["--resume"],
    "rgb_model_name": ["--rgb-model-name", "resnet34"],
    "robomimic_config": ["--robomimic-config", "theirs.json"],
    "rotation_6d": ["--rotation-6d", "3:6"],
    "rollout_env": ["--rollout-env", "walk.py:make"],
    "rollout_every": ["--rollout-every", "3"],
    "rollout_episodes": ["--rollout-episodes", "3"],
    "rollout_workers": ["--rollout-workers", "2"],
    "save_every": ["--save-every", "3"],
    "seed": ["--seed", "5"],
    "shard_rows": ["--shard-rows", "64"],
    "share_rgb_model": ["--share-rgb-model"],
    "source": ["--source", "streamed"],
    "store": ["--store", "scratch.zarr"],
    "steps": ["--steps", "30"],
    "store_dtype": ["--store-dtype", "float32"],
    "unfreeze": ["--unfreeze", "layer4"],
    "unfreeze_schedule": ["--unfreeze-schedule", "layer4@0"],
    "update_batchnorm": ["--update-batchnorm"],
    "valid_key": ["--valid-key", "bad"],
    "views": ["--views", "3"],
    "wandb": ["--wandb", "project"],
    "weights": ["--weights", "w.safetensors"],
    "weights_prefix": ["--weights-prefix", "teacher"],
}
SETTINGS = {"steps": 70, "seed": 70, "batch_size": 70}
BASES = {
    "extract": ["extract-features", "a.hdf5"],
    "train on a cache": ["train", "--from-cache", "a.zarr"],
    "train live": ["train", "--dataset", "a.hdf5"],
    "train live, unfrozen": ["train", "--dataset", "a.hdf5", "--no-freeze-encoder"],
    "train live, from a cache": ["train", "--from-cache", "a.zarr", "--dataset", "a.hdf5", "--source", "live"],
    "train robomimic": ["train", "--from-cache", "a.zarr", "--policy", "robomimic:bc"],
    "finetune live": ["finetune", "--checkpoint", "run", "--live-encoder"],
    "finetune on a cache": ["finetune", "--checkpoint", "run", "--from-cache", "a.zarr"],
    "verify": ["verify", "a.zarr"],
    "rollout": ["rollout", "run"],
    "collect": ["collect", "--out", "a.hdf5"],
    "collect from states": ["collect", "--out", "a.hdf5", "--from-states", "b.hdf5"],
    "probe": ["probe", "a.zarr"],
    "bench": ["bench"],
    "quickstart": ["quickstart"],
}
FUNCTIONS = (
    "extract.pipeline.extract_features",
    "extract.plan.plan_extraction",
    "extract.verify.verify",
    "cache.integrity.check_integrity",
    "training.train.train",
    "training.finetune.finetune",
    "sim.rollout.rollout",
    "sim.collect.collect",
    "sim.rerender.rerender",
    "reports.probe.probe_cache",
    "reports.bench.run.run_bench",
    "reports.quickstart.run_quickstart",
)
# Allowed where they change nothing: ``--seed`` is a promise about whatever is random, kept where nothing is;
# ``--no-imagenet-norm`` is what random weights have anyway; ``--encoder`` beside a cache or a run names the factory
# whose code may be run.
ALLOWED = {"seed"}
AGREEING = {("imagenet_norm", "pretrained_encoder")}
NAMES_A_FACTORY = {("train", "from_cache"), ("extract-features", "encoder_from")}


class Result(NamedTuple):
    ok: bool = True

    def to_json(self):
        return {}

    def lines(self):
        return ["done"]


class Outcome(NamedTuple):
    """What a command line leads to; ``refused`` is the error, if it is one."""

    function: str = ""
    config: Any = None
    printed: str = ""
    refused: str = ""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A function from the words of a command line to its outcome. Nothing is opened, built or trained."""
    called: list[tuple[str, Any]] = []

    def fake(name):
        return lambda *given, **options: called.append((name, (given, options))) or Result()

    def run(words):
        called.clear()
        words = [*words, *(["--out", "o"] if "--out" not in words and words[0] == "extract-features" else [])]
        printed = io.StringIO()
        command = GROUP.commands[words[0]]
        try:
            with contextlib.redirect_stdout(printed):
                command.main(words[1:], standalone_mode=False, prog_name=words[0])
        except ConfigError as error:
            return Outcome(refused=str(error))
        name, (given, options) = called[-1]
        config = effective(given[0]) if dataclasses.is_dataclass(given[0]) else (given, options)
        return Outcome(name, config, printed.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        for name in ("a.hdf5", "more.hdf5"):
            Path(name).touch()
        Path("settings.json").write_text(json.dumps({"config": SETTINGS}))
        for name in FUNCTIONS:
            patch.setattr(f"cache_pipeline.{name}", fake(name))
        patch.setattr("cache_pipeline.runs.tuned_encoder.encoders_of_run", encoders_of_run)
        yield run


def encoders_of_run(run, cut="avgpool", *args, **options):
    """The encoder of a run, which is the same whatever else is asked for."""
    return {"": EncoderSpec(weights=f"{run}.safetensors", cut=cut)}, {"": Preprocess()}


def effective(config: Any) -> dict[str, Any]:
    """What of a config can change what is computed, kept or said."""
    value = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    if isinstance(config, FinetuneConfig):
        value["unfreeze"] = parse_unfreezing(value["unfreeze"], value.pop("unfreeze_schedule"), config.steps)
        return value if config.augment else {name: item for name, item in value.items() if name != "augmentation"}
    if isinstance(config, TrainConfig):
        learns = config.live and not config.freeze_encoder
        dropped = [
            *(() if learns else ("share_rgb_model", "encoder_lr")),
            *(("encoder", "preprocess") if config.cache is not None else ()),
            *((*OWN_POLICY_OPTIONS, "freeze_encoder") if config.robomimic else ()),
            *(("precision",) if config.robomimic and not config.live else ()),
            *(("order",) if config.live else ()),
            *(() if config.live and config.augment else ("augmentation",)),
        ]
        value = {name: item for name, item in value.items() if name not in dropped}
        value["augment"] = bool(config.augment) if config.live else config.augment
        if "encoder" in value:
            value["encoder"], value["preprocess"] = _network(config.encoder), _pixels(config.preprocess)
        return value
    if not isinstance(config, ExtractConfig):
        return value
    if config.views == 1:
        del value["view_spec"]
    if config.overwrite:
        del value["deep"]
    value["encoders"] = _each(config.encoders, _network)
    value["preprocess"] = _each(config.preprocess, _pixels)
    return value


def _each(value, effect):
    return {key: effect(item) for key, item in value.items()} if isinstance(value, dict) else effect(value)


def _network(spec):
    if spec is None or spec.factory is not None:
        return spec and spec.factory
    seed = spec.seed if spec.weights == "random" else None
    return spec.rgb_model_name, spec.weights, spec.weights_prefix, spec.cut, seed


def _pixels(preprocess):
    return preprocess and json.dumps(preprocess.to_json())


def options_of(base: list[str]) -> list[str]:
    """Options of the base's command that the base leaves open."""
    given = {word for word in base if word.startswith("--")}
    found = []
    for parameter in GROUP.commands[base[0]].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            spelled = {*parameter.opts, *parameter.secondary_opts}
            repeatable = parameter.multiple
            if repeatable or not spelled & given:
                found.append(parameter.name)
    return found


@pytest.mark.parametrize("command", sorted({words[0] for words in BASES.values()}))
def test_every_option_has_a_sample(command):
    unknown = set(options_of([command])) - set(SAMPLES)
    assert not unknown - {"checkpoint", "help"}, f"give a value to try for {unknown} in SAMPLES"


@pytest.mark.parametrize("base", BASES)
def test_no_option_is_dropped_alone_or_beside_another(base, outcome):
    words, names = BASES[base], [name for name in options_of(BASES[base]) if name in SAMPLES]
    alone = {name: outcome([*words, *SAMPLES[name]]) for name in names}
    plain = outcome(words)
    dropped = [name for name, found in alone.items() if found == plain and not _allowed(words, name, ())]
    assert not dropped, f"silently dropped: {dropped}"
    pairs = []
    for one, other in itertools.combinations(names, 2):
        both = outcome([*words, *SAMPLES[one], *SAMPLES[other]])
        if both.refused:
            assert "\n" not in both.refused
            continue
        for name, beside in ((one, other), (other, one)):
            if both == alone[beside] and not _allowed(words, name, (beside,)):
                pairs.append(f"{name} beside {beside}")
    assert not pairs, f"silently dropped: {pairs}"


def _allowed(words, name, beside):
    given = {*beside, *(word.removeprefix("--").replace("-", "_") for word in words)}
    names_a_factory = name == "encoder" and any((words[0], option) in NAMES_A_FACTORY for option in given)
    return name in ALLOWED or names_a_factory or any((name, other) in AGREEING for other in beside)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --from-cache c --weights w.pth", "--weights has no effect: a cache holds the output"),
        ("train --from-cache c --no-pretrained-encoder", "--no-pretrained-encoder has no effect"),
        ("train --from-cache c --cut avgpool", "--cut has no effect"),
        ("train --from-cache c --rgb-model-name resnet18", "--rgb-model-name has no effect"),
        ("train --from-cache c --no-imagenet-norm", "--no-imagenet-norm has no effect"),
        ("train --from-cache c --crop-shape 8,8", "--crop-shape has no effect"),
        ("train --from-cache c --share-rgb-model", "--share-rgb-model has no effect"),
        ("train --from-cache c --encoder-lr 1e-5", "--encoder-lr has no effect: the encoder is frozen"),
        ("train --from-cache c --no-freeze-encoder", "a cache holds frozen features"),
        ("train --from-cache c --policy robomimic:bc --lr 1e-3", "--lr has no effect: robomimic"),
        ("train --from-cache c --policy robomimic:bc --precision bf16", "--precision has no effect: robomimic"),
        ("train --dataset d --no-augment", "--no-augment has no effect: live frames are changed with --augment only"),
        ("train --dataset d --hue 0.1", "--hue has no effect: frames are changed with --augment only"),
        ("train --from-cache c --augment --hue 0.1", "--hue has no effect: a cache holds the views"),
        ("finetune --checkpoint r --live-encoder --no-random-crop", "--no-random-crop has no effect"),
        ("extract-features d --out c --contrast 0", "--contrast has no effect: only views beyond the first"),
        ("train --from-cache c --policy robomimic:bc --ema none", "--ema has no effect: robomimic"),
        ("train --dataset d --encoder f.py:f --rgb-model-name resnet34", "--encoder brings its own"),
        ("train --dataset d --encoder f.py:f --weights w", "--weights has no effect: --encoder brings"),
        ("train --dataset d --encoder f.py:f --cut layer3", "--cut has no effect: only ResNets are cut"),
        ("train --dataset d --weights w --no-pretrained-encoder", "--weights takes the weights of a file"),
        ("train --dataset d --weights-prefix teacher", "--weights-prefix has no effect: it chooses among the ResNets"),
        ("quickstart --weights-prefix teacher", "--weights-prefix has no effect: it chooses among the ResNets"),
        ("extract-features d --out c --encoder f.py:f --weights-prefix x", "--weights-prefix has no effect: --encoder"),
        ("extract-features d --out c --image-mean 0,0,0", "--image-mean and --image-std belong together"),
        ("extract-features d --out c --image-mean 0,0,0 --image-std 0,1,1", "--image-std 0.0,1.0,1.0 must be above 0"),
        (
            "extract-features d --out c --image-mean 0,0 --image-std 1,1,1",
            "'0,0' is not one number each for red, green",
        ),
        ("extract-features d --out c --image-mean nan,0,0 --image-std 1,1,1", "'nan,0,0' is not one number each"),
        (
            "extract-features d --out c --image-mean 0,0,0 --image-std 1,1,1 --no-imagenet-norm",
            "--no-imagenet-norm has no effect: --image-mean and --image-std set the normalisation",
        ),
        ("train --dataset d --source resident", "source resident reads a cache"),
        ("train --dataset d --order block", "order block is for reading a cache"),
        ("train --from-cache c --source live --dataset d --order block", "order block is for reading a cache"),
        ("train --from-cache c --cameras a --cameras b", "--cameras is given 2 times"),
        ("train --from-cache c --resume --overwrite", "give one of them"),
        ("extract-features d --out c --encoder-from r --weights w", "--weights has no effect: --encoder-from takes"),
        ("extract-features d --out c --encoder-from r --camera-encoder a=resnet34", "--camera-encoder has no effect"),
        ("extract-features d --out c --encoder-from r --resize-shape 8,8", "--resize-shape has no effect"),
        ("extract-features d --out c --overwrite --deep", "--deep has no effect: --overwrite reads"),
        ("extract-features d --out c --camera-encoder a=resnet34 --camera-encoder a=resnet50", "names a twice"),
        ("finetune --checkpoint r --live-encoder --from-cache c", "--live-encoder has no effect: --from-cache reads"),
        ("finetune --checkpoint r --live-encoder --unfreeze all --unfreeze-schedule all@3", "--unfreeze has no effect"),
        ("finetune --checkpoint r --from-cache c --source live", "give only --live-encoder"),
        ("finetune --checkpoint r --live-encoder --source streamed", "source streamed reads a cache"),
        ("verify c --integrity --rows 3", "--rows has no effect: --integrity reads"),
        ("verify c --integrity --dataset d", "--dataset has no effect"),
        ("bench encode load --batch-size 8", "--batch-size has no effect: only train"),
        ("collect --out a --from-states b --demos 3", "--demos has no effect: --from-states renders"),
        ("collect --out a --from-states b --task Lift", "--task has no effect: --from-states renders"),
        ("collect --out a --env-args e.json", "--env-args has no effect: the task describes"),
        ("collect --out a --render-flag shadow", "render flag 'shadow' is not NAME=on or NAME=off"),
        ("collect --out a --valid-fraction 1", "leaves no demo to train on"),
        ("rollout r --videos 3", "--videos has no effect: no video is written"),
    ],
)
def test_options_without_effect_are_usage_errors_that_say_why(words, told):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert told in result.stderr, result.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"encoder": EncoderSpec(weights="random")},
        {"preprocess": Preprocess()},
        {"share_rgb_model": True},
        {"encoder_lr": 1.0},
    ],
)
def test_configs_refuse_what_has_no_effect_too(options):
    with pytest.raises(OptionError):
        TrainConfig(cache=Path("c"), **options)
