"""Law 2: pieces equal the whole, for any cutting, causal and symmetric, on awake models."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import awake, difference, drawn, thinned
from hypothesis import strategies as st
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.network import timewise
from temporal_vae.network.primitives import PositionNorm, TimeConv
from temporal_vae.network.timewise import TemporalAttention
from temporal_vae.walks import streamed
from temporal_vae.walks.tracing import LiveBytes

State = Any


def clip(frames: int, channels: int = 3, size: int = 4, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, channels, frames, size, size, generator=generator).double()


def cut(x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    for start, stop in pairwise([0, *accumulate(sizes)]):
        yield x[:, :, start:stop]


def encode(model: TemporalVAE, pieces: Iterator[Tensor], **options: Any) -> list[Tensor | None]:
    state: State = ()
    out = []
    for piece in pieces:
        latents, state = model.encode_step(piece, state, **options)
        out.append(latents)
    return [*out, model.encode_finish(state, **options)]


def decode(model: TemporalVAE, pieces: Iterator[Tensor]) -> list[Tensor | None]:
    state: State = ()
    out = []
    for piece in pieces:
        frames, state = model.decode_step(piece, state)
        out.append(frames)
    return [*out, model.decode_finish(state)]


def join(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None], 2)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_hooks_may_replace_what_a_convolution_over_time_gets(causal: bool) -> None:
    model = awake(torch.float32, causal_mode=causal)
    z = torch.randn(1, model.latent_channels, 5, 4, 6)
    whole = model.decode(z)
    for module in model.decoder.modules():
        if isinstance(module, TimeConv):
            module.register_forward_pre_hook(lambda module, given: given[0] * 1.0)
    torch.testing.assert_close(model.decode(z), whole, rtol=1e-4, atol=1e-5)
    stream = model.decode_stream()
    made = [stream.push(z[:, :, n : n + 1]) for n in range(5)] + [stream.finish()]
    pieces = torch.cat([piece for piece in made if piece is not None], 2)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


def test_norms_of_positions_do_without_a_bias() -> None:
    norm = PositionNorm(16).requires_grad_(False)
    x = torch.randn(1, 2, 3, 4, 16).movedim(-1, 1)
    expected = norm(x)
    norm.register_parameter("bias", None)
    torch.testing.assert_close(norm(x), expected)


def assert_pieces_equal_whole(
    model: TemporalVAE, sizes: list[int], batch: int = 1, tolerance: float = 1e-10
) -> None:
    frames = sum(sizes)
    video = clip(frames, batch=batch).to(model.dtype)
    latent = clip(frames, 4, 2, batch).to(model.dtype)
    whole = model.encode(video, generator=torch.Generator().manual_seed(9))
    pieces = encode(model, cut(video, sizes), generator=torch.Generator().manual_seed(9))
    assert join(pieces).shape == whole.shape, "latents were lost or made up"
    assert difference(join(pieces), whole) < tolerance
    whole = model.decode(latent)
    pieces = decode(model, cut(latent, sizes))
    assert join(pieces).shape == whole.shape, "frames were lost or made up"
    assert difference(join(pieces), whole) < tolerance


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"causal_mode": True},
    {"temporal_kernel_size": 5, "temporal_attention_reach": 3},
    {"temporal_kernel_size": 5, "num_temporal_layers": 2, "causal_mode": True},
    {"temporal_kernel_size": 1, "temporal_attention_reach": 2},
    {"temporal_attention_reach": 0, "time_conv_out": True},
    {"temporal_attention_reach": 1, "time_conv_out": True, "causal_mode": True},
    {"temporal_encoder": False, "num_temporal_layers": 3},
    {"num_temporal_layers": 0},
]
MODELS = {str(options): awake(**options) for options in LAYOUTS}


@pytest.mark.parametrize(
    ("layout", "sizes"), thinned(2, MODELS, [[1], [5], [1] * 7, [40, 1, 1, 2], [1, 70, 9]])
)
def test_pieces_equal_whole(layout: str, sizes: list[int]) -> None:
    assert_pieces_equal_whole(MODELS[layout], sizes)


@drawn(
    10,
    60,
    layout=st.sampled_from(list(MODELS)),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    batch=st.integers(1, 2),
)
def test_any_cutting(layout: str, sizes: list[int], batch: int) -> None:
    assert_pieces_equal_whole(MODELS[layout], sizes, batch)


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
def test_in_float32(options: dict[str, Any]) -> None:
    assert_pieces_equal_whole(awake(torch.float32, **options), [3, 1, 8, 2], tolerance=1e-4)


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
@torch.no_grad()
def test_bfloat16_is_no_further_from_the_truth(options: dict[str, Any]) -> None:
    latent = clip(14, 4, 2)
    exact, model = awake(**options).decode(latent), awake(torch.bfloat16, **options)
    whole = model.decode(latent.bfloat16())
    pieces = join(decode(model, cut(latent.bfloat16(), [3, 1, 8, 2])))
    errors = [float((x.double() - exact).square().mean().sqrt()) for x in (pieces, whole)]
    assert errors[0] <= 1.2 * errors[1]


@torch.no_grad()
def test_a_causal_step_gives_as_many_frames_as_it_takes() -> None:
    model = MODELS[str({"causal_mode": True})]
    given = [
        part.shape[2] for part in encode(model, cut(clip(9), [1, 3, 5]))[:-1] if part is not None
    ]
    assert given == [1, 3, 5]
    assert encode(model, cut(clip(9), [9]))[-1] is None


@torch.no_grad()
def test_a_symmetric_step_gives_all_that_its_reach_allows() -> None:
    model = MODELS[str({})]
    for step, reach, channels, size in (
        (encode, model.encode_reach, 3, 4),
        (decode, model.decode_reach, 4, 2),
    ):
        assert reach is not None
        parts = step(model, cut(clip(reach + 7, channels, size), [reach, 1, 4, 2]))
        lengths = [0 if part is None else part.shape[2] for part in parts]
        assert lengths == [0, 1, 4, 2, reach]


@pytest.mark.parametrize("layout", [str({}), str({"causal_mode": True})])
@torch.no_grad()
def test_a_state_is_a_value(layout: str) -> None:
    """Fork it, go back to it, save it: the call never changes it, nor the frames."""
    model, latent = MODELS[layout], clip(40, 4, 2)
    _, state = model.decode_step(latent[:, :, :30])
    kept = [[t.clone() for t in layer] for layer in state]
    given = latent.clone()
    first, _ = model.decode_step(latent[:, :, 30:], state)
    other, _ = model.decode_step(latent[:, :, :10], state)
    again, _ = model.decode_step(latent[:, :, 30:], tuple(map(tuple, kept)))
    assert first is not None and other is not None and again is not None
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(given, latent)
    for layer, copy in zip(state, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, copy, strict=True))


@torch.no_grad()
def test_the_end_is_as_flat_as_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the model sees, one frame at a time is on the way when a stream ends."""
    model, honest = MODELS[str({})], streamed._pass_on
    _, state = model.decode_step(clip(40, 4, 2))
    sizes: list[int] = []

    def watched(layers: Any, x: Tensor | None, *rest: Any) -> Any:
        sizes.append(0 if x is None else x.shape[2])
        return honest(layers, x, *rest)

    monkeypatch.setattr(streamed, "_pass_on", watched)
    rest = model.decode_finish(state)
    assert rest is not None and rest.shape[2] == model.decode_reach
    assert max(sizes) == 1


@torch.no_grad()
@torch.no_grad()
def test_a_stream_ends_in_pieces_as_large_as_those_before() -> None:
    """Which is faster than a frame at a time, and takes no more memory than the steps did."""
    model = awake(torch.float32)
    x = torch.randn(1, 3, 24, 64, 64, generator=torch.Generator().manual_seed(0))
    expected, frames, most = model.encode(x, sample_mode=False), dict[int, list[int]](), list[int]()
    for length in (1, 8):
        stream, found = model.encode_stream(False), list[Tensor]()
        for ends in (False, True):
            with LiveBytes() as alive:
                for there in (
                    x,
                    *found,
                    *model.parameters(),
                    *(t for s in stream.state for t in s),
                ):
                    alive.leave_out(there)
                pieces = stream.flush() if ends else map(stream.push, x.split(length, 2))
                for piece in pieces:
                    found += [] if piece is None else [piece]
                    if ends:
                        frames.setdefault(length, []).append(found[-1].shape[2])
            most.append(alive.most)
        assert difference(torch.cat(found, 2), expected) < 1e-4
    assert set(frames[1]) == {1} and max(frames[8]) > 1
    assert most[3] <= most[2]


def test_a_state_does_not_keep_the_clip_alive() -> None:
    model = MODELS[str({})]
    _, long = model.decode_step(clip(200, 4, 2))
    _, short = model.decode_step(clip(40, 4, 2))

    def size(state: State) -> int:
        return sum(t.untyped_storage().nbytes() for layer in state for t in layer)

    assert size(long) == size(short)


@pytest.mark.parametrize("layout", [str({}), str({"causal_mode": True})])
@torch.no_grad()
def test_streams_joined_to_a_batch(layout: str) -> None:
    model = MODELS[layout]
    causal = model.is_causal
    settled = 3 if causal else 60
    latents = [clip(settled + 8, 4, 2) * (i + 1) for i in range(2)]
    lengths = [settled, settled + 2]  # unequal ages
    states, rest = [], []
    for latent, length in zip(latents, lengths, strict=True):
        states.append(model.decode_step(latent[:, :, :length])[1])
        rest.append(latent[:, :, length : length + 5])
    joined = tuple(
        tuple(torch.cat(pair) for pair in zip(*layers, strict=True))
        for layers in zip(*states, strict=True)
    )
    together, _ = model.decode_step(torch.cat(rest), joined)
    for i in range(2):
        alone, _ = model.decode_step(rest[i], states[i])
        assert together is not None and alone is not None
        assert difference(together[i : i + 1], alone) < 1e-10


@pytest.mark.parametrize("layout", [str({}), str({"causal_mode": True})])
@torch.no_grad()
def test_under_autocast_a_state_keeps_its_dtype(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA autocast runs layer norms in float32: so here."""
    monkeypatch.setattr(
        PositionNorm, "forward", lambda self, x: F.layer_norm(
            x.movedim(1, -1).float(), self.weight.shape, self.weight.float(), self.bias.float()
        ).movedim(-1, 1),
    )  # fmt: skip
    model = awake(torch.float32, **dict(LAYOUTS[list(MODELS).index(layout)]))
    with torch.autocast("cpu", torch.bfloat16):
        parts = decode(model, cut(clip(6, 4, 2).bfloat16(), [2, 2, 2]))
    assert join(parts).shape[2] == 6


# Mutations -----------------------------------------------------------------------------------


def test_law_2_sees_a_dropped_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = timewise._step

    def forgetful(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        y, tail = honest(*args, **options)
        return y, torch.zeros_like(tail)

    monkeypatch.setattr(timewise, "_step", forgetful)
    for layout in (str({}), str({"causal_mode": True})):
        with pytest.raises(AssertionError):
            assert_pieces_equal_whole(MODELS[layout], [6, 6])


def test_law_2_sees_keys_before_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TemporalAttention._mix
    monkeypatch.setattr(
        TemporalAttention, "_mix", lambda s, q, k, v, shift, unborn: honest(s, q, k, v, shift, None)
    )
    for layout in (str({}), str({"causal_mode": True})):
        with pytest.raises(AssertionError):
            assert_pieces_equal_whole(MODELS[layout], [6, 6])


def test_law_2_sees_zeros_pushed_through_the_front() -> None:
    """The tempting way to flush: feed black frames. Norms and biases make them something."""
    model = MODELS[str({})]
    latent, reach = clip(12, 4, 2), model.decode_reach
    assert reach is not None
    with torch.no_grad():
        _, state = model.decode_step(latent)
        pushed, _ = model.decode_step(torch.zeros(1, 4, reach, 2, 2).double(), state)
        assert pushed is not None
        assert difference(pushed[:, :, -12:], model.decode(latent)) > 0.01


# Refused -------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_the_state_survives() -> None:
    model, other = MODELS[str({})], MODELS[str({"num_temporal_layers": 0})]
    video = clip(3)
    _, state = model.encode_step(video)
    kept = tuple(tuple(t.clone() for t in layer) for layer in state)
    for frames, message in (
        (clip(3, size=6), "not one of this model for a stream of these frames"),
        (clip(3, batch=2), "not one of this model for a stream of these frames"),
        (video[:, :, 0], r"frames of a stream must be .*unsqueeze\(2\)"),
        (video.float(), "frames is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode_step(frames, state)
    with pytest.raises(ValueError, match="of another model"):
        other.encode_step(video, state)
    with pytest.raises(ValueError, match="not one of this model"):
        MODELS[LAYOUT_5].encode_step(video, state)
    with pytest.raises(ValueError, match="not one of this model"):
        model.encode_finish(tuple(layer[:1] for layer in state))
    after, _ = model.encode_step(video, state, sample_mode=False)
    untouched, _ = model.encode_step(video, kept, sample_mode=False)
    assert (after is None) == (untouched is None)
    finished = [model.encode_finish(s, sample_mode=False) for s in (state, kept)]
    assert finished[0] is not None and finished[1] is not None
    assert torch.equal(finished[0], finished[1])


LAYOUT_5 = str({"temporal_kernel_size": 5, "temporal_attention_reach": 3})


def test_a_norm_over_the_clip_cannot_stream() -> None:
    model = awake(temporal_norm="clip", clip_frames=4, temporal_encoder=False)
    latents, state = model.encode_step(clip(3), sample_mode=False)
    assert latents is not None and latents.shape[2] == 3
    with pytest.raises(ValueError, match="clip after clip"):
        model.decode_step(latents)
    assert model.encode_finish(state) is None


def test_an_empty_stream() -> None:
    model = MODELS[str({})]
    assert model.encode_finish(()) is None
    assert model.decode_finish(()) is None


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
@pytest.mark.parametrize("sizes", [[1, 1, 1], [3, 3], [9]], ids=str)
def test_gradients_go_through_a_stream(options: dict[str, Any], sizes: list[int]) -> None:
    model = awake(**options)
    weights, gradients = list(model.decoder.parameters()), []
    latent = clip(sum(sizes), 4, 2).requires_grad_()
    for decoded in (model.decode(latent), join(decode(model, cut(latent, sizes)))):
        found = torch.autograd.grad(decoded.square().sum(), [latent, *weights])
        gradients.append(found)
    for whole, pieces in zip(*gradients, strict=True):
        assert torch.allclose(pieces, whole, rtol=1e-9, atol=1e-9)
