"""Ways to walk the layers of a network over a clip; all give the same result."""
