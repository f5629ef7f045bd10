import pytest
import torch
from torch import nn

from cache_pipeline.encoders.cut import CUTS
from cache_pipeline.encoders.device import resolve_device
from cache_pipeline.encoders.folded import can_fold, folded_conv, onednn_fuses
from cache_pipeline.encoders.frozen import FrozenEncoder, preferred_batch_size
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder
from cache_pipeline.encoders.precision import error_over_variation, nearest_precision, resolve_precision
from cache_pipeline.encoders.preprocess import Preprocess, preprocess
from cache_pipeline.encoders.views import ViewParameters
from cache_pipeline.errors import ConfigError, EncoderError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frames():
    return torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def relative_error(features, exact):
    return float((features.double() - exact.double()).norm() / exact.double().norm())


def trained(name, cut="avgpool"):
    """Random weights with BatchNorm statistics that are not those of a fresh layer."""
    encoder = build_encoder(EncoderSpec(rgb_model_name=name, weights="random", cut=cut))
    generator = torch.Generator().manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.4, generator=generator)
            module.weight.data.uniform_(0.5, 1.0, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return encoder


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_fast_path_in_fp32_equals_the_plain_encoder(name, cut, frames):
    encoder = trained(name, cut)
    found = FrozenEncoder(encoder, Preprocess(), CPU, "fp32")(frames)
    with torch.inference_mode():
        wanted = encoder.trunk(preprocess(frames, Preprocess()))
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) < 1e-5


def test_the_plain_convolution_equals_the_fused_one():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, bias=False).eval(), nn.BatchNorm2d(8).eval()
    norm.running_mean.normal_()
    folded = folded_conv(conv, norm, CPU, torch.float32)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for relu, residual in ((True, x), (False, x), (True, None), (False, None)):
            wanted = norm(conv(x)) + (0 if residual is None else residual)
            wanted = wanted.relu() if relu else wanted
            for fused in {folded.fused, False}:
                plain = folded_conv(conv, norm, CPU, torch.float32)
                if not fused:
                    plain.fused, plain.weight = (
                        False,
                        (conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]),
                    )
                torch.testing.assert_close(plain(x, relu, residual), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not onednn_fuses(torch.float32), reason="torch has no fused oneDNN convolution here")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("threads", [1, 2])
def test_onednn_uses_the_weights_of_a_known_input_size_without_converting_them(name, threads, capfd):
    """One conversion per call made the encoder with one thread up to five times slower on a CPU with AVX2."""
    frozen = FrozenEncoder(trained(name), Preprocess(), CPU, "fp32")
    frames = [torch.full((2, size, size, 3), 7, dtype=torch.uint8) for size in (32, 48)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = [frozen(batch) for batch in frames]
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            again = [frozen(batch) for batch in frames]
    finally:
        torch.set_num_threads(before)
    executed = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert sum(",convolution," in line for line in executed) >= 2 * 20
    assert [line for line in executed if ",reorder," in line] == []
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_trying_the_fused_convolution_gives_an_answer():
    assert onednn_fuses(torch.float32) in (True, False)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_bf16_stays_near_fp32(name, frames):
    frozen = FrozenEncoder(trained(name), Preprocess(), CPU, "bf16")
    assert frozen(frames).dtype == torch.float32
    assert 0 < relative_error(frozen(frames), frozen.in_precision("fp32")(frames)) < 2e-2


def test_an_error_is_judged_by_the_variation_over_frames_not_by_the_size_of_features():
    generator = torch.Generator().manual_seed(0)
    varying = torch.randn(64, 8, generator=generator)
    exact, noise = 100 + varying, 0.1 * torch.randn(64, 8, generator=generator)
    assert error_over_variation(exact + noise, exact) == pytest.approx(0.1, rel=0.2)
    assert relative_error(exact + noise, exact) < 2e-3
    assert error_over_variation(exact, exact) == 0
    constant = torch.ones(4, 8)
    assert 1 < error_over_variation(constant * 1.001, constant) < 1e5
    assert error_over_variation(constant[:1] * 1.001, constant[:1]) == pytest.approx(1e-3, rel=1e-3)


def test_features_do_not_depend_on_batch_mates(frames):
    frozen = FrozenEncoder(trained("resnet18"), Preprocess(), CPU, "fp32")
    others = torch.cat([frames[:1], 255 - frames[1:]])
    assert torch.equal(frozen(frames)[0], frozen(others)[0])


def test_training_the_encoder_afterwards_changes_nothing(frames):
    encoder = trained("resnet18")
    frozen = FrozenEncoder(encoder, Preprocess(), CPU, "fp32")
    before, identity = frozen(frames), frozen.identity((32, 32, 3))
    for parameter in encoder.parameters():
        parameter.data.add_(1)
    assert torch.equal(frozen(frames), before)
    assert frozen.identity((32, 32, 3)) == identity
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_other_modules_and_group_norm_run_as_they_are(frames):
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5))
    for encoder in (ImageEncoder(module), build_encoder(EncoderSpec(weights="random", use_group_norm=True))):
        assert not can_fold(encoder.net)
        found = FrozenEncoder(encoder.train(), Preprocess(), CPU, "fp32")(frames)
        with torch.inference_mode():
            assert relative_error(found, encoder.eval().trunk(preprocess(frames, Preprocess()))) < 1e-5


def test_views_change_the_features_and_numpy_frames_are_accepted(frames):
    frozen = FrozenEncoder(trained("resnet18"), Preprocess(crop_shape=(24, 24)), CPU, "fp32")
    clean = frozen(frames.numpy())
    assert torch.equal(frozen(frames, ViewParameters()), clean)
    assert not torch.equal(frozen(frames, ViewParameters(crop=(0.0, 0.0))), clean)


def test_the_identity_is_json_with_the_precision_that_is_computed_in(frames):
    frozen = FrozenEncoder(trained("resnet18", "layer4"), Preprocess(), CPU, "auto")
    identity = frozen.identity((32, 32, 3))
    assert identity["precision"]["compute"] in ("fp32", "bf16")
    assert tuple(identity["feature_shape"]) == frozen.feature_shape((32, 32, 3)) == tuple(frozen(frames).shape[1:])
    assert identity["architecture"] == "resnet18"
    assert identity["cut"] == "layer4"


def test_precisions_follow_the_device(monkeypatch):
    monkeypatch.setattr("cache_pipeline.encoders.precision.cpu_has_bf16", lambda: True)
    assert resolve_precision("auto", CPU) == "bf16"
    monkeypatch.setattr("cache_pipeline.encoders.precision.cpu_has_bf16", lambda: False)
    assert resolve_precision("auto", CPU) == "fp32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert resolve_precision("auto", torch.device("cuda")) == "fp16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    assert resolve_precision("tf32", torch.device("cuda")) == "tf32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    for precision in ("tf32", "bf16"):
        with pytest.raises(EncoderError, match=rf"{precision} needs a CUDA device of compute capability 8\.0"):
            resolve_precision(precision, torch.device("cuda"))
        assert nearest_precision(precision, torch.device("cuda")) == "fp32"
    for precision in ("tf32", "fp16"):
        with pytest.raises(EncoderError, match="needs a CUDA device"):
            resolve_precision(precision, CPU)
        assert nearest_precision(precision, CPU) == "fp32"
    assert nearest_precision("bf16", CPU) == "bf16"
    with pytest.raises(EncoderError, match="did you mean fp32"):
        resolve_precision("fp23", CPU)


def test_missing_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == CPU
    for name in ("gpu", "", "cuda:3", "cuda:-1", "cuda:99999999999999999999", "cpu:3", "meta", "xla"):
        with pytest.raises(ConfigError, match="--device"):
            resolve_device(name)
    assert preferred_batch_size(CPU, 84 * 84) == 64 < preferred_batch_size("cuda", 84 * 84) == 1024
    assert preferred_batch_size(CPU, 720 * 1280) == 3
    assert preferred_batch_size(CPU, 16384 * 16384) == preferred_batch_size("cuda", 16384 * 16384) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 5e-3), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_features_of_gpu_and_cpu_agree(frames, precision, tolerance):
    encoder = trained("resnet18")
    exact = FrozenEncoder(encoder, Preprocess(), CPU, "fp32")(frames)
    found = FrozenEncoder(encoder, Preprocess(), "cuda", precision)(frames)
    assert found.device.type == "cuda"
    assert relative_error(found.cpu(), exact) < tolerance
