"""Who tries what: the store and its queue, claims, heartbeats, reports. Never touches a tensor."""
