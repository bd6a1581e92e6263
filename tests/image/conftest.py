"""Tests of a built image run where a container engine is named; `make test-image` does so."""

import os

ENGINE = os.environ.pop("METASERVE_IMAGE_ENGINE", "")
collect_ignore = [] if ENGINE else ["test_image.py"]
