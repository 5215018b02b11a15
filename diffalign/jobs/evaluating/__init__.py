"""Compare: models on a prompt set, rankings, published protocols."""
