import pytest
import torch
import torchvision.transforms.v2.functional as vision

from cache_pipeline.encoders.preprocess import Preprocess, augment, check_views
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.encoders.views import ViewParameters, jitter_colors, view_parameters
from cache_pipeline.errors import ConfigError, EncoderError

CROP = Preprocess(crop_shape=(9, 9), imagenet_norm=False)


@pytest.fixture
def frames():
    return torch.randint(256, (4, 14, 13, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def muted():
    return 0.35 + 0.25 * torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_parameters_are_a_pure_function_of_seed_demo_camera_and_view():
    spec = ViewSpec(seed=1)
    torch.manual_seed(0)
    one = view_parameters(spec, "demo_3", "agentview_image", 2)
    torch.manual_seed(9)
    assert view_parameters(spec, "demo_3", "agentview_image", 2) == one
    others = [
        view_parameters(ViewSpec(seed=2), "demo_3", "agentview_image", 2),
        view_parameters(spec, "demo_4", "agentview_image", 2),
        view_parameters(spec, "demo_3", "eye_image", 2),
        view_parameters(spec, "demo_3", "agentview_image", 3),
    ]
    assert len({one, *others}) == 5


def test_parameters_of_a_known_view_do_not_change_between_versions():
    found = view_parameters(ViewSpec(seed=0), "demo_0", "agentview_image", 1)
    wanted = (1.2767607878497613, 1.2364684772510428, 1.05949408704335, -0.013195917261211687)
    assert found[1:] == pytest.approx(wanted, abs=1e-12)
    assert found.crop == pytest.approx((0.39437924157874815, 0.2144621802806418), abs=1e-12)


def test_view_0_is_the_clean_view(frames):
    assert view_parameters(ViewSpec(), "demo_0", "agentview_image", 0) == ViewParameters()
    assert torch.equal(augment(frames, CROP, ViewParameters()), augment(frames, CROP))


def test_drawn_parameters_fill_their_ranges():
    drawn = [view_parameters(ViewSpec(), f"demo_{i}", "camera", 1) for i in range(300)]
    for name, low, high in (
        ("brightness", 0.7, 1.3),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.7, 1.3),
        ("hue", -0.05, 0.05),
    ):
        values = [getattr(parameters, name) for parameters in drawn]
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high >= max(values) > high - 0.1 * (high - low)


def test_crops_reach_both_corners(frames):
    first = augment(frames, CROP, ViewParameters(crop=(0.0, 0.0)))
    last = augment(frames, CROP, ViewParameters(crop=(0.999999, 0.999999)))
    images = frames.permute(0, 3, 1, 2) / 255
    assert torch.equal(first, images[:, :, :9, :9])
    assert torch.equal(last, images[:, :, -9:, -9:])


def test_a_view_for_each_frame_equals_the_frames_one_by_one(frames):
    views = [view_parameters(ViewSpec(), f"demo_{i}", "camera", 1) for i in range(4)]
    together = augment(frames, CROP, views)
    for i, view in enumerate(views):
        torch.testing.assert_close(together[i : i + 1], augment(frames[i : i + 1], CROP, view), rtol=1e-6, atol=1e-6)


def test_as_many_views_as_frames_are_needed(frames):
    with pytest.raises(EncoderError, match="3 views were given for 4 frames"):
        augment(frames, CROP, [ViewParameters()] * 3)


@pytest.mark.parametrize(
    ("color", "reference"),
    [
        ((1.2, 1, 1, 0), lambda x: vision.adjust_brightness(x, 1.2)),
        ((1, 0.7, 1, 0), lambda x: vision.adjust_contrast(x, 0.7)),
        ((1, 1, 0.6, 0), lambda x: vision.adjust_saturation(x, 0.6)),
    ],
)
def test_colour_jitter_equals_torchvisions_where_nothing_is_clipped(muted, color, reference):
    found = jitter_colors(muted, torch.tensor([color] * 2))
    torch.testing.assert_close(found, reference(muted), rtol=0, atol=2e-3)


def test_a_turn_of_the_hue_keeps_greys_and_luma_and_comes_round(muted):
    grey = muted.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    turn = torch.tensor([[1, 1, 1, 0.2]] * 2)
    torch.testing.assert_close(jitter_colors(grey, turn), grey, rtol=0, atol=2e-4)
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned = jitter_colors(muted, turn)
    assert (turned - muted).abs().max() > 0.02
    torch.testing.assert_close(
        torch.einsum("bchw,c->bhw", turned, luma), torch.einsum("bchw,c->bhw", muted, luma), rtol=0, atol=1e-3
    )
    around = jitter_colors(muted, torch.tensor([[1, 1, 1, 1.0]] * 2))
    torch.testing.assert_close(around, muted, rtol=0, atol=1e-4)


def test_jittered_pixels_stay_between_0_and_1(frames):
    found = augment(frames, CROP, ViewParameters(brightness=2.0, contrast=2.0))
    assert found.min() >= 0
    assert found.max() <= 1


def test_views_that_change_nothing_are_refused():
    with pytest.raises(ConfigError, match="all views are equal to the clean view"):
        ViewSpec(random_crop=False, brightness=0, contrast=0, saturation=0, hue=0)


@pytest.mark.parametrize(
    ("spec", "p", "says"),
    [
        (ViewSpec(), Preprocess(), True),
        (ViewSpec(), Preprocess(crop_shape=(84, 84)), True),
        (ViewSpec(), Preprocess(resize_shape=(64, 64), crop_shape=(64, 64)), True),
        (ViewSpec(), Preprocess(crop_shape=(84, 76)), False),
        (ViewSpec(), Preprocess(resize_shape=(96, 96), crop_shape=(84, 84)), False),
        (ViewSpec(random_crop=False), Preprocess(), False),
    ],
)
def test_random_crops_that_cannot_move_are_said(spec, p, says):
    assert ("differ in colour only" in (check_views(spec, p, (84, 84)) or "")) is says


@pytest.mark.parametrize("p", [Preprocess(), Preprocess(crop_shape=(84, 84))])
def test_views_that_would_equal_the_clean_view_for_want_of_a_crop_are_refused(p):
    still = ViewSpec(brightness=0, contrast=0, saturation=0, hue=0)
    with pytest.raises(ConfigError, match="all augmented views would equal the clean view"):
        check_views(still, p, (84, 84))
    assert check_views(still, Preprocess(crop_shape=(76, 76)), (84, 84)) is None


def test_json_gives_the_same_spec_again():
    spec = ViewSpec(seed=4, hue=0.1)
    assert ViewSpec.from_json(spec.to_json()) == spec
