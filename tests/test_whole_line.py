"""The whole line on real photographs: timm's own pipeline against our running service.

The same weights, from a file in timm's layout: on one side timm's transform and timm's model, on
the other `metaserve export`, `metaserve serve` and JSON over a socket.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from app.cli import main
from models.tolerances import cosine_distance
from tests.images.files import photographs
from tests.reference import randomise, timm_model, timm_transform
from tests.servers import ServiceProcess, service_process

VARIANTS = ("caformer_s18", "convformer_s18")
BACKENDS = ("onnxruntime", "torch")

Answers = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits less their log-sum-exp, and embeddings, one row a photograph."""


def jpegs() -> list[bytes]:
    """Return real photographs as the JPEG files a client would send."""
    files = []
    for path in photographs():
        buffer = BytesIO()
        Image.open(path).convert("RGB").save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


@pytest.fixture(scope="module", params=VARIANTS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Answers]:
    """A package made by our export, and what timm answers with the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    model = randomise(timm_model(request.param), seed=11)
    checkpoint, package = folder / "model.safetensors", folder / request.param
    save_file(model.state_dict(), checkpoint)
    arguments = ["export", request.param, "--checkpoint", str(checkpoint), "--out", str(package)]
    assert main(arguments) == 0
    return package, timm_answers(model)


@torch.inference_mode()
def timm_answers(model: torch.nn.Module) -> Answers:
    transform = timm_transform(224)
    images = [transform(Image.open(BytesIO(file)).convert("RGB")) for file in jpegs()]
    features = model.forward_features(torch.stack(images))  # type: ignore[operator]
    logits = model.forward_head(features)  # type: ignore[operator]
    embedding = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return logits.log_softmax(1).numpy(), embedding.numpy()


def served_answers(service: ServiceProcess) -> Answers:
    """Ask for all classes and the vector of each photograph.

    The reply holds probabilities; their logarithms are the logits less one number an image.
    """
    rows, vectors = [], []
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        for file in jpegs():
            reply = client.post("/classify?top_k=1000", content=file)
            assert reply.status_code == 200, reply.text
            predictions = reply.json()["predictions"]
            row = np.empty(1000)
            row[[one["index"] for one in predictions]] = [one["probability"] for one in predictions]
            rows.append(np.log(row))
            reply = client.post("/embed", content=file)
            vectors.append(np.array(reply.json()["embedding"], np.float32))
    return np.stack(rows).astype(np.float32), np.stack(vectors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_service_answers_photographs_as_timm_does(
    trained: tuple[Path, Answers], backend: str
) -> None:
    package, (expected_logits, expected_embedding) = trained
    env = {
        "METASERVE_MODEL": str(package),
        "METASERVE_BACKEND": backend,
        "METASERVE_MAX_BATCH_SIZE": "2",  # warming larger ones takes torch half a minute
    }
    with service_process(env) as service:
        logits, embedding = served_answers(service)
    assert len(logits) >= 3
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=0)
    assert (logits.argmax(1) == expected_logits.argmax(1)).all()
    assert cosine_distance(embedding, expected_embedding).max() <= 1e-6
    # Vectors of different photographs are apart, so the distance above says something.
    assert cosine_distance(embedding[:1], embedding[1:2]).min() > 1e-4
