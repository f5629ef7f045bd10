"""The keys of a dataset that are used and those that are left out; printed before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cache_pipeline.text import listed


class Choice(NamedTuple):
    """Cameras, low-dim keys and action arrays: those used, and those present but left out."""

    cameras: tuple[str, ...]
    low_dim: tuple[str, ...]
    other_cameras: tuple[str, ...] = ()
    other_low_dim: tuple[str, ...] = ()
    other_obs: tuple[str, ...] = ()
    """Obs that are neither an rgb image nor low-dim, such as depth."""
    other_actions: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns one line of the keys used and, if any are left out, one line of those."""
        used = f"cameras {_listed(self.cameras)}; low-dim keys {_listed(self.low_dim)}; action key actions"
        parts = (
            ("cameras", self.other_cameras),
            ("low-dim keys", self.other_low_dim),
            ("other obs", self.other_obs),
            ("action keys", self.other_actions),
        )
        left = [f"{what} {_listed(names)}" for what, names in parts if names]
        hint = " (--cameras and --low-dim-keys choose)" if self.other_cameras or self.other_low_dim else ""
        return [f"used: {used}", *([f"left out: {'; '.join(left)}{hint}"] if left else [])]


def choose_from(there: Iterable[str], taken: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of ``there`` that are not in ``taken``, in their order."""
    return tuple(name for name in there if name not in taken)


def _listed(names: Sequence[str]) -> str:
    return listed(names) or "none"
