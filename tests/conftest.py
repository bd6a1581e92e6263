"""Reads the switches of the tests before any of them looks at the environment."""

import tests.k8s.place
import tests.required
import tests.triton.place  # noqa: F401
