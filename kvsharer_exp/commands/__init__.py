"""One file per command; each wires the rooms below and knows nothing of how they work."""
