"""Dynamic batching: requests in, replies out."""
