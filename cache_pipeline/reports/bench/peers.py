"""robomimic's image pipeline as a peer: its SequenceDataset and VisualCore feed our policy network.

Both sides train the same projection and policy on the same windows; only the source of features differs. The peer has
its fastest settings: frames in memory (``hdf5_cache_mode="all"``), and only the policy's obs steps are encoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_pipeline.demos.windows import WindowSpec
from cache_pipeline.errors import MissingExtraError, install_command
from cache_pipeline.policies.batch import Batch

PEER_NAME = "robomimic 0.3.0 SequenceDataset + VisualCore(ResNet18Conv), all in fp32, frames in memory, same network"


class RobomimicImages(nn.Module):
    """Batches of frames from robomimic's dataset, encoded by one VisualCore per camera.

    Args:
        cameras: camera → (H, W, 3).
        frozen: keep the backbone in eval mode without gradients.
    """

    def __init__(
        self,
        path: Path,
        *,
        cameras: dict[str, tuple[int, int, int]],
        low_dim_keys: Sequence[str],
        windows: WindowSpec,
        batch_size: int,
        frozen: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._windows, self._batch_size, self._device = windows, batch_size, device
        with _quiet():
            dataset_class, core_class, self._process = _robomimic(cameras, low_dim_keys)
            self._dataset = dataset_class(
                hdf5_path=str(path),
                obs_keys=(*cameras, *low_dim_keys),
                dataset_keys=("actions",),
                frame_stack=windows.obs_horizon,
                seq_length=windows.action_horizon,
                get_pad_mask=True,
                hdf5_cache_mode="all",
                hdf5_use_swmr=False,
                load_next_obs=False,
            )
            cores = {
                name: core_class(
                    input_shape=(3, *shape[:2]),
                    backbone_class="ResNet18Conv",
                    backbone_kwargs={"pretrained": False},
                    pool_class="SpatialMeanPool",
                    feature_dimension=None,
                )
                for name, shape in cameras.items()
            }
        self.cores = nn.ModuleDict(cores).to(device)
        self._frozen = frozen
        self.requires_grad_(not frozen).train(not frozen)

    def batches(self) -> Iterator[Batch]:
        """Yields windows with features of the obs steps, ``{camera: (B,To,D), key: (B,To,d)}``, endlessly."""
        loader = torch.utils.data.DataLoader(
            self._dataset, batch_size=self._batch_size, shuffle=True, drop_last=True, num_workers=0
        )
        while True:
            for raw in loader:
                yield self._encode(raw)

    def _encode(self, raw: dict[str, Any]) -> Batch:
        steps = self._windows.obs_horizon
        obs = {key: value[:, :steps].to(self._device) for key, value in raw["obs"].items()}
        with torch.set_grad_enabled(not self._frozen):
            features = {name: self._features(core, self._process(obs[name], name)) for name, core in self.cores.items()}
        low_dim = {key: value.float() for key, value in obs.items() if key not in features}
        actions = raw["actions"][:, steps - 1 :].float().to(self._device)
        mask = raw["pad_mask"][:, steps - 1 :, 0].bool().to(self._device)
        return Batch({**features, **low_dim}, actions, mask)

    @staticmethod
    def _features(core: nn.Module, images: Tensor) -> Tensor:
        return core(images.flatten(0, 1)).unflatten(0, images.shape[:2])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides robomimic's prints to stdout and its warnings about deprecated names of torchvision."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _robomimic(
    cameras: Sequence[str] | dict[str, Any], low_dim_keys: Sequence[str]
) -> tuple[Any, Any, Callable[..., Any]]:
    try:
        from robomimic.models.obs_core import VisualCore
        from robomimic.utils import obs_utils
        from robomimic.utils.dataset import SequenceDataset
    except ImportError as error:
        raise MissingExtraError(f"robomimic is not installed; {install_command('robomimic')}") from error
    obs_utils.initialize_obs_modality_mapping_from_dict({"rgb": list(cameras), "low_dim": list(low_dim_keys)})
    return SequenceDataset, VisualCore, lambda obs, key: obs_utils.process_obs(obs=obs, obs_key=key)
