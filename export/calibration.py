"""How large the squares of a network grow: what tells whether float16 holds them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from export.seams import Answers, ReadImage, UnusableImage
from export.verify import VerificationError, torch_run
from models.layers import SquaredReLU, StarReLU
from models.package import ActivationRange, Calibration, InputSpec, PackageError
from models.serving import ServedModel

FLOAT16_MAX = 65504.0
# Images that are served differ from those of the calibration: squares may grow by these factors
# before they overflow. Real images reached 4.8 times the values of the golden ones in the embedded
# network; among themselves they differ less.
GOLDEN_HEADROOM = 16.0
REAL_HEADROOM = 2.0

MOST_IMAGES = 256
CHUNK = 8


class OverflowsFloat16(Exception):
    """Activations that float16 does not hold; one sentence that names the largest."""


def read_images(folder: Path, spec: InputSpec, read_image: ReadImage) -> NDArray[np.uint8]:
    """Read the images of a folder, the first 256 by name; what is no image is passed over.

    Returns:
        uint8 (N, S, S, 3).

    Raises:
        PackageError: there is no such folder, or no image in it.
    """
    images: list[NDArray[np.uint8]] = []
    for path in sorted(folder.glob("**/*")):
        if path.is_file() and len(images) < MOST_IMAGES:
            with contextlib.suppress(UnusableImage):
                images.append(read_image(path.read_bytes(), spec))
    if not images:
        raise PackageError(f"{folder} holds no images to calibrate with")
    return np.stack(images)


def calibrate(
    model: ServedModel, golden: NDArray[np.uint8], real: NDArray[np.uint8] | None = None
) -> tuple[Answers, Calibration]:
    """Run images through a network and note the range of every squaring activation.

    Args:
        model: in float32, on the CPU.
        golden: uint8 (N, S, S, 3), run in one batch.
        real: more images, as they will be served; None where there are none.

    Returns:
        The answers to the golden images; and for each StarReLU, and the squared ReLU of an `mlp`
        head, its range over all images.

    Raises:
        VerificationError: the network computes values that are not finite.
    """
    found: dict[str, tuple[float, float]] = {}
    squares: dict[nn.Module, str] = {
        module: name.removeprefix("network.")
        for name, module in model.named_modules()
        if isinstance(module, StarReLU | SquaredReLU)
    }

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        before, after = found.get(squares[module], (0.0, 0.0))
        largest = float(inputs[0].max()), float(output.abs().max())
        # numpy's maximum, not Python's, which loses a NaN that comes second.
        found[squares[module]] = np.maximum(before, largest[0]), np.maximum(after, largest[1])

    run = torch_run(model)
    hooks = [module.register_forward_hook(note) for module in squares]
    try:
        answers = run(golden)
        more = np.empty((0, *golden.shape[1:]), np.uint8) if real is None else real
        for start in range(0, len(more), CHUNK):
            run(more[start : start + CHUNK])
    finally:
        for hook in hooks:
            hook.remove()
    if not all(np.isfinite(part).all() for part in (*answers, list(found.values()))):
        raise VerificationError("the network computes values that are not finite")
    activations = {
        name: ActivationRange(largest_input=float(before), largest_output=float(after))
        for name, (before, after) in found.items()
    }
    images = len(golden) + len(more)
    return answers, Calibration(images=images, real_images=len(more), activations=activations)


def check_float16(calibration: Calibration) -> None:
    """Refuse a network whose activations come near the end of float16.

    The head is computed in float32 and does not count.

    Raises:
        OverflowsFloat16: with the module and its figures.
    """
    limit = FLOAT16_MAX / (REAL_HEADROOM if calibration.real_images else GOLDEN_HEADROOM)
    hint = "" if calibration.real_images else ", or show it real images with --calibration DIR"
    for name, activation in calibration.by_output():
        if name.startswith("head."):
            continue
        # The square alone too: a folded scale comes after it.
        if not (activation.largest_output <= limit and activation.largest_input**2 <= limit):
            raise OverflowsFloat16(
                f"{name} reaches {activation.largest_output:.3g} from an input of "
                f"{activation.largest_input:.3g}, where float16 ends at {FLOAT16_MAX:.5g} and "
                f"{limit:.5g} is allowed; use --precision bf16{hint}"
            )


def format_calibration(calibration: Calibration) -> str:
    """Return the report: every activation, the largest output first."""
    lines = [
        f"largest values over {calibration.images} calibration images "
        f"(float16 ends at {FLOAT16_MAX:.5g}):",
        f"  {'activation':<40}{'input':>10}{'output':>10}",
    ]
    lines += [
        f"  {name:<40}{activation.largest_input:>10.3g}{activation.largest_output:>10.3g}"
        for name, activation in calibration.by_output()
    ]
    return "\n".join(lines)
