"""train, finetune and export: from a cache or a dataset to a policy, and back to a live encoder."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cache_pipeline.cli import options as o
from cache_pipeline.errors import ConfigError, RunStopped

if TYPE_CHECKING:
    from cache_pipeline.training.config import SavingConfig
    from cache_pipeline.training.result import TrainResult

Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Windows per step.")]
EncoderLr = Annotated[float, typer.Option("--encoder-lr", help="Peak learning rate of an encoder that learns.")]
Source = Annotated[str, typer.Option("--source", help="auto, resident, streamed or live.")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", help="Memory for features or frames on the device, such as 2GiB.")
]
Order = Annotated[str, typer.Option("--order", help="Order of samples: full, block, or auto; block reads far less.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint of --out.")]
Deep = Annotated[
    bool, typer.Option("--deep", help="Compare every frame with its source instead of trusting size and time.")
]
Wandb = Annotated[str | None, typer.Option("--wandb", help="Log to this Weights & Biases project too.")]
EvalEvery = Annotated[int, typer.Option("--eval-every", min=0, help="Steps between held-out measurements.")]
SaveEvery = Annotated[int, typer.Option("--save-every", min=0, help="Steps between checkpoints.")]
KeepBest = Annotated[int, typer.Option("--keep-best", min=0, help="Best checkpoints kept beside the latest.")]


def train(
    from_cache: Annotated[Path | None, typer.Option("--from-cache", help="A cache made by extract-features.")] = None,
    dataset: o.Datasets = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; runs/NAME by default.")] = None,
    cameras: o.Cameras = None,
    low_dim_keys: o.LowDimKeys = None,
    filter_key: o.FilterKey = None,
    valid_key: o.ValidKey = None,
    policy: Annotated[str, typer.Option("--policy", help="flow, mlp, gmm or robomimic:ALGORITHM.")] = "flow",
    robomimic_config: Annotated[
        Path | None, typer.Option("--robomimic-config", help="A robomimic JSON config; trains its algorithm.")
    ] = None,
    steps: Steps = 4000,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Windows per step; 64, or what the robomimic config says.")
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of projection and policy.")] = 1e-3,
    encoder_lr: EncoderLr = 1e-5,
    emb_dim: Annotated[int, typer.Option("--emb-dim", min=1, help="Width of the projection.")] = 256,
    obs_horizon: Annotated[
        int | None,
        typer.Option("--obs-horizon", min=1, help="Obs steps that the policy sees (frame_stack); 2 for our own."),
    ] = None,
    action_horizon: Annotated[
        int | None,
        typer.Option("--action-horizon", min=1, help="Action steps it predicts (seq_length); 8 for our own."),
    ] = None,
    action_normalization: Annotated[
        str, typer.Option("--action-normalization", help="minmax, gaussian or none.")
    ] = "minmax",
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="Draw a view per window; on when there are several.")
    ] = None,
    feature_noise: Annotated[
        float, typer.Option("--feature-noise", min=0, help="Noise on features, in deviations.")
    ] = 0,
    feature_dropout: Annotated[
        float, typer.Option("--feature-dropout", min=0, help="Share of features left out at random.")
    ] = 0,
    rotation_6d: Annotated[
        str | None,
        typer.Option("--rotation-6d", help="Axis-angle part of the action, such as 3:6, for the policy to see in 6d."),
    ] = None,
    rgb_model_name: o.RgbModelName = "resnet18",
    pretrained: o.Pretrained = True,
    weights: o.Weights = None,
    encoder: o.Encoder = None,
    freeze_encoder: Annotated[
        bool, typer.Option("--freeze-encoder/--no-freeze-encoder", help="With --dataset: keep or train the encoder.")
    ] = True,
    imagenet_norm: o.ImagenetNorm = None,
    share_rgb_model: o.ShareRgbModel = False,
    cut: o.Cut = "avgpool",
    resize_shape: o.ResizeShape = None,
    crop_shape: o.CropShape = None,
    source: Source = "auto",
    order: Order = "auto",
    max_memory: MaxMemory = None,
    eval_every: EvalEvery = 500,
    save_every: SaveEvery = 1000,
    keep_best: KeepBest = 1,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    seed: o.Seed = 0,
    wandb: Wandb = None,
    deep: Deep = False,
    resume: Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Train projection and policy on a cache (--from-cache), or with the encoder live (--dataset)."""
    from cache_pipeline.policies.rotations import parse_slices
    from cache_pipeline.training.config import TrainConfig
    from cache_pipeline.training.train import train as run

    if from_cache is None and not dataset:
        raise ConfigError("nothing to train on; give --from-cache CACHE, or --dataset FILE to encode at every step")
    live: dict[str, Any] = {}
    if dataset:
        spec = o.encoder_spec(
            rgb_model_name=rgb_model_name, pretrained=pretrained, weights=weights, encoder=encoder, cut=cut, seed=seed
        )
        preprocess = o.preprocessing(
            resize_shape=resize_shape, crop_shape=crop_shape, imagenet_norm=imagenet_norm, spec=spec
        )
        live = {"encoder": spec, "preprocess": preprocess} if from_cache is None else {}
    config = TrainConfig(
        cache=from_cache,
        datasets=tuple(dataset or ()),
        cameras=o.names(cameras),
        low_dim_keys=o.names(low_dim_keys),
        filter_key=filter_key,
        valid_key=valid_key,
        encoder_factory=encoder if from_cache is not None else None,
        freeze_encoder=freeze_encoder,
        share_rgb_model=share_rgb_model,
        policy=policy,
        robomimic_config=robomimic_config,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        encoder_lr=encoder_lr,
        emb_dim=emb_dim,
        obs_horizon=obs_horizon,
        action_horizon=action_horizon,
        action_normalization=cast(Any, action_normalization),
        augment=augment,
        feature_noise=feature_noise,
        feature_dropout=feature_dropout,
        rotation_6d=() if rotation_6d is None else parse_slices(rotation_6d),
        source=cast(Any, source),
        order=cast(Any, order),
        max_memory=o.byte_count(max_memory),
        device=device,
        precision=cast(Any, precision),
        seed=seed,
        wandb=wandb,
        out=out,
        deep=deep,
        resume=resume,
        overwrite=overwrite,
        saving=_saving(eval_every, save_every, keep_best),
        **live,
    )
    _emit(partial(run, config), json)


def finetune(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="The run to go on from, or one of its checkpoints.")],
    live_encoder: Annotated[
        bool, typer.Option("--live-encoder", help="Encode at every step, so that the encoder can learn.")
    ] = False,
    from_cache: Annotated[
        Path | None,
        typer.Option("--from-cache", help="A cache cut below the layers to unfreeze, such as --cut layer3."),
    ] = None,
    dataset: o.Datasets = None,
    encoder: o.StoredEncoder = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; RUN_finetune by default.")] = None,
    filter_key: o.FilterKey = None,
    valid_key: o.ValidKey = None,
    unfreeze: Annotated[str, typer.Option("--unfreeze", help="all, or layers such as layer4,layer3.")] = "all",
    unfreeze_schedule: Annotated[
        str | None, typer.Option("--unfreeze-schedule", help="Such as layer4@0,layer3@2000,all@5000.")
    ] = None,
    freeze: Annotated[
        str | None, typer.Option("--freeze", help="Patterns of encoder parameters that stay frozen, comma-separated.")
    ] = None,
    update_batchnorm: Annotated[
        bool, typer.Option("--update-batchnorm", help="Let BatchNorm statistics follow the batches.")
    ] = False,
    share_rgb_model: o.ShareRgbModel = False,
    steps: Steps = 2000,
    batch_size: BatchSize = 64,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of projection and policy.")] = 1e-4,
    encoder_lr: Annotated[
        float | None,
        typer.Option("--encoder-lr", help="Peak learning rate of the encoder; 1e-5, less where features vary little."),
    ] = None,
    augment: Annotated[bool, typer.Option("--augment", help="Random crop and colour jitter on the device.")] = False,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Parts into which a batch is split.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more arithmetic.")
    ] = False,
    source: Source = "auto",
    order: Order = "auto",
    max_memory: MaxMemory = None,
    eval_every: EvalEvery = 500,
    save_every: SaveEvery = 1000,
    keep_best: KeepBest = 1,
    device: o.Device = "auto",
    precision: o.Precision = "auto",
    seed: o.Seed = 0,
    wandb: Wandb = None,
    deep: Deep = False,
    resume: Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Go on from a run with the encoder unfrozen: live, or live only above the cut of a cache."""
    from cache_pipeline.training.config import FinetuneConfig
    from cache_pipeline.training.finetune import finetune as run

    if not live_encoder and from_cache is None:
        raise ConfigError(
            "say where features come from: --live-encoder, or --from-cache with a cache cut below --unfreeze"
        )
    config = FinetuneConfig(
        checkpoint=checkpoint,
        datasets=tuple(dataset or ()),
        cache=from_cache,
        encoder_factory=encoder,
        filter_key=filter_key,
        valid_key=valid_key,
        unfreeze=unfreeze,
        unfreeze_schedule=unfreeze_schedule,
        freeze=freeze,
        batchnorm="update" if update_batchnorm else "frozen",
        share_rgb_model=share_rgb_model,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        encoder_lr=encoder_lr,
        augment=augment,
        accumulate=accumulate,
        checkpointing=gradient_checkpointing,
        source=cast(Any, source),
        order=cast(Any, order),
        max_memory=o.byte_count(max_memory),
        device=device,
        precision=cast(Any, precision),
        seed=seed,
        wandb=wandb,
        out=out,
        deep=deep,
        resume=resume,
        overwrite=overwrite,
        saving=_saving(eval_every, save_every, keep_best),
    )
    _emit(partial(run, config), json)


def export(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    out: Annotated[Path, typer.Option("--out", help="The file: .onnx, or .pt2 (torch.export).")],
    encoder: o.StoredEncoder = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Write one file that takes raw images and low-dim obs and gives the action chunk."""
    from cache_pipeline.runs.export import export_policy

    result = export_policy(run, out, overwrite=overwrite, encoder=encoder)
    o.emit(json, result.to_json(), result.lines())


def _emit(run: Callable[[], TrainResult], json: bool) -> None:
    """Runs and prints the result, under torchrun in the first process alone."""
    from cache_pipeline.training.update.distributed import launched

    try:
        result = run()
    except RunStopped as stopped:
        raise KeyboardInterrupt(f"{stopped}; go on with: {resuming_command()}") from None
    if launched().first:
        o.emit(json, result.to_json(), result.lines())


def resuming_command() -> str:
    """This command line with --resume."""
    program, *words = sys.argv
    named = ["-m", "cache_pipeline"] if Path(program).name == "__main__.py" else [program]
    if "LOCAL_WORLD_SIZE" in os.environ:
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        start = ["torchrun", *(["--nnodes", nodes] if nodes != "1" else [])]
        start += ["--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *named]
    elif program.endswith(".py"):
        start = ["python", *named]
    else:
        start = [Path(program).name]
    return shlex.join([*start, *(word for word in words if word not in ("--overwrite", "--resume")), "--resume"])


def _saving(eval_every: int, save_every: int, keep_best: int) -> SavingConfig:
    from cache_pipeline.training.config import SavingConfig

    return SavingConfig(eval_every=eval_every, save_every=save_every, keep_best=keep_best)
