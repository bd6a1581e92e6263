"""The one place where a row of the catalogue and a state dict become a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.checkpoints import Checkpoint, fit_state, load_checkpoint
from models.metaformer import MetaFormer
from models.package import Package, PackageError
from models.serving import ServedModel
from models.variants import Architecture


def build_network(architecture: Architecture, checkpoint: Checkpoint) -> MetaFormer:
    """Build a network in evaluation mode with a checkpoint's weights.

    Raises:
        CheckpointError: the checkpoint does not fit; the sentence names the key.
    """
    return _build(architecture, checkpoint.state, checkpoint.classes, checkpoint.head_norm_eps)


def load_served_model(package: Package) -> ServedModel:
    """Build the served model of a package from its `weights.safetensors`.

    Raises:
        PackageError: the package holds no weights, or describes no network.
        CheckpointError: the weights cannot be read or do not fit the manifest's architecture.
    """
    manifest = package.manifest
    try:
        architecture = manifest.architecture.to_architecture()
    except ValueError as error:
        raise PackageError(
            f"the manifest of {package.path} describes no network: {error}"
        ) from error
    network = _build(
        architecture,
        load_checkpoint(package.weights_path).state,
        manifest.classes,
        manifest.head_norm_eps,
    )
    return ServedModel(network, manifest.input).eval()


def _build(
    architecture: Architecture, state: Mapping[str, Tensor], classes: int, head_norm_eps: float
) -> MetaFormer:
    # On the meta device the initial values, which the weights replace, cost no time.
    with torch.device("meta"):
        network = MetaFormer(architecture, classes, head_norm_eps)
    fitted = fit_state(state, network.state_dict())
    # Copied, not assigned: safetensors maps the file, which may be overwritten under a server.
    network.to_empty(device="cpu").load_state_dict(fitted, strict=True)
    return network.eval().requires_grad_(False)
