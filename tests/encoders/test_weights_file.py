"""Weights as they are found in the wild: features equal those of the plain checkpoint, or one line says what to do."""

import argparse
import enum
import importlib
import itertools
import json
import os
import pickle
import random
import shutil
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from cache_pipeline.cli.encoder import EncoderOptions
from cache_pipeline.encoders.found_resnet import architecture, find_resnets, shapes_of
from cache_pipeline.encoders.frozen import FrozenEncoder
from cache_pipeline.encoders.image_encoder import EncoderSpec, build_encoder, make_preprocess, with_declared
from cache_pipeline.encoders.preprocess import Preprocess
from cache_pipeline.encoders.resnet import RESNETS, ResNet, get_resnet, load_backbone
from cache_pipeline.encoders.weights_file import read_weights
from cache_pipeline.errors import EncoderError
from cache_pipeline.text import message_line


def drawn(seed):
    """A whole torchvision ResNet-18, with a classifier and statistics that are not those of an untrained network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torchvision.models.resnet18(weights=None).eval()
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return net


@pytest.fixture(scope="module")
def net():
    return drawn(0)


@pytest.fixture(scope="module")
def whole(net):
    return net.state_dict()


@pytest.fixture(scope="module")
def bare(whole):
    return {name: value for name, value in whole.items() if not name.startswith("fc.")}


@pytest.fixture(scope="module")
def other():
    return {name: value for name, value in drawn(1).state_dict().items() if not name.startswith("fc.")}


def features(net):
    """What torchvision itself gives for two images, without the classifier."""
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        layers = nn.Sequential(*list(net.children())[:-1]) if isinstance(net.fc, nn.Linear) else net
        return layers.eval()(images).flatten(1)


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def nested(*keys, value):
    for key in reversed(keys):
        value = {key: value}
    return value


HEAD = {"fc.0.weight": torch.zeros(4, 4), "fc.0.bias": torch.zeros(4)}
WORDS = {"lang_enc.model.embeddings.weight": torch.zeros(8, 4), "lang_rew.pred.0.bias": torch.zeros(4)}
KINDS = {
    "torchvision": lambda w, b: w,
    "without classifier": lambda w, b: b,
    "classifier of another size": lambda w, b: {**b, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)},
    "MLP in place of the classifier": lambda w, b: b | HEAD,
    "R3M": lambda w, b: {"r3m": under("module.convnet.", b) | under("module.", WORDS), "global_step": 10},
    "VIP": lambda w, b: {"vip": under("module.convnet.", b | {"fc.weight": torch.zeros(10, 512)})},
    "SparK": lambda w, b: {"arch": "resnet18", "module": b, "is_pretrain": True},
    "Lightning": lambda w, b: {
        "epoch": 3,
        "state_dict": under("model.obs_encoder.", b),
        "hyper_parameters": {"lr": 1e-4},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}],
    },
    "SimCLR": lambda w, b: {"state_dict": under("backbone.", b | HEAD), "optimizer": {"param_groups": []}},
    "SwAV": lambda w, b: {
        "epoch": 1,
        "state_dict": under("module.", b)
        | {
            "module.projection_head.0.weight": torch.zeros(8, 512),
            "module.projection_head.1.running_mean": torch.ones(8),
        }
        | {"module.prototypes.weight": torch.zeros(30, 8)},
    },
    "MoCo, one encoder": lambda w, b: {
        "state_dict": under("module.encoder_q.", b | HEAD) | {"module.queue": torch.zeros(8, 4)}
    },
    "DINO, one network": lambda w, b: {"teacher": under("backbone.", b) | {"head.mlp.0.weight": torch.zeros(4, 512)}},
    "timm": lambda w, b: {"arch": "resnet18", "version": 2, "state_dict": w, "metric": 70.1},
    "torch.compile": lambda w, b: under("_orig_mod.", w),
    "compiled inside": lambda w, b: under("module._orig_mod.backbone.", b),
    "FSDP": lambda w, b: {
        f"_fsdp_wrapped_module.{k.replace('.', '._fsdp_wrapped_module.', 1)}": v for k, v in b.items()
    },
    "seven levels": lambda w, b: nested(*"abcdefg", value=under("h.i.", b)),
    "list of networks": lambda w, b: {"models": [{"net": b}, {"head": torch.zeros(3)}]},
    "beside tensors of the same level": lambda w, b: {"queue": torch.zeros(3), "model": {"net": b}},
    "nn.Sequential": lambda w, b: sequential(b),
    "nn.Sequential with its classifier": lambda w, b: sequential(w),
    "nn.Sequential under a prefix": lambda w, b: {"state_dict": under("encoder.f.", sequential(b))},
    "nn.Sequential behind a preprocessing": lambda w, b: under("nets.", sequential(b, first=1)),
    "nn.Sequential without activation and pooling": lambda w, b: sequential(b, stages=(2, 3, 4, 5)),
    "fastai": lambda w, b: {"model": under("0.", sequential(b)) | {"1.2.weight": torch.zeros(9), "1.4.weight": HEAD}},
    "stem in a layer0": lambda w, b: {
        {"conv1": "layer0.0", "bn1": "layer0.1"}.get(k.split(".")[0], k.split(".")[0]) + k[k.index(".") :]: v
        for k, v in b.items()
    },
    "no counters": lambda w, b: {k: v for k, v in b.items() if not k.endswith("num_batches_tracked")},
    "parameters": lambda w, b: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in b.items()},
    "float64": lambda w, b: {k: v.double() if v.is_floating_point() else v for k, v in b.items()},
}


def sequential(state, first=0, stages=(4, 5, 6, 7)):
    """The names of ``nn.Sequential(*resnet.children())``."""
    places = {"conv1": 0, "bn1": 1, "fc": 9} | {f"layer{i + 1}": stage for i, stage in enumerate(stages)}
    return {
        f"{places[name.split('.')[0]] + first}{name[name.index('.') :]}": value
        for name, value in sorted(state.items(), key=lambda item: places[item[0].split(".")[0]])
    }


def test_the_names_of_a_real_sequential_are_those_of_the_cases(net):
    assert nn.Sequential(*net.children()).state_dict().keys() == sequential(net.state_dict()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_each_kind_gives_the_features_of_the_plain_one(tmp_path, net, whole, bare, kind):
    torch.save(KINDS[kind](whole, bare), tmp_path / "w.pth")
    found = build_encoder(EncoderSpec(weights=str(tmp_path / "w.pth")))
    torch.testing.assert_close(features(found.net), features(net), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_half_precision_is_read_as_float32_of_the_same_values(tmp_path, bare, dtype, suffix):
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in bare.items()}
    path = tmp_path / f"w{suffix}"
    save_file(half, path) if suffix != ".pth" else torch.save(under("module.", half), path)
    found = build_encoder(EncoderSpec(weights=str(path))).net.state_dict()
    for name, value in half.items():
        if value.is_floating_point():
            assert torch.equal(found[name], value.float())
            assert found[name].dtype == torch.float32


def test_the_format_before_torch_1_6_is_read(tmp_path, net, bare):
    torch.save({"state_dict": under("module.", bare)}, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=False)
    found = build_encoder(EncoderSpec(weights=str(tmp_path / "w.pth.tar")))
    assert torch.equal(features(found.net), features(net))


def test_what_is_not_used_is_named_in_a_line(tmp_path, bare, caplog):
    caplog.set_level("INFO", logger="cache_pipeline")
    tensors = under("module.encoder_q.", bare | HEAD) | {"module.queue": torch.zeros(8, 4)}
    torch.save(
        {"epoch": 2, "state_dict": tensors, "optimizer": {"state": {3: torch.ones(1)}}}, tmp_path / "moco.pth.tar"
    )
    get_resnet("resnet18", tmp_path / "moco.pth.tar")
    assert caplog.messages[0] == (
        "moco.pth.tar: resnet18 under state_dict.module.encoder_q; "
        "not used: state_dict.module.encoder_q.fc (2 tensors), state_dict.module.queue (1 tensor), optimizer (1 tensor)"
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory, bare, other):
    """DINO's two networks, of which only the student is wrapped, and a third one at the top level."""
    path = tmp_path_factory.mktemp("several") / "dino.pth"
    third = {name: value * 2 if value.is_floating_point() else value for name, value in bare.items()}
    teacher = under("backbone.", bare) | {"head.last_layer.weight_v": torch.zeros(3, 4)}
    torch.save({"student": under("module.backbone.", other), "teacher": teacher, **third}, path)
    return path


def test_several_networks_are_listed_in_one_line_with_the_option(several):
    with pytest.raises(EncoderError) as caught:
        build_encoder(EncoderSpec(weights=str(several)))
    assert str(caught.value) == (
        f"{several} holds several ResNets: student.module.backbone (resnet18), teacher.backbone (resnet18), "
        ". (resnet18); choose one, for example with --weights-prefix student.module.backbone"
    )


@pytest.mark.parametrize("prefix", ["teacher.backbone", "teacher.backbone.", "teacher"])
def test_a_prefix_chooses_among_several(several, net, prefix):
    encoder = build_encoder(EncoderSpec(weights=str(several), weights_prefix=prefix))
    assert torch.equal(features(encoder.net), features(net))
    assert encoder.source == f"dino.pth, {prefix}"


@pytest.mark.parametrize(
    ("prefix", "bias"), [("student", 1), ("student.module.backbone", 1), ("module", 1), (".", 2), ("teacher", 0)]
)
def test_a_prefix_may_be_shortened_and_a_dot_is_the_top_level(several, bare, other, prefix, bias):
    value = get_resnet("resnet18", several, prefix=prefix).bn1.running_mean
    wanted = [bare["bn1.running_mean"], other["bn1.running_mean"], bare["bn1.running_mean"] * 2][bias]
    assert torch.equal(value, wanted)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        (
            "backbone",
            "holds several ResNets: student.module.backbone (resnet18), teacher.backbone (resnet18); choose one",
        ),
        (
            "ema",
            "holds no ResNet under 'ema'; --weights-prefix takes one of: student.module.backbone (resnet18), teacher",
        ),
        ("back", "holds no ResNet under 'back'"),
    ],
)
def test_a_prefix_that_fits_none_or_several_lists_those_that_there_are(several, prefix, said):
    with pytest.raises(EncoderError) as caught:
        get_resnet("resnet18", several, prefix=prefix)
    assert said in str(caught.value)


def test_networks_of_several_architectures_are_told_apart(tmp_path, bare):
    big = torchvision.models.resnet50(weights=None).state_dict()
    torch.save({"small": bare, "big": big}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=r"small \(resnet18\), big \(resnet50\)"):
        get_resnet("resnet18", tmp_path / "w.pth")
    assert torch.equal(get_resnet("resnet50", tmp_path / "w.pth", prefix="big").conv1.weight, big["conv1.weight"])


def test_equal_copies_count_as_one_and_are_named(tmp_path, net, bare, caplog):
    caplog.set_level("INFO", logger="cache_pipeline")
    cameras = {f"obs_encoder.key_model_map.{camera}.{k}": v for camera in ("front", "wrist") for k, v in bare.items()}
    torch.save(
        {"state_dict": cameras, "ema": under("model.", {k: v.clone() for k, v in bare.items()})}, tmp_path / "w.ckpt"
    )
    assert torch.equal(features(get_resnet("resnet18", tmp_path / "w.ckpt")), features(net))
    assert (
        "state_dict.obs_encoder.key_model_map.front (resnet18), state_dict.obs_encoder.key_model_map.wrist"
        in caplog.text
    )
    assert "all are equal, and the first is used; --weights-prefix chooses another" in caplog.text


@pytest.mark.parametrize("weights", ["imagenet", "random"])
def test_a_prefix_without_a_file_is_refused(weights):
    with pytest.raises(EncoderError, match="weights_prefix chooses one of several ResNets in a weights file"):
        EncoderSpec(weights=weights, weights_prefix="x")


def test_a_long_prefix_is_named_by_some_parts_so_that_it_can_be_typed(tmp_path, bare, other):
    start = "policy.nets.encoder.nets.obs.obs_nets"
    both = {"front": bare, "a_camera_with_a_name_of_some_length": other}
    tensors = {f"{start}.{camera}.backbone.{k}": v for camera, state in both.items() for k, v in state.items()}
    torch.save({"model": tensors}, tmp_path / "w.pth")
    with pytest.raises(EncoderError) as caught:
        get_resnet("resnet18", tmp_path / "w.pth")
    said = "front (resnet18), a_camera_with_a_name_of_some_length (resnet18); choose one, for example "
    assert f"holds several ResNets: {said}with --weights-prefix front" in message_line(str(caught.value))
    assert torch.equal(
        get_resnet("resnet18", tmp_path / "w.pth", prefix="front.backbone").conv1.weight, bare["conv1.weight"]
    )


def test_parts_of_a_prefix_in_their_order_choose_among_the_networks_of_two_policies(tmp_path, bare):
    start, tensors = "obs_encoder.key_model_map", {}
    for number, (policy, camera) in enumerate(itertools.product(("model", "ema_model"), ("agentview_image", "wrist"))):
        state = {k: v + number if v.is_floating_point() else v for k, v in bare.items()}
        tensors |= under(f"{policy}.{start}.{camera}.", state)
    torch.save({"state_dicts": tensors}, tmp_path / "w.ckpt")
    with pytest.raises(EncoderError) as caught:
        get_resnet("resnet18", tmp_path / "w.ckpt")
    shown = ["model.agentview_image", "model.wrist", "ema_model.agentview_image", "ema_model.wrist"]
    assert ", ".join(f"{name} (resnet18)" for name in shown) in message_line(str(caught.value))
    for number, name in enumerate(shown):
        found = get_resnet("resnet18", tmp_path / "w.ckpt", prefix=name)
        assert torch.equal(found.bn1.bias, bare["bn1.bias"] + number)


# Normalisation.


def frames():
    return torch.randint(0, 256, (2, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_r3ms_0_to_255_with_its_own_normalisation_is_imagenets_as_here(tmp_path, net, bare, caplog):
    caplog.set_level("INFO", logger="cache_pipeline")
    torch.save({"r3m": under("module.convnet.", bare)}, tmp_path / "r3m.pt")
    encoder = build_encoder(EncoderSpec(weights=str(tmp_path / "r3m.pt")))
    images = frames()
    normalised = torchvision.transforms.functional.normalize  # as R3M.forward does
    with torch.no_grad():
        theirs = net(
            normalised(images.permute(0, 3, 1, 2).float() / 255.0, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        )
    ours = FrozenEncoder(encoder, make_preprocess(encoder), precision="fp32")(images)
    with torch.no_grad():
        torch.testing.assert_close(net.fc(ours), theirs, rtol=1e-5, atol=1e-5)
    assert "R3M and VIP take 0-255 and normalise with ImageNet's mean and std in their own code" in caplog.text


@pytest.mark.parametrize("origin", ["robomimic", "unknown"])
@pytest.mark.parametrize("norm", [None, True, False])
def test_the_normalisation_is_the_one_of_the_option_else_the_one_of_the_weights(tmp_path, bare, caplog, origin, norm):
    caplog.set_level("INFO", logger="cache_pipeline")
    prefix = "nets.obs.obs_nets.front.backbone." if origin == "robomimic" else "backbone."
    torch.save({"model": under(prefix, bare)}, tmp_path / "w.pth")
    spec = EncoderSpec(weights=str(tmp_path / "w.pth"))
    encoder = build_encoder(spec)
    said = {"robomimic": "robomimic trains on pixels on 0-1", "unknown": "does not say how its frames were normalised"}
    assert said[origin] in caplog.text
    plain = norm is False or (norm is None and origin == "robomimic")
    wanted = Preprocess(imagenet_norm=not plain).to_json()
    assert make_preprocess(encoder, imagenet_norm=norm).to_json() == wanted
    options = EncoderOptions(weights=tmp_path / "w.pth", imagenet_norm=norm)
    assert with_declared(encoder, options.preprocess(spec)).to_json() == wanted
    own = EncoderOptions(weights=tmp_path / "w.pth", image_mean=(0, 0, 0), image_std=(1 / 255,) * 3)
    assert with_declared(encoder, own.preprocess(spec)).to_json()["std"] == [1 / 255] * 3


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_a_checkpoint_that_robomimic_wrote(tmp_path):
    pytest.importorskip("robomimic", reason="robomimic is not installed")
    from robomimic.models.base_nets import ResNet18Conv
    from robomimic.models.obs_core import VisualCore

    core = VisualCore((3, 84, 84))
    state = nn.ModuleDict({"obs_nets": nn.ModuleDict({"front": core})}).state_dict()
    shape_metadata = {"ac_dim": 7, "stats": {"eef_pos": {"mean": np.zeros((1, 3))}}}
    torch.save(
        {"model": under("policy.nets.encoder.nets.obs.", state), "config": "{}", **shape_metadata}, tmp_path / "m.pth"
    )
    net = get_resnet("resnet18", tmp_path / "m.pth").eval()
    images = torch.rand(2, 3, 84, 84)
    assert isinstance(core.backbone, ResNet18Conv)
    with torch.no_grad():
        torch.testing.assert_close(net(images), core.backbone.eval()(images).mean((2, 3)))
    assert net.preprocess_std == (1.0, 1.0, 1.0)


# Wrong networks.

NETWORKS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"]
NETWORKS += ["resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_architecture_is_told_from_the_shapes(name):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)(weights=None).state_dict()
    assert architecture(shapes_of(state)) == name
    if name not in RESNETS:
        misfit = (
            f"holds the weights of a {name}, but only resnet18, resnet34, resnet50 are built in; any other: --encoder"
        )
        with pytest.raises(EncoderError, match=misfit):
            load(state)
    elif name != "resnet18":
        with pytest.raises(EncoderError, match=f"weights of a {name}, not of a resnet18; use --rgb-model-name {name}"):
            load(state)


def load(state):
    """Loads a state dict into a ResNet-18 without a file."""
    load_backbone(ResNet("resnet18"), "resnet18", find_resnets(state)[0].state, "w.pth")


def without(state, *ends):
    return {name: value for name, value in state.items() if not name.endswith(ends)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: {**s, "conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"conv1.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)",
        ),
        (lambda s: {**s, "conv1.weight": torch.zeros(64, 9, 7, 7)}, r"conv1.weight is \(64, 9, 7, 7\)"),
        (lambda s: {**s, "layer1.0.se.fc.weight": torch.zeros(3)}, r"1 unknown \(layer1.0.se.fc.weight\)"),
        (lambda s: without(s, "layer4.1.bn2.bias"), r"1 missing \(layer4.1.bn2.bias\)"),
        (lambda s: without(s, "running_mean", "running_var", "num_batches_tracked"), "no BatchNorm statistics"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"].to(torch.int8)}, r"holds torch.int8 in conv1.weight"),
        (
            lambda s: {**s, "conv1.weight": s["conv1.weight"].to(torch.complex64)},
            r"holds torch.complex64 in conv1.weight",
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("layer4")},
            r"a ResNet of \(2, 2, 2, 0\) basic blocks",
        ),
        (lambda s: {f"{k.replace('conv1', 'conv1.0')}": v for k, v in s.items()}, "holds no ResNet with torchvision's"),
        (
            lambda s: {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)},
            "named blocks.0.attn.qkv.weight; any other network",
        ),
        (lambda s: {"9999.0.conv1.weight": torch.zeros(3)}, "holds no ResNet"),
        (lambda s: {"99999999999999999999.0.conv1.weight": torch.zeros(3)}, "holds no ResNet"),
    ],
)
def test_another_network_is_one_line_that_says_what_it_looks_like(tmp_path, bare, change, said):
    torch.save(change(bare), tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=said) as caught:
        get_resnet("resnet18", tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


# What a file may hold beside tensors.


class Settings(dict):
    """Like the dictionaries with attributes of Lightning, EasyDict or yacs."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


class Colour(enum.Enum):
    RED = 1


class Ran(Exception):
    """Code of a file was run."""


class Trap:
    def __setstate__(self, state):
        raise Ran

    def __reduce__(self):
        return (Trap, (), {"a": 1})


def test_objects_of_any_class_beside_the_tensors_are_not_run_and_not_in_the_way(tmp_path, net, bare):
    beside = {
        "args": argparse.Namespace(arch="resnet18", out=Path("runs"), rng=np.random.default_rng(0).random(3)),
        "hyper_parameters": Settings(lr=0.1, inner=Settings(a=1)),
        "best": np.float64(0.3),
        "colour": Colour.RED,
        "counts": defaultdict(list, {"a": [1]}),
        "trap": Trap(),
    }
    torch.save({**beside, "student": under("module.", bare)}, tmp_path / "w.pth")
    with pytest.raises(Ran):
        torch.load(tmp_path / "w.pth", weights_only=False)
    assert torch.equal(features(get_resnet("resnet18", tmp_path / "w.pth")), features(net))


def test_a_whole_pickled_module_is_read_without_its_code(tmp_path, net):
    for number, module in enumerate((net, nn.DataParallel(net), nn.Sequential(OrderedDict(backbone=net)))):
        torch.save({"ema": module}, tmp_path / f"{number}.pt")
        assert torch.equal(features(get_resnet("resnet18", tmp_path / f"{number}.pt")), features(net))


class Call:
    """Pickled as a call of a function with one text."""

    def __init__(self, function, text):
        self.call = (function, (text,))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, exec, __import__, os.system])
def test_a_file_that_asks_to_run_code_of_python_is_refused(tmp_path, bare, function):
    torch.save({"state_dict": bare, "x": Call(function, "1")}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=rf"cannot read weights.*{function.__name__}.*nothing in a file is executed"):
        read_weights(tmp_path / "w.pth")


def test_a_call_of_any_other_function_is_not_made(tmp_path, bare):
    torch.save(
        {"state_dict": bare, "x": Call(os.path.getsize, "/"), "y": Call(shutil.rmtree, "/none")}, tmp_path / "w.pth"
    )
    assert len(read_weights(tmp_path / "w.pth")) == len(bare)


def test_no_module_that_a_file_names_is_imported(tmp_path, bare, monkeypatch):
    (tmp_path / "unheard_of.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    thing = importlib.import_module("unheard_of").Thing()
    thing.size = 3
    torch.save({"thing": thing, "state_dict": bare}, tmp_path / "w.pth")
    del sys.modules["unheard_of"]
    assert len(read_weights(tmp_path / "w.pth")) == len(bare)
    assert "unheard_of" not in sys.modules


def test_cycles_and_depth_end(tmp_path, bare):
    loop = {"model": bare}
    loop["self"] = loop
    loop["list"] = [loop, {"again": loop}]
    torch.save(loop, tmp_path / "loop.pth")
    assert len(read_weights(tmp_path / "loop.pth")) == len(bare)
    wide = [[]]
    for _ in range(60):
        wide = [wide] * 10
    torch.save({"wide": wide, "x": torch.zeros(1)}, tmp_path / "wide.pth")
    assert list(read_weights(tmp_path / "wide.pth")) == ["x"]


def test_tensors_without_values_are_not_weights(tmp_path, bare):
    odd = {"sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta"), "string": "x", 3: None}
    torch.save({**odd, "model": bare}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == {f"model.{name}" for name in bare}
    torch.save({"conv1.weight": torch.empty(64, 3, 7, 7, device="meta")}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=r"holds no state dict but conv1\.weight"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3}, "holds no state dict but epoch"),
        ([1, 2], "holds no state dict but a list"),
        ({}, "holds no state dict but nothing"),
        ("text", "holds no state dict but a str"),
    ],
)
def test_a_file_without_tensors_says_what_it_holds(tmp_path, content, said):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=said):
        read_weights(tmp_path / "w.pth")


def test_other_files_are_one_line(tmp_path, net):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pth").touch()
    (tmp_path / "pickle.pkl").write_bytes(pickle.dumps({"conv1": np.zeros(3)}))
    (tmp_path / "text.safetensors").write_text(json.dumps({"a": 1}))
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as file:
        file.writestr("a.txt", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "script.pt"))
    for name in (
        "folder",
        "gone.pth",
        "empty.pth",
        "pickle.pkl",
        "text.safetensors",
        "arrays.npz",
        "zip.pth",
        "script.pt",
    ):
        with pytest.raises(EncoderError) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_damaged_files_are_one_line_or_harmless(tmp_path):
    """Bytes of three small files are changed, removed and cut at 600 places."""
    state = {f"layer{i}.0.conv1.weight": torch.ones(2, 2, 1, 1) for i in range(1, 5)}
    state |= {"conv1.weight": torch.ones(2, 3, 1, 1), "bn1.weight": torch.ones(2)}
    value = {
        "args": argparse.Namespace(a=1),
        "state_dict": under("module.", state),
        "list": [{"x": {0: torch.ones(3)}}],
    }
    torch.save(value, tmp_path / "new.pth")
    torch.save(value | {"args": None}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "w.safetensors")
    rng, ends, lines, mutated = random.Random(0), Counter(), [], tmp_path / "mutated"
    for number in range(600):
        content = bytearray((tmp_path / ("new.pth", "old.pth", "w.safetensors")[number % 3]).read_bytes())
        at = rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 600))
        if number % 4 == 0:
            del content[at:]
        elif number % 4 == 1:
            del content[at : at + rng.choice([1, 30])]
        else:
            content[at : at + 3] = rng.randbytes(rng.choice([1, 3]))
        mutated.write_bytes(content)
        try:
            find_resnets(read_weights(mutated))
            ends["read"] += 1
        except EncoderError as error:
            lines.append(str(error))
    assert not [line for line in lines if "\n" in line]
    ends["refused"] = len(lines)
    assert min(ends["read"], ends["refused"]) > 20, ends


def test_a_file_that_ends_within_a_number_is_one_line(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x80\x02J\x01")  # a number of four bytes, cut after the first
    with pytest.raises(EncoderError, match="cannot read weights"):
        read_weights(tmp_path / "w.pth")
