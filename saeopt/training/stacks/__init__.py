"""Stacks: members of one architecture and shape that are stepped together."""
