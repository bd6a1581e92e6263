"""The load generator: open-loop or closed-loop, latencies counted from the intended start."""
