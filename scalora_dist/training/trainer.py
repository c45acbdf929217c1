"""The training loop: global batches, summed losses, the method's transform before each step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora_dist.checkpoint.manifest import checkpoint_folder, step_of
from scalora_dist.checkpoint.run_state import RunState, check_same_data
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config.options import Options
from scalora_dist.distributed.stop_signals import PREEMPTED, StopSignals
from scalora_dist.distributed.watchdog import Watchdog
from scalora_dist.distributed.world import World
from scalora_dist.engines.build import engine_factory
from scalora_dist.errors import RunExit
from scalora_dist.methods.registry import METHODS
from scalora_dist.methods.runner import MethodRunner
from scalora_dist.model_io.export_adapter import check_adapter_rank
from scalora_dist.model_io.import_adapter import SavedAdapter
from scalora_dist.modeling.hub_files import at_commit, commit_of
from scalora_dist.modeling.load import read_base_model
from scalora_dist.modeling.loss import TargetLoss
from scalora_dist.modeling.padding import whole_rows
from scalora_dist.training.build_model import build_model, check_same_attention
from scalora_dist.training.evaluate import Evaluation, evaluate
from scalora_dist.training.feed import DataFeed, MicroBatches
from scalora_dist.training.optimizer import make_schedule
from scalora_dist.training.progress import Progress
from scalora_dist.training.resolve import resolve
from scalora_dist.training.results import Results
from scalora_dist.training.resume import check_not_beyond, checkpoint_to_resume, goes_on_in
from scalora_dist.training.run_log import RunLog, disk_errors_told, read_history
from scalora_dist.training.saving import SavePolicy, StopAsked
from scalora_dist.training.step_profile import make_profile
from scalora_dist.training.upload import prepare_upload

logger = logging.getLogger(__name__)


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
        signals: records stop signals.
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

    def __init__(self, options: Options, world: World, signals: StopSignals | None = None) -> None:
        """Load data and model, add the method's layers, and shard the model. Writes no results.

        The engine takes longest to set up, so it is made after all other checks.

        Args:
            signals: what records stop signals; by default one that ``run`` enters.

        Raises:
            UserError: on every rank, for every mistake in the options or the data.
        """
        model, dtype = at_commit(options.model, world), options.train.dtype
        base = world.node_first(lambda: read_base_model(model, dtype, world.device))
        self.options = options = resolve(options, world.size, base)
        pinned = replace(options, model=model)
        self.world = world
        train, method = options.train, METHODS[options.method.name]
        make_engine = engine_factory(options, world, base)
        check_adapter_rank(options, merges=method.merges)
        self.output_dir = Path(str(train.output_dir))
        timeout = timedelta(seconds=train.ddp_timeout)
        self.checkpoints = Checkpoints(
            self.output_dir, world, keep=train.save_total_limit, timeout=timeout
        )
        self.resumes_from = checkpoint_to_resume(self.checkpoints, options)
        self.signals = signals or StopSignals()
        if self.resumes_from and goes_on_in(self.resumes_from, self.output_dir):
            self._advise(step_of(self.resumes_from) or 0)
        repository = prepare_upload(options, self.checkpoints)
        self.saved_adapter = None
        if options.model.adapter_name_or_path and self.resumes_from is None:
            commit = commit_of(options.model.adapter_name_or_path, None, world)
            self.saved_adapter = world.node_first(lambda: SavedAdapter(options, commit))
        self.feed = DataFeed(pinned, world)
        data = self.feed.data.checksum
        if self.resumes_from is not None:
            world.main_only(partial(check_same_data, self.resumes_from, options, data))
            check_not_beyond(self.resumes_from, self.feed.steps)
        check_same_attention(base, world)
        self.engine = make_engine()
        self.model = build_model(pinned, base, method, self.engine, self.saved_adapter)
        self.feed.fit(self.model)
        self.loss = TargetLoss(self.model)
        self.runner = MethodRunner(method, self.engine, options)
        logger.info(
            "%s: %d layers adapted, %d parameters trained",
            options.model.model_name_or_path,
            len(self.engine.adapted),
            self.runner.parameters,
        )
        self.results = Results(self.runner, options, model, self.checkpoints, repository)
        self.scheduler = make_schedule(self.engine.optimizer, method, options, self.feed.steps)
        self.state = RunState(self.engine, self.runner, self.scheduler, options, data)
        self.profile = self.runner.clock = make_profile(pinned, self.runner, self.feed.steps)
        self.watchdog = Watchdog(world, train.hang_timeout)
        self.saves = SavePolicy(self.checkpoints, train, self.signals, self.watchdog)
        self.progress = Progress()

    def run(self) -> dict[str, Any]:
        """Train, evaluate before and after, write the results.

        Returns:
            the contents of summary.json.

        Raises:
            RunExit: on every rank; on rank 0 alone, where an export cannot be written.
        """
        try:
            with self.signals:
                summary = self._run()
                self.signals.finish()
        except RuntimeError:
            self.signals.end_with_others()
            if gone := self.watchdog.blame():  # a collective failed: a rank is no longer there
                self.watchdog.end(gone)
            raise
        except RunExit:
            self.close()
            raise
        self.close()
        return summary

    def _run(self) -> dict[str, Any]:
        micro_batches = self.start()
        log = RunLog(
            self.output_dir,
            is_main=self.world.is_main,
            first_step=self.progress.first_step,
            steps=self.feed.steps,
            logging_steps=self.options.train.logging_steps,
            history=self.progress.history,
        )
        try:
            self._train(micro_batches, log)
            report = self.runner.finish()
            if not self.results.phases.done("evaluation"):
                if report:
                    log.note(self.feed.steps, "train", {"carry": report})
                self.results.evaluated(self._evaluate(log, self.feed.steps))
        finally:
            log.close()  # before a final error message is printed
        with disk_errors_told(self.output_dir / "profile"):
            self.profile.close()
        return self.results.write(
            self.feed.tokenizer,
            self.progress.tally,
            self.progress.before,
            self.feed.data.turns,
        )

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
        self.watchdog.pause()
        # A start runs the model a few times, and has other hooks on each layer.
        with torch.compiler.set_stance("force_eager"):
            self.runner.initialize(
                lambda: self.feed.samples(self.loss, self.model), examples=self.feed.examples
            )
        if self.saved_adapter:
            self.saved_adapter.fill(self.runner)
        self.results.clear()
        return self.micro_batches(0)

    def _restore(self, checkpoint: Path) -> MicroBatches:
        here = goes_on_in(checkpoint, self.output_dir)
        first_step = step_of(checkpoint) or 0
        micro_batches = self.micro_batches(first_step)  # draws a seed, as at the start of a run
        state = self.state.restore(self.checkpoints, checkpoint)
        history = read_history(checkpoint.parent, first_step) if self.world.is_main else []
        if not here:
            self.results.clear()
        elif first_step < self.feed.steps:
            self.results.clear(resumed=True)
        else:
            self.results.go_on(checkpoint, self.options.train.save_total_limit)
        if not self.results.phases.done("evaluation"):  # then its lines are written again
            steps = self.feed.steps
            history = [line for line in history if "loss" in line or line["step"] < steps]
        self.progress = Progress.restored(state["progress"], first_step, history)
        if here:
            self.saves.saved = first_step
            if self.world.is_main:
                (self.output_dir / PREEMPTED).unlink(missing_ok=True)
        logger.info("going on from %s", checkpoint)
        return micro_batches

    def _advise(self, step: int) -> None:
        """Set what is said after a signal, now that the checkpoint of ``step`` is written."""
        self.signals.step = step
        self.signals.advice = (
            f"{checkpoint_folder(self.output_dir, step)} is written: go on with "
            "--resume_from_checkpoint latest"
        )

    def micro_batches(self, first_step: int) -> MicroBatches:
        """This rank's micro-batches from ``first_step`` on, counted from 0."""
        return self.feed.micro_batches(first_step)

    def _train(self, micro_batches: MicroBatches, log: RunLog) -> None:
        """Run all steps, and save the trained state."""
        progress, first, steps = self.progress, self.progress.first_step, self.feed.steps
        self.engine.module.train()
        if not first:
            progress.before = self._evaluate(log, 0)
        elif self._evaluates_after(first) and not self._evaluated(first):
            self._evaluate(log, first)  # a signal has cut it short
        save = partial(self._save, log)
        self.world.sum(0.0)  # a barrier: a signal that finds one rank held must find all held
        self.signals.hold()
        for step in range(first, steps):
            self.profile.start(step + 1)
            record, votes = self.take_step(step, micro_batches)
            self.watchdog.pause()  # a slow disk does not mean a hung rank
            record |= self.profile.finish(record["tokens"])
            progress.note(record)
            log.step(record)
            done = step + 1
            if self._evaluates_after(done):
                try:
                    self._evaluate(log, done, each_batch=self.saves.check_asked)
                except StopAsked:
                    votes[0] = 1.0
            self.watchdog.pause()
            self.saves.after(done, progress.health.skipped_in_a_row, votes, save)
        micro_batches.close()
        saved = self.saves.finish(steps, save)
        if not self.results.phases.done("training"):
            self.results.phases.trained(steps, saved=saved)
        if saved:  # otherwise the results are all that will be left of the last steps
            self._advise(steps)
            self.signals.release()

    def _evaluates_after(self, step: int) -> bool:
        """Whether the run evaluates between ``step`` and the next one."""
        every = self.options.train.eval_steps
        return bool(every) and step % every == 0 and step < self.feed.steps

    def _evaluated(self, step: int) -> bool:
        """Whether an earlier process has evaluated after ``step``. A collective."""
        lines = self.progress.history
        return self.world.json_from_rank_0(
            lambda: any("eval_loss" in line and line["step"] == step for line in lines)
        )

    def _save(self, log: RunLog, step: int) -> None:
        log.sync()
        self.state.save(self.checkpoints, step, self.progress.state())

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
        # The last backward has reduced the gradients. The device may still be at it, until the sum.
        layers = self.runner.layers_due(self.progress.steps_taken)
        total_loss, total_tokens, *votes = self.world.sum(loss_sum, tokens, *self.saves.votes())
        record = self._describe(step, total_loss / targets)
        # The method edits this rank's shards in place.
        report = self.runner.before_step(layers, finite=math.isfinite(total_loss))
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

    @whole_rows()
    def _accumulate(
        self, step: int, targets: int, micro_batches: MicroBatches
    ) -> tuple[Tensor, int]:
        """Run forward and backward of a step's micro-batches. The host does not wait for them.

        Only under --activation_offloading it waits in the backward, if it is far ahead.

        Args:
            targets: number of target tokens in the global batch.

        Returns:
            this rank's summed loss, a float64 scalar on its device, and its number of tokens.
        """
        accumulation = self.options.train.gradient_accumulation_steps
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        tokens = 0
        for micro_step in range(accumulation):
            self.watchdog.at(f"step {step + 1}")
            self.profile.begin("data")
            batch = next(micro_batches)
            self.profile.forward(batch)
            loss = self.loss(self.engine.module, batch).loss
            self.profile.begin("backward")
            # The sum over ranks and micro-batches of these is the mean over all target tokens.
            self.engine.backward(loss / targets, last=micro_step == accumulation - 1)
            loss_sum += loss.detach()
            tokens += batch.tokens
            self.profile.begin("data")
            if micro_step + 1 < accumulation or step + 1 < self.feed.steps:
                micro_batches.load_next()
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
        if spike := self.progress.health.spike(loss):
            record["loss_spike"] = spike
            logger.warning(
                "step %d: the loss jumped to %.4f, %.0f deviations above the last steps' median",
                step + 1,
                loss,
                spike,
            )
        return record

    def _evaluate(
        self, log: RunLog, step: int, each_batch: Callable[[], None] | None = None
    ) -> Evaluation | None:
        """Evaluate after ``step`` steps, and log it. Calls ``each_batch`` before each batch."""
        data = self.feed.data.evaluation
        if data is None:
            return None

        def next_batch() -> None:
            self.watchdog.at(f"the evaluation after step {step}")
            if each_batch:
                each_batch()

        size = self.options.train.per_device_eval_batch_size
        result = evaluate(
            self.engine.module, self.loss, data, self.feed.collate, self.world, size, next_batch
        )
        self.watchdog.pause()
        log.evaluation(step, {"eval_loss": result.loss, "eval_exact_match": result.exact_match})
        return result
