"""Floor 8: workloads, load, reports. Works with torch not installed; every figure it prints was measured."""
