"""Checkpoints to proven model packages."""
