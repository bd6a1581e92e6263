"""The arguments of `metaserve export`, and the network and preprocessing they describe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from models.package import WEIGHTS, InputSpec
from models.tolerances import Precision
from models.variants import Activation, Architecture, Mixer, ResidualScaling

FORMATS = ("onnx", "tensorrt", "triton")
MAX_BATCH_SIZE = 32

# Flags that mean something to some formats only, by their names in the namespace.
_OF_FORMATS = {
    "max_batch_size": ("tensorrt", "triton"),
    "engine_cache": ("tensorrt",),
    "triton_platform": ("triton",),
    "triton_device": ("triton",),
}
# Flags that describe weights, a network or its preprocessing: a package has them settled.
_OF_WEIGHTS = (
    "config", "labels", "revision", "sha256", "version", "no_ema", "no_weights", "head_norm_eps",
    "input_size", "crop_pct", "interpolation", "mean", "std", "activation", "residual_scaling",
    "block_bias", "mixers", "calibration",
)  # fmt: skip


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `metaserve export`."""
    parser.add_argument(
        "variant",
        help="a name from `metaserve models`, or hf-hub:USER/REPOSITORY for your own; for "
        "--format tensorrt and triton also a package directory",
    )
    _add_source_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write [VARIANT]")
    parser.add_argument("--name", help="name of the package [the directory's name]")
    parser.add_argument("--version", help="version of the package [hash of the weights]")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="of the graph; bf16 runs in torch and TensorRT alone, fp16 everywhere [fp32]",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="real images that show how large activations grow; what fp16 is judged by",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a package at --out")
    parser.add_argument("--no-ema", action="store_true", help="take the weights, not their average")
    parser.add_argument(
        "--no-weights", action="store_true", help=f"leave out {WEIGHTS} (the torch backend's)"
    )
    parser.add_argument(
        "--head-norm-eps",
        type=float,
        metavar="EPS",
        help="of the norm in the head [1e-5 for official files, 1e-6 for timm's]",
    )
    _add_format_arguments(parser)
    shape = parser.add_argument_group(
        "preprocessing", "defaults are those of config.json, or of the published weights"
    )
    shape.add_argument("--input-size", type=int, metavar="PX")
    shape.add_argument("--crop-pct", type=float)
    shape.add_argument("--interpolation", choices=["bicubic", "bilinear"])
    shape.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"))
    shape.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    ablation = parser.add_argument_group(
        "ablations", "for checkpoints that differ from the paper's"
    )
    ablation.add_argument("--activation", choices=get_args(Activation))
    ablation.add_argument("--residual-scaling", choices=get_args(ResidualScaling))
    ablation.add_argument("--block-bias", action="store_true", default=None)
    ablation.add_argument(
        "--mixers", nargs=4, choices=get_args(Mixer), metavar="MIXER", help="one a stage"
    )


def _add_format_arguments(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument_group("formats")
    target.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="onnx: a package. tensorrt: a package with an engine for this machine's GPU in it. "
        "triton: a model repository, --out, whose model folder holds the package [%(default)s]",
    )
    target.add_argument(
        "--max-batch-size",
        type=_batch_size,
        metavar="N",
        help=f"largest batch of an engine or a Triton model [{MAX_BATCH_SIZE}]",
    )
    target.add_argument(
        "--engine-cache",
        type=Path,
        metavar="DIR",
        help="engines and kernel timings of earlier builds",
    )
    target.add_argument(
        "--triton-platform",
        choices=["onnxruntime", "tensorrt"],
        help="what runs the model in Triton [onnxruntime]",
    )
    target.add_argument(
        "--triton-device",
        choices=["auto", "cpu", "gpu"],
        help="what Triton runs it on [auto]",
    )


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("weights", "downloaded from the hub unless a file is given")
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the weights: .safetensors, .pth, .pt or .bin, in the official layout, timm's or ours",
    )
    source.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="timm's config.json of that file: labels and preprocessing",
    )
    source.add_argument(
        "--labels",
        metavar="FILE",
        help="one label a line, or a .json with label_names, or imagenet-1k, or imagenet-21k",
    )
    # Where a first use wants the package, for the sentence that says how to do without the hub.
    source.add_argument("--place", help=argparse.SUPPRESS)
    source.add_argument("--revision", metavar="REV", help="branch, tag or commit to download")
    source.add_argument("--sha256", metavar="HEX", help="what the weights' file must have")


def refuse_idle_flags(arguments: argparse.Namespace, *, of_a_package: bool) -> None:
    """Refuse flags that would have no effect, rather than let them be believed in.

    Args:
        arguments: as parsed.
        of_a_package: whether the export starts from a package that is there.

    Raises:
        ValueError: naming the first.
    """
    chosen = arguments.format
    for name, formats in _OF_FORMATS.items():
        if getattr(arguments, name) is not None and chosen not in formats:
            raise ValueError(
                f"{_flag(name)} has no effect with --format {chosen}; leave it out, or choose "
                f"--format {' or '.join(formats)}"
            )
    idle = (*_OF_WEIGHTS, *(("name",) if chosen == "tensorrt" else ()))
    for name in idle if of_a_package else ():
        if getattr(arguments, name) not in (None, False):
            raise ValueError(
                f"{_flag(name)} has no effect on a package that is there; leave it out, or export "
                "from --checkpoint FILE"
            )


def describes_weights(arguments: argparse.Namespace) -> bool:
    """Tell whether a flag asks for other weights, or another network, than a name stands for."""
    return any(getattr(arguments, name) not in (None, False) for name in _OF_WEIGHTS)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def ablated(architecture: Architecture, arguments: argparse.Namespace) -> Architecture:
    """Return the architecture with the fields that the command line changes."""
    fields = ("activation", "residual_scaling", "block_bias", "mixers", "input_size")
    given = {name: getattr(arguments, name) for name in fields}
    changes = {name: value for name, value in given.items() if value is not None}
    if "mixers" in changes:
        changes["mixers"] = tuple(changes["mixers"])
    # Random matrices are as large as the grid was in training: another size is another network,
    # which `check_input_size` refuses.
    if "random" in architecture.mixers:
        changes.pop("input_size", None)
    return replace(architecture, **changes)


def input_spec(
    architecture: Architecture, stated: Mapping[str, Any], arguments: argparse.Namespace
) -> InputSpec:
    """Return the preprocessing: flags go before what belongs to the weights.

    Raises:
        ValueError: a value that cannot be; the sentence names its flag.
    """
    flags = {"size": arguments.input_size} | {
        name: getattr(arguments, name) for name in ("crop_pct", "interpolation", "mean", "std")
    }
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return InputSpec.model_validate({"size": architecture.input_size, **stated, **given})
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        flag = f"--{name.replace('_', '-').replace('size', 'input-size')}"
        where = flag if name in given else f"{name} in config.json:"
        raise ValueError(f"{where} {fault['input']}: {fault['msg'].lower()}") from error


def _batch_size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:  # METASERVE_MAX_BATCH_SIZE's bounds
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 1024")
    return int(text)
