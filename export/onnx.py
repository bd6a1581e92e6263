"""ServedModel -> one ONNX file with a dynamic batch axis."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from models.folding import fold_served_model
from models.golden import golden_images
from models.metaformer import MetaFormer
from models.serving import ServedModel

# TensorRT's importer misreads one-group norms from 21 on; 20 is the newest before that.
OPSET = 20
# The first whose Conv and AveragePool take bfloat16. From 20 on the operators we use differ in the
# types they take alone, so a traced graph is raised by its number; the checker sees to it.
OPSET_BFLOAT16 = 22
# What opset 20 was released with; every runtime that reads the opset reads it.
IR_VERSION = 10


def export_onnx(model: ServedModel, input_size: int, path: Path) -> None:
    """Write a served model as `write_onnx` does, folded if it computes in float32.

    Folding is for CPUs, which run float32; a network that was cast for a GPU stays as it is.
    """
    folded = isinstance(model.network, MetaFormer)
    write_onnx(fold_served_model(model) if folded else model, input_size, path)


def write_onnx(model: nn.Module, input_size: int, path: Path) -> None:
    """Trace a model that takes and gives what a `ServedModel` does, and write it.

    The graph takes `images` uint8 (batch, S, S, 3) and gives `logits` and `embedding`, float32.

    Args:
        model: in evaluation mode, on the CPU.
        input_size: S.
        path: the file to write, weights included.
    """
    # The exporter specialises an axis of length one, so the example holds two images.
    example = torch.from_numpy(golden_images(input_size, 2))
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of torch about its own internals
        program = torch.onnx.export(
            model,
            (example,),
            None,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits", "embedding"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert program is not None  # with dynamo a program is always returned
    proto = program.model_proto
    strip_metadata(proto)
    proto.ir_version = IR_VERSION
    if any(one.data_type == onnx.TensorProto.BFLOAT16 for one in proto.graph.initializer):
        (main,) = (one for one in proto.opset_import if one.domain == "")
        main.version = OPSET_BFLOAT16
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def strip_metadata(model: onnx.ModelProto) -> None:
    """Delete what the exporter notes down beside the graph: stack traces, paths, source lines."""
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    model.producer_name, model.producer_version = "metaserve", ""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        graph.name = "metaserve"
        for message in (
            graph,
            *graph.node,
            *graph.input,
            *graph.output,
            *graph.value_info,
            *graph.initializer,
        ):
            message.ClearField("doc_string")
            message.ClearField("metadata_props")
        graphs.extend(
            attribute.g
            for node in graph.node
            for attribute in node.attribute
            if attribute.type == onnx.AttributeProto.GRAPH
        )
    for function in model.functions:
        for message in (function, *function.node):
            message.ClearField("doc_string")
            message.ClearField("metadata_props")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress off the terminal; ours says what is needed."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
