import pytest
import torch
from torch import nn

from cache_pipeline.encoders.cut import CUTS
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder
from cache_pipeline.encoders.resnet import ResNet, get_resnet
from cache_pipeline.errors import EncoderError

CHANNELS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512, "avgpool": 512}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_trunk_then_head_equals_the_whole_at_every_cut(name):
    torch.manual_seed(0)
    net = get_resnet(name).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        whole = net(images)
        for cut in CUTS:
            encoder = ImageEncoder(net, cut)
            features = encoder.trunk(images)
            assert tuple(features.shape[1:]) == encoder.feature_shape(32, 32)
            assert features.shape[1] == CHANNELS[cut] * (4 if name == "resnet50" else 1)
            torch.testing.assert_close(encoder.head(features), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_every_parameter_lies_either_below_or_above_the_cut(cut):
    encoder = ImageEncoder(get_resnet("resnet18"), cut)
    below, above = (dict(parameters) for parameters in (encoder.trunk_parameters(), encoder.head_parameters()))
    assert {**below, **above}.keys() == dict(encoder.named_parameters()).keys()
    assert not below.keys() & above.keys()
    assert any("layer4" in name for name in above) == (cut in ("layer1", "layer2", "layer3"))


def test_an_unknown_cut_is_refused_with_the_known_ones():
    with pytest.raises(EncoderError, match=r"no cut 'layer5'; available: avgpool, layer4"):
        EncoderSpec(cut="layer5")


def test_gradients_with_checkpointing_equal_those_without():
    encoder = build_encoder(EncoderSpec(weights="random"))
    images, gradients = torch.rand(2, 3, 32, 32), []
    for _ in range(2):
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
        encoder.enable_gradient_checkpointing()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_checkpointing_is_refused_where_it_would_count_batches_twice():
    encoder = build_encoder(EncoderSpec(weights="random"))
    encoder.train_batch_norm = True
    with pytest.raises(EncoderError, match="twice per step"):
        encoder.enable_gradient_checkpointing()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("use_group_norm", [False, True])
def test_training_with_frozen_statistics_has_the_gradients_of_the_plain_network(name, use_group_norm):
    spec = EncoderSpec(rgb_model_name=name, weights="random", use_group_norm=use_group_norm)
    encoder = build_encoder(spec).double().requires_grad_(True).eval()
    generator = torch.Generator().manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.4, generator=generator)
    images = torch.randn(2, 3, 40, 40, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, encoder.out_dim, generator=generator, dtype=torch.float64)
    parameters = list(encoder.parameters())
    found = torch.autograd.grad((encoder(images) * weights).sum(), parameters)
    wanted = torch.autograd.grad((ResNet.forward(encoder.net, images) * weights).sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_updated_statistics_are_those_of_the_batch():
    encoder = build_encoder(EncoderSpec(weights="random")).requires_grad_(True)
    encoder.train_batch_norm = True
    encoder.train()
    images = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    before = encoder.net.bn1.running_mean.clone()
    found = encoder(images)
    assert not torch.equal(encoder.net.bn1.running_mean, before)
    torch.testing.assert_close(found, ResNet.forward(encoder.net, images), rtol=1e-4, atol=1e-5)
