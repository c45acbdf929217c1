"""The training loop: global batches, summed losses, the method's transform before each step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora_dist.checkpoint.manifest import clear_leftovers, step_of
from scalora_dist.checkpoint.run_state import RunState
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.options import Options
from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World
from scalora_dist.engines.base import Engine
from scalora_dist.errors import RunExit
from scalora_dist.methods.registry import find_method, resolve_merge_options
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.export_adapter import check_adapter_rank
from scalora_dist.model_io.import_adapter import SavedAdapter
from scalora_dist.modeling.load import BaseModelSpec
from scalora_dist.modeling.loss import TargetLoss
from scalora_dist.training.build_model import build_model, check_same_attention
from scalora_dist.training.evaluate import Evaluation, evaluate, evaluation_before
from scalora_dist.training.feed import DataFeed
from scalora_dist.training.health import loss_spike
from scalora_dist.training.optimizer import make_schedule
from scalora_dist.training.output_dir import clear_results
from scalora_dist.training.results import Results
from scalora_dist.training.resume import checkpoint_to_resume
from scalora_dist.training.run_log import RunLog, read_history
from scalora_dist.training.saving import PREEMPTED, SavePolicy
from scalora_dist.training.step_profile import make_profile

logger = logging.getLogger(__name__)

MicroBatches = Iterator[dict[str, Tensor]]


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        first_step: the step that this process began at, counted from 0.
        steps_taken: number of steps since the run's first that were not skipped.
        records: the line of metrics.jsonl of every step.
        history: all lines of metrics.jsonl before ``first_step``, evaluations included.
    """

    first_step: int = 0
    steps_taken: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Fine-tunes one model on one engine and leaves its results in ``output_dir``.

    Attributes:
        options: all options of the run.
        world: the ranks.
        output_dir: the folder of results and checkpoints.
        checkpoints: the run's checkpoints, in ``output_dir``.
        resumes_from: the checkpoint that the run resumes from, or None.
        saved_adapter: an adapter that the run starts from, or None.
        feed: the data.
        model: the model that the engine trains.
        engine: the sharded model with its optimizer.
        loss: the summed loss of a micro-batch.
        runner: runs the method around each step.
        results: writes what the run leaves at its end.
        scheduler: the schedule of the learning rate.
        state: saves and restores the state of the run.
        saves: decides when to save and when to stop.
        watchdog: ends the job when a rank has died or hangs.
        profile: measures the steps, if ``--profile`` is set.
        progress: how far the run is.
    """

    def __init__(
        self,
        options: Options,
        world: World,
        base: BaseModelSpec,
        make_engine: Callable[[], Engine],
    ) -> None:
        """Load data and model, add the method's layers, and shard the model. Writes no results.

        The engine takes longest to set up, so it is made after all other checks.

        Raises:
            UserError: on every rank, for every mistake in the options or the data.
        """
        self.options = options
        self.world = world
        train = options.train
        method = find_method(options.method)
        resolve_merge_options(options.method, method, quantized=base.fourbit is not None)
        check_adapter_rank(options, merges=method.merges)
        self.output_dir = Path(str(train.output_dir))
        timeout = timedelta(seconds=train.ddp_timeout)
        self.checkpoints = Checkpoints(
            self.output_dir, world, keep=train.save_total_limit, timeout=timeout
        )
        self.resumes_from = checkpoint_to_resume(self.checkpoints, options)
        self.saved_adapter = None
        if options.model.adapter_name_or_path and self.resumes_from is None:
            self.saved_adapter = world.node_first(lambda: SavedAdapter(options))
        self.feed = DataFeed(options, world)
        check_same_attention(base, world)
        self.engine = make_engine()
        self.model = build_model(options, base, method, self.engine, self.saved_adapter)
        self.loss = TargetLoss(self.model)
        self.runner = MethodRunner(method, self.engine, options)
        logger.info(
            "%s: %d layers adapted, %d parameters trained",
            options.model.model_name_or_path,
            len(self.engine.adapted),
            self.runner.parameters,
        )
        self.results = Results(self.runner, options)
        self.scheduler = make_schedule(self.engine.optimizer, method, options, self.feed.steps)
        self.state = RunState(self.engine, self.runner, self.scheduler, options)
        self.profile = self.runner.clock = make_profile(options, self.runner, self.feed.steps)
        self.saves = SavePolicy(self.checkpoints, train)
        self.watchdog = Watchdog(world, train.hang_timeout)
        self.progress = Progress()

    def run(self) -> dict[str, Any]:
        """Train, evaluate before and after, write the results.

        Returns:
            the contents of summary.json.

        Raises:
            RunExit: on every rank, after everything that can be written is written.
        """
        try:
            with self.saves.signals:
                evaluations = self._train()
            summary = self.results.write(
                self.output_dir,
                self.model,
                self.feed.tokenizer,
                self.progress.records,
                evaluations,
            )
            self.profile.close()
        except RuntimeError:
            if gone := self.watchdog.blame():  # a collective failed: a rank is no longer there
                self.watchdog.end(gone)
            raise
        except RunExit:
            self.close()
            raise
        self.close()
        return summary

    def close(self) -> None:
        """End all threads, because the process may continue after the run."""
        self.watchdog.close()
        self.checkpoints.close()

    def start(self) -> MicroBatches:
        """Initialize the added layers, or restore the checkpoint.

        Returns:
            this rank's micro-batches from there on.
        """
        if self.resumes_from is not None:
            return self._restore(self.resumes_from)
        if self.world.is_main:
            clear_results(self.output_dir)
        self.watchdog.pause()
        self.runner.initialize(
            lambda: self.feed.samples(self.loss, self.model), examples=self.feed.examples
        )
        if self.saved_adapter:
            self.saved_adapter.fill(self.runner)
        return self.micro_batches(0)

    def _restore(self, checkpoint: Path) -> MicroBatches:
        same_folder = checkpoint.parent.resolve() == self.output_dir.resolve()
        if self.world.is_main and same_folder:
            clear_leftovers(self.output_dir)
            (self.output_dir / PREEMPTED).unlink(missing_ok=True)
        elif self.world.is_main:
            clear_results(self.output_dir)
        first_step = step_of(checkpoint) or 0
        micro_batches = self.micro_batches(first_step)  # draws a seed, as at the start of a run
        state = self.state.restore(self.checkpoints, checkpoint)
        history = [
            line
            for line in read_history(checkpoint.parent, first_step)
            if "loss" in line or line["step"] < self.feed.steps
        ]
        records = [line for line in history if "loss" in line]
        self.progress = Progress(first_step, state["steps_taken"], records, history)
        logger.info("going on from %s", checkpoint)
        return micro_batches

    def micro_batches(self, first_step: int) -> MicroBatches:
        """This rank's micro-batches from ``first_step`` on, counted from 0."""
        return self.feed.micro_batches(first_step)

    def _train(self) -> tuple[Evaluation | None, Evaluation | None]:
        """Run all steps. Returns the evaluations before the first and after the last."""
        train, steps = self.options.train, self.feed.steps
        micro_batches = self.start()
        progress = self.progress
        log = RunLog(
            self.output_dir,
            is_main=self.world.is_main,
            first_step=progress.first_step,
            steps=steps,
            logging_steps=train.logging_steps,
            history=progress.history,
        )

        def save(step: int) -> None:
            log.sync()
            self.state.save(self.checkpoints, step, progress.steps_taken)

        self.engine.module.train()
        before = evaluation_before(progress.history, self.feed.data.evaluation)
        try:
            if not progress.first_step:
                before = self._evaluate(log, 0)
            for step in range(progress.first_step, steps):
                self.profile.start(step + 1)
                record, votes = self.take_step(step, micro_batches)
                self.watchdog.pause()  # a slow disk does not mean a hung rank
                record |= self.profile.finish(record["tokens"])
                progress.records.append(record)
                log.step(record)
                done = step + 1
                if train.eval_steps and done % train.eval_steps == 0 and done < steps:
                    self._evaluate(log, done)
                self.watchdog.pause()
                self.saves.after(done, progress.records, votes, save)
            self.saves.finish()
            if report := self.runner.finish():
                log.note(steps, "train", {"carry": report})
            after = self._evaluate(log, steps)
        finally:
            log.close()  # before a final error message is printed
        return before, after

    def take_step(
        self, step: int, micro_batches: MicroBatches
    ) -> tuple[dict[str, Any], list[float]]:
        """Run one optimizer step.

        Args:
            step: number of the step, counted from 0.

        Returns:
            its record for metrics.jsonl, and ``SavePolicy.votes`` summed over ranks.
        """
        started = time.perf_counter()
        targets = self.feed.batches.target_tokens(step)
        loss_sum, tokens = self._accumulate(step, targets, micro_batches)
        self.profile.begin("rest")
        total_loss, total_tokens, *votes = self.world.sum(loss_sum, tokens, *self.saves.votes())
        record = self._describe(step, total_loss / targets)

        # The last backward has reduced the gradients. The method edits this rank's shards in place.
        layers = self.engine.layer_shards()
        report = self.runner.before_step(
            layers, steps_taken=self.progress.steps_taken, finite=math.isfinite(total_loss)
        )
        del layers  # views of gradients, which the engine frees
        if report.applied:
            self.engine.step()
        else:
            self.engine.discard_step()

        record |= report.metrics
        if report.applied:
            self.profile.begin("rest")
            self.scheduler.step()
            self.progress.steps_taken += 1
            record |= self.runner.after_step(step + 1, self.progress.steps_taken)
        else:
            record["skipped_step"] = True
            logger.warning("step %d skipped: loss or gradients are not finite", step + 1)
        record |= {"tokens": int(total_tokens), "seconds": time.perf_counter() - started}
        return record, votes

    def _accumulate(
        self, step: int, targets: int, micro_batches: MicroBatches
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward of a step's micro-batches.

        Args:
            targets: number of target tokens in the global batch.

        Returns:
            this rank's summed loss, float64, and its number of tokens, int64; both scalars.
        """
        device = self.world.device
        accumulation = self.options.train.gradient_accumulation_steps
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        tokens = torch.zeros((), dtype=torch.int64, device=device)
        for micro_step in range(accumulation):
            self.watchdog.at(f"step {step + 1}")
            self.profile.begin("data")
            batch = {k: v.to(device) for k, v in next(micro_batches).items()}
            self.profile.forward(batch)
            loss = self.loss(self.engine.module, batch).loss
            self.profile.begin("backward")
            # The sum over ranks and micro-batches of these is the mean over all target tokens.
            self.engine.backward(loss / targets, last=micro_step == accumulation - 1)
            loss_sum += loss.detach()
            tokens += batch["attention_mask"].sum()
        return loss_sum, tokens

    def _describe(self, step: int, loss: float) -> dict[str, Any]:
        """The first fields of a step's record, known before the optimizer's step."""
        record: dict[str, Any] = {
            "step": step + 1,
            "loss": loss,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        if self.options.train.fp16:
            record["loss_scale"] = self.engine.loss_scale
        if spike := loss_spike(self.progress.records, loss):
            record["loss_spike"] = spike
            logger.warning(
                "step %d: the loss jumped to %.4f, %.0f deviations above the last steps' median",
                step + 1,
                loss,
                spike,
            )
        return record

    def _evaluate(self, log: RunLog, step: int) -> Evaluation | None:
        if self.feed.data.evaluation is None:
            return None
        result = evaluate(
            self.engine.module,
            self.loss,
            self.feed.data.evaluation,
            self.feed.collate,
            self.world,
            self.options.train.per_device_eval_batch_size,
            each_batch=lambda: self.watchdog.at(f"the evaluation after step {step}"),
        )
        self.watchdog.pause()
        log.evaluation(step, {"eval_loss": result.loss, "eval_exact_match": result.exact_match})
        return result
