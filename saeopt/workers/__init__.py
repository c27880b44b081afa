"""The worker: claims of packs, the process that trains them, and how each trial ends."""
