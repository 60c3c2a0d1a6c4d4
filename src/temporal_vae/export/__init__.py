"""The network as graphs that need no Python: of `torch.export`, and of ONNX."""
