"""Floor 1, control plane: requests, blocks, scheduling. Imports no torch and nothing of ``tuili.ops``."""
