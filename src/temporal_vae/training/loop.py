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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.model import TemporalVAE
from temporal_vae.network.kernels.dtypes import fastest, slowness
from temporal_vae.training import optimizers as how
from temporal_vae.training import parallel
from temporal_vae.training.adversary import Adversary
from temporal_vae.training.build import build_model, image_twin
from temporal_vae.training.data import Batches, Samples, Share, in_order
from temporal_vae.training.page import write_page
from temporal_vae.training.parallel import Strategy
from temporal_vae.training.recipe import Recipe, Table
from temporal_vae.training.run import Run, pack, restore, unpack, weights
from temporal_vae.training.sources import (
    Clip,
    Skipped,
    Source,
    find_sources,
    hold_out,
    probe_all,
    refuse_unfit,
)
from temporal_vae.training.step import Pass, Terms, cells_of
from temporal_vae.training.tensorboard import Events
from temporal_vae.training.validation import HeldOut, flat_scores

SCALE_BATCHES = 8
"""Batches on which the scale of the latents is measured."""

Record = dict[str, Any]
Say = Callable[[str], None]


@dataclass(slots=True)
class Inputs:
    """What a run is trained and measured on: paths of folders, lists and tar files of videos.

    Without `validation`, every twentieth file of `data` by the hash of its name is left out of
    training for it.
    """

    data: Sequence[str | Path]
    validation: Sequence[str | Path] = ()
    skipped: Skipped = field(default_factory=Skipped)
    clips: list[Clip] = field(default_factory=list)
    held: list[Source] = field(default_factory=list)

    def look(self, recipe: Recipe, progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Find the files, and see which of them can be trained on.

        Raises `ValueError` where there are none.
        """
        found = find_sources(self.data, recipe.data.exclude)
        if self.validation:
            self.held = find_sources(self.validation)
        else:
            found, self.held = hold_out(found)
        readable = probe_all(found, self.skipped, progress)
        self.held = [clip.source for clip in probe_all(self.held, self.skipped, progress)]
        kinds = [stage.data for stage in recipe.stages()]
        fitting = [{clip.source for clip in refuse_unfit(readable, k, self.skipped)} for k in kinds]
        self.clips = [clip for clip in readable if clip.source in set.union(*fitting)]
        if not all(fitting):
            reasons = "; ".join(f"{n}: {r}" for n, r in list(self.skipped.reasons.items())[:3])
            raise ValueError(f"none of {len(found)} videos can be trained on: {reasons}")


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
        run, its = Run(out), table or asdict(recipe)
        device = parallel.own_device(torch.device(device))
        training = Training(recipe, inputs, run, share, device, strategy, say)
        training.begin(run.look(its, resume))
        if share.of > 1:  # every process has looked, before one writes
            torch.distributed.barrier()
        if share.rank == 0:
            run.open(its)
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
        self.model: TemporalVAE
        self._is_spread = False
        self._events: Events | None = None
        self.average: how.Average | None = None

    # Beginning, and going on from a checkpoint -----------------------------------------------

    def begin(self, step: int | None) -> None:
        """Build everything, and bring it to where a checkpoint left off."""
        torch.manual_seed(self.recipe.seed)
        if step is None:
            self.model, anew = build_model(self.recipe.model, self.recipe.seed)
            if anew:
                self.say(f"{len(anew)} weights in time begin anew, such as {anew[0]}")
            self.index, self.batch = self._stage_at(self.progress()), self._batches_before()
            self._enter_stage()
            return
        tensors, state = self.run.load(step)
        self.model = TemporalVAE.from_config(TemporalVAEConfig.from_dict(state["model"]))
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

    def _batches_before(self) -> int:
        return self.step * self.stages[self.index].optimizer.accumulate

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
        if self.stage.model.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.trained = how.freeze(self.model, self.stage.model)
        if self.strategy == "fsdp" and self.share.of > 1:
            self._spread(network)
        self.network = network
        self.dtype = computing_type(self.stage.optimizer.dtype, self.device, self.say)
        self.terms = Terms(self.stage.loss, self.device, cells_of(self.model))
        passing = Pass(network, self.stage.loss)
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
            raise ValueError("fsdp trains a model whole: without model.temporal = false, or by ddp")
        if not self._is_spread:
            parallel.spread(network)
        self._is_spread = True
        self.trained = {n: p for n, p in network.named_parameters() if p.requires_grad}

    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        return self.clock.seconds / (3600 * (self.recipe.hours or 1))

    def stage_progress(self) -> float:
        """The part of the stage that is done, 0 to 1."""
        begin = self.bounds[self.index - 1] if self.index else 0.0
        length = self.bounds[self.index] - begin
        return min(1.0, max(0.0, self.progress() - begin) / length) if length else 1.0

    # The loop ----------------------------------------------------------------------------------

    def steps(self) -> Iterator[Record]:
        """Step after step to the end of the run; saves, measures and says how it goes."""
        if self.recipe.tensorboard and self.share.rank == 0:
            self._events = Events(self.run.folder / "tensorboard", self.step)
        self.tell("running")
        try:
            while not self.ended():
                if self._stage_at(self.progress()) > self.index:
                    self.rescale()
                    self.index = self._stage_at(self.progress())
                    self._enter_stage()
                record = self.one_step()
                self.note(record)
                yield record
                self.now_and_then()
            self.rescale()
            self.measure()
            self.save()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            self.save()
            self.tell("stopped")
            raise
        except Exception as error:
            self.tell("failed", message=str(error))
            raise
        finally:
            if self._events is not None:
                self._events.close()
        self.tell("done")

    @torch.no_grad()
    def rescale(self) -> None:
        """Measure the scale that brings latents to unit variance, where the encoder was trained.

        A student keeps the scale of its teacher.
        """
        encoder = any(part.startswith("encoder") for part in how.trained_parts(self.stage.model))
        if not encoder or self.stage.loss.teacher:
            return
        batches = Batches(self.inputs.clips, self.stage.data, self.recipe.seed)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        with self.averaged():
            found = [
                self.network.encode(batches[number].pixels().to(self.device), generator=generator)
                .flatten()
                .cpu()
                for number in range(SCALE_BATCHES)
            ]
        scale = round(1 / float(torch.cat(found).std()), 4)
        assert isinstance(self.model.config, TemporalVAEConfig)  # see `build_model`
        self.model.config = replace(self.model.config, latent_scale_factor=scale)

    def ended(self) -> bool:
        """Whether the run has had its steps or its hours."""
        return parallel.agreed(self.progress() >= 1, self.share, self.device)

    def one_step(self) -> Record:
        """One update of the weights on `accumulate` batches; the record of it."""
        start, waited, frames = time.monotonic(), 0.0, 0
        rate = how.learning_rate(self.stage.optimizer, self.stage_progress(), self.stage_step)
        count = self.stage.optimizer.accumulate
        sums: dict[str, Tensor] = {}
        for _ in range(count):
            before = time.monotonic()
            samples = next(self.batches)
            waited += time.monotonic() - before
            frames += samples.frames.shape[0] * samples.frames.shape[1] * self.share.of
            for name, value in self._gradients(samples, 1 / count).items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu() / count
        values = parallel.mean_over_processes(sums, self.share)
        self._refuse_infinite(values, samples)
        values["gradient_norm"] = self._update(rate)
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        seconds = time.monotonic() - start
        return {
            "step": self.step, **values, "stage": self.stage.name, "learning_rate": rate,
            "frames_per_second": frames / seconds, "waited": waited / seconds,
            "seconds": self.clock.seconds,
        }  # fmt: skip

    def _gradients(self, samples: Samples, part: float) -> dict[str, Tensor]:
        """Add the gradients of one batch to those there are; its terms and its loss."""
        self.batch = samples.number + 1
        for clip, reason in samples.broken:
            self.inputs.skipped.add(clip.source, reason)
        video = samples.pixels().to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            reconstruction, mean, log_variance = self.passing(video, samples.seeds)
        reconstruction, mean = reconstruction.float(), mean.float()
        terms = self.terms(video, reconstruction, mean, log_variance.float())
        loss = self.terms.weighted(terms)
        loss = loss + self.adversary.of_generator(video, reconstruction, loss, self._on(), terms)
        (loss * part).backward()
        return {"loss": loss, **{f"{_family(name)}/{name}": term for name, term in terms.items()}}

    def _on(self) -> bool:
        return self.stage_progress() >= self.stage.critic.start

    def _update(self, rate: float) -> float:
        """Clip the gradients, step, average; the norm that the gradients had."""
        parameters, limit = list(self.trained.values()), self.stage.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
        how.set_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.adversary.update()
        if self.average is not None:
            self.average.update(self.trained)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _refuse_infinite(self, values: Mapping[str, float], samples: Samples) -> None:
        if math.isfinite(values["loss"]):
            return
        odd = next((name for name, value in values.items() if not math.isfinite(value)), "loss")
        file = self.run.save_batch(self.step + 1, samples.frames)
        raise ValueError(
            f"the loss of step {self.step + 1} is not finite ({odd} = {values[odd]}): its batch is "
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
        if every and self.step % every == 0 and not self.ended():
            self.measure()
        late = time.monotonic() - self.clock.saved >= due
        if parallel.agreed(late, self.share, self.device):
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
            "average_updates": 0 if self.average is None else self.average.updates,
        }  # fmt: skip
        if self.share.rank == 0:
            self.run.save(self.step, tensors, state, self.recipe.keep)
            self._save_model(tensors)
        self.clock.saved = time.monotonic()

    def _save_model(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The trained model, with averaged weights where there are some."""
        model = TemporalVAE.from_config(self.model.config)
        restore(
            dict(model.named_parameters()),
            dict(tensors["weights"]) | dict(tensors.get("average", {})),
        )
        self.run.model.mkdir(exist_ok=True)
        model.save_pretrained(self.run.model)
        text = (self.run.folder / "recipe.toml").read_text(encoding="utf-8")
        (self.run.model / "recipe.toml").write_text(text, encoding="utf-8")

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
    return {"kl": "latent", "distill": "latent", "adversarial": "critic"}.get(
        name, "reconstruction"
    )


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def computing_type(name: str, device: torch.device, say: Say) -> torch.dtype:
    """What the network is computed with, which is said, and whether it is slow on the device."""
    dtype: torch.dtype
    if name == "auto":
        fast = fastest(device)
        dtype = fast if fast == torch.bfloat16 else torch.float32
        say(f"computed in {str(dtype).removeprefix('torch.')}, which {device} is fastest with")
        return dtype
    dtype = getattr(torch, name)
    if (said := slowness(dtype, device)) is not None:
        say(f"note: {said}")
    return dtype
