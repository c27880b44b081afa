"""SAEs for other tools: one file per foreign format (`formats.FORMATS`), each of which says what it cannot say exactly."""
