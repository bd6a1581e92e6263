"""Pack trained weights as the embedded model, with the accuracy of the packed graph in it.

python -m examples.digits.package caformer_digits.safetensors models/pretrained/caformer_digits
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from app.backends.ort import OnnxRuntimeBackend
from app.images.decode import decode_image
from app.images.prepare import prepare_image
from examples.digits.data import held_out
from export.proofs import format_verification
from export.publish import ExportRequest, export_package
from export.weights import Weights
from models.classes import read_names
from models.package import Evaluation, InputSpec, Package
from models.variants import CAFORMER_DIGITS

LABELS = Path(__file__).parent / "labels.txt"


def evaluate(package: Package) -> Evaluation:
    """Classify the held-out digits as the service does: PNG, decode, resize, packed graph."""
    backend = OnnxRuntimeBackend(package, "cpu", threads=1)
    digits = held_out()
    correct = 0
    for png, label in digits:
        image, _ = decode_image(png, max_pixels=10_000, exif_orientation=True, draft_size=None)
        pixels = prepare_image(image, package.manifest.input)
        correct += int(backend.run(pixels[np.newaxis]).logits.argmax()) == label
    return Evaluation(
        dataset="held-out fifth of scikit-learn's handwritten digits (examples/digits/data.py)",
        images=len(digits),
        correct=correct,
        top1=correct / len(digits),
    )


def main() -> None:
    """Export, prove, evaluate and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint
    weights = Weights(
        CAFORMER_DIGITS.name,
        CAFORMER_DIGITS,
        checkpoint,
        file=checkpoint.name,
        names=read_names(LABELS),
    )
    request = ExportRequest(
        weights=weights,
        architecture=CAFORMER_DIGITS,
        input=InputSpec(size=CAFORMER_DIGITS.input_size),
        out=arguments.out,
        name=CAFORMER_DIGITS.name,
        overwrite=True,
        evaluation=evaluate,
    )
    package = export_package(request, lambda step: print(step, file=sys.stderr))
    print(format_verification(package.manifest, package.manifest.verification))
    print(package.manifest.evaluation)


if __name__ == "__main__":
    main()
