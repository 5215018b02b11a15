"""Score any number of pictures: sources, decoding in worker processes, stored scores, shares of several processes."""
