"""How a model is made: `recipe` says how, `data` draws batches of clips, `loop` trains."""
