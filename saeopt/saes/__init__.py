"""The dictionary learners, one file each. Knows torch only; importing this package imports no torch."""
