"""SAEs for other tools: one file per foreign format (`formats.FORMATS`), which says itself what it cannot say exactly."""
