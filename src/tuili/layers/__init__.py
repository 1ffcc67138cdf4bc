"""Floor 3: the parts that models are made of."""
