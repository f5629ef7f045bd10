"""The TF32 flags, inside and outside the encoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from cache_pipeline.encoders import precision
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import ImageEncoder
from cache_pipeline.encoders.precision import autocast_dtype, computing_in
from cache_pipeline.encoders.preprocess import Preprocess

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flags() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(params=[("highest", True), ("high", True), ("medium", False)])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """What the process has chosen; as it was at the end."""
    kept = flags()
    precision._set_float32(*request.param)
    yield request.param
    precision._set_float32(*kept)


@pytest.mark.parametrize("choice", ["fp32", "bf16", "fp16", "tf32"])
def test_float32_on_cuda_is_tf32_only_if_requested(choice: str, before: tuple[str, bool]) -> None:
    wanted = ("high", True) if choice == "tf32" else ("highest", False)
    with computing_in(choice, CUDA):
        assert flags() == wanted
        with computing_in("fp32", CUDA):
            assert flags() == ("highest", False)
        assert flags() == wanted
    assert flags() == before
    with pytest.raises(ZeroDivisionError), computing_in(choice, CUDA):
        raise ZeroDivisionError
    assert flags() == before


def test_float32_on_a_cpu_is_not_bfloat16_whatever_the_process_has_chosen(before: tuple[str, bool]) -> None:
    with computing_in("fp32", CPU):
        assert flags() == ("highest", before[1])
    assert flags() == before


class Noting(nn.Module):
    """(B,3,h,w) → (B,3); notes the flags that it runs under."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        SEEN.add(flags())
        return images.mean((2, 3)) * self.scale


SEEN: set[tuple[str, bool]] = set()


def test_a_frozen_encoder_runs_under_its_own_precision(before: tuple[str, bool]) -> None:
    SEEN.clear()
    FrozenEncoder(ImageEncoder(Noting()), Preprocess(), CPU, "fp32")(np.zeros((2, 8, 8, 3), np.uint8))
    assert {("highest", before[1])} == SEEN
    assert flags() == before


def test_only_half_precisions_are_autocast() -> None:
    assert [autocast_dtype(name) for name in ("fp32", "tf32", "bf16", "fp16")] == [
        None,
        None,
        torch.bfloat16,
        torch.float16,
    ]


def test_bf16_on_a_cpu_that_emulates_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    precision._warn_of_slow_bf16.cache_clear()
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert precision.resolve_precision("bf16", CPU) == "bf16"
    assert not caplog.records
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert [precision.resolve_precision(name, CPU) for name in ("auto", "bf16", "bf16")] == ["fp32", "bf16", "bf16"]
    (record,) = caplog.records
    assert "slower than fp32" in record.getMessage()
