"""Training of the bundled weights: `data` makes batches of clips, `loop` trains by a recipe."""
