"""The first five tests mirror those of the guide for pretrained frozen encoders."""

import pytest
import torch
from torch import nn

from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.obs_encoder import MultiImageObsEncoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.resnet import get_resnet
from cache_pipeline.errors import EncoderError

CAMERAS = ("agentview_image", "eye_image")


def shape_meta(*cameras, size=32):
    images = {camera: {"shape": (3, size, size), "type": "rgb"} for camera in cameras or CAMERAS[:1]}
    return {"obs": {**images, "robot0_eef_pos": {"shape": (3,), "type": "low_dim"}}}


def observations(*cameras, size=32, lead=(2,)):
    generator = torch.Generator().manual_seed(0)
    images = {camera: torch.rand(*lead, 3, size, size, generator=generator) for camera in cameras or CAMERAS[:1]}
    return {**images, "robot0_eef_pos": torch.rand(*lead, 3, generator=generator)}


class Small(nn.Module):
    """A quick encoder with BatchNorm and Dropout, cut into nothing: (B,3,h,w) to (B,8,h',w')."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.second = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.second(self.first(x))


def small(*cameras, **options):
    return MultiImageObsEncoder(shape_meta(*cameras), Small(), 16, **options)


def train_steps(encoder, obs, steps):
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        encoder(obs).square().mean().backward()
        optimizer.step()


def test_given_weights_are_loaded(tmp_path):
    torch.manual_seed(7)
    state = get_resnet("resnet18").state_dict()
    torch.save(state, tmp_path / "w.pth")
    encoder = MultiImageObsEncoder(shape_meta(), weights=str(tmp_path / "w.pth"))
    found = encoder.key_model_map["agentview_image"].net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert encoder.preprocessing["agentview_image"].imagenet_norm


def test_freezing_leaves_the_projection_alone_trainable():
    encoder = small()
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trainable == {f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_unfreezing_makes_all_or_the_named_layers_trainable():
    encoder = MultiImageObsEncoder(shape_meta(), pretrained=False)
    net = encoder.key_model_map["agentview_image"]
    encoder.unfreeze_rgb_encoder(["layer4"])
    assert all(p.requires_grad == ("layer4" in name) for name, p in net.named_parameters())
    encoder.unfreeze_rgb_encoder(["layer3"])
    assert all(p.requires_grad == ("layer4" in name or "layer3" in name) for name, p in net.named_parameters())
    encoder.unfreeze_rgb_encoder()
    assert all(p.requires_grad for p in encoder.parameters())
    encoder.freeze_rgb_encoder()
    assert not any(p.requires_grad for p in net.parameters())
    with pytest.raises(EncoderError, match=r"no layer 'layer5'; available: conv1"):
        encoder.unfreeze_rgb_encoder(["layer5"])


def test_forward_gives_emb_dim_and_only_trainable_parameters_get_gradients():
    encoder = MultiImageObsEncoder(shape_meta(), pretrained=False, emb_dim=64)
    for name, p in encoder.key_model_map["agentview_image"].named_parameters():
        p.requires_grad = "layer4" in name
    out = encoder(observations())
    assert out.shape == (2, 64)
    out.square().mean().backward()
    for p in encoder.parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad


@pytest.mark.parametrize(
    ("name", "trainable", "total"),
    [("resnet18", 197_888, 11_374_400), ("resnet34", 197_888, 21_482_560), ("resnet50", 591_104, 24_099_136)],
)
def test_parameter_counts_are_exact(name, trainable, total):
    encoder = MultiImageObsEncoder(shape_meta(size=84), name, 256, pretrained=False)
    share = f"{trainable / total:.1%}"
    assert encoder.parameter_report() == f"Encoder: {trainable:,} / {total:,} parameters trainable ({share})"


def test_frozen_features_are_the_same_bits_after_100_training_steps():
    encoder, obs = small().train(), observations(lead=(4,))
    before = encoder.features(obs)["agentview_image"]
    train_steps(encoder, obs, 100)
    assert torch.equal(encoder.features(obs)["agentview_image"], before)
    assert torch.equal(encoder.eval().features(obs)["agentview_image"], before)


def test_frozen_resnet_statistics_do_not_drift_in_train_mode():
    encoder, obs = MultiImageObsEncoder(shape_meta(), pretrained=False).train(), observations()
    digest = encoder.key_model_map["agentview_image"].weights_digest()
    train_steps(encoder, obs, 2)
    assert encoder.key_model_map["agentview_image"].weights_digest() == digest


def test_layers_frozen_by_hand_after_train_stay_as_they_are():
    encoder, obs = small(freeze_rgb_encoder=False, train_batch_norm=True).train(), observations(lead=(4,))
    net = encoder.key_model_map["agentview_image"].net
    net.first.requires_grad_(False)
    before = {name: value.clone() for name, value in net.first.state_dict().items()}
    train_steps(encoder, obs, 3)
    assert all(torch.equal(value, before[name]) for name, value in net.first.state_dict().items())
    assert torch.equal(net.first(obs["agentview_image"]), net.eval().first(obs["agentview_image"]))


def test_batch_norm_statistics_are_updated_only_if_requested_or_from_scratch():
    obs = observations(lead=(4,))
    for options, learns in (({}, False), ({"train_batch_norm": True}, True), ({"pretrained": False}, True)):
        encoder = small(freeze_rgb_encoder=False, **options).train()
        norm = encoder.key_model_map["agentview_image"].net.first[1]
        encoder(obs)
        assert bool(norm.running_mean.abs().sum() > 0) == learns


def test_features_do_not_depend_on_batch_mates_in_train_mode():
    encoder, obs = small().train(), observations(lead=(4,))
    mates = obs["agentview_image"].clone()
    mates[1:] = 1 - mates[1:]
    one, two = (
        encoder.features({"agentview_image": images})["agentview_image"][0]
        for images in (obs["agentview_image"], mates)
    )
    assert torch.equal(one, two)


def test_shared_and_separate_encoders_of_the_same_weights_give_the_same():
    shared, separate = small(*CAMERAS, share_rgb_model=True), small(*CAMERAS)
    model = shared.key_model_map["agentview_image"]
    assert shared.key_model_map["eye_image"] is model
    assert separate.key_model_map["eye_image"] is not separate.key_model_map["agentview_image"]
    for camera in CAMERAS:
        separate.key_model_map[camera].load_state_dict(model.state_dict())
    separate.projection.load_state_dict(shared.projection.state_dict())
    obs = observations(*CAMERAS)
    assert torch.equal(shared(obs), separate(obs))


def test_a_shared_encoder_is_counted_and_saved_once():
    shared, separate = small(*CAMERAS, share_rgb_model=True), small(*CAMERAS)
    one = sum(p.numel() for p in Small().parameters())
    counts = [sum(p.numel() for p in encoder.key_model_map.parameters()) for encoder in (shared, separate)]
    assert counts == [one, 2 * one]
    pointers = [value.data_ptr() for value in shared.state_dict().values() if value.numel() > 1]
    assert len(pointers) == len(set(pointers))


def test_each_camera_can_have_its_own_encoder():
    encoder = MultiImageObsEncoder(
        shape_meta(*CAMERAS), {"agentview_image": "resnet18", "eye_image": Small()}, 16, pretrained=False
    )
    assert encoder.feature_shapes == {"agentview_image": (512,), "eye_image": (8, 13, 13)}
    assert encoder.projection[0].in_features == 512 + 8 + 3
    assert encoder(observations(*CAMERAS)).shape == (2, 16)
    with pytest.raises(EncoderError, match="missing for the camera 'eye_image'"):
        MultiImageObsEncoder(shape_meta(*CAMERAS), {"agentview_image": Small()})


def test_a_time_axis_is_kept_and_features_equal_those_of_single_frames():
    encoder, obs = small().eval(), observations(lead=(2, 3))
    out = encoder(obs)
    assert out.shape == (2, 3, 16)
    flat = {key: value.flatten(0, 1) for key, value in obs.items()}
    torch.testing.assert_close(out.flatten(0, 1), encoder(flat))


def test_uint8_and_float_in_either_layout_give_the_same():
    encoder = small().eval()
    frames = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    low_dim = torch.rand(2, 3)
    chw = frames.permute(0, 3, 1, 2)
    outs = [encoder({"agentview_image": x, "robot0_eef_pos": low_dim}) for x in (frames, chw, frames / 255, chw / 255)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_float_images_on_0_to_255_are_refused():
    obs = observations()
    with pytest.raises(EncoderError, match="float pixels lie on 0–1"):
        small()({**obs, "agentview_image": obs["agentview_image"] * 255})


def test_missing_keys_are_errors_that_list_the_keys():
    obs = observations()
    for key in obs:
        rest = {name: value for name, value in obs.items() if name != key}
        with pytest.raises(EncoderError, match=rf"'{key}' is missing; available: {next(iter(rest))}"):
            small()(rest)


def test_wrong_shapes_and_unequal_batches_are_refused():
    obs = observations()
    with pytest.raises(EncoderError, match="agentview_image: images have the shape"):
        small()(observations(size=30))
    with pytest.raises(EncoderError, match="robot0_eef_pos: low-dim obs"):
        small()({**obs, "robot0_eef_pos": torch.rand(2, 4)})
    with pytest.raises(EncoderError, match="obs differ in batch or time"):
        small()({**obs, "robot0_eef_pos": torch.rand(3, 3)})


@pytest.mark.parametrize("cut", ["avgpool", "layer3"])
def test_cached_features_enter_where_live_ones_do(cut):
    encoder = MultiImageObsEncoder(shape_meta(), pretrained=False, cut=cut).eval()
    obs = observations(lead=(1, 2))
    with torch.no_grad():
        features, live = encoder.features(obs), encoder(obs)
        assert torch.equal(encoder.project(features, obs), live)
        half = {camera: value.half() for camera, value in features.items()}
        torch.testing.assert_close(encoder.project(half, obs), live, rtol=1e-2, atol=1e-2)
    assert tuple(features["agentview_image"].shape[2:]) == encoder.feature_shapes["agentview_image"]
    with pytest.raises(EncoderError, match="agentview_image: features have the shape"):
        encoder.project({"agentview_image": torch.rand(1, 2, 7)}, obs)


def test_training_crops_are_one_per_window_and_eval_takes_the_centre():
    encoder = small(random_crop=True, crop_shape=(24, 24)).train()
    frame = torch.rand(1, 1, 3, 32, 32).expand(6, 2, 3, 32, 32)
    draws = [
        encoder.features({"agentview_image": frame}, generator=torch.Generator().manual_seed(seed))["agentview_image"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.testing.assert_close(draws[0][:, 0], draws[0][:, 1])
    assert not torch.allclose(draws[0][0, 0], draws[0][1, 0])
    centre = encoder.eval().features({"agentview_image": frame})["agentview_image"]
    wanted = small_features(encoder, frame[:1, 0, :, 4:28, 4:28])
    torch.testing.assert_close(centre[0, :1], wanted)


def small_features(encoder, images):
    p = encoder.preprocessing["agentview_image"]
    mean, std = (torch.tensor(value)[:, None, None] for value in p.normalization)
    return encoder.key_model_map["agentview_image"].trunk((images - mean) / std)


@pytest.mark.parametrize("option", [{"resize_shape": (20, 20)}, {"crop_shape": (8, 8)}, {"imagenet_norm": False}])
def test_options_that_a_given_preprocessing_overrides_are_refused(option):
    with pytest.raises(EncoderError, match="preprocess sets resize, crop and normalisation"):
        MultiImageObsEncoder(shape_meta(), pretrained=False, preprocess=Preprocess(), **option)


def test_weights_for_an_encoder_with_its_own_weights_are_refused():
    with pytest.raises(EncoderError, match="leave out weights"):
        MultiImageObsEncoder(shape_meta(), torch.nn.Flatten(), weights="mine.safetensors")


def test_random_crop_needs_a_crop_shape():
    with pytest.raises(EncoderError, match="random_crop needs a crop_shape"):
        small(random_crop=True)


def test_spatial_softmax_is_trained_and_needs_a_map():
    encoder = small(pooling="spatial_softmax")
    assert encoder.projection[0].in_features == 64 + 3
    encoder(observations()).sum().backward()
    assert all(p.grad is not None for p in encoder.pooling.parameters())
    with pytest.raises(EncoderError, match="--cut layer4"):
        MultiImageObsEncoder(shape_meta(), pretrained=False, pooling="spatial_softmax")


@pytest.mark.parametrize("shared", [True, False])
def test_names_of_cameras_may_contain_dots(shared):
    cameras = ("observation.images.top", "observation.images.wrist")
    encoder = small(*cameras, pooling="spatial_softmax", share_rgb_model=shared)
    encoder(observations(*cameras)).sum().backward()
    assert all(p.grad is not None for p in encoder.pooling.parameters())
    other = small(*cameras, pooling="spatial_softmax", share_rgb_model=shared)
    other.load_state_dict(encoder.state_dict())
    obs = observations(*cameras)
    assert torch.equal(encoder.eval()(obs), other.eval()(obs))


def test_group_norm_is_refused_for_pretrained_and_accepted_for_random_weights():
    with pytest.raises(EncoderError, match="use_group_norm would replace the BatchNorm"):
        MultiImageObsEncoder(shape_meta(), use_group_norm=True)
    encoder = MultiImageObsEncoder(shape_meta(), pretrained=False, use_group_norm=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


def test_the_guides_config_names_build_it_and_unknown_ones_are_refused():
    config = {"encoder": "image", "rgb_model_name": "resnet18", "pretrained_encoder": False, "freeze_encoder": True}
    encoder = MultiImageObsEncoder.from_config(shape_meta(), {**config, "emb_dim": 32, "imagenet_norm": True})
    assert encoder.out_dim == 32
    assert encoder.preprocessing["agentview_image"].imagenet_norm
    with pytest.raises(EncoderError, match=r"no option 'freeze_encodr'.*did you mean freeze_encoder"):
        MultiImageObsEncoder.from_config(shape_meta(), {"freeze_encodr": True})


def test_the_start_is_reported(caplog):
    with caplog.at_level("INFO", "cache_pipeline"):
        MultiImageObsEncoder(shape_meta(), EncoderSpec(weights="random"), 256)
    assert "agentview_image: resnet18, weights: random, seed 0" in caplog.text
    assert "froze the RGB encoder" in caplog.text
    assert "Encoder: 197,888 / 11,374,400 parameters trainable (1.7%)" in caplog.text


def test_a_loaded_encoder_is_used_unchanged():
    ready = build_encoder(EncoderSpec(weights="random", seed=3, cut="layer4"))
    encoder = MultiImageObsEncoder(shape_meta(), {"agentview_image": ready})
    assert encoder.key_model_map["agentview_image"] is ready
    assert encoder.feature_shapes["agentview_image"] == (512, 1, 1)
