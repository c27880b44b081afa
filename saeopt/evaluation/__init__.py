"""Metrics, spliced cross-entropy, plots and reports."""
