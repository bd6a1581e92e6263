"""Half precisions: what stays in float32, what is proven, what is refused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import export.publish
from app.backends.ort import OnnxRuntimeBackend
from app.cli import main
from app.engine.loading import check_golden
from examples.digits.data import held_out
from export.calibration import FLOAT16_MAX, OverflowsFloat16, calibrate, check_float16
from export.graph_runner import graph_run, widened_graph
from export.onnx import export_onnx
from export.verify import torch_run
from models.golden import golden_images
from models.layers import ImageNorm, PositionNorm, SquaredReLU, StarReLU
from models.metaformer import MetaFormer
from models.package import PRETRAINED, ActivationRange, Calibration, InputSpec, open_package
from models.precision import DTYPES, InFloat32, cast_network, widen_network
from models.serving import ServedModel
from models.tolerances import Precision
from models.variants import Activation, Architecture, Mixer, find_variant
from tests.models.tiny import CAFORMER, POOLFORMERV2, network
from tests.reference import randomise

DIGITS, _ = find_variant("caformer_digits")
HALVES: tuple[Precision, ...] = ("fp16", "bf16")
MIXERS: tuple[Mixer, ...] = ("identity", "random", "pooling", "conv", "attention")


def tiny(mixer: Mixer) -> Architecture:
    """Return a tiny network of a family: one mixer in its last two stages."""
    base = CAFORMER if mixer in ("conv", "attention") else POOLFORMERV2
    first: Mixer = base.mixers[0]
    return replace(base, name=f"tiny_{mixer}", mixers=(first, first, mixer, mixer))


def served(architecture: Architecture, precision: Precision = "fp32") -> ServedModel:
    model = cast_network(network(architecture), precision)
    return ServedModel(model, InputSpec(size=architecture.input_size)).eval()


def run_cli(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def weights(folder: Path, *, gain: float = 1.0) -> Path:
    """Write a network whose first MLP sees values `gain` times as large."""
    state = randomise(MetaFormer(DIGITS, 10), 3).state_dict()
    state["stages.0.blocks.0.mlp.fc1.weight"] *= gain
    state["stages.0.blocks.0.mlp.fc2.weight"] /= gain**2
    path = folder / "weights.safetensors"
    save_file(state, path)
    return path


@pytest.mark.parametrize("activation", ["star_relu", "squared_relu"])
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_norms_squares_and_head_stay_in_float32_and_nothing_else(
    mixer: Mixer, precision: Precision, activation: Activation
) -> None:
    architecture = replace(tiny(mixer), activation=activation)
    trained = network(architecture)
    model = cast_network(deepcopy(trained), precision)
    values = dict(trained.named_parameters()) | dict(trained.named_buffers())
    kept = (PositionNorm, ImageNorm, StarReLU, SquaredReLU)
    found = {torch.float32: 0, DTYPES[precision]: 0}
    for name, module in model.named_modules():
        in_head = name.startswith("network.head")
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            wide = in_head or isinstance(module, kept)
            assert tensor.dtype == (torch.float32 if wide else DTYPES[precision]), name
            found[tensor.dtype] += 1
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        path = name.removeprefix("network.").replace(".module", "")
        for part, tensor in own:
            wanted = values[f"{path}.{part}"].to(tensor.dtype)  # what is kept was never rounded
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)
        if isinstance(module, kept) and not in_head:
            parent = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(parent, InFloat32), f"{name} would compute on {precision}"
    assert all(found.values())


@pytest.mark.parametrize(
    ("mixer", "precision"), [*((mixer, "bf16") for mixer in MIXERS), ("attention", "fp16")]
)
def test_every_mixer_rounds_within_the_tolerance_and_exports_exactly(
    mixer: Mixer, precision: Precision, tmp_path: Path
) -> None:
    architecture = tiny(mixer)
    images = golden_images(architecture.input_size, 5)
    half = served(architecture, precision)
    export_onnx(half, architecture.input_size, tmp_path / "half.onnx")
    logits = torch_run(served(architecture))(images)[0]
    difference = np.abs(torch_run(half)(images)[0] - logits).max() / logits.std()
    # Tiny networks have few values to average over; a cast that was forgotten gives 0.
    assert 0 < difference < {"fp16": 0.1, "bf16": 0.8}[precision]
    half.network = widen_network(half.network)
    run, runtime = graph_run(tmp_path / "half.onnx", widen=True)
    assert "widened" in runtime
    np.testing.assert_allclose(run(images)[0], torch_run(half)(images)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 20), ("bf16", 22)])
def test_a_half_package_is_written_proven_and_its_graph_is_of_that_type(
    precision: Precision, opset: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half"
    arguments = ("--checkpoint", weights(tmp_path), "--precision", precision, "--out", out)
    assert run_cli("export", "caformer_digits", *arguments) == 0
    package = open_package(out)
    manifest = package.manifest
    assert (manifest.precision, manifest.opset) == (precision, opset)
    graph = onnx.load(out / "model.onnx")
    assert graph.opset_import[0].version == opset
    half_type = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    sizes: dict[int, int] = {}
    for tensor in graph.graph.initializer:
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    body = sum(p.numel() for n, p in MetaFormer(DIGITS, 10).named_parameters() if "head" not in n)
    assert sizes[half_type] > 0.9 * body, "the matrices are in half precision"
    (proof,) = manifest.proofs
    assert (proof.backend, proof.precision) == ("torch", precision)
    assert 1e-4 < proof.max_abs_logit_difference <= proof.logit_tolerance
    shown = capsys.readouterr()
    assert "largest values over 5 calibration images" in shown.err
    assert "stages.2.blocks.0.mlp.act" in shown.err
    assert f"torch    {precision}" in shown.out


def test_a_half_package_is_served_by_onnxruntime_within_its_own_tolerance(tmp_path: Path) -> None:
    out = tmp_path / "half"
    arguments = ("--checkpoint", weights(tmp_path), "--precision", "fp16", "--out", out)
    assert run_cli("export", "caformer_digits", *arguments) == 0
    package = open_package(out)
    backend = OnnxRuntimeBackend(package, "cpu", threads=1)
    golden = check_golden(backend, package)
    assert backend.info.precision == "fp16"
    assert golden.max_abs_logit_difference > 1e-4
    backend.close()


@pytest.mark.parametrize("precision", HALVES)
def test_verify_repeats_the_proof_of_a_half_package(
    precision: Precision, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, extra in (("whole", ()), ("bare", ("--no-weights",))):
        out = tmp_path / name
        arguments = ("--checkpoint", weights(tmp_path), "--precision", precision, "--out", out)
        assert run_cli("export", "caformer_digits", *arguments, *extra) == 0
        capsys.readouterr()
        assert run_cli("verify", out) == 0
        shown = capsys.readouterr().out
        assert "proven: " in shown
        assert (f"torch    {precision}" in shown) == (name == "whole")


@pytest.mark.parametrize("precision", HALVES)
def test_a_half_graph_that_is_wrong_by_less_than_its_rounding_is_refused(
    precision: Precision,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def export_another(model: ServedModel, input_size: int, path: Path) -> None:
        other = deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name.endswith("head.fc.fc2.bias"):
                    parameter[3] += 2e-3
        export_onnx(other, input_size, path)

    monkeypatch.setattr(export.publish, "export_onnx", export_another)
    out = tmp_path / "models" / "wrong"
    arguments = ("--checkpoint", weights(tmp_path), "--precision", precision, "--out", out)
    assert run_cli("export", "caformer_digits", *arguments) == 2
    assert "does not compute the network in fp32: logits differ by 0.002" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


def test_calibration_lists_every_square_with_its_largest_input_and_output() -> None:
    model = served(CAFORMER)
    images = golden_images(32, 3)
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen[name] = inputs[0].clamp(min=0).max().item(), output.abs().max().item()

        return hook

    for name, module in model.network.named_modules():
        if isinstance(module, StarReLU | SquaredReLU):
            module.register_forward_hook(note(name))  # type: ignore[arg-type]
    answers, calibration = calibrate(model, images)
    assert calibration.images == 3
    found = {
        name: (one.largest_input, one.largest_output)
        for name, one in calibration.activations.items()
    }
    assert found == seen
    np.testing.assert_array_equal(answers[0], torch_run(model)(images)[0])
    blocks = sum(CAFORMER.depths)
    assert len(found) == blocks + sum(CAFORMER.depths[:2]) + 1  # MLPs, SepConvs, the head


def test_real_images_are_calibrated_with_as_the_service_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for index, (png, _) in enumerate(held_out()[:20]):
        (folder / ("deeper" if index % 2 else ".") / f"{index}.png").write_bytes(png)
    (folder / "notes.txt").write_text("no image")
    trained = PRETRAINED / "caformer_digits" / "weights.safetensors"
    out = tmp_path / "out"
    arguments = ("--checkpoint", trained, "--calibration", folder, "--precision", "fp16")
    assert run_cli("export", "caformer_digits", *arguments, "--out", out) == 0
    calibration = open_package(out).manifest.calibration
    golden = open_package(PRETRAINED / "caformer_digits").manifest.calibration
    assert calibration is not None
    assert golden is not None
    assert (calibration.images, calibration.real_images) == (25, 20)
    name = "stages.2.blocks.0.mlp.act"
    largest, of_golden = (one.activations[name].largest_output for one in (calibration, golden))
    assert largest > 2 * of_golden, "real digits excite it more than ramps and noise"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    again = ("--checkpoint", trained, "--calibration", empty, "--out", tmp_path / "no")
    assert run_cli("export", "caformer_digits", *again) == 2
    assert "holds no images to calibrate with" in capsys.readouterr().err


def test_fp16_that_fails_elsewhere_than_in_a_square_says_bf16_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = randomise(MetaFormer(DIGITS, 10), 3).state_dict()
    state["stages.0.blocks.0.mlp.fc2.weight"] *= 3e5  # the residual stream leaves the range
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    arguments = ("--checkpoint", path, "--precision", "fp16", "--out", tmp_path / "out")
    assert run_cli("export", "caformer_digits", *arguments) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert sentence.endswith("use --precision bf16")


def test_fp16_that_would_overflow_is_refused_and_bf16_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = weights(tmp_path, gain=100.0)
    out = tmp_path / "models" / "large"
    arguments = ("--checkpoint", checkpoint, "--out", out, "--precision")
    assert run_cli("export", "caformer_digits", *arguments, "fp16") == 2
    shown = capsys.readouterr().err.splitlines()
    (sentence,) = (line for line in shown if line.startswith("metaserve:"))
    assert "stages.0.blocks.0.mlp.act reaches" in sentence
    assert "use --precision bf16" in sentence
    assert any("stages.0.blocks.0.mlp.act" in line for line in shown if line != sentence)
    assert list(out.parent.iterdir()) == []
    assert run_cli("export", "caformer_digits", *arguments, "bf16") == 0
    activations = open_package(out).manifest.calibration
    assert activations is not None
    assert activations.activations["stages.0.blocks.0.mlp.act"].largest_output > FLOAT16_MAX / 2


@pytest.mark.parametrize(
    ("largest_input", "largest_output", "fits"),
    [
        (180.0, 32400.0, True),
        (182.0, 33124.0, False),
        (182.0, 10.0, False),  # a small scale: the square alone leaves the range
        (10.0, 40000.0, False),  # a large scale
        (float("nan"), 1.0, False),
    ],
)
@pytest.mark.parametrize("real_images", [0, 1])
def test_float16_is_refused_near_its_end_and_nearer_without_real_images(
    largest_input: float, largest_output: float, fits: bool, real_images: int
) -> None:
    if not real_images:  # a margin of 16 for squares, not of 2
        largest_input, largest_output = largest_input / 8**0.5, largest_output / 8
    activation = ActivationRange.model_construct(
        largest_input=largest_input, largest_output=largest_output
    )
    calibration = Calibration.model_construct(
        images=1, real_images=real_images, activations={"stages.0.act": activation}
    )
    if fits:
        check_float16(calibration)
    else:
        with pytest.raises(OverflowsFloat16, match=r"stages\.0\.act reaches"):
            check_float16(calibration)


@pytest.mark.parametrize("precision", HALVES)
def test_widening_keeps_every_value_and_leaves_no_half(
    precision: Precision, tmp_path: Path
) -> None:
    path = tmp_path / "half.onnx"
    export_onnx(served(CAFORMER, precision), 32, path)
    narrow = {one.name: one for one in onnx.load(path).graph.initializer}
    wide = widened_graph(path)
    onnx.checker.check_model(wide, full_check=True)
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    assert any(one.data_type in halves for one in narrow.values())
    for tensor in wide.graph.initializer:
        assert tensor.data_type not in halves
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(tensor),
            onnx.numpy_helper.to_array(narrow[tensor.name]),
        )


ABLATIONS: list[dict[str, Any]] = [
    {"block_bias": True},
    {"activation": "gelu"},
    {"residual_scaling": "layer_scale"},
    {"residual_scaling": "branch_scale"},
]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_ablations_are_exported_in_half_precision(precision: Precision, tmp_path: Path) -> None:
    for index, changes in enumerate(ABLATIONS if precision == "bf16" else ABLATIONS[:1]):
        path, out = tmp_path / f"{index}.safetensors", tmp_path / f"out{index}"
        save_file(randomise(MetaFormer(replace(DIGITS, **changes), 10), 3).state_dict(), path)
        flags: list[str] = []
        for name, value in changes.items():
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        arguments = ("--checkpoint", path, "--precision", precision, "--out", out, *flags)
        assert run_cli("export", "caformer_digits", *arguments) == 0, changes


def test_logits_that_are_all_the_same_can_be_proven_in_half_precision(tmp_path: Path) -> None:
    state = randomise(MetaFormer(DIGITS, 10), 3).state_dict()
    for key in state:  # a head as fine-tunes start with
        if key.startswith("head.fc."):
            state[key].zero_()
    path, out = tmp_path / "fresh.safetensors", tmp_path / "out"
    save_file(state, path)
    arguments = ("--checkpoint", path, "--precision", "bf16", "--out", out)
    assert run_cli("export", "caformer_digits", *arguments) == 0
    assert open_package(out).manifest.proofs[0].logit_tolerance == pytest.approx(1e-4)
