"""Everything of a run that lies on disk: its folder, weights and state files, its name, whose it is."""
