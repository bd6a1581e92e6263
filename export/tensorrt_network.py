"""ONNX file -> TensorRT network, with every check that the library leaves to its caller.

The library raises nothing and warns of little: two bytes of garbage parse as a network without
layers, a norm over one group becomes one over each channel, and a graph of float32 builds a
float32 engine whatever it is called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.package import PackageError
from models.tensorrt import first_error

INPUT = "images"
OUTPUTS = {"logits", "embedding"}

_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}


class PlanError(PackageError):
    """An engine that cannot be built; one sentence that says why."""


def parse_network(trt: Any, builder: Any, log: Any, path: Path, input_size: int) -> Any:
    """Read a graph and check that it is the served one and was understood.

    Args:
        trt: the library.
        builder: of the library; it must outlive the network.
        log: from `error_log`, the builder's.
        path: the ONNX file.
        input_size: S of its input, uint8 (batch, S, S, 3).

    Returns:
        The network: strongly typed, so the graph's types are the engine's.

    Raises:
        PlanError: it cannot be parsed, or is not computed as it is meant.
    """
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(path))
    if not parsed or parser.num_errors:
        raise PlanError(f"{trt.__name__} cannot read {path}: {_parser_errors(parser, log)}")
    if network.num_layers == 0:
        raise PlanError(f"{path} is no ONNX graph: {trt.__name__} finds no layer in it")
    _check_ends(network, path, input_size)
    for layer in layers(network):
        if layer.type.name == "NORMALIZATION":
            _check_norm(trt, layer, path)
        elif layer.type.name.startswith("ATTENTION"):
            _check_attention(layer, path)
    return network


def layers(network: Any) -> Iterator[Any]:
    """Yield every layer."""
    return (network.get_layer(index) for index in range(network.num_layers))


def precision_of(network: Any) -> str:
    """Return the type that convolutions and matrix products compute in.

    Returns:
        `fp32` where all do; `fp16` or `bf16` where most do and the rest stay in float32, as norms
        and the head may; else the types and how often each occurs, in words.
    """
    found: Counter[str] = Counter(
        layer.get_output(0).dtype.name
        for layer in layers(network)
        if layer.type.name in ("CONVOLUTION", "MATRIX_MULTIPLY")
    )
    most, count = found.most_common(1)[0] if found else ("FLOAT", 0)
    others = set(found) - {most, "FLOAT"}
    is_clear = not others and (len(found) <= 1 or (most != "FLOAT" and count > found["FLOAT"]))
    if is_clear and most in _PRECISIONS:
        return _PRECISIONS[most]
    return "a mixture of " + ", ".join(f"{kind} ({times})" for kind, times in sorted(found.items()))


def _parser_errors(parser: Any, log: Any) -> str:
    if parser.num_errors == 0:
        return first_error(log)
    error = parser.get_error(0)
    node = f" at node {error.node_name()} ({error.node_operator()})" if error.node_name() else ""
    more = f", and {parser.num_errors - 1} more" if parser.num_errors > 1 else ""
    return f"{error.desc().splitlines()[0]}{node}{more}"


def _check_ends(network: Any, path: Path, input_size: int) -> None:
    """Compare inputs and outputs with those of every served graph."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    found = [(tensor.name, tensor.dtype.name, tuple(tensor.shape)) for tensor in inputs]
    wanted = (INPUT, "UINT8", (-1, input_size, input_size, 3))
    if found != [wanted]:
        raise PlanError(
            f"{path} takes {found}, not one input {wanted} with -1 for the batch; export it again"
        )
    answers = {(tensor.name, tensor.dtype.name, len(tensor.shape)) for tensor in outputs}
    if answers != {(name, "FLOAT", 2) for name in OUTPUTS}:
        raise PlanError(
            f"{path} gives {sorted(answers)}, not float32 rows logits and embedding; "
            "export it again"
        )


def _check_norm(trt: Any, layer: Any, path: Path) -> None:
    """Refuse a norm over anything but the last axis or everything besides the batch.

    From opset 21 on a GroupNormalization of one group is read as a norm of each channel, without a
    word: its axes leave the channels out.
    """
    # What the network hands out is a plain layer; this is how the library casts it.
    layer.__class__ = trt.INormalizationLayer
    shape = tuple(layer.get_input(0).shape)
    scale = tuple(layer.get_input(1).shape)
    axes = {axis for axis in range(len(shape)) if layer.axes >> axis & 1}
    spread = {axis for axis in range(1, len(shape)) if shape[axis] != 1}
    covers_the_image = spread <= axes and 0 not in axes
    last = len(shape) - 1
    covers_the_channels = axes == {last} and scale[last] == shape[last]
    if not (covers_the_image or covers_the_channels) or layer.num_groups != 1:
        raise PlanError(
            f"{trt.__name__} reads the norm {layer.name} of {path} as one over axes "
            f"{sorted(axes)} of {shape}, which is not what the network computes; "
            "export the graph again at opset 20"
        )


def _check_attention(layer: Any, path: Path) -> None:
    """Refuse fused attention in float32, which the builder fails at or dies of."""
    kinds = {layer.get_input(index).dtype.name for index in range(layer.num_inputs)}
    if "FLOAT" in kinds:
        raise PlanError(
            f"{path} holds an Attention node in float32, for which TensorRT has no kernel; "
            "export the graph again at opset 20, or in fp16 or bf16"
        )
