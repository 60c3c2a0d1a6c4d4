"""Decode one clip by several processes, each in its share of the memory:

    torchrun --nproc-per-node 2 examples/decode_together.py latents.safetensors out.mp4

Every process reads the few latents and has its part of the pixels; the first one writes the video.
"""

import sys

import torch
import torch.distributed

from temporal_vae import TemporalVAE, read_latents, save_video, sharded


def main() -> None:
    """See the module."""
    source, target = sys.argv[1:]
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    device = f"cuda:{torch.distributed.get_node_local_rank()}" if cuda else "cpu"
    vae = TemporalVAE.from_pretrained("tiny").requires_grad_(False).float().to(device)
    latent, info = read_latents(source)  # not scaled
    own = sharded.part(vae, latent.to(device))
    pixels = sharded.decode(vae, own, memory="2GiB")
    video = sharded.gather(vae, pixels)  # on the CPU of the first process; None elsewhere
    if video is not None:
        save_video(video[..., : info.height, : info.width], target, fps=info.fps)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
