import pytest
import torch
import torchvision

from cache_pipeline.encoders.resnet import ResNet, as_backbone, get_resnet
from cache_pipeline.errors import EncoderError


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_the_output_is_the_pooled_feature(name, width):
    resnet = get_resnet(name).eval()
    with torch.inference_mode():
        assert resnet(torch.rand(1, 3, 32, 32)).shape == (1, width)
    assert resnet.out_dim == width


def test_a_whole_torchvision_file_loads_by_the_guides_line(tmp_path):
    whole = torchvision.models.resnet18(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "my_weights.pth")
    resnet = get_resnet("resnet18", weights=None).eval()
    resnet.load_state_dict(torch.load(tmp_path / "my_weights.pth"))
    whole.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(resnet(images), whole(images), rtol=0, atol=0)


def test_resnet50_equals_torchvisions_forward():
    whole = torchvision.models.resnet50(weights=None).eval()
    backbone = as_backbone(whole).eval()
    whole.fc = torch.nn.Identity()
    images = torch.rand(1, 3, 40, 40)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), whole(images), rtol=1e-5, atol=1e-5)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(EncoderError, match=r"resnet19.*available: resnet18.*did you mean resnet18"):
        get_resnet("resnet19")


def test_modules_that_are_no_torchvision_resnet_stay_as_they_are():
    module = torch.nn.Flatten()
    assert as_backbone(module) is module
    assert isinstance(as_backbone(torchvision.models.resnet18(weights=None)), ResNet)
