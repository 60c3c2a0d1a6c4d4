"""Training: a loop to be read from top to bottom.

    for record in train(recipe, Inputs(["clips/"]), "run/"):
        print(record["step"], record["loss"])

What a step computes is in `step`, how weights follow in `optimizers`, what a run leaves on disk in
`run`. Batches are a function of their number alone (`data`), and so is all else that is drawn for a
sample: a run that was stopped, or killed, goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from temporal_vae.config import config_from_dict
from temporal_vae.latents import scaling
from temporal_vae.model import TemporalVAE
from temporal_vae.network.kernels.dtypes import fastest, slowness
from temporal_vae.training import optimizers as how
from temporal_vae.training import parallel
from temporal_vae.training.adversary import Adversary
from temporal_vae.training.build import (
    build_model,
    image_twin,
    refuse_misfit,
    without_branches,
)
from temporal_vae.training.data import Batches, Samples, Share, in_order
from temporal_vae.training.linear_start import silence_branches, start_linear
from temporal_vae.training.page import write_page
from temporal_vae.training.parallel import Strategy
from temporal_vae.training.recipe import Recipe, Table, plain_table
from temporal_vae.training.requests import deferred_requests, obey
from temporal_vae.training.run import Run, pack, restore, unpack, weights
from temporal_vae.training.sources import Inputs
from temporal_vae.training.step import Pass, Terms, cells_of
from temporal_vae.training.tensorboard import Events
from temporal_vae.training.validation import HeldOut, flat_scores

FITTED = 40
"""Clips that a linear start is fitted to."""
SCALE_BATCHES = 8
"""Batches on which the scale of the latents is measured."""

Record = dict[str, Any]
Say = Callable[[str], None]


def train(
    recipe: Recipe,
    inputs: Inputs,
    out: str | Path,
    *,
    resume: bool = False,
    table: Table | None = None,
    device: torch.device | str = "cpu",
    strategy: Strategy = "ddp",
    say: Say = lambda _: None,
) -> Generator[Record, None, None]:
    """Train by a recipe, into the folder `out`; yields a record after every step.

    A record has the `step`, the `loss`, each term of it, the `learning_rate`, `frames_per_second`,
    and the share of the step's time that it `waited` for data. `table` is the recipe's TOML table,
    which travels with the weights. `resume` goes on with the run in `out`, if there is one.

    Started by `torchrun`, the processes share every batch; `strategy` says whether each holds the
    whole model ("ddp") or a part of it ("fsdp"). Stopped in between (the iterator is closed, or
    Ctrl-C), it saves a checkpoint.

    Raises `ValueError` for data that nothing can be trained on, a folder that holds something else,
    weights of another architecture, and a loss that is not finite; `OSError` where it cannot write.
    """
    with parallel.processes(torch.device(device)) as share:
        if not inputs.clips:
            inputs.look(recipe)
        run, its = Run(out), table or plain_table(recipe)
        device = parallel.own_device(torch.device(device))
        training = Training(recipe, inputs, run, share, device, strategy, say)
        training.begin(run.look(its, resume))
        if share.of > 1:  # every process has looked, before one writes
            torch.distributed.barrier()
        with run.opened(its) if share.rank == 0 else nullcontext():
            yield from training.steps()


@dataclass(slots=True)
class Clock:
    """Seconds of work, over all parts of a run, and when things were last done."""

    before: float = 0.0
    start: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds of the run until now."""
        return self.before + time.monotonic() - self.start


class Training:
    """One process's part of a run: everything that changes while it trains."""

    def __init__(
        self, recipe: Recipe, inputs: Inputs, run: Run, share: Share, device: torch.device,
        strategy: Strategy, say: Say,
    ):  # fmt: skip
        self.recipe, self.inputs, self.run, self.say = recipe, inputs, run, say
        self.share, self.device, self.strategy = share, device, strategy
        self.stages, self.bounds = recipe.stages(), recipe.bounds()
        self.step, self.index, self.batch, self.clock = recipe.first_step, 0, 0, Clock()
        self.held = HeldOut.read(inputs.held, recipe.validation, inputs.skipped)
        if not self.held.clips:
            say("there is nothing to measure on: give clips for validation")
        self.model: TemporalVAE
        self._is_spread, self._whole = False, True
        self.progress = 0.0
        self._events: Events | None = None
        self.average: how.Average | None = None

    # Beginning, and going on from a checkpoint -----------------------------------------------

    def begin(self, step: int | None) -> None:
        """Build everything, and bring it to where a checkpoint left off."""
        dtype = computing_type(self.recipe.optimizer.dtype, self.device)
        self.say(f"computed in {str(dtype).removeprefix('torch.')} on {self.device}")
        if (slow := slowness(dtype, self.device)) is not None:
            self.say(f"note: {slow}")
        if step is None:
            self.model, anew = build_model(self.recipe.model, self.recipe.seed)
            if anew:
                self.say(f"{len(anew)} weights in time begin anew, such as {anew[0]}")
            self.index, self.batch = self._stage_at(self.look_at_clock()), self._batches_before()
            refuse_misfit(self.model, self.stages)
            if self.recipe.model.start == "linear":
                self._start_linear()
            elif not all(stage.model.branches for stage in self.stages):
                silence_branches(self.model)
            self._enter_stage()
            return
        tensors, state = self.run.load(step)
        self.model = TemporalVAE.from_config(config_from_dict(state["model"]))
        restore(dict(self.model.named_parameters()), tensors["weights"])
        self.step, self.index, self.batch = state["step"], state["stage"], state["batch"]
        self.clock.before = state["seconds"]
        self._enter_stage(state["stage_step"])
        for number, optimizer in enumerate(self.optimizers):
            unpack(optimizer, tensors.get(f"optimizer.{number}", {}))
        if self.average is not None and "average" in tensors:
            restore(self.average.values, tensors["average"])
            self.average.updates = state["average_updates"]
        self.adversary.load(tensors)
        self.say(f"going on from step {step}")
        if state.get("clips") != self.inputs.fingerprint():
            self.say(
                "note: these are not the clips that the run has seen so far: its batches are others"
            )

    def _start_linear(self) -> None:
        """Fit a new model to a first batch of the stages' longest clips, the same in all runs."""
        kinds = [kind for stage in self.stages for kind in stage.data.batch]
        kind = max(kinds, key=lambda kind: (kind.frames, kind.crop))
        self.say(f"fitting a linear start to {FITTED} clips")
        data = replace(self.recipe.data, batch=(replace(kind, samples=FITTED, chance=1.0),))
        clips = Batches(self.inputs.clips, data, self.recipe.seed)[0]
        start_linear(self.model, clips.pixels())

    def _batches_before(self) -> int:
        """Batches that the steps of earlier runs have taken."""
        before = (self._stage_at(step / (self.recipe.steps or 1)) for step in range(self.step))
        return sum(self.stages[index].optimizer.accumulate for index in before)

    def _stage_at(self, progress: float) -> int:
        """Which stage a part of the run falls into."""
        return next(
            (i for i, end in enumerate(self.bounds) if progress < end), len(self.bounds) - 1
        )

    def _enter_stage(self, stage_step: int = 0) -> None:
        """Build what belongs to a stage: its network, losses, optimizers and batches."""
        self.stage, self.stage_step = self.stages[self.index], stage_step
        self.model.to(self.device)
        network = self.model if self.stage.model.temporal else image_twin(self.model)
        network = network if self.stage.model.branches else without_branches(network)
        network.disable_gradient_checkpointing()
        if self.stage.model.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.trained = how.freeze(self.model, self.stage.model)
        if self.strategy == "fsdp" and self.share.of > 1:
            self._spread(network)
        self.network = network
        self.dtype = computing_type(self.stage.optimizer.dtype, self.device)
        self.terms = Terms(self.stage.loss, self.device, cells_of(self.model))
        passing = Pass(network, self.stage.loss, self.stage.model.memory)
        self.passing = parallel.data_parallel(passing, self.share, self.strategy)
        self.optimizers = how.optimizers(self.trained, self.stage.optimizer)
        self.adversary = Adversary(self.stage, network, self.share)
        decay = self.stage.optimizer.ema
        if decay and (self.average is None or self.average.values.keys() != self.trained.keys()):
            self.average = how.Average(self.trained, decay)
        batches = Batches(self.inputs.clips, self.stage.data, self.recipe.seed, self.share)
        self.batches = in_order(batches, self.batch, self.stage.data.workers)

    def _spread(self, network: TemporalVAE) -> None:
        if self.stage.optimizer.name == "muon":
            raise ValueError("muon needs whole matrices: with fsdp take optimizer.name = 'adamw'")
        if self.stage.loss.adversarial:
            raise ValueError("a critic needs the decoder's last layer whole: train it by ddp")
        if network is not self.model:
            raise ValueError(
                "fsdp trains a model whole: leave model.temporal = false or "
                "model.branches = false away, or train by ddp"
            )
        if not self._is_spread:
            parallel.spread(network)
        self._is_spread = True
        self.trained = {n: p for n, p in network.named_parameters() if p.requires_grad}

    def look_at_clock(self) -> float:
        """Find which part of the run is done, 0 to 1; all processes go by the first one's clock."""
        now = self.clock.seconds / (3600 * (self.recipe.hours or 1))
        if self.recipe.steps is not None:
            now = self.step / self.recipe.steps
        self.progress = parallel.agreed(now, self.share, self.device)
        return self.progress

    def stage_progress(self) -> float:
        """The part of the stage that is done, 0 to 1."""
        begin = self.bounds[self.index - 1] if self.index else 0.0
        length = self.bounds[self.index] - begin
        return min(1.0, max(0.0, self.progress - begin) / length) if length else 1.0

    # The loop ----------------------------------------------------------------------------------

    def steps(self) -> Iterator[Record]:
        """Step after step to the end of the run; saves, measures and says how it goes."""
        if self.recipe.tensorboard and self.share.rank == 0:
            self._events = Events(self.run.folder / "tensorboard", self.step)
        self.tell("running")
        try:
            with deferred_requests() as asked:
                while self.look_at_clock() < 1:
                    if self._stage_at(self.progress) > self.index:
                        self.next_stage()
                    record = self.one_step()
                    self.note(record)
                    yield record
                    self.now_and_then()
                    obey(int(parallel.agreed(asked[0] if asked else 0, self.share, self.device)))
            self.save()
            self.end_stage()
            self.measure()
            self.save_model()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            if self._whole:  # half an update, or half a stage, is no state to go on from
                self.save()
            self.tell("stopped")
            raise
        except Exception as error:
            self.tell("failed", message=str(error))
            raise
        finally:
            self.batches.close()  # its workers end with it, and with nothing else
            if self._events is not None:
                self._events.close()
        self.tell("done")

    def next_stage(self) -> None:
        """Leave a stage for the one that it is time for."""
        self._whole = False
        self.batches.close()
        self.end_stage()
        self.index = self._stage_at(self.progress)
        self._enter_stage()
        self._whole = True

    @torch.no_grad()
    def end_stage(self) -> None:
        """Take the averaged weights for good, and measure the latents' scale where it has changed.

        The scale brings latents to unit variance; a student keeps that of its teacher.
        """
        if self.average is not None:
            _put(self.trained, self.average.values)
            self.average = None
        encoder = any(part.startswith("encoder") for part in how.trained_parts(self.stage.model))
        if not encoder or self.stage.loss.teacher:
            return
        batches = Batches(self.inputs.clips, self.stage.data, self.recipe.seed)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        videos = (batches[number].pixels().to(self.device) for number in range(SCALE_BATCHES))
        found = [self.network.encode(x, generator=generator).cpu() for x in videos]
        for model in {self.model, self.network}:
            model.config = scaling.measured(model.config, found)

    def one_step(self) -> Record:
        """One update of the weights on `accumulate` batches; the record of it."""
        start, waited, frames = time.monotonic(), 0.0, 0
        rate = how.learning_rate(self.stage.optimizer, self.stage_progress(), self.stage_step)
        count = self.stage.optimizer.accumulate
        sums: dict[str, Tensor] = {}  # one number for each term, read once
        for _ in range(count):
            before = time.monotonic()
            samples = next(self.batches)
            waited += time.monotonic() - before
            frames += samples.frames.shape[0] * samples.frames.shape[1] * self.share.of
            for name, value in self._gradients(samples, 1 / count).items():
                sums[name] = sums.get(name, 0) + value.detach() / count
        values = parallel.mean_over_processes(sums, self.share, self.device)
        values["gradient_norm"] = self._clip()
        self._refuse_infinite(values, samples)
        self._whole = False
        self._update(rate)
        self.batch = samples.number + 1
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        self._whole = True
        seconds = time.monotonic() - start
        return {
            "step": self.step, **values, "stage": self.stage.name, "learning_rate": rate,
            "frames_per_second": frames / seconds, "waited": waited / seconds,
            "seconds": self.clock.seconds,
        }  # fmt: skip

    def _gradients(self, samples: Samples, part: float) -> dict[str, Tensor]:
        """Add the gradients of one batch to those there are; its terms and its loss."""
        for clip, reason in samples.broken:
            self.inputs.skipped.add(clip.source, reason)
        video = samples.pixels().to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            reconstruction, mean, log_variance = self.passing(video, samples.seeds)
        reconstruction, mean = reconstruction.float(), mean.float()
        terms = self.terms(video, reconstruction, mean, log_variance.float())
        loss = self.terms.weighted(terms)
        if self.stage_progress() >= self.stage.critic.start:
            loss = loss + self.adversary.of_generator(video, reconstruction, loss, part, terms)
        (loss * part).backward()
        return {"loss": loss, **{f"{_family(name)}/{name}": term for name, term in terms.items()}}

    def _clip(self) -> float:
        """Scale gradients down to the largest norm that the recipe allows; the norm they had."""
        limit = self.stage.optimizer.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _update(self, rate: float) -> None:
        """Step down the gradients, and take the weights into the average."""
        how.set_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.adversary.update()
        if self.average is not None:
            self.average.update(self.trained)

    def _refuse_infinite(self, values: Mapping[str, float], samples: Samples) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        odd = next((name for name, value in values.items() if not math.isfinite(value)), "loss")
        file = self.run.folder / f"failed-step-{self.step + 1:08d}.safetensors"
        if self.share.rank == 0:
            save_file({"frames": samples.frames.contiguous()}, file)
        raise ValueError(
            f"the loss or gradient of step {self.step + 1} is not finite ({odd} = {values[odd]}): "
            f"its batch is "
            f"in {file}; the last checkpoint is that of step {self.run.last()}; a lower "
            "optimizer.learning_rate or a longer warm-up is the usual way out"
        )

    # What is kept and told ---------------------------------------------------------------------

    def note(self, record: Record) -> None:
        """Append a record to the run's metrics."""
        if self.share.rank == 0:
            self.run.add(record)
        if self._events is not None:
            numbers = {name: value for name, value in record.items() if isinstance(value, float)}
            self._events.add(record["step"], numbers)

    def now_and_then(self) -> None:
        """Save and measure, where it is time to."""
        every, due = self.recipe.validation.every, 60 * self.recipe.save_minutes
        if every and self.step % every == 0 and self.step != self.recipe.steps:
            self.measure()
        ago = time.monotonic() - self.clock.saved
        if parallel.agreed(ago, self.share, self.device) >= due:
            self.save()
            self.tell("running")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the present ones, for as long as the block lasts."""
        if self.average is None:
            yield
            return
        present = {name: p.detach().clone() for name, p in self.trained.items()}
        _put(self.trained, self.average.values)
        try:
            yield
        finally:
            _put(self.trained, present)

    def measure(self) -> None:
        """Validate the averaged weights."""
        if not self.held.clips:
            return
        with self.averaged():
            samples = self.run.samples if self.share.rank == 0 else None
            record = self.held.measure(self.network, self.step, samples)
        if self.share.rank == 0:
            self.run.add_validation(record)
            if self._events is not None:
                self._events.add(self.step, flat_scores(record))
            shown = ", ".join(
                f"{scores['psnr']:.2f} dB and flicker {scores['flicker']:.1f} at noise {share}"
                for share, scores in record["noise"].items()
            )
            self.say(f"step {self.step}: {shown}")
            self.tell("running")

    def save(self) -> None:
        """Write a checkpoint, and the averaged model."""
        tensors = {"weights": weights(dict(self.model.named_parameters()))}
        for number, optimizer in enumerate(self.optimizers):
            tensors[f"optimizer.{number}"] = pack(optimizer)
        if self.average is not None:
            tensors["average"] = weights(self.average.values)
        tensors |= self.adversary.saved()
        state = {
            "model": self.model.config.to_dict(), "stage": self.index, "batch": self.batch,
            "stage_step": self.stage_step, "seconds": self.clock.seconds,
            "clips": self.inputs.fingerprint(),
            "average_updates": 0 if self.average is None else self.average.updates,
        }  # fmt: skip
        if self.share.rank == 0:
            self.run.save(self.step, tensors, state, self.recipe.keep)
        self.save_model()
        self.clock.saved = time.monotonic()

    def save_model(self) -> None:
        """Write the trained model, with averaged weights where there are some."""
        values = weights(dict(self.model.named_parameters()))
        if self.average is not None:
            values |= weights(self.average.values)
        if self.share.rank == 0:
            model = TemporalVAE.from_config(self.model.config)
            restore(dict(model.named_parameters()), values)
            self.run.save_model(model)

    def tell(self, status: str, message: str = "") -> None:
        """Write how far the run is, and the page to watch."""
        if self.share.rank:
            return
        self.run.tell(
            status=status, step=self.step, steps=self.recipe.steps, hours=self.recipe.hours,
            seconds=self.clock.seconds, message=message, skipped=self.inputs.skipped.reasons,
        )  # fmt: skip
        write_page(self.run.folder)


def _family(name: str) -> str:
    """Which family a term is of: what it compares."""
    return {"kl": "latent", "distill": "latent", "adversarial": "critic", "critic": "critic"}.get(
        name, "reconstruction"
    )


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def computing_type(name: str, device: torch.device) -> torch.dtype:
    """What a network is computed with; "auto" is bfloat16 where a device is fast with it."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    fast = fastest(device)
    return fast if fast == torch.bfloat16 else torch.float32
