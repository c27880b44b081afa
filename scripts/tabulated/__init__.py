"""A study that was trained in full once, as a table, and searches that are replayed on it (`compare_search.py`)."""
