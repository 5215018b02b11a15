"""The embedded world: how it is made, and the demo that is set in it."""
