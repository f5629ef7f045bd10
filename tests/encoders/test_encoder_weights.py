import pytest
import torch
from safetensors.torch import save_file

from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder
from cache_pipeline.encoders.resnet import get_resnet
from cache_pipeline.encoders.weights import state_digest
from cache_pipeline.encoders.weights_file import read_weights
from cache_pipeline.errors import EncoderError


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(3)
    return get_resnet("resnet18").state_dict()


def built(path):
    return build_encoder(EncoderSpec(weights=str(path))).net.state_dict()


def assert_same(found, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_safetensors_and_torch_files_load_the_same_weights(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    assert_same(built(tmp_path / "weights.safetensors"), state)
    assert_same(built(tmp_path / "weights.pth"), state)


def test_nested_and_prefixed_states_are_found(tmp_path, state):
    torch.save({"epoch": 3, "state_dict": {f"module.backbone.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    assert_same(built(tmp_path / "w.pth"), state)


def test_two_resnets_in_one_file_are_refused(tmp_path, state):
    slow = {k: v * 0.99 if v.is_floating_point() else v for k, v in state.items()}
    both = {f"query.{k}": v for k, v in state.items()} | {f"momentum.{k}": v for k, v in slow.items()}
    torch.save(both, tmp_path / "w.pth")
    with pytest.raises(
        EncoderError, match=r"several ResNets: query \(resnet18\), momentum \(resnet18\); .*--weights-prefix query"
    ):
        built(tmp_path / "w.pth")


def test_weights_of_another_architecture_name_the_one_that_fits(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="weights of a resnet18, not of a resnet50; use --rgb-model-name resnet18"):
        build_encoder(EncoderSpec(rgb_model_name="resnet50", weights=str(tmp_path / "w.pth")))


def test_missing_tensors_are_named(tmp_path, state):
    torch.save({k: v for k, v in state.items() if k != "layer3.0.bn1.bias"}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=r"1 missing \(layer3.0.bn1.bias\)"):
        built(tmp_path / "w.pth")


def test_values_that_are_not_finite_are_refused(tmp_path, state):
    torch.save({**state, "bn1.bias": torch.full((64,), float("nan"))}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=r"not finite in bn1\.bias"):
        built(tmp_path / "w.pth")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"state_dict": Payload()}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="cannot read weights"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_without_weights_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(EncoderError, match="cannot read weights"):
        read_weights(tmp_path / name)


def test_a_failed_download_names_three_ways_out(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(EncoderError) as error:
        build_encoder(EncoderSpec(weights="imagenet"))
    for way in ("--weights FILE", "--no-pretrained-encoder --seed N", "resnet18-f37072fd.pth", str(tmp_path)):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_placed_in_the_hub_folder_is_the_imagenet_source(tmp_path, monkeypatch, state):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: seen.append(url) or dict(state))
    encoder = build_encoder(EncoderSpec(weights="imagenet"))
    assert seen
    assert seen[0].endswith("resnet18-f37072fd.pth")
    assert encoder.source == "torchvision IMAGENET1K_V1, sha256 f37072fd"


def test_another_file_under_torchvisions_name_is_refused_before_it_is_read(tmp_path, monkeypatch, state):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    placed = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    placed.parent.mkdir(parents=True)
    torch.save(state, placed)
    with pytest.raises(EncoderError, match=r"is not torchvision's resnet18: its SHA-256 begins with [0-9a-f]{8}, not"):
        build_encoder(EncoderSpec(weights="imagenet"))


def test_random_weights_depend_on_the_seed_alone_and_leave_the_global_generator():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = build_encoder(EncoderSpec(weights="random", seed=5)).weights_digest()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert build_encoder(EncoderSpec(weights="random", seed=5)).weights_digest() == one
    assert build_encoder(EncoderSpec(weights="random", seed=6)).weights_digest() != one


def test_the_digest_counts_values_statistics_and_shapes_but_not_order_kind_of_float_or_the_batch_counter():
    state = {"a": torch.arange(4.0), "running_mean": torch.ones(2), "num_batches_tracked": torch.tensor(0)}
    reference = state_digest(state)
    assert state_digest(dict(reversed(state.items()))) == reference
    assert state_digest({**state, "a": state["a"].half()}) == reference
    assert state_digest({**state, "num_batches_tracked": torch.tensor(9)}) == reference
    assert state_digest({**state, "a": state["a"].reshape(2, 2)}) != reference
    assert state_digest({**state, "running_mean": torch.tensor([1.0, 1.0001])}) != reference
    assert state_digest({"b" if k == "a" else k: v for k, v in state.items()}) != reference


def test_group_norm_is_refused_on_weights_trained_with_batch_norm(tmp_path, state):
    with pytest.raises(EncoderError, match="use_group_norm would replace the BatchNorm"):
        EncoderSpec(use_group_norm=True)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="trained with BatchNorm"):
        build_encoder(EncoderSpec(weights=str(tmp_path / "w.pth"), use_group_norm=True))


def test_group_norm_weights_load_into_group_norm(tmp_path):
    encoder = build_encoder(EncoderSpec(weights="random", use_group_norm=True))
    torch.save(encoder.net.state_dict(), tmp_path / "w.pth")
    again = build_encoder(EncoderSpec(weights=str(tmp_path / "w.pth"), use_group_norm=True))
    assert again.weights_digest() == encoder.weights_digest()
    assert again.architecture == "resnet18+groupnorm"
