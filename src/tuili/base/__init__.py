"""Floor 0: errors, config, registry, clock, log. Imports nothing of Tuili."""
