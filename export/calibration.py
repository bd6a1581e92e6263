"""How large the squares of a network grow: what tells whether float16 holds them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.candidate import Answers
from export.verify import VerificationError, torch_run
from models.layers import SquaredReLU, StarReLU
from models.package import ActivationRange, Calibration
from models.serving import ServedModel

FLOAT16_MAX = 65504.0
# Images that are served differ from those of the calibration: squares may grow by this factor
# before they overflow.
HEADROOM = 2.0


class OverflowsFloat16(Exception):
    """Activations that float16 does not hold; one sentence that names the largest."""


def calibrate(model: ServedModel, images: NDArray[np.uint8]) -> tuple[Answers, Calibration]:
    """Run images through a network and note the range of every squaring activation.

    Args:
        model: in float32, on the CPU.
        images: uint8 (N, S, S, 3).

    Returns:
        Its answers; and for each StarReLU, and the squared ReLU of an `mlp` head, its range.

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
        found[squares[module]] = float(F.relu(inputs[0]).max()), float(output.abs().max())

    hooks = [module.register_forward_hook(note) for module in squares]
    try:
        answers = torch_run(model)(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(np.isfinite(part).all() for part in (*answers, list(found.values()))):
        raise VerificationError("the network computes values that are not finite")
    activations = {
        name: ActivationRange(largest_input=before, largest_output=after)
        for name, (before, after) in found.items()
    }
    return answers, Calibration(images=len(images), activations=activations)


def check_float16(calibration: Calibration) -> None:
    """Refuse a network whose activations come near the end of float16.

    The head is computed in float32 and does not count.

    Raises:
        OverflowsFloat16: with the module and its figures.
    """
    limit = FLOAT16_MAX / HEADROOM
    for name, activation in calibration.by_output():
        if name.startswith("head."):
            continue
        # The square alone too: a folded scale comes after it.
        if not (activation.largest_output <= limit and activation.largest_input**2 <= limit):
            raise OverflowsFloat16(
                f"{name} reaches {activation.largest_output:.3g} from an input of "
                f"{activation.largest_input:.3g}, where float16 ends at {FLOAT16_MAX:.5g} and "
                f"{limit:.5g} is allowed; use --precision bf16"
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
