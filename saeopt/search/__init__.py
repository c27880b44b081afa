"""What to try: search space, samplers, objectives. No database, no tensor."""
