"""Floor 8: what fits and how fast it will be, computed from config.json and measured limits. No torch, no weights."""
