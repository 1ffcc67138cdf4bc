"""Floor 5, data plane: plan to tensors to result."""
