"""Comparison with other libraries (`scripts/compare_peers.py`)."""
