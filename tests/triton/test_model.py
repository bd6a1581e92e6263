"""A server's words about its model, against the package's; no server needed."""

from __future__ import annotations

from typing import Any

import pytest

from app.backends.triton_model import MOST_LANES, Described, check_model
from app.errors import StartupError
from models.package import Package
from tests.required import require

Tensor = tuple[str, str, list[int]]

IMAGES: Tensor = ("images", "UINT8", [-1, 32, 32, 3])
LOGITS: Tensor = ("logits", "FP32", [-1, 10])
EMBEDDING: Tensor = ("embedding", "FP32", [-1, 64])


def described(
    inputs: list[Tensor] | None = None,
    outputs: list[Tensor] | None = None,
    max_batch_size: int = 8,
    groups: list[dict[str, Any]] | None = None,
) -> Described:
    """Return what a server would say; the embedded package's model where nothing is given."""
    service = require("tritonclient.grpc.service_pb2")
    config = require("tritonclient.grpc.model_config_pb2")

    def messages(tensors: list[Tensor]) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": kind, "shape": dims} for name, kind, dims in tensors]

    return Described(
        "2.51.0",
        service.ModelMetadataResponse(
            inputs=messages([IMAGES] if inputs is None else inputs),
            outputs=messages([LOGITS, EMBEDDING] if outputs is None else outputs),
        ),
        config.ModelConfig(max_batch_size=max_batch_size, instance_group=groups or []),
    )


def refusal(package: Package, **differs: Any) -> str:
    with pytest.raises(StartupError) as caught:
        check_model(described(**differs), package, "model m on Triton at t:1")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_packages_own_model_is_taken(package: Package) -> None:
    check_model(described(), package, "m")
    check_model(described(outputs=[("more", "FP32", [-1]), EMBEDDING, LOGITS]), package, "m")


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ({"inputs": [("images", "FP32", [-1, 3, 32, 32])]}, "images is FP32 [-1, 3, 32, 32] there"),
        ({"inputs": [("pixels", "UINT8", [-1, 32, 32, 3])]}, "images is missing there"),
        ({"inputs": [IMAGES, ("mask", "BOOL", [-1])]}, "mask is BOOL [-1] there and missing here"),
        ({"outputs": [LOGITS]}, "embedding is missing there and FP32 [-1, 64] here"),
        ({"outputs": [("logits", "FP16", [-1, 10]), EMBEDDING]}, "logits is FP16 [-1, 10] there"),
        ({"max_batch_size": 0}, "takes no batches; set max_batch_size"),
    ],
)
def test_what_differs_is_named_on_both_sides(
    package: Package, differs: dict[str, Any], says: str
) -> None:
    sentence = refusal(package, **differs)
    assert "model m on Triton at t:1" in sentence
    assert says in sentence


@pytest.mark.parametrize(
    ("groups", "lanes", "device"),
    [
        ([], 2, "unknown"),
        ([{"count": 1, "kind": "KIND_CPU"}], 2, "cpu"),
        ([{"count": 2, "kind": "KIND_GPU", "gpus": [0, 1]}], 5, "cuda"),
        ([{"count": 1, "kind": "KIND_GPU"}, {"count": 1, "kind": "KIND_CPU"}], 3, "unknown"),
        ([{"count": 90, "kind": "KIND_CPU"}], MOST_LANES, "cpu"),
    ],
)
def test_every_instance_is_kept_busy_and_one_batch_waits(
    groups: list[dict[str, Any]], lanes: int, device: str
) -> None:
    model = described(groups=groups)
    assert (model.lanes, model.device) == (lanes, device)
