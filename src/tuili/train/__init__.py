"""Floor 8: makes the project's own models; same layers and ops as the engine."""
