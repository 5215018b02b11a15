"""Draw: which models, which prompts, and the pictures they make."""
