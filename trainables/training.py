"""The epoch loop that every training trainable shares: optimiser, schedule, state on disk, best weights.

A trainable owns its state directory: after each epoch the whole state (weights, optimiser, counters, best, random
generators) replaces the earlier one atomically, and :meth:`Training.setup` goes on from whatever state it finds. So a
killed worker, a lost node and a resumed sweep take the same path, and resumed equals uninterrupted. A trial whose node
is about to be taken away saves its state in the middle of the epoch, too, and leaves.
"""

from __future__ import annotations

import gc
import math
import random
import socket
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from ray.actor import exit_actor
from ray.tune import Trainable
from torch import Tensor, nn

from engines.errors import InputError
from trainables import checkpoint, fast_linear, memory, preemption, recompute
from trainables.domain import Domain
from trainables.gang import Gang
from trainables.optimizer import Optimizer

Batch = dict[str, Tensor]


def learning_rate(progress: float, peak: float, end: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of training, then a cosine from `peak` to `end` x `peak`."""
    if progress < warmup:
        return peak * progress / warmup
    turn = (progress - warmup) / (1 - warmup)
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(turn, 1.0))))


class Training(Trainable):
    """One epoch per step. Subclasses give the model, the batches, the loss and the validation.

    config: trial_id, state_dir, domain, params, settings, seed (all plain data; see sweeps/training.py); workers, where
    several train the trial together (see gang.py).
    """

    domain: Domain
    model: nn.Module
    trained: nn.ModuleList  # the model and whatever else is trained with it

    def build(self) -> None:
        """Set self.domain, self.model and self.trained from self.config."""
        raise NotImplementedError

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch 1, 2, ...; a function of the epoch alone, so that a resumed epoch sees the same.

        Of a gang, this worker's share of each (see :meth:`trainables.gang.Gang.share`).
        """
        raise NotImplementedError

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and its parts by name; progress is the share of training done, in [0, 1)."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Metrics of the present model on validation data; must hold 'val_quality'."""
        raise NotImplementedError

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower val_quality is better."""
        raise NotImplementedError

    # ------------------------------------------------------------------ Ray's interface
    def setup(self, config: dict[str, Any]) -> None:
        """Build everything from `config`, then go on from the state directory if it holds a state."""
        self.config = config
        self.gang: Gang = vars(self).get("gang") or Gang(config.get("workers", 1), config.get("rank", 0))
        self._before = vars(self).get("_before") or {*vars(self), "_before"}  # what outlives a trial
        self.gang.assemble(type(self), config)
        self.settings: dict[str, Any] = config["settings"]
        self.folder = Path(config["state_dir"])
        sweep = self.folder.parent.parent  # the driver made it: on a host without the storage, ours would be private
        if not sweep.is_dir():
            raise InputError(f"{socket.gethostname()} does not see the storage {sweep}; mount it there")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seed = int(config["seed"])
        self.epoch, self.best = 0, math.nan
        self.last: dict[str, float] | None = None  # what the last finished epoch found
        self.unheard = False
        self._begin_epoch()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.steps_per_epoch = max(1, self.settings["samples_per_epoch"] // self.settings["batch_size"])
        self._seed_all()
        with memory.named(self.device):
            self.build()
            self._seed_all()  # what building drew depends on what other trials had left in the cache
            self.ready()
        for left in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        state = self.folder / "state.pt"
        if state.exists():
            self._restore(checkpoint.load(state, "state"))
        self.gang.connect(self.device, (self.epoch, self.taken))

    def ready(self) -> None:
        """Make self.trained trainable: on its device, fast, with a fresh optimiser."""
        self.trained.to(self.device)
        fast_linear.install(self.trained)
        if self.settings["checkpointing"]:
            recompute.install(self.trained, self.domain.blocks)
        self.optimizer = Optimizer(self.trained, self.settings["optimizer"], self.settings["weight_decay"])

    def _seed_all(self) -> None:
        torch.manual_seed(self.seed)
        np.random.seed(self.seed % 2**32)
        random.seed(self.seed)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another trial in the same process (starting one costs seconds of imports)."""
        self._forget()
        self.setup(new_config)
        return True

    def _forget(self) -> None:
        """Free what the last trial held, before the next one needs as much: a card may not have room for both."""
        for name in [name for name in vars(self) if name not in self._before and not name.startswith("_")]:
            delattr(self, name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other trials share the card

    def cleanup(self) -> None:
        """Ray's word that this process has trained its last trial."""
        self.gang.disband()

    def step(self) -> dict[str, Any]:
        """Train one epoch, validate, save.

        A restored trial first says again what it last found: its driver may have died before it heard.
        """
        if self.unheard and self.last:
            self.unheard = False
            return {"epoch": self.epoch, **self.last}
        with memory.named(self.device):
            return self._step()

    def _step(self) -> dict[str, Any]:
        self.started, self.cpu = time.perf_counter() - self.spent[0], time.process_time() - self.spent[1]
        with self.gang.epoch() as others:
            metrics = self.train_epoch()
        trained = time.perf_counter()
        metrics |= self.validate()
        quality = metrics["val_quality"]
        better = math.isnan(self.best) or (quality < self.best if self.lower_is_better else quality > self.best)
        better = better and math.isfinite(quality)
        if better:
            self.best = quality
            checkpoint.save(self.folder / "best.pth", self.exported())
        metrics |= {
            "kept": float(better),
            "seconds_train": trained - self.started,
            "seconds_val": time.perf_counter() - trained,
        }
        metrics["epoch_s"] = time.perf_counter() - self.started
        metrics["cpu_s"] = time.process_time() - self.cpu + sum(others)
        if self.gang.size > 1:
            metrics["workers"] = float(self.gang.size)
        self.last = metrics
        self._save()
        return {"epoch": self.epoch, **metrics}

    def _begin_epoch(self) -> None:
        # Steps that the epoch in progress has taken, the sums of their losses, and their seconds: by the clock, of CPU.
        self.taken, self.sums, self.spent = 0, dict[str, float](), (0.0, 0.0)

    def _leave(self) -> NoReturn:
        if self.gang.rank:
            raise ConnectionError("the trial leaves: the leader saves it")
        self.spent = (time.perf_counter() - self.started, time.process_time() - self.cpu)
        self._save()
        # The driver reads from this end that it is no failure; the trial starts again on another node.
        exit_actor()  # type: ignore[no-untyped-call]
        raise RuntimeError("an actor that has ended goes on")

    def exported(self) -> dict[str, Any]:
        """What best.pth holds: the plain model, how to build it, and where it comes from."""
        raise NotImplementedError

    def train_epoch(self) -> dict[str, float]:
        """The training of an epoch, or of what is left of it, which every worker of a gang does; means over batches."""
        metrics = self._train()
        self.epoch += 1
        self._begin_epoch()
        self.model.eval()
        return metrics

    def start_epoch(self) -> None:
        """What an epoch changes in the model before its first step."""

    def _train(self) -> dict[str, float]:
        if not self.taken:
            self.start_epoch()
        self.gang.align(self.trained)
        self.model.train()
        total, waited = self.settings["epochs"] * self.steps_per_epoch, 0.0
        first, mark = self.epoch * self.steps_per_epoch, time.perf_counter()
        for batch in islice(self.batches(self.epoch + 1), self.taken, None):
            batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            waited += time.perf_counter() - mark
            for name, value in self.train_step(batch, first + self.taken, total).items():
                self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
            self.taken += 1
            if self.gang.any(preemption.noticed()):
                self._leave()
            mark = time.perf_counter()
        means = {f"train_{name}": value / self.steps_per_epoch for name, value in self.sums.items()}
        return {**means, "lr": self.optimizer.rate, "seconds_data": waited}

    def train_step(self, batch: Batch, step: int, total: int) -> dict[str, Tensor]:
        """One optimiser step, number `step` of `total`; the loss and its parts, on the graph's device.

        With `accumulate` the batch goes through in so many equal pieces, whose gradients are averaged. Of a gang, batch
        is this worker's share; gradients and the loss are averaged over all.
        """
        rate, pieces = self.rate(step, total), self.settings["accumulate"]
        rows = len(next(iter(batch.values()))) // pieces
        parts_of_mean = pieces * self.gang.size
        means: dict[str, Tensor] = {}
        for start in range(0, rows * pieces, rows):
            piece = {name: value[start : start + rows] for name, value in batch.items()} if pieces > 1 else batch
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["precision"] == "bfloat16"):
                loss, parts = self.loss(piece, step / total)
            torch.autograd.backward(loss / parts_of_mean)
            for name, value in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0) + value.detach() / parts_of_mean
        self.gang.sum_gradients(self.trained.parameters(), means.values())
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step(rate)
        return means

    def rate(self, step: int, total: int) -> float:
        """The learning rate of step number `step` of `total`."""
        return learning_rate(
            (step + 1) / total, self.settings["lr"], self.settings["lr_end"], self.settings["lr_warmup"]
        )

    def _save(self) -> None:
        checkpoint.save(self.folder / "state.pt", self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "metrics": self.last,
            "part": {"taken": self.taken, "sums": self.sums, "spent": list(self.spent)},
            "best": self.best,
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": checkpoint.rng_states(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.best, self.last = state["epoch"], state["best"], state["metrics"]
        part, self.unheard = state["part"], self.last is not None
        self.taken, self.sums, self.spent = part["taken"], part["sums"], (part["spent"][0], part["spent"][1])
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        checkpoint.restore_rng(state["rng"])
