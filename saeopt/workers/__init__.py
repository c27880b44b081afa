"""The worker: claims of packs, the process that trains them, and what each trial is told."""
