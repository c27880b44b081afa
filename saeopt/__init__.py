"""saeopt trains and evaluates sparse autoencoders on language-model activations, at the scale of sweeps."""

__version__ = "0.1.0"
