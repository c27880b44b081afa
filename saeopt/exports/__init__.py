"""SAEs for other tools: one file per foreign format (`formats.FORMATS`); it says what it cannot say exactly."""
