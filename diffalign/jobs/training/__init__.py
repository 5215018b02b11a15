"""Train: from a configuration to an aligned model, and what a run needs on the way."""
