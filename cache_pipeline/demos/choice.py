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
    actions: tuple[str, ...] = ("actions",)
    """The arrays that are the actions, side by side."""

    def lines(self) -> list[str]:
        """Returns one line of the keys used and, if any are left out, one line of those."""
        used = f"cameras {_listed(self.cameras)}; low-dim keys {_listed(self.low_dim)}; {self._actions()}"
        parts = (
            ("cameras", self.other_cameras, "--cameras"),
            ("low-dim keys", self.other_low_dim, "--low-dim-keys"),
            ("other obs", self.other_obs, ""),
            ("action keys", self.other_actions, "--action-key"),
        )
        left = [f"{what} {_listed(names)}" for what, names, _ in parts if names]
        flags = [flag for _, names, flag in parts if names and flag]
        hint = f" (choose with {', '.join(flags)})" if flags else ""
        return [f"used: {used}", *([f"left out: {'; '.join(left)}{hint}"] if left else [])]

    def _actions(self) -> str:
        return f"action key{'s' * (len(self.actions) > 1)} {_listed(self.actions)}"


def choose_from(there: Iterable[str], taken: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of ``there`` that are not in ``taken``, in their order."""
    return tuple(name for name in there if name not in taken)


def _listed(names: Sequence[str]) -> str:
    return listed(names) or "none"
