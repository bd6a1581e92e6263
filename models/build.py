"""The one place where a row of the catalogue and a state dict become a network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.checkpoints import Checkpoint, fit_state
from models.metaformer import MetaFormer
from models.package import Package
from models.serving import ServedModel
from models.variants import Architecture


def build_network(architecture: Architecture, checkpoint: Checkpoint) -> MetaFormer:
    """Build a network in evaluation mode with a checkpoint's weights.

    Raises:
        CheckpointError: the checkpoint does not fit; the sentence names the key.
    """
    network = MetaFormer(architecture, checkpoint.classes, checkpoint.head_norm_eps)
    return load_state(network, fit_state(checkpoint.state, network.state_dict()))


def load_state(network: MetaFormer, state: Mapping[str, Tensor]) -> MetaFormer:
    """Load fitted weights and switch the network to evaluation."""
    network.load_state_dict(dict(state), strict=True)
    return network.eval().requires_grad_(False)


def load_served_model(package: Package) -> ServedModel:
    """Build the served model of a package from its `weights.safetensors`.

    Raises:
        PackageError: the package holds no weights.
        CheckpointError: the weights do not fit the manifest's architecture.
    """
    from safetensors.torch import load_file

    manifest = package.manifest
    network = MetaFormer(
        manifest.architecture.to_architecture(), manifest.classes, manifest.head_norm_eps
    )
    state = load_file(package.weights_path)
    return ServedModel(
        load_state(network, fit_state(state, network.state_dict())), manifest.input
    ).eval()
