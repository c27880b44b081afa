"""Search space, storage, claims and retries, objectives and packing. Never touches a tensor."""
