"""What a worker in another process needs to make units. It measures and decides nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from cache_pipeline.cache.manifest import Manifest
from cache_pipeline.cache.manifest_store import PENDING
from cache_pipeline.cache.store import exists, store_at
from cache_pipeline.cache.store_protocol import Stamp, Store
from cache_pipeline.demos.dataset import Dataset
from cache_pipeline.demos.remote import local_path, url_of
from cache_pipeline.encoders.device import device_name
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import load_encoder
from cache_pipeline.errors import CacheError, StaleCacheError
from cache_pipeline.extract.staleness import check_camera
from cache_pipeline.extract.worker import Report, Worker
from cache_pipeline.files import Location


class Task(NamedTuple):
    """The units of one cache, as a value that can be pickled.

    Attributes:
        place: the cache, which holds the weights of its encoders already.
        claim: on an object store, the stamp of the claimed manifest.
        manifest: its target manifest, with the precision of each camera and the batch size.
        dataset: the source of frames and rows.
        encoders: camera → spec and preprocessing.
        any_device: whether other devices than those of ``manifest`` may encode.
    """

    place: Location
    claim: Stamp | None
    manifest: Manifest
    dataset: Dataset
    encoders: Mapping[str, tuple[EncoderSpec, Preprocess]]
    any_device: bool

    def worker(self, device: str, report: Report) -> Worker:
        """Loads the encoders onto a device and returns a worker.

        Raises:
            EncoderError: weights cannot be loaded, or the device lacks the precision.
            CacheError: this machine does not reach the cache.
            StaleCacheError: the device or an encoder is another one than that of the cache.
        """
        where = torch.device(device)
        name, devices = device_name(where), self.manifest.devices
        if devices and name not in devices and not self.any_device:
            was, meaning = ", ".join(devices), "bits of features may differ between devices"
            raise StaleCacheError("device", was, name, meaning, f"encode on {was}, or add --allow-other-device")
        store = store_at(self.place)
        if not exists(store, PENDING):
            raise CacheError(
                f"{socket.gethostname()} does not reach {self.place}; give an --out that all workers reach, "
                "on a shared file system or a URL"
            )
        dataset = self.dataset
        if any(url_of(source.path) for source in self.manifest.files):
            dataset = dataset.at([local_path(source.path) for source in self.manifest.files])
        return Worker(store, self.claim, self.manifest, dataset, self._load(store, where), report)

    def _load(self, store: Store, device: torch.device) -> dict[str, FrozenEncoder]:
        loaded: dict[tuple[EncoderSpec, str], ImageEncoder] = {}
        frozen: dict[tuple[EncoderSpec, Preprocess, str], FrozenEncoder] = {}
        found = {}
        for camera, (spec, preprocess) in self.encoders.items():
            entry, file = self.manifest.cameras[camera], self.manifest.encoders[camera]
            if (spec, file) not in loaded:
                loaded[spec, file] = _load_encoder(spec, store, file)
            precision = entry.identity["precision"]["compute"]
            key = (spec, preprocess, precision)
            if key not in frozen:
                frozen[key] = FrozenEncoder(loaded[spec, file], preprocess, device, precision)
            found[camera] = frozen[key]
            identity = json.loads(json.dumps(found[camera].identity(entry.image_shape)))
            check_camera(camera, entry, entry._replace(identity=identity))
        return found


def _load_encoder(spec: EncoderSpec, store: Store, name: str) -> ImageEncoder:
    if isinstance(store.place, Path):
        return load_encoder(spec, store.place / name)
    with TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        file.write_bytes(store.read(name))
        return load_encoder(spec, file)
