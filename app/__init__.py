"""The service: an image over HTTP in, a label or a vector out."""
