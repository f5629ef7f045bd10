import re

import pytest
import torch
from cache_fakes import CAMERA, OTHER, OTHER_WEIGHTS, change_pixel, extract, outputs
from fakes import make_dataset

from cache_pipeline.cache.integrity import check_integrity
from cache_pipeline.cache.manifest_store import read_manifest
from cache_pipeline.cache.reader import FeatureCache
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.saving import load_encoder
from cache_pipeline.encoders.view_spec import ViewSpec
from cache_pipeline.errors import StaleCacheError
from cache_pipeline.extract.freshness import check_sources
from cache_pipeline.extract.staleness import check_camera

LENGTHS = (7, 5, 9)
CROPPED = Preprocess(crop_shape=(20, 20))


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "demos.hdf5", lengths=LENGTHS)


def weights_file(path, changed=None):
    """The weights of a ResNet-18 drawn from seed 0, one value changed."""
    state = build_encoder(EncoderSpec(weights="random")).net.state_dict()
    if changed is not None:
        state[changed].view(-1)[0] += 1
    torch.save(state, path)
    return path


@pytest.fixture
def out(tmp_path, dataset):
    path = tmp_path / "cache.zarr"
    extract(path, dataset, views=2, preprocess=CROPPED)
    return path


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("encoder.weights.digest", {"encoders": OTHER_WEIGHTS}),
        ("encoder.architecture", {"encoders": EncoderSpec(weights="random")}),
        ("preprocess.crop_shape", {"preprocess": Preprocess(crop_shape=(16, 16))}),
        ("preprocess.resize_shape", {"preprocess": Preprocess(resize_shape=(28, 28), crop_shape=(20, 20))}),
        ("preprocess.mean", {"preprocess": Preprocess(crop_shape=(20, 20), imagenet_norm=False)}),
        ("precision.compute", {"precision": "bf16"}),
        ("precision.store", {"store_dtype": "float32"}),
        ("views.seed", {"views": 2, "view_spec": ViewSpec(seed=1)}),
        ("views.hue", {"views": 3, "view_spec": ViewSpec(hue=0.2)}),
        ("shard_rows", {"shard_rows": 32}),
    ],
)
def test_extraction_names_what_differs_and_leaves_the_cache_alone(out, dataset, field, options):
    before = outputs(out)
    with pytest.raises(StaleCacheError) as caught:
        extract(out, dataset, **{"preprocess": CROPPED, **options})
    assert caught.value.field == field
    assert "--overwrite" in str(caught.value)
    assert repr(caught.value.cached) in str(caught.value)
    assert repr(caught.value.wanted) in str(caught.value)
    assert outputs(out) == before


def test_weights_under_another_name_are_the_same_weights(out):
    entry = read_manifest(out).cameras[CAMERA]
    renamed = {**entry.identity, "weights": {**entry.identity["weights"], "source": "elsewhere.pth"}}
    check_camera(CAMERA, entry, entry._replace(identity=renamed))


def test_a_cache_made_with_weights_of_another_name_is_encoded_no_second_time(tmp_path, dataset):
    first, second = (weights_file(tmp_path / name) for name in ("first.pth", "second.pth"))
    extract(tmp_path / "c.zarr", dataset, encoders=EncoderSpec(weights=str(first), cut="layer1"))
    before = outputs(tmp_path / "c.zarr")
    result = extract(tmp_path / "c.zarr", dataset, encoders=EncoderSpec(weights=str(second), cut="layer1"))
    assert (result.images, result.units_encoded) == (0, 0)
    assert outputs(tmp_path / "c.zarr") == before


def test_a_layer3_cache_does_not_go_stale_when_only_layer4_differs(tmp_path, dataset):
    path, first = tmp_path / "c.zarr", weights_file(tmp_path / "first.pth")
    extract(path, dataset, encoders=EncoderSpec(weights=str(first), cut="layer3"))
    before = outputs(path)
    tuned = EncoderSpec(weights=str(weights_file(tmp_path / "tuned.pth", "layer4.1.conv2.weight")), cut="layer3")
    assert extract(path, dataset, encoders=tuned).images == 0
    assert outputs(path) == before
    file = FeatureCache(path).encoder_file(CAMERA)
    assert load_encoder(None, file).weights_digest() == build_encoder(tuned).weights_digest()
    assert list(file.parent.iterdir()) == [file]
    assert check_integrity(path).ok


@pytest.mark.parametrize("changed", ["layer3.1.conv2.weight", "layer2.0.bn1.running_mean"])
def test_a_layer3_cache_is_stale_when_a_weight_or_statistic_below_differs(tmp_path, dataset, changed):
    path, first = tmp_path / "c.zarr", weights_file(tmp_path / "first.pth")
    extract(path, dataset, encoders=EncoderSpec(weights=str(first), cut="layer3"))
    other = EncoderSpec(weights=str(weights_file(tmp_path / "other.pth", changed)), cut="layer3")
    with pytest.raises(StaleCacheError) as caught:
        extract(path, dataset, encoders=other)
    assert caught.value.field == "encoder.weights.digest"


def test_frames_of_another_size_are_named(out, dataset):
    make_dataset(dataset, lengths=LENGTHS, cameras={CAMERA: (32, 32, 3), OTHER: (24, 24, 3)})
    with pytest.raises(StaleCacheError, match=r"image_shape is \[24, 24, 3\] in the cache and \[32, 32, 3\] now"):
        extract(out, dataset, preprocess=CROPPED, views=2)


def test_a_camera_that_the_dataset_lost_is_named(out, dataset):
    make_dataset(dataset, lengths=LENGTHS, cameras={CAMERA: (24, 24, 3)})
    with pytest.raises(StaleCacheError, match=OTHER):
        extract(out, dataset, preprocess=CROPPED)


def test_an_unfinished_cache_of_another_encoder_is_not_mixed(out, dataset):
    (out / "manifest.json").rename(out / "pending.json")
    with pytest.raises(StaleCacheError, match=r"encoder\.weights\.digest"):
        extract(out, dataset, preprocess=CROPPED, encoders=OTHER_WEIGHTS)
    assert extract(out, dataset, preprocess=CROPPED, encoders=OTHER_WEIGHTS, overwrite=True).units_reused == 0


def test_a_cache_that_fits_its_dataset_may_be_trained_on(out, dataset):
    check_sources(FeatureCache(out), [dataset])
    check_sources(FeatureCache(out))


def test_the_error_before_training_names_the_changed_frame(out, dataset):
    change_pixel(dataset, "demo_2", OTHER, 4)
    with pytest.raises(StaleCacheError) as caught:
        check_sources(FeatureCache(out), [dataset])
    assert caught.value.field == f"demo demo_2 camera {OTHER} frame 4"
    assert re.fullmatch("[0-9a-f]{32}", caught.value.cached)
    assert "extract-features" in str(caught.value)


def test_the_error_before_training_names_the_added_demo(out, dataset):
    make_dataset(dataset, lengths=(*LENGTHS, 4), names=["demo_0", "demo_1", "demo_2", "demo_9"])
    with pytest.raises(StaleCacheError, match="demo demo_9 is 'absent' in the cache and 'present' now"):
        check_sources(FeatureCache(out), [dataset])


def test_the_error_before_training_names_the_changed_filter_key(out, dataset):
    make_dataset(dataset, lengths=LENGTHS, masks={"train": ["demo_0"], "valid": ["demo_1", "demo_2"]})
    message = r"filter key train is '2 demos' in the cache.*its demos have changed .demo_1"
    with pytest.raises(StaleCacheError, match=message):
        check_sources(FeatureCache(out))
    assert extract(out, dataset, views=2, preprocess=CROPPED).images == 0
    check_sources(FeatureCache(out))


def test_the_error_before_training_names_the_demo_whose_length_changed(out, dataset):
    make_dataset(dataset, lengths=(7, 6, 9))
    with pytest.raises(StaleCacheError, match="demo demo_1 length is 5 in the cache and 6 now"):
        check_sources(FeatureCache(out), [dataset])


def test_the_error_before_training_names_the_changed_actions(out, dataset):
    import h5py

    with h5py.File(dataset, "r+") as file:
        file["data/demo_1/actions"][0, 0] += 0.125
    with pytest.raises(StaleCacheError, match="demo demo_1 actions"):
        check_sources(FeatureCache(out), [dataset])


def test_the_error_before_training_names_the_removed_demo(out, dataset):
    make_dataset(dataset, lengths=LENGTHS[:2])
    with pytest.raises(StaleCacheError, match="demo demo_2 is 'present' in the cache and 'absent' now"):
        check_sources(FeatureCache(out), [dataset])


def test_another_seed_is_no_difference_while_there_are_no_views(tmp_path, dataset):
    path = tmp_path / "plain.zarr"
    extract(path, dataset)
    assert extract(path, dataset, view_spec=ViewSpec(seed=7)).units_encoded == 0
    assert extract(path, dataset, views=2, view_spec=ViewSpec(seed=7)).units_encoded > 0
