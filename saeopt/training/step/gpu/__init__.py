"""The fast steps on a CUDA device."""
