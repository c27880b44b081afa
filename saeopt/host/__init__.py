"""The machine: devices, one GPU for each worker, launchers, signs that work goes on."""
