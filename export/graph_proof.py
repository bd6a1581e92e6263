"""The whole proof of a package's graph: by its export, and repeated by `metaserve verify`."""

from __future__ import annotations

from pathlib import Path

import torch

from export.graph_runner import graph_run
from export.seams import Answers
from export.verify import compare, judge, torch_answers, torch_run
from models.package import BackendProof, Verification
from models.precision import widen_network
from models.serving import ServedModel
from models.tolerances import Precision

# Ten times that of float32: constants that the exporter folds are rounded once more on the way.
WIDENED_TOLERANCE = 1e-3


def prove_graph(
    path: Path,
    input_size: int,
    precision: Precision,
    reference: Answers,
    served: ServedModel | None,
) -> tuple[Verification, tuple[BackendProof, ...]]:
    """Prove a graph against torch in float32.

    A bound as wide as half precision needs would let a slightly wrong graph pass. So a half graph
    is proven twice more: torch shows how the precision rounds, and the graph with its types
    widened to float32 has to keep a bound near float32's against the network with the same weights.

    Args:
        path: of the graph.
        input_size: S.
        precision: of the graph.
        reference: what torch in float32 answers.
        served: the network that the graph was traced from, in its precision; used up. None where
            there are no weights: then a half graph is proven as a float32 one is.

    Returns:
        The figures of the graph, and for half precision those of torch.

    Raises:
        VerificationError: a figure is out of its bound.
    """
    # ONNX Runtime runs no bfloat16 on a CPU.
    run, runtime = graph_run(path, widen=precision == "bf16")
    verification = compare(run, runtime, input_size, reference, precision)
    judge(verification, precision)
    if precision == "fp32" or served is None:
        return verification, ()
    runtime = f"torch {torch.__version__} eager"
    rounding = compare(torch_run(served), runtime, input_size, reference, precision)
    judge(rounding, precision)
    served.network = widen_network(served.network)
    run, runtime = graph_run(path, widen=True)
    exact = compare(run, runtime, input_size, torch_answers(served, input_size), "fp32")
    judge(exact.model_copy(update={"logit_tolerance": WIDENED_TOLERANCE}), "fp32")
    figures = rounding.model_dump()
    return verification, (
        BackendProof(**figures, backend="torch", precision=precision, device="cpu"),
    )
