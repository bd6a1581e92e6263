"""Where the validators of manifests are installed; imports nothing that a test could lack."""

from __future__ import annotations

import os
from pathlib import Path

# Taken out of the environment, where the service would refuse it; conftest.py imports this module
# before any test runs.
VENV = Path(os.environ.pop("METASERVE_TESTS_K8S_VENV", Path(__file__).parents[2] / ".venv-k8s"))
