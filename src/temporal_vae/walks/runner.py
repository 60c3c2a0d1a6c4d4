"""How a model's clips are walked: which walk, in how much memory, and again when memory runs out.

A clip (B, C, T, H, W) goes through the encoder or the decoder whole, bounded or as the steps of a
stream, as a plan says or as the model's settings do. Latent channels that are not active are masked
here, and what `torch.compile` made of the network is kept here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from temporal_vae.config import VAEConfig
from temporal_vae.geometry import indivisible, latent_frames
from temporal_vae.latents import LatentDistribution
from temporal_vae.latents.latent_channels import mask
from temporal_vae.network.autoencoder import unwrapped
from temporal_vae.network.kernels.blocks import used_again
from temporal_vae.network.kernels.plain import has_memory, recorded, transformed, values_only
from temporal_vae.network.layer import Shape
from temporal_vae.network.lines import AnyDecoder, AnyEncoder, Operation, as_configured
from temporal_vae.network.primitives import hooked
from temporal_vae.walks import bounded, gradients, piecewise, stages, streamed
from temporal_vae.walks.budget import Budget, check_budget
from temporal_vae.walks.peak import Offload, PlanRequest
from temporal_vae.walks.plan import Plan, fastest, planner
from temporal_vae.walks.stages import Bounds
from temporal_vae.walks.streamed import Held, State
from temporal_vae.walks.workspace import share_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a model's setters stored: how it walks where a call gives no plan.

    A value: a setter replaces it, so that models that were copied do not share it.
    """

    slicing: bool = False
    """Walk the samples of a batch one by one."""
    tiling: bool = False
    """Walk with the least memory; goes before the budget."""
    budget: Budget = None
    active: tuple[int, ...] | None = None
    """Latent channels in use; None for all."""
    compile_options: dict[str, Any] | None = None
    """Options of `torch.compile`, once the network is to be compiled."""
    compiled: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"compiled": {}}  # bound to these layers; a copy makes its own

    @property
    def default_budget(self) -> Budget:
        """The budget of every walk without a plan."""
        return "least" if self.tiling else self.budget


@dataclass(frozen=True)
class Runner:
    """Walks the encoder and the decoder of a model."""

    encoder: AnyEncoder
    decoder: AnyDecoder
    settings: Settings

    @property
    def config(self) -> VAEConfig:
        """The configuration of the model."""
        return self.encoder.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.conv_in.weight.device

    def line(self, operation: Operation) -> AnyEncoder | AnyDecoder:
        """The encoder or the decoder, its scales fitted to its weights."""
        line: AnyEncoder | AnyDecoder = cast(Any, unwrapped(self._outer(operation)))
        return line.ready()

    def _outer(self, operation: Operation) -> AnyEncoder | AnyDecoder:
        """The same with what may be wrapped around it."""
        return self.encoder if operation == "encode" else self.decoder

    def mask(self, latent: Tensor) -> Tensor:
        """A latent or moment (B, L, ...) with zeros in the channels that are not active."""
        active = self.settings.active
        return latent if active is None else mask(latent, active)

    def posterior(self, moments: Tensor) -> LatentDistribution:
        """Clamped and masked moments of (B, 2*L, ...)."""
        return LatentDistribution(*map(self.mask, LatentDistribution.from_moments(moments)))

    # Plans -----------------------------------------------------------------------------------

    def plan(
        self,
        shape: Sequence[int],
        operation: Operation,
        dtype: torch.dtype,
        budget: Budget,
        *,
        stream: bool = False,
        keep_state: bool = True,
        offload: Offload = None,
        gradients: bool = False,
        ranks: int = 1,
        device: torch.device | None = None,
    ) -> Plan:
        """The fastest walk within a budget; see `TemporalVAE.plan`. `device`: where it will run."""
        full, line = self._checked_shape(shape, operation, stream), self.line(operation)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {dtype}")
        device = device or self.device
        check_budget(budget, device)
        if stream and line.reach is None:
            raise ValueError(
                f"this model normalises over the whole clip, so it cannot {operation} a stream"
            )
        together = stages.in_pieces(list(line.layers()))
        if together and offload is not None:
            raise ValueError(
                "this model's layers see time and space together and keep no activation of the "
                "whole clip that could lie elsewhere: leave offload out"
            )
        if together and gradients:
            raise ValueError(
                "this model's layers see time and space together, and gradients go back through "
                f"them whole: {stages.TO_TRAIN_IN_PIECES}, or call it within torch.no_grad() if no "
                "gradients are wanted"
            )
        if gradients and (stream or offload is not None):
            raise ValueError(
                "a plan with gradients is for a clip that stays where the weights are: it has "
                "neither stream nor offload"
            )
        if ranks != 1:
            if stream or gradients or ranks < 1:
                raise ValueError(
                    "ranks, the number of processes, is 1 or more, and above 1 it is for a clip "
                    f"without gradients and without a stream; got {ranks}"
                )
            full = self.largest_part(full, operation, ranks)
        places = (None,) if together or gradients else self._places(offload, budget)
        request = PlanRequest(
            self.config.layout, operation, full, dtype, stream, places, device,
            keep_state or not stream, self._trained_bytes(operation) if gradients else None,
            ranks,
        )  # fmt: skip
        return planner(request).plan(budget)

    def by_rows(self, operation: Operation) -> bool:
        """Whether processes that walk a clip together have rows of it each, or else frames."""
        return stages.in_pieces(list(self.line(operation).layers()))

    def parts(self, size: int, operation: Operation, ranks: int) -> list[int]:
        """Frames of a clip, or rows of it, for each process: as equal as can be, latents whole."""
        rows = self.by_rows(operation)
        unit = self.config.downsample_factor if rows and operation == "encode" else 1
        if size // unit < ranks:
            raise ValueError(
                f"{size // unit} {'rows of latents' if rows else 'frames'} are too few for {ranks} "
                "processes, each of which needs one: take fewer"
            )
        edges = [size // unit * rank // ranks * unit for rank in range(ranks + 1)]
        return [stop - start for start, stop in pairwise(edges)]

    def largest_part(self, shape: Shape, operation: Operation, ranks: int) -> Shape:
        """The shape of the largest part of a clip (B, C, T, H, W) that each process has."""
        axis = 3 if self.by_rows(operation) else 2
        most = max(self.parts(shape[axis], operation, ranks))
        return (*shape[:axis], most, *shape[axis + 1 :])

    def _trained_bytes(self, operation: Operation) -> int:
        return sum(p.nbytes for p in self.line(operation).parameters() if p.requires_grad)

    def wants_gradients(self, operation: Operation, clip: Tensor) -> bool:
        """Whether gradients of an input or of weights are to go back through a walk."""
        tensors = (clip, *self.line(operation).parameters())
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)

    def _checked_shape(self, shape: Sequence[int], operation: Operation, stream: bool) -> Shape:
        if operation not in ("encode", "decode"):
            raise ValueError(f"operation must be 'encode' or 'decode', got {operation!r}")
        if len(shape) not in (4, 5):
            raise ValueError(f"shape must be (B, C, T, H, W) or (B, C, H, W), got {tuple(shape)}")
        full = tuple(shape) if len(shape) == 5 else (*shape[:2], 1, *shape[2:])
        if not all(isinstance(n, int) and n > 0 for n in full):
            raise ValueError(f"shape must be whole numbers above 0, got {tuple(shape)}")
        if full[1] != (channels := self._channels(operation)):
            raise ValueError(f"to {operation}, shape must have {channels} channels, got {full[1]}")
        problem = indivisible(full[3], full[4], self.config.downsample_factor)
        if operation == "encode" and problem:
            raise ValueError(problem)
        if operation == "encode" and not stream:
            latent_frames(full[2], self.config.frames_per_latent)
        return full

    def _channels(self, operation: Operation) -> int:
        """Channels of the input."""
        config = self.config
        return config.input_channels if operation == "encode" else config.latent_channels

    def _places(self, offload: Offload, budget: Budget) -> tuple[Offload, ...]:
        """Where the activation may lie, in the order of preference."""
        if offload is None:
            return (None, "host") if self.device.type == "cuda" and budget is not None else (None,)
        if offload == "host":
            if self.device.type == "cpu":
                raise ValueError("offload='host' is for a model on a GPU; this one is on the CPU")
            return (offload,)
        if not isinstance(offload, (str, os.PathLike)) or not os.path.isdir(offload):
            raise ValueError(f"offload must be 'host' or a folder, got {offload!r}")
        if self.device.type != "cpu":
            raise ValueError(
                f"offload to a folder needs the model on the CPU, it is on {self.device}: "
                "take 'host'"
            )
        return (offload,)

    def plan_for(
        self,
        operation: Operation,
        clip: Tensor,
        plan: Plan | None,
        *,
        stream: bool = False,
        donated: bool = False,
    ) -> Plan | None:
        """The plan that was given, if it fits the input, or one for what the settings say.

        Raises `ValueError` for a plan of another model, device, input or kind of walk. A plan that
        lets go of states needs one that is `donated`.
        """
        if plan is None:
            budget = self.settings.default_budget
            if budget is None or (stream and self.line(operation).reach is None):
                return None
            if transformed() or (stream and torch.is_grad_enabled() and clip.requires_grad):
                return None  # which only the whole walk has
            wanted = not stream and self.wants_gradients(operation, clip)
            return self.plan(
                tuple(clip.shape), operation, clip.dtype, budget, stream=stream, gradients=wanted
            )
        self._check_origin(plan)
        shape = tuple(clip.shape)
        if stream and shape[2] <= plan.shape[2]:  # a shorter piece takes less
            shape = (*shape[:2], plan.shape[2], *shape[3:])
        kind = f"stream={plan.stream}" + (f", ranks={plan.ranks}" if plan.ranks > 1 else "")
        made_for = (plan.operation, plan.shape, plan.dtype, kind)
        if made_for != (operation, shape, clip.dtype, f"stream={stream}"):
            got = (operation, tuple(clip.shape), clip.dtype, f"stream={stream}")
            raise ValueError(
                f"the plan is for {made_for}, not for {got}: make one with plan(shape, operation, "
                "dtype)"
            )
        if stream and not plan.keep_state and not donated:
            raise ValueError(
                "the plan is for a stream that lets go of its states: give it to encode_stream or "
                "decode_stream, or make one with keep_state=True"
            )
        return plan

    def _check_origin(self, plan: Plan) -> None:
        if not isinstance(plan, Plan):
            raise ValueError(f"plan must be what plan(...) gives, got {plan!r}")
        if plan.device != self.device:
            what = f"a model on {plan.device}, not on {self.device}"
        elif plan.network != self.config.layout:
            what = "a model of another layout"
        else:
            return
        raise ValueError(f"the plan is for {what}: make one with this model's plan(...)")

    def _smaller(self, plan: Plan | None) -> Plan | None:
        """A plan for the same with a third less memory, or as much less as can be."""
        if plan is None:
            return None
        for budget in (plan.peak_bytes * 2 // 3, "least"):
            with suppress(ValueError):
                smaller = self.plan(
                    plan.shape, plan.operation, plan.dtype, budget,
                    stream=plan.stream, gradients=plan.gradients,
                )  # fmt: skip
                if smaller.peak_bytes < plan.peak_bytes:
                    return smaller
        return None

    # Clips -----------------------------------------------------------------------------------

    def encode(self, clip: Tensor, plan: Plan | None = None) -> LatentDistribution:
        """The posterior of a clip of pixels."""
        return self.posterior(self._walk("encode", clip, plan).contiguous())

    def decode(self, clip: Tensor, plan: Plan | None = None, out: Tensor | None = None) -> Tensor:
        """The pixels of a clip of latents, in `out` (B, C, T, H, W) if it is given."""
        clip = self.mask(clip)
        if out is not None and self.wants_gradients("decode", clip):
            raise ValueError("what is written into `out` has no gradient: use torch.no_grad()")
        return self._walk("decode", clip, plan, out)

    def reconstruct(
        self, clip: Tensor, sample: Callable[..., Tensor] | None
    ) -> tuple[Tensor, LatentDistribution]:
        """Pixels through the posterior's mean, or what `sample` draws, and back; walked whole."""
        posterior = self.posterior(self._compiled("encode")(clip))
        latent = posterior.mean if sample is None else self.mask(sample(*posterior))
        return self._compiled("decode")(latent), posterior

    def _walk(
        self, operation: Operation, clip: Tensor, plan: Plan | None, out: Tensor | None = None
    ) -> Tensor:
        plan = self.plan_for(operation, clip, plan)
        # a plan's peak counts what is in use, and not what is free between
        with used_again() if plan is None else nullcontext():
            return self._retried(plan, lambda plan: self._walk_once(operation, clip, plan, out))

    def _walk_once(
        self, operation: Operation, clip: Tensor, plan: Plan | None, out: Tensor | None
    ) -> Tensor:
        bounds = self._bounds(operation, clip, plan)
        if bounds is not None:
            if plan is not None and plan.gradients and self.wants_gradients(operation, clip):
                return gradients.walk(self.line(operation), clip, bounds)
            if out is not None and share_memory(clip, out):
                clip = clip.clone()  # which is still read when the first frames are written
            walked = bounded.walk if bounds.pieces is None else piecewise.walk
            return walked(self.line(operation), clip, bounds, out)
        walk = self._compiled(operation)
        samples = clip.split(1) if self.settings.slicing else (clip,)
        y = torch.cat([walk(x) for x in samples]) if len(samples) > 1 else walk(clip)
        return y if out is None else out.copy_(y)

    def _bounds(self, operation: Operation, clip: Tensor, plan: Plan | None) -> Bounds | None:
        """The pieces of a plan, or else of the fastest walk; None for the whole walk, which whoever
        looks into the network is to see: by gradients, hooks, parts of his own, a compiler."""
        if plan is not None and plan.bounds is not None:
            return plan.bounds
        if clip.device.type != "cpu" or clip.shape[2] == 1 or torch.is_grad_enabled():
            return None
        compiled = self.settings.compile_options is not None or torch.is_autocast_enabled("cpu")
        if compiled or not values_only(clip) or recorded() or not has_memory(clip):
            return None
        line, layout = self.line(operation), self.config.layout
        if self._outer(operation) is not line or not as_configured(line, layout, operation):
            return None
        shape = tuple(clip.shape)
        return fastest(
            line, PlanRequest(layout, operation, shape, clip.dtype, False, (None,), clip.device)
        )

    def pieces(self, clip: Tensor, plan: Plan | None) -> Iterator[Tensor]:
        """The frames of one clip of latents, (1, C, n, H, W), as they are made."""
        plan = self.plan_for("decode", clip, plan)
        if plan is None or plan.bounds is None:
            return iter([self.decode(clip, plan).contiguous()])
        line, clip = self.line("decode"), self.mask(clip.clone())

        def walk(plan: Plan | None) -> Iterator[Tensor]:
            if plan is None or plan.bounds is None:
                return iter([line(clip)])
            if plan.bounds.pieces is not None:
                return piecewise.frames(line, clip, plan.bounds)
            return bounded.pieces(line, clip, plan.bounds)

        return self._retried_pieces(plan, walk)

    # When memory runs out: only a GPU raises it ----------------------------------------------

    def _retried(self, plan: Plan | None, run: Callable[[Plan | None], T]) -> T:
        """What `run` gives, which begins again with less memory where that runs out."""
        while True:
            try:
                return run(plan)
            except torch.OutOfMemoryError:
                if (smaller := self._smaller(plan)) is None:
                    raise
                plan = smaller

    def _retried_pieces(
        self, plan: Plan | None, walk: Callable[[Plan | None], Iterator[Tensor]]
    ) -> Iterator[Tensor]:
        """The pieces of a walk, which begins again with less memory where that runs out.

        Frames that were given are walked again, and not given again.
        """
        pieces = walk(plan)  # which refuses here what it cannot do

        def walked(plan: Plan | None, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
            given = 0
            while True:
                try:
                    for piece in _behind(pieces, given):
                        given += piece.shape[2]
                        yield piece
                        del piece  # or it would be there during the next
                    return
                except torch.OutOfMemoryError:
                    if (smaller := self._smaller(plan)) is None:
                        raise
                    plan = smaller
                with torch.no_grad():  # as it was where the first walk was made
                    pieces = walk(plan)

        return walked(plan, pieces)

    # Steps of a stream -----------------------------------------------------------------------

    def step(
        self, operation: Operation, clip: Tensor, state: Held | None, plan: Plan | None
    ) -> tuple[Tensor | None, State]:
        """The next piece of a clip -> what is certain by now, not masked, and the new state.

        A state in a list is donated: it is written over, so there is no second try.
        """
        donated = isinstance(state, list)
        clip = self.mask(clip) if operation == "decode" else clip
        plan = self.plan_for(operation, clip, plan, stream=True, donated=donated)
        bounded.refuse_hooks(self.line(operation))

        def once(plan: Plan | None) -> tuple[Tensor | None, State]:
            if plan is not None and plan.bounds is not None:
                return streamed.step(self.line(operation), clip, state, plan.bounds)
            held = tuple(state or ()) if donated and self.settings.compile_options else state
            return self._compiled_step(operation)(clip, held)

        return once(plan) if donated else self._retried(plan, once)

    def finish(
        self, operation: Operation, state: Held | None, plan: Plan | None, frames: int = 1
    ) -> Iterator[Tensor]:
        """What an ended stream still owes, not masked, a few frames at a time: as many as a plan
        is for, or without one as are given here."""
        donated = isinstance(state, list)
        first = next((memory for memory in state or () if memory), None)
        if first is not None:
            if operation == "encode":
                for taken in first[0].tolist():
                    latent_frames(taken, self.config.frames_per_latent)
            frame = self._frame_of(operation, first)
            plan = self.plan_for(operation, frame, plan, stream=True, donated=donated)

        def walk(plan: Plan | None) -> Iterator[Tensor]:
            at_once, bounds = (frames, None) if plan is None else (plan.shape[2], plan.bounds)
            if bounds is not None and bounds.pieces is not None:  # which owe nothing
                bounds = None
            return streamed.finish(self.line(operation), state, bounds, at_once)

        return walk(plan) if donated else self._retried_pieces(plan, walk)

    def _frame_of(self, operation: Operation, memory: tuple[Tensor, ...]) -> Tensor:
        """A frame that stands for a stream's input, by the memory of the first layer with tails."""
        scale = Fraction(1)
        for layer in self.line(operation).layers():
            if layer.tails():
                break
            scale *= layer.scale
        tail = memory[-1]
        size = (int(side / scale) for side in tail.shape[3:])
        return tail.new_empty(1).expand(len(tail), self._channels(operation), 1, *size)

    # Compilation -----------------------------------------------------------------------------

    def _compiled(self, operation: Operation) -> Callable[[Tensor], Tensor]:
        """The line, compiled if that was asked for."""
        line, outer = self.line(operation), self._outer(operation)
        if outer is not line or hooked(line):  # who stands around it is to be called
            return outer
        return self._compile(operation, line, line.forward) or line

    def _compiled_step(
        self, operation: Operation
    ) -> Callable[[Tensor, Held | None], tuple[Tensor | None, State]]:
        """A whole step of a stream, compiled if that was asked for and one graph serves each."""
        line = self.line(operation)
        step = partial(streamed.step, line)
        same = self.config.causal_mode and self.config.frames_per_latent == 1
        return (same and self._compile(f"{operation} step", line, step)) or step

    def _compile(
        self, name: str, line: AnyEncoder | AnyDecoder, function: Callable[..., Any]
    ) -> Callable[..., Any] | None:
        options, compiled = self.settings.compile_options, self.settings.compiled
        if options is None:
            return None
        if (name, line) not in compiled:
            compiled[name, line] = torch.compile(function, **options)
        return compiled[name, line]


@dataclass(frozen=True)
class Steps:
    """One kind of stream of a model: what it takes, how it is walked, and what it gives."""

    runner: Runner
    operation: Operation
    take: Callable[[Tensor], Tensor]
    """Checks a piece before it is walked."""
    give: Callable[[Tensor], Tensor]
    """What is made of a piece of the result."""
    plan: Plan | None

    def step(self, piece: Tensor, state: Held | None) -> tuple[Tensor | None, State]:
        """The next piece -> what is certain by now, None if nothing, and the new state."""
        y, state = self.runner.step(self.operation, self.take(piece), state, self.plan)
        return (None if y is None else self.give(y)), state

    def flush(self, state: Held | None, frames: int = 1) -> Iterator[Tensor]:
        """What an ended stream still owes, in pieces; without a plan of so many frames."""
        return map(self.give, self.runner.finish(self.operation, state, self.plan, frames))

    def finish(self, state: Held | None) -> Tensor | None:
        """What an ended stream still owes; None if it owes nothing."""
        owed = list(self.flush(state))
        return torch.cat(owed, 2) if owed else None

    def first_state(self) -> State:
        """The state of a stream that writes over it: there from the start, if it walks bounded."""
        if self.plan is None or self.plan.bounds is None or self.plan.bounds.pieces is not None:
            return ()
        like = torch.empty(1, dtype=self.plan.dtype, device=self.runner.device)
        return streamed.begin(self.runner.line(self.operation), like.expand(self.plan.shape))

    def check(self, piece: Tensor) -> None:
        """Raise for a piece that could not be taken."""
        clip = self.take(piece)
        self.runner.plan_for(self.operation, clip, self.plan, stream=True, donated=True)
        if self.plan is not None and self.plan.bounds is not None:
            bounded.refuse_watchers(self.runner.line(self.operation), clip)


class Stream:
    """One clip in pieces: push what comes, finish when it ends; or pull it through at once.

    `state` is what has been remembered so far, a plain value: to go back, keep it and set it. With
    a plan that does not keep states a step writes over the old one: less memory, and the end of the
    stream where a step fails; a piece that cannot be taken raises before anything is written over.
    """

    def __init__(self, steps: Steps):
        self._steps, self._ended = steps, False
        self._largest = 1  # piece so far: the end of the clip takes no more memory
        self._keeps = steps.plan is None or steps.plan.keep_state
        self.state: State = () if self._keeps else steps.first_state()

    def push(self, piece: Tensor) -> Tensor | None:
        """Take the next piece; give all that is certain by now, or None.

        Raises `ValueError` after the end, and for a piece that does not continue the clip; the
        state then stays what it was.
        """
        self._refuse_after_end()
        if not self._keeps:
            self._steps.check(piece)
            self._ended = True  # until the step has made another state
        given, self.state = self._steps.step(piece, self._donated())
        self._largest = max(self._largest, piece.shape[2])
        self._ended = False
        return given

    def finish(self) -> Tensor | None:
        """End the clip; give what is still owed, or None. Raises `ValueError` after the end."""
        self._refuse_after_end()
        self._ended = not self._keeps
        owed = list(self._steps.flush(self._donated(), self._largest))
        self._ended = True
        return torch.cat(owed, 2) if owed else None

    def flush(self) -> Iterator[Tensor]:
        """`finish`, in pieces: the further a model looks ahead, the more it still owes."""
        self._refuse_after_end()
        self._ended = True
        return self._steps.flush(self._donated(), self._largest)

    def pull(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Push all pieces and finish; gives what there is, as soon as it is."""
        for piece in pieces:
            if (given := self.push(piece)) is not None:
                yield given
        yield from self.flush()

    def _donated(self) -> Held:
        """The state to go on from: all there is of it, unless it is kept."""
        if self._keeps:
            return self.state
        state, self.state = list(self.state), ()
        return state

    def _refuse_after_end(self) -> None:
        if self._ended:
            raise ValueError(
                "this stream has ended, or a step of it failed: start a new one for another clip, "
                "or keep its `state` before finishing to go on from there"
            )


def _behind(pieces: Iterator[Tensor], frames: int) -> Iterator[Tensor]:
    """The pieces (1, C, n, H, W) behind the first frames."""
    for piece in pieces:
        if frames < piece.shape[2]:
            yield piece[:, :, frames:]
        frames = max(0, frames - piece.shape[2])
        del piece  # or it would be there during the next
