"""Worked examples: a model trained from scratch, and images to send."""
