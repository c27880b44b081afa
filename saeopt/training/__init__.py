"""The pack, its stacks, the loop that trains it, checkpoints and loggers."""
