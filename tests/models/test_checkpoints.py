"""Checkpoint files: all that should load does, all else is refused in one sentence."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from models.build import build_network
from models.checkpoints import CheckpointError, fit_state, load_checkpoint
from models.variants import ARCHITECTURES
from tests.models import tiny
from tests.reference import timm_model, to_official_layout

State = dict[str, Tensor]

OURS = tiny.network(tiny.CAFORMER).state_dict()
TIMM = tiny.timm_twin().state_dict()
OFFICIAL = to_official_layout(TIMM)
EMA = tiny.timm_twin(seed=2).state_dict()


def save(content: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(content, dict)
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def build(path: Path, *, ema: bool = True) -> State:
    return build_network(tiny.CAFORMER, load_checkpoint(path, ema=ema)).state_dict()


def refusal(path: Path) -> str:
    """Return why a file is refused, by the loader or when the network is built."""
    with pytest.raises(CheckpointError) as caught:
        build(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 300
    return sentence


def assert_holds(state: State, expected: State) -> None:
    """Compare weights, pointwise ones flattened to matrices."""
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[key].reshape(tensor.shape)), key


def without(state: State, *keys: str) -> State:
    return {key: tensor for key, tensor in state.items() if key not in keys}


# --- what loads ---


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize(
    ("state", "layout"),
    [(OURS, "timm"), (TIMM, "timm"), (OFFICIAL, "official")],
    ids=["ours", "timm", "official"],
)
def test_every_layout_loads_from_every_kind_of_file(
    state: State, layout: str, suffix: str, tmp_path: Path
) -> None:
    path = save(state, tmp_path / f"weights{suffix}")

    checkpoint = load_checkpoint(path)

    assert checkpoint.layout == layout
    assert checkpoint.classes == tiny.CLASSES
    assert checkpoint.sha256 == sha256(path.read_bytes()).hexdigest()
    assert_holds(build(path), OURS if state is OURS else TIMM)


def test_the_file_format_of_old_torch_loads(tmp_path: Path) -> None:
    torch.save(TIMM, tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    assert_holds(build(tmp_path / "old.pth"), TIMM)


def test_a_network_is_built_for_inference_and_draws_no_random_numbers(tmp_path: Path) -> None:
    path = save(TIMM, tmp_path / "weights.pth")
    before = torch.get_rng_state()

    network = build_network(tiny.CAFORMER, load_checkpoint(path))

    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_keeps_its_weights_when_its_file_is_overwritten(tmp_path: Path) -> None:
    path = save(TIMM, tmp_path / "weights.safetensors")
    network = build_network(tiny.CAFORMER, load_checkpoint(path))

    with path.open("r+b") as file:  # in place: safetensors maps the file into memory
        file.write(bytes(path.stat().st_size))

    assert_holds(network.state_dict(), TIMM)


WRAPPED: dict[str, tuple[dict[str, object], State, State]] = {
    # name: (file, weights by default, weights without the moving average)
    "state_dict": ({"epoch": 3, "state_dict": TIMM, "arch": "caformer_s18"}, TIMM, TIMM),
    "state_dict_ema": ({"state_dict": TIMM, "state_dict_ema": EMA, "metric": 0.9}, EMA, TIMM),
    "model": ({"model": TIMM, "optimizer": {"param_groups": [1]}}, TIMM, TIMM),
    "model_ema": ({"model": TIMM, "model_ema": EMA}, EMA, TIMM),
    "model_ema beside state_dict": ({"state_dict": TIMM, "model_ema": EMA}, EMA, TIMM),
    "no average kept": ({"state_dict": TIMM, "state_dict_ema": None}, TIMM, TIMM),
    "an empty average": ({"state_dict": TIMM, "state_dict_ema": {}}, TIMM, TIMM),
    "official": ({"state_dict": OFFICIAL}, TIMM, TIMM),
    "ordered": ({"state_dict": OrderedDict(TIMM)}, TIMM, TIMM),
}


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "no_ema"])
@pytest.mark.parametrize(("content", "average", "plain"), WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_in_what_training_scripts_save(
    content: dict[str, object], average: State, plain: State, ema: bool, tmp_path: Path
) -> None:
    path = save(content, tmp_path / "last.pth.tar.pth")

    assert_holds(build(path, ema=ema), average if ema else plain)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("state", [TIMM, OFFICIAL], ids=["timm", "official"])
def test_prefixes_of_wrapped_modules_fall_off(state: State, prefix: str, tmp_path: Path) -> None:
    prefixed = {prefix + key: tensor for key, tensor in state.items()}

    assert_holds(build(save(prefixed, tmp_path / "flat.safetensors")), TIMM)
    assert_holds(build(save({"state_dict": prefixed}, tmp_path / "wrapped.pth")), TIMM)


@pytest.mark.parametrize("official", [True, False], ids=["official", "timm"])
@pytest.mark.parametrize("classes", [2, 10, 21841])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_number_of_classes_comes_from_the_weights(
    head: str, classes: int, official: bool, tmp_path: Path
) -> None:
    architecture = tiny.CAFORMER if head == "mlp" else tiny.POOLFORMERV2
    state = tiny.network(architecture, classes=classes).state_dict()
    path = save(to_official_layout(state) if official else state, tmp_path / "weights.pth")

    checkpoint = load_checkpoint(path)
    logits, embedding = tiny.outputs(build_network(architecture, checkpoint), tiny.images())

    assert checkpoint.classes == classes
    assert logits.shape == (2, classes)
    assert embedding.shape == (2, 64)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    cast = {key: tensor.to(dtype) for key, tensor in TIMM.items()}

    state = build(save(cast, tmp_path / f"half{suffix}"))

    assert_holds(state, {key: tensor.float() for key, tensor in cast.items()})


def test_parameters_and_strided_views_load_like_tensors(tmp_path: Path) -> None:
    unusual: State = {
        key: torch.nn.Parameter(tensor.t().contiguous().t() if tensor.ndim == 2 else tensor)
        for key, tensor in TIMM.items()
    }

    assert_holds(build(save(unusual, tmp_path / "views.pth")), TIMM)


# --- weights that do not fit ---


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    key = "stages.2.blocks.1.token_mixer.qkv.weight"

    sentence = refusal(save(without(TIMM, key), tmp_path / "weights.pth"))

    assert sentence == f"the checkpoint lacks {key}"


@pytest.mark.parametrize(
    "key", ["norm.weight", "head.norm.weight", "stages.3.0.res_scale2.scale", "head.fc1.bias"]
)
def test_a_key_missing_from_an_official_file_is_named_as_ours(key: str, tmp_path: Path) -> None:
    names = {
        "norm.weight": "head.norm.weight",
        "head.norm.weight": "head.fc.norm.weight",
        "stages.3.0.res_scale2.scale": "stages.3.blocks.0.res_scale2.scale",
        "head.fc1.bias": "head.fc.fc1.bias",
    }

    sentence = refusal(save(without(OFFICIAL, key), tmp_path / "weights.pth"))

    assert sentence == f"the checkpoint lacks {names[key]}"


def test_many_missing_keys_are_counted(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in TIMM.items() if not key.startswith("stages.3.")}

    sentence = refusal(save(state, tmp_path / "weights.pth"))

    missing = len(TIMM) - len(state)
    assert sentence.startswith("the checkpoint lacks stages.3.downsample.norm.weight, ")
    assert sentence.endswith(f" and {missing - 3} more")


@pytest.mark.parametrize("state", [TIMM, OFFICIAL], ids=["timm", "official"])
def test_an_extra_key_is_named(state: State, tmp_path: Path) -> None:
    more = {**state, "n_averaged": torch.zeros(())}

    sentence = refusal(save(more, tmp_path / "weights.pth"))

    assert sentence == "the checkpoint holds keys the network lacks: n_averaged"


def test_a_key_both_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    twice = {**TIMM, "module.stem.norm.weight": torch.ones(8)}

    assert "'stem.norm.weight' is there twice" in refusal(save(twice, tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("key", "reshape"),
    [
        ("stem.conv.weight", lambda tensor: tensor[:, :, 1:]),
        ("stem.norm.weight", lambda tensor: tensor[1:]),
        # As many values in another shape: only (out, in, 1, 1) may become (out, in).
        ("stages.0.blocks.0.mlp.fc1.weight", lambda tensor: tensor.reshape(8, 32, 1, 1)),
        ("stages.0.blocks.0.mlp.fc1.weight", lambda tensor: tensor.reshape(32, 8, 1)),
        ("stages.0.blocks.0.mlp.fc1.weight", lambda tensor: tensor.reshape(32, 1, 8, 1)),
        ("stages.2.blocks.0.mlp.fc2.weight", lambda tensor: tensor.reshape(128, 32)),
        ("stages.2.blocks.0.token_mixer.proj.weight", lambda tensor: tensor.reshape(-1)),
        ("stages.0.blocks.0.token_mixer.dwconv.weight", lambda tensor: tensor[:, 0]),
        ("stages.0.blocks.0.norm1.weight", lambda tensor: tensor[:, None, None]),
        ("stages.2.blocks.0.res_scale1.scale", lambda tensor: tensor[:, None, None]),
        ("stages.0.blocks.0.mlp.act.scale", lambda tensor: tensor.reshape(())),
        ("head.fc.fc2.weight", lambda tensor: tensor[:, :-1]),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    key: str, reshape: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    misshapen = {**TIMM, key: reshape(TIMM[key]).contiguous()}

    sentence = refusal(save(misshapen, tmp_path / "weights.safetensors"))

    found, wanted = list(misshapen[key].shape), list(OURS[key].shape)
    assert sentence == f"{key} has shape {found}, the network wants {wanted}"


def test_an_official_file_whose_head_norms_were_mixed_up_is_refused(tmp_path: Path) -> None:
    # What happens to who takes the official `head.norm` (4 d long) for timm's (d long).
    swapped = {
        **TIMM,
        "head.norm.weight": TIMM["head.fc.norm.weight"],
        "head.fc.norm.weight": TIMM["head.norm.weight"],
    }

    sentence = refusal(save(swapped, tmp_path / "weights.pth"))

    assert sentence == "head.norm.weight has shape [256], the network wants [64]"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = save(tiny.network(tiny.POOLFORMERV2).state_dict(), tmp_path / "weights.pth")

    assert refusal(path).startswith("the checkpoint lacks stages.0.blocks.0.token_mixer.pwconv1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    spoilt = {key: tensor.clone() for key, tensor in TIMM.items()}
    spoilt["stages.1.blocks.0.norm2.weight"][3] = value

    sentence = refusal(save(spoilt, tmp_path / "weights.safetensors"))

    assert sentence == "stages.1.blocks.0.norm2.weight holds values that are not finite"


def test_values_too_large_for_float32_are_refused(tmp_path: Path) -> None:
    spoilt = {**TIMM, "stem.norm.weight": torch.full((8,), 1e300, dtype=torch.float64)}

    assert "stem.norm.weight holds values that are not finite" in refusal(
        save(spoilt, tmp_path / "weights.safetensors")
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_point_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    spoilt = {**TIMM, "stem.conv.weight": TIMM["stem.conv.weight"].to(dtype)}

    sentence = refusal(save(spoilt, tmp_path / "weights.pth"))

    assert sentence == f"stem.conv.weight is {dtype}, the network wants floating point"


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_are_not_plain_are_refused(kind: str, tmp_path: Path) -> None:
    norm = TIMM["stem.norm.weight"]
    odd = norm.to_sparse() if kind == "sparse" else norm.to("meta")

    sentence = refusal(save({**TIMM, "stem.norm.weight": odd}, tmp_path / "weights.pth"))

    assert sentence == "'stem.norm.weight' is a sparse, nested or meta tensor, not a plain one"


@pytest.mark.parametrize(("shape", "head"), [((), "mlp"), ((0, 256), "mlp"), ((0, 64), "linear")])
def test_a_classifier_without_classes_is_refused(
    shape: tuple[int, ...], head: str, tmp_path: Path
) -> None:
    architecture = tiny.CAFORMER if head == "mlp" else tiny.POOLFORMERV2
    key = "head.fc.fc2.weight" if head == "mlp" else "head.fc.weight"
    state = {**tiny.network(architecture).state_dict(), key: torch.zeros(shape)}

    sentence = refusal(save(state, tmp_path / "weights.pth"))

    assert sentence == f"the classifier of weights.pth has shape {list(shape)}, which is no classes"


def test_a_backbone_without_classifier_is_refused(tmp_path: Path) -> None:
    backbone = {key: tensor for key, tensor in TIMM.items() if not key.startswith("head.fc")}

    sentence = refusal(save(backbone, tmp_path / "backbone.safetensors"))

    assert sentence.startswith("backbone.safetensors has no classifier")


def test_poolformer_v1_is_refused_by_name_in_timms_layout(tmp_path: Path) -> None:
    state = timm_model("poolformer_s12", classes=10).state_dict()
    path = save(state, tmp_path / "poolformer_s12.safetensors")

    with pytest.raises(CheckpointError, match=r"^this is a PoolFormer v1 checkpoint"):
        build_network(ARCHITECTURES["poolformerv2_s12"], load_checkpoint(path))


def test_poolformer_v1_is_refused_by_name_in_the_official_layout(tmp_path: Path) -> None:
    # The keys of sail-sg/poolformer, models/poolformer.py, where a stage begins and at the end.
    state = {
        "patch_embed.proj.weight": torch.zeros(64, 3, 7, 7),
        "patch_embed.proj.bias": torch.zeros(64),
        "network.0.0.layer_scale_1": torch.zeros(64),
        "network.0.0.layer_scale_2": torch.zeros(64),
        "network.0.0.norm1.weight": torch.zeros(64),
        "network.0.0.mlp.fc1.weight": torch.zeros(256, 64, 1, 1),
        "network.1.proj.weight": torch.zeros(128, 64, 3, 3),
        "norm.weight": torch.zeros(512),
        "head.weight": torch.zeros(1000, 512),
        "head.bias": torch.zeros(1000),
    }

    for each in (state, without(state, "network.0.0.mlp.fc1.weight")):
        sentence = refusal(save(each, tmp_path / "poolformer_s12.pth"))
        assert sentence.startswith("this is a PoolFormer v1 checkpoint")
        assert sentence.endswith("use a poolformerv2 checkpoint")


def test_a_missing_stem_norm_or_a_layer_scale_alone_does_not_make_a_poolformer_v1(
    tmp_path: Path,
) -> None:
    scaled = replace(tiny.CAFORMER, residual_scaling="layer_scale", scaled_stages=(0, 1, 2, 3))
    ours = tiny.network(scaled).state_dict()

    sentence = refusal(save(without(TIMM, "stem.norm.weight"), tmp_path / "weights.pth"))

    assert sentence == "the checkpoint lacks stem.norm.weight"
    assert_holds(build_network(scaled, tiny.save_and_load(ours, tmp_path)).state_dict(), ours)


def test_weights_of_another_network_are_refused_with_a_sample_of_their_keys(
    tmp_path: Path,
) -> None:
    resnet = {f"layer{n}.conv.weight": torch.zeros(1) for n in range(9)}

    sentence = refusal(save(resnet, tmp_path / "resnet.pth"))

    assert sentence == (
        "these are no MetaFormer weights; the file starts with layer0.conv.weight, "
        "layer1.conv.weight, layer2.conv.weight, layer3.conv.weight, layer4.conv.weight"
    )


# --- files that are no checkpoints ---


class Hostile:
    """A pickle that runs a shell command when it is loaded without care."""

    def __init__(self, victim: Path) -> None:
        self.command = f"touch {victim}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_a_pickled_argparse_namespace_is_refused_by_name(tmp_path: Path) -> None:
    content = {"state_dict": TIMM, "args": argparse.Namespace(lr=0.1)}

    sentence = refusal(save(content, tmp_path / "last.pth"))

    assert sentence == (
        "last.pth holds more than plain tensors (argparse.Namespace) and is not unpickled; "
        "save its state dict alone, best as .safetensors"
    )


def test_a_pickled_network_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tiny.network(tiny.CAFORMER), tmp_path / "whole.pth")

    assert "holds more than plain tensors (models." in refusal(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    kind: str, protocol: int, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    content = {"state_dict": TIMM, "extra": Hostile(victim)}
    path = tmp_path / "hostile.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": Hostile(victim)}, protocol=protocol))
    else:
        torch.save(
            content,
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=kind == "torch",
        )

    sentence = refusal(path)

    assert not victim.exists()
    assert "save its state dict alone" in sentence
    if protocol == 2:
        assert "holds more than plain tensors (posix.system)" in sentence
    # The same file, loaded without care, does run: it was armed.
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert victim.exists()


def zip_bytes(name: str) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "nothing")
    return buffer.getvalue()


def bytes_of(content: object, suffix: str = ".pth", **options: bool) -> bytes:
    buffer = BytesIO()
    if suffix == ".safetensors":
        assert isinstance(content, dict)
        return safetensors.torch.save(content)
    torch.save(content, buffer, **options)
    return buffer.getvalue()


NO_CHECKPOINTS = {
    "empty": (b"", "{name} is empty"),
    "text": (b"hello, I am text\n" * 9, "{name} (cannot be read as a|is no torch checkpoint)"),
    "page": (b"<!DOCTYPE html><html>", "{name} (cannot be read as a|is no torch checkpoint)"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 105368960\n",
        "{name} (cannot be read as a|is no torch checkpoint)",
    ),
    "zip of something else": (zip_bytes("a/notes.txt"), "{name} cannot be read as a"),
    "truncated torch": (bytes_of(TIMM)[:-900], "{name} cannot be read as a"),
    "beginning of torch": (bytes_of(TIMM)[:900], "{name} cannot be read as a"),
    "truncated old torch": (
        bytes_of(TIMM, _use_new_zipfile_serialization=False)[:5000],
        "{name} cannot be read as a",
    ),
    "truncated safetensors": (
        bytes_of(TIMM, ".safetensors")[:-1],
        "{name} (cannot be read as a|is no torch checkpoint)",
    ),
    "safetensors garbage": (
        (64).to_bytes(8, "little") + b"{" * 64,
        "{name} (cannot be read as a|is no torch checkpoint)",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize(("content", "sentence"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(
    content: bytes, sentence: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)

    assert re.match(sentence.format(name=re.escape(path.name)), refusal(path))


@pytest.mark.parametrize(
    "content",
    [TIMM["stem.conv.weight"], [TIMM], {}, {"state_dict": {}}, "text", 7, None],
    ids=["tensor", "list", "nothing", "nothing wrapped", "text", "number", "none"],
)
def test_a_torch_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    sentence = refusal(save(content, tmp_path / "weights.pth"))

    assert sentence == "the file holds no state dict, that is no mapping of names to tensors"


@pytest.mark.parametrize("key", [7, "stem\nconv", ("stem", "conv")], ids=["number", "line", "pair"])
def test_a_key_that_is_no_name_is_refused(key: object, tmp_path: Path) -> None:
    sentence = refusal(save({key: torch.zeros(1)}, tmp_path / "weights.pth"))

    assert sentence == f"a key of the state dict is no name: {key!r}"


def test_a_value_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    sentence = refusal(save({**TIMM, "epoch": 3}, tmp_path / "weights.pth"))

    assert sentence == "'epoch' is of type int, not a tensor"


def test_a_moving_average_is_not_used_against_the_users_will(tmp_path: Path) -> None:
    path = save({"state_dict_ema": TIMM}, tmp_path / "weights.pth")

    with pytest.raises(CheckpointError, match="'state_dict_ema' is of type OrderedDict, not"):
        load_checkpoint(path, ema=False)


def test_missing_files_directories_and_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    onnx = save(TIMM, tmp_path / "model.pth").rename(tmp_path / "model.onnx")

    assert refusal(tmp_path / "no.pth") == f"there is no checkpoint file {tmp_path / 'no.pth'}"
    assert "folder.pth is a directory" in refusal(tmp_path / "folder.pth")
    assert refusal(onnx) == "model.onnx is neither .safetensors nor .pth, .pt or .bin"


def test_fitting_keeps_the_networks_order_and_leaves_the_checkpoint_alone() -> None:
    shuffled = {key: TIMM[key].half() for key in sorted(TIMM)}

    fitted = fit_state(shuffled, OURS)

    assert list(fitted) == list(OURS)
    assert all(tensor.dtype == torch.float16 for tensor in shuffled.values())


FILES = {
    ".safetensors": bytes_of(TIMM, ".safetensors"),
    ".pth": bytes_of({"state_dict": TIMM}),
    ".pt": bytes_of(TIMM, _use_new_zipfile_serialization=False),
}
# Where a file says what follows: headers, pickles, the directory at the end of a zip.
SPOTS = {
    suffix: [
        *range(min(len(content), 4000)),
        *range(max(len(content) - 4000, 0), len(content)),
    ]
    for suffix, content in FILES.items()
}


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    suffix = draw(st.sampled_from(sorted(FILES)))
    content = bytearray(FILES[suffix])
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.sampled_from(SPOTS[suffix]))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    return suffix, bytes(content)


def random_files() -> st.SearchStrategy[tuple[str, bytes]]:
    starts = st.sampled_from([b"", b"\x80\x02", b"\x80\x02}(", b"PK\x03\x04", bytes(7)])
    contents = st.builds(lambda start, rest: start + rest, starts, st.binary(max_size=100))
    return st.tuples(st.sampled_from(sorted(FILES)), contents)


@settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(file=st.one_of(damaged_files(), random_files()))
def test_whatever_is_in_a_file_it_loads_or_is_refused_in_one_sentence(
    file: tuple[str, bytes], tmp_path: Path
) -> None:
    suffix, content = file
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about odd pickles
        outcome = load_or_refuse(path)

    if isinstance(outcome, str):
        assert outcome
        assert "\n" not in outcome
    else:
        assert outcome.keys() == OURS.keys()
        assert all(torch.isfinite(tensor).all() for tensor in outcome.values())


def load_or_refuse(path: Path) -> State | str:
    try:
        return build(path)
    except CheckpointError as error:
        return str(error)
