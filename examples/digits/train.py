"""Train `caformer_digits`: `python -m examples.digits.train --out caformer_digits.safetensors`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from examples.digits.augment import Fields, draw
from examples.digits.data import (
    CLASSES,
    Scans,
    render_scan,
    training_and_validation_scans,
    training_scans,
)
from examples.digits.strokes import style_weights, trace
from models.metaformer import MetaFormer
from models.package import InputSpec
from models.serving import ServedModel
from models.variants import CAFORMER_DIGITS


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        epochs: an epoch is `drawings_per_scan` drawings for every scan.
        drawings_per_scan: likewise.
        batch: images of one step.
        learning_rate: the highest, after the warm-up; it falls to zero along a cosine.
        warmup_epochs: how long the learning rate rises; at most half of the training.
        weight_decay: of matrices and kernels; vectors are left alone.
        label_smoothing: share of the target spread over all classes.
        ema_decay: of the moving average of the weights, which is what is saved.
        seed: of the weights and of the drawings.
    """

    epochs: int = 70
    drawings_per_scan: int = 10
    batch: int = 128
    learning_rate: float = 3e-3
    warmup_epochs: int = 3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    ema_decay: float = 0.998
    seed: int = 0


def train(scans: Scans, validation: Scans | None, recipe: Recipe) -> MetaFormer:
    """Train a network and print a line an epoch.

    Args:
        scans: what the weights are fitted to.
        validation: reported, where given; it changes nothing.
        recipe: how.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    fields, labels = Fields.of(trace(scans)), torch.from_numpy(scans.labels)
    weights = torch.from_numpy(style_weights(scans))
    network = MetaFormer(CAFORMER_DIGITS, CLASSES)
    model = ServedModel(network, InputSpec(size=CAFORMER_DIGITS.input_size))
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(_parameter_groups(network, recipe), lr=recipe.learning_rate)
    steps = -(-len(labels) * recipe.drawings_per_scan // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=steps * recipe.epochs,
        pct_start=min(recipe.warmup_epochs / recipe.epochs, 0.5),
        cycle_momentum=False,
    )
    for epoch in range(1, recipe.epochs + 1):
        started, losses = time.monotonic(), []
        for chosen in _batches(weights, recipe, generator):
            logits, _ = model(draw(fields, chosen, generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            _follow(average, model, recipe.ema_decay)
            losses.append(loss.item())
        report = f"epoch {epoch}/{recipe.epochs} loss {np.mean(losses):.4f}"
        if validation is not None:
            report += f" validation {accuracy(average, validation):.4f}"
        print(f"{report} ({time.monotonic() - started:.1f} s)", flush=True)
    network.load_state_dict(average.network.state_dict())
    return network.eval()


def accuracy(model: nn.Module, scans: Scans) -> float:
    """Return the share of scans read correctly, as a client would send them."""
    images = [render_scan(ink, CAFORMER_DIGITS.input_size).convert("RGB") for ink in scans.ink]
    with torch.inference_mode():
        logits, _ = model(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    return float((logits.argmax(1).numpy() == scans.labels).mean())


def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average of the weights towards the weights."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight.detach(), 1 - decay)


def _batches(weights: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the int64 indices of an epoch, drawn by weight."""
    count = len(weights) * recipe.drawings_per_scan
    order = torch.multinomial(weights, count, replacement=True, generator=generator)
    for start in range(0, count, recipe.batch):
        yield order[start : start + recipe.batch]


def _parameter_groups(network: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    """Keep weight decay from norms, scales and biases."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def main() -> None:
    """Train, then save the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--threads", type=int, default=1, help="of torch; more changes rounding")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="train on four fifths of the training digits and report on the rest",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scans, validation = (
        training_and_validation_scans() if arguments.validate else (training_scans(), None)
    )
    network = train(scans, validation, Recipe(epochs=arguments.epochs))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
