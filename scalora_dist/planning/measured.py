"""Measures a step's memory and messages in a real run, for comparison with a plan."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch

from scalora_dist.data.collate import batch_of
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.profiling.clock import Clock
from scalora_dist.profiling.live import LiveBytes, living_tensors
from scalora_dist.profiling.memory import restart_peak
from scalora_dist.profiling.traffic import Traffic
from scalora_dist.training.feed import MicroBatches
from scalora_dist.training.trainer import Trainer

# The first steps are not measured: they create the optimizer's state and record module order.
TRACKED, COUNTED, ALONE = 2, 3, 4
STEPS = ALONE + 1
# {phase of a plan: the parts of a step that it stands for, as `Clock.begin` names them}
PHASES = {"grams": {"grams", "solve"}, "compression": {"room"}, "merge": {"gather", "merge"}}


class MeasuredTrainer(Trainer):
    """Takes ``STEPS`` steps on random tokens, with the largest batches that the options allow.

    Each measurement has a step of its own.

    Attributes:
        tracked: largest number of bytes of live tensors on this rank in a step.
        phases: {phase of a plan: the same}, of the phases of a rescale that the step had.
        scale: the same while the factors are scaled, which is no phase of a plan; 0: they were not.
        staged: bytes of the copies that a save makes on this rank.
        peak: peak memory of the process in a step, bytes: resident memory on a CPU, the allocator's
            on a GPU; None if the kernel cannot reset its count.
        traffic: bytes and calls of collectives in a step.
        others: bytes of tensors that were alive before this trainer was made.
    """

    tracked = 0
    scale = 0
    phases: dict[str, int]
    staged = 0
    peak: int | None = None
    traffic: Traffic

    def __init__(self, *args: Any) -> None:
        gc.collect()
        self.others = LiveBytes(existing=living_tensors()).now
        super().__init__(*args)

    def micro_batches(self, first_step: int) -> MicroBatches:
        """Random examples of ``max_length`` tokens, of which all but the first are targets.

        They are shorter if the model has no positions for so many tokens. Where the model needs an
        attention mask, the last token of each batch is padding: a mask without any is dropped.
        """
        return MicroBatches(self._random_batches(), self.world.device)

    def _random_batches(self) -> Iterator[MicroBatch]:
        tables = self.feed.tables
        length = tables.longest(self.options.data.max_length)
        shape = self.options.train.per_device_train_batch_size, length
        generator = torch.Generator().manual_seed(self.world.rank)
        while True:
            ids = torch.randint(min(tables.rows, tables.logits), shape, generator=generator)
            mask = None
            if self.feed.collate.masks:
                mask = torch.ones_like(ids)
                mask[-1, -1] = 0
            yield batch_of(ids, ids, mask)

    def take_step(self, step: int, *args: Any) -> Any:
        if step == TRACKED:
            gc.collect()
            with LiveBytes(existing=living_tensors()) as live:
                clock = _Peaks(live)
                with patch.object(self.runner, "clock", clock):
                    done = super().take_step(step, *args)
                clock.begin("")
            peaks = {part: peak - self.others for part, peak in clock.peaks.items()}
            self.tracked = max(peaks.values())
            self.scale = peaks.get("scale", 0)
            self.phases = {
                phase: max(peaks.get(part, 0) for part in parts)
                for phase, parts in PHASES.items()
                if peaks.keys() & parts
            }
        elif step == COUNTED:
            with Traffic() as self.traffic:
                done = super().take_step(step, *args)
        elif step == ALONE:
            _give_back()
            restart_peak(self.world.device)
            done = super().take_step(step, *args)
            self.peak = restart_peak(self.world.device)
        else:
            done = super().take_step(step, *args)
        return done

    def _save(self, *args: Any) -> None:
        save = self.checkpoints.save

        def noted(*parts: Any) -> None:
            gc.collect()
            with LiveBytes(existing=living_tensors()) as live:
                before = live.now
                save(*parts)
            self.staged = live.most - before

        with patch.object(self.checkpoints, "save", noted):
            super()._save(*args)


class _Peaks(Clock):
    """Notes the largest number of live bytes in each part of a step.

    Attributes:
        peaks: {part: bytes}; "" is what comes before the method's work.
    """

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.peaks: dict[str, int] = {}
        self.part = ""

    def begin(self, part: str) -> None:
        gc.collect()  # what is in cycles lives for a while longer, by chance
        self.peaks[self.part] = max(self.live.most, self.peaks.get(self.part, 0))
        self.live.most, self.part = self.live.now, part


def _give_back() -> None:
    """Make the C library return freed memory to the system, if it can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
