"""Using what was trained: SAEs spliced into a language model. Knows `activations` and `saes`, and no training."""
