"""Finds the settings that serve the most requests within a promised latency, on this machine."""
