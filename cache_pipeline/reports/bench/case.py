"""One comparison of a benchmark, and the settings of all cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class BenchRow(NamedTuple):
    """One comparison.

    Attributes:
        case: the measured quantity with its unit, such as ``train resnet18, steps/s``.
        ours, peer, limit: rates in that unit, or None.
        peer_name: name and settings of the peer.
    """

    case: str
    ours: float
    peer: float | None = None
    peer_name: str | None = None
    limit: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "ours": _rounded(self.ours),
            "peer": _rounded(self.peer),
            "peer_name": self.peer_name,
            "ratio": None if self.peer is None else _rounded(self.ours / self.peer),
            "limit": _rounded(self.limit),
            "of_limit": None if self.limit is None else _rounded(self.ours / self.limit),
        }


@dataclass(frozen=True, kw_only=True)
class BenchSetup:
    """Settings of all cases."""

    dataset: Path
    folder: Path
    """A temporary folder, removed at the end."""
    store: str | None = None
    """A URL or a folder for the cache of the case ``stream``, beside the one in ``folder``."""
    rgb_model_name: str = "resnet18"
    batch_size: int = 64
    seconds: float = 10.0
    device: str = "cpu"
    frames: int = 1024
    """Number of frames for timing the encoder alone."""
    cached_steps: int = 200
    """Training steps per turn of a contender without encoding; takes about as long as a turn of the others."""
    live_steps: int = 2
    """Training steps per turn of a contender that encodes frames."""


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
