"""Train and convert reward models."""
