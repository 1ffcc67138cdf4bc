"""Floor 7: the loop, its clients, text in and out."""
