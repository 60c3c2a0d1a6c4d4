"""Decode latents piece by piece in ONNX Runtime, without torch and without this library.

python stream_onnx.py GRAPHS LATENTS.npy FRAMES.npy, where `tvae export MODEL GRAPHS` made GRAPHS.
"""

import sys

import numpy as np
import onnxruntime

folder, source, target = sys.argv[1:]
latents = np.load(source)  # (B, L, T, h, w), float32
step = onnxruntime.InferenceSession(f"{folder}/decode_step.onnx")
delay = int(step.get_modelmeta().custom_metadata_map["delay"])  # 0 for a causal model

sizes = {"batch": latents.shape[0], "rows": latents.shape[3], "columns": latents.shape[4]}
state = {}  # zeros, of sizes such as "batch", 64 or "2*rows"
for port in step.get_inputs()[1:]:
    axes = [str(axis).split("*") for axis in port.shape]
    shape = [int(np.prod([sizes[n] if n in sizes else int(n) for n in axis])) for axis in axes]
    state[port.name] = np.zeros(shape, np.int64 if "int64" in port.type else np.float32)
if delay:  # a model that looks ahead has to know where the clip ends, by then
    state["length"][:] = latents.shape[2]
    latents = np.pad(latents, ((0, 0), (0, 0), (0, delay), (0, 0), (0, 0)))

frames = []
for piece in np.split(latents, range(4, latents.shape[2], 4), 2):
    video, *after = step.run(None, {"latent": piece, **state})
    state = dict(zip(state, after, strict=True))
    frames.append(video)
np.save(target, np.concatenate(frames, 2)[:, :, delay:])
