"""What runs the network: one class each."""
