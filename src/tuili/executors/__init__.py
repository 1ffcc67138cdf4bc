"""Floor 6: where plans run. ``local`` runs the model here, ``simulated`` prices plans under a virtual clock."""
