"""Bytes to pixels, and numbers to ranked labels."""
