import copy

import pytest
import torch
from torch import nn

from cache_pipeline.encoders.convolution import Geometry, convolve, weight_gradient
from cache_pipeline.encoders.cut import STAGES, run_stages
from cache_pipeline.encoders.resnet import get_resnet


def net(name, seed=0):
    """With statistics that a BatchNorm could have, in float64."""
    torch.manual_seed(seed)
    made = get_resnet(name, weights=None).double()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.normal_(0, 0.1)
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 1.5)
    return made


def plain(made, x):
    for stage in STAGES:
        x = getattr(made, stage)(x)
    return x


def gradients(made, run):
    images = torch.randn(12, 3, 37, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = run(made, images.contiguous(memory_format=torch.channels_last))
    (maps * torch.linspace(-1, 1, maps.numel(), dtype=maps.dtype).view_as(maps)).sum().backward()
    return maps.detach(), {name: value.grad for name, value in made.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trunk_with_frozen_statistics_learns_as_its_modules_would(name, checkpointing):
    made = net(name).eval()
    expected, wanted = gradients(copy.deepcopy(made), plain)
    maps, found = gradients(made, lambda *args: run_stages(*args, STAGES, checkpointing))
    torch.testing.assert_close(maps, expected)
    assert found.keys() == wanted.keys()
    assert {"bn1.weight", "layer4.0.downsample.1.bias", "conv1.weight"} < found.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-7, atol=1e-9, msg=parameter)


def test_trained_batch_norm_uses_the_statistics_of_the_batch():
    made, reference = net("resnet18").train(), net("resnet18").train()
    expected, wanted = gradients(reference, plain)
    maps, found = gradients(made, lambda *args: run_stages(*args, STAGES))
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(dict(made.named_buffers()), dict(reference.named_buffers()))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [(3, 1, 1, (3, 3)), (3, 2, 1, (6, 7)), (3, 2, 1, (7, 6)), (1, 2, 0, (7, 6)), (3, 1, 1, (1, 1)), (7, 2, 3, (9, 5))],
)
def test_the_gradient_of_weights_is_torchs(kernel, stride, padding, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding).double()
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    out = conv(x)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    found = weight_gradient(x, gradient, (kernel, kernel), Geometry((stride, stride), (padding, padding)))
    torch.testing.assert_close(found, conv.weight.grad)


@pytest.mark.parametrize(("channels", "kernel", "stride"), [((256, 512), 3, 2), ((64, 128), 1, 2), ((32, 32), 3, 1)])
def test_bfloat16_learns_as_torchs_convolution_does(channels, kernel, stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, kernel, stride, kernel // 2)
    images = torch.randn(2, channels[0], 6, 6).contiguous(memory_format=torch.channels_last)
    found, wanted = [], []
    for results, run in ((found, lambda x: convolve(x, conv.weight, conv.bias, conv)), (wanted, conv)):
        x = images.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        results += [out.detach(), x.grad, conv.weight.grad, conv.bias.grad]
        conv.zero_grad()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()
