"""The backward pass of power retention: an op of its own."""
