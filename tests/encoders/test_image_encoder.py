import pytest
import torch
from torch import nn

from cache_pipeline.encoders.identity import encoder_identity
from cache_pipeline.encoders.image_encoder import EncoderSpec, ImageEncoder, build_encoder, make_preprocess
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import load_encoder, save_encoder
from cache_pipeline.errors import EncoderError

FACTORY = """
import torch
from torch import nn

class Small(nn.Module):
    preprocess_mean = (0.5, 0.5, 0.5)
    preprocess_std = (0.25, 0.25, 0.25)
    preprocess_resize_shape = (8, 8)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x){after}

def small():
    return Small()

def number():
    return 3
"""


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(3, 4)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x.mean((2, 3))) * self.scale


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY.format(after=""))
    return f"{tmp_path / 'mine.py'}:small"


def identity(encoder, preprocess=None, compute="fp32"):
    return encoder_identity(encoder, preprocess or Preprocess(), compute, (16, 16, 3))


def decisive(value):
    return {**value, "weights": value["weights"]["digest"]}


def test_a_factory_gives_its_own_maps_and_its_head_pools_them(factory):
    encoder = build_encoder(EncoderSpec(factory=factory))
    images = torch.rand(2, 3, 8, 8)
    assert encoder.cut == "output"
    assert encoder.trunk(images).shape == (2, 5, 6, 6)
    assert encoder(images).shape == (2, 5)
    assert encoder.out_dim == 5


def test_a_declared_normalisation_and_size_are_used(factory):
    encoder = build_encoder(EncoderSpec(factory=factory))
    p = make_preprocess(encoder)
    assert p.normalization == ((0.5,) * 3, (0.25,) * 3)
    assert p.resize_shape == (8, 8)
    assert make_preprocess(encoder, imagenet_norm=False).normalization is None
    assert make_preprocess(encoder, resize_shape=(9, 9)).resize_shape == (9, 9)


def test_imagenet_normalisation_is_on_unless_weights_are_random():
    assert make_preprocess(build_encoder(EncoderSpec(weights="random"))).normalization is None
    assert make_preprocess(ImageEncoder(Scaled(1))).imagenet_norm


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module:factory", "cannot import no_such_module"),
        ("no_such_file.py:factory", "there is no file no_such_file.py"),
        ("torch", "names no factory"),
        ("{file}:smal", "did you mean small"),
        ("{file}:number", "returned a int"),
    ],
)
def test_a_factory_that_cannot_be_imported_or_called_is_an_encoder_error(factory, reference, message):
    with pytest.raises(EncoderError, match=message):
        build_encoder(EncoderSpec(factory=reference.format(file=factory.rpartition(":")[0])))


def test_a_factory_takes_neither_cut_nor_weights(factory):
    for options in ({"cut": "layer3"}, {"weights": "w.pth"}, {"weights": "random"}, {"use_group_norm": True}):
        with pytest.raises(EncoderError, match=r"mine\.py:small"):
            EncoderSpec(factory=factory, **options)


def test_an_encoder_whose_output_is_not_a_feature_is_refused():
    with pytest.raises(EncoderError, match=r"Identity returned \(2, 3, 4\)"):
        ImageEncoder(nn.Identity()).trunk(torch.rand(2, 3, 4))


def test_the_spec_survives_json(factory):
    for spec in (EncoderSpec(weights="random", cut="layer3", seed=4), EncoderSpec(factory=factory)):
        assert EncoderSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("cut", ["avgpool", "layer2"])
def test_a_saved_encoder_is_made_again_without_its_source(tmp_path, cut):
    encoder = build_encoder(EncoderSpec(weights="random", seed=3, cut=cut))
    save_encoder(encoder, tmp_path / "e.safetensors")
    for spec in (None, encoder.spec, encoder.spec.to_json()):
        again = load_encoder(spec, tmp_path / "e.safetensors")
        assert identity(again) == identity(encoder)
        assert not again.training


def test_a_saved_factory_encoder_gets_its_saved_weights(tmp_path, factory):
    encoder = build_encoder(EncoderSpec(factory=factory))
    nn.init.constant_(encoder.net.conv.weight, 0.5)
    save_encoder(encoder, tmp_path / "e.safetensors")
    assert load_encoder(None, tmp_path / "e.safetensors", factory).weights_digest() == encoder.weights_digest()


def test_the_same_encoder_is_saved_as_the_same_bytes(tmp_path, factory):
    encoder = build_encoder(EncoderSpec(factory=factory))
    for number in range(8):
        save_encoder(encoder, tmp_path / f"{number}.safetensors")
    assert len({file.read_bytes() for file in tmp_path.glob("*.safetensors")}) == 1


def test_loading_does_not_download_imagenet_weights(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("download")

    encoder = build_encoder(EncoderSpec(weights="random"))
    save_encoder(encoder, tmp_path / "e.safetensors")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    assert load_encoder(EncoderSpec(), tmp_path / "e.safetensors").weights_digest() == encoder.weights_digest()


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(EncoderError, match="cannot read the encoder's weights"):
        load_encoder(EncoderSpec(), tmp_path / "bad.safetensors")
    save_encoder(ImageEncoder(Scaled(1)), tmp_path / "ready.safetensors")
    with pytest.raises(EncoderError, match="a module without factory"):
        load_encoder(None, tmp_path / "ready.safetensors")
    with pytest.raises(EncoderError, match="does not hold the weights of resnet18"):
        load_encoder(EncoderSpec(), tmp_path / "ready.safetensors")


def test_renaming_a_weights_file_changes_only_the_source(tmp_path):
    encoder = build_encoder(EncoderSpec(weights="random"))
    for name in ("one.pth", "two.pth"):
        torch.save(encoder.net.state_dict(), tmp_path / name)
    one, two = (identity(build_encoder(EncoderSpec(weights=str(tmp_path / name)))) for name in ("one.pth", "two.pth"))
    assert decisive(one) == decisive(two)
    assert one["weights"]["source"] != two["weights"]["source"]


def test_encoders_of_different_features_never_share_an_identity():
    base = build_encoder(EncoderSpec(weights="random"))
    identities = [
        identity(base),
        identity(build_encoder(EncoderSpec(weights="random", seed=1))),
        identity(build_encoder(EncoderSpec(weights="random", cut="layer4"))),
        identity(build_encoder(EncoderSpec(weights="random", use_group_norm=True))),
        identity(base, compute="bf16"),
        identity(base, Preprocess(imagenet_norm=False)),
        identity(base, Preprocess(crop_shape=(12, 12))),
        identity(base, Preprocess(resize_shape=(16, 16))),
        identity(ImageEncoder(Scaled(1.0))),
        identity(ImageEncoder(Scaled(2.0))),
    ]
    base.net.bn1.running_mean[0] += 1e-3
    identities.append(identity(base))
    texts = [str(decisive(value)) for value in identities]
    assert len(set(texts)) == len(texts)


def test_a_factory_whose_code_changes_has_another_identity(tmp_path, factory):
    one = build_encoder(EncoderSpec(factory=factory))
    (tmp_path / "mine.py").write_text(FACTORY.format(after=" * 2"))
    two = build_encoder(EncoderSpec(factory=factory))
    two.load_state_dict(one.state_dict())
    assert one.weights_digest() == two.weights_digest()
    assert decisive(identity(one)) != decisive(identity(two))


def test_a_size_that_the_encoder_does_not_take_is_one_clear_error(factory):
    with pytest.raises(EncoderError, match=r"does not take images of 2×2 pixels.*--resize-shape"):
        build_encoder(EncoderSpec(factory=factory)).feature_shape(2, 2)


def test_probing_a_shape_leaves_the_training_mode_as_it_was():
    encoder = ImageEncoder(Scaled(1)).train()
    encoder.net.linear.eval()
    encoder.feature_shape(8, 8)
    assert encoder.training
    assert not encoder.net.linear.training
