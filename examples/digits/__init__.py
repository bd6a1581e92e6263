"""The training of `caformer_digits`, the embedded model, on real handwritten digits."""
