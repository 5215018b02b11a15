"""The embedded world: captions of coloured shapes, a renderer, and an oracle that measures images exactly."""
