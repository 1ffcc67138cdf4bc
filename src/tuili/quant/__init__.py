"""Floor 2: how weights are stored and multiplied. A format is one file of ``formats/``."""
