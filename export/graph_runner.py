"""Runs a package's graph in ONNX Runtime on the CPU, for the proof of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.seams import Answers, Run
from export.verify import VerificationError
from models.onnx_runtime import import_onnxruntime

_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def graph_run(path: Path, *, widen: bool = False) -> tuple[Run, str]:
    """Return a function that runs a graph, and what runs it in words.

    Args:
        path: the graph.
        widen: turn its half precisions into float32 of the same values first.

    Raises:
        VerificationError: onnxruntime is not installed, or cannot load the graph.
    """
    try:
        ort = import_onnxruntime()
    except ImportError as error:
        raise VerificationError(
            "verification runs the graph in onnxruntime; install metaserve[cpu]"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = widened_graph(path).SerializeToString() if widen else str(path)
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises bare RuntimeErrors of its own making
        raise VerificationError(f"onnxruntime cannot load {path}: {error}") from error

    def run(images: NDArray[np.uint8]) -> Answers:
        try:
            logits, embedding = session.run(["logits", "embedding"], {"images": images})
        except Exception as error:
            raise VerificationError(f"onnxruntime cannot run {path}: {error}") from error
        return logits, embedding

    how = ", widened to float32" if widen else ""
    return run, f"onnxruntime {ort.__version__} CPUExecutionProvider{how}"


def widened_graph(path: Path) -> onnx.ModelProto:
    """Return a graph with every half precision turned into float32 of the same value."""
    model = onnx.load(path)
    graph = model.graph
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALVES:
                attribute.i = onnx.TensorProto.FLOAT
            elif attribute.HasField("t"):
                _widen(attribute.t)
    del graph.value_info[:]  # states types that are no longer so; loading infers them again
    return model


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _HALVES:
        values: Any = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
