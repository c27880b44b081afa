"""Language model, token data and the stream of activations."""
