"""Reads the switch of tests/required.py before any test looks at the environment."""

import tests.required  # noqa: F401
