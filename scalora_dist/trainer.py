"""The training loop: global batches, summed losses, the rescale before the optimizer's step."""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from scalora_dist.checkpoint.manifest import clear_leftovers, step_of
from scalora_dist.checkpoint.storage import Checkpoints
from scalora_dist.config import Options
from scalora_dist.data import Collator, GlobalBatches, RankBatches, prepare_data
from scalora_dist.engines.base import Engine
from scalora_dist.errors import Ending, UserError
from scalora_dist.evaluate import Evaluation, evaluate
from scalora_dist.export import export_model
from scalora_dist.export_adapter import AdapterExport, check_adapter_rank
from scalora_dist.health import loss_spike
from scalora_dist.import_adapter import SavedAdapter
from scalora_dist.loss import TargetLoss
from scalora_dist.method_run import MethodRun
from scalora_dist.methods import find_method, settle_merges
from scalora_dist.metrics import RunLog, read_history, write_json
from scalora_dist.models import Base, load_model, load_tokenizer
from scalora_dist.optimizer import make_optimizer, make_schedule
from scalora_dist.output import check_output_dir, clear_results
from scalora_dist.profiling.memory import peak_memory_bytes
from scalora_dist.profiling.steps import make_profile
from scalora_dist.resume import RunState, check_no_newer, check_same_run, find_checkpoint
from scalora_dist.saving import PREEMPTED, Saving, check_shared
from scalora_dist.starts.samples import SamplePass
from scalora_dist.summary import summarize
from scalora_dist.update_rank import UpdateRank
from scalora_dist.watch import Watch
from scalora_dist.world import World

logger = logging.getLogger(__name__)


class Trainer:
    """Fine-tunes one model on one engine and leaves its results in ``output_dir``."""

    def __init__(
        self, options: Options, world: World, base: Base, make_engine: Callable[[], Engine]
    ) -> None:
        """Load data and model, add the method's layers, shard; writes nothing yet.

        The engine, which takes longest to set up, is made when the rest has been checked.

        Raises:
            UserError: on every rank, for every mistake in the options or the data.
        """
        self.options, self.world = options, world
        method = find_method(options.method)
        settle_merges(options.method, method, quantized=base.fourbit is not None)
        check_adapter_rank(options, merges=method.merges)
        train = options.train
        self.folder = Path(str(train.output_dir))
        self.checkpoints = Checkpoints(
            self.folder,
            world,
            keep=train.save_total_limit,
            timeout=timedelta(seconds=train.ddp_timeout),
        )
        self.resumes_from = self._find_checkpoint()
        self.saved_adapter = None
        if options.model.adapter_name_or_path and self.resumes_from is None:
            self.saved_adapter = self.world.node_first(lambda: SavedAdapter(options))
        name = options.model.model_name_or_path
        self.tokenizer = load_tokenizer(options.model)
        self.data = self.world.node_first(
            lambda: prepare_data(options.data, self.tokenizer, train.seed)
        )
        self._check_data()
        if not world.agree(zlib.crc32(str(base.attention).encode())):
            raise UserError(
                "flash-attn is installed on some nodes only: install it on all, or set "
                "--attn_implementation sdpa"
            )
        self.engine = engine = make_engine()
        weights = self.world.is_main or not engine.one_reader
        device = world.device if engine.whole else None

        def load() -> PreTrainedModel:
            return load_model(options.model, base, engine.dtype, weights=weights, device=device)

        with engine.loading():
            self.model = self.world.node_first(load) if engine.one_reader else load()
            layers = method.add(self.model, options.method, train.seed, engine.dtype)
        if self.saved_adapter:
            self.saved_adapter.check(layers)
        torch.manual_seed(train.seed + self.world.rank)  # dropout
        if train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        engine.attach(self.model, layers, partial(make_optimizer, method, options))
        self.loss = TargetLoss(self.model)
        self.method = MethodRun(method, engine, options)
        self.adapter = AdapterExport(engine, options, edits_weights=self.method.edits_weights)
        logger.info(
            "%s: %d layers adapted, %d parameters trained",
            *(name, len(layers), self.method.parameters),
        )
        assert train.train_batch_size is not None  # settled by settle_batch
        self.batches = GlobalBatches(
            self.data.train["target_tokens"], train.train_batch_size, train.seed
        )
        self.steps = train.max_steps
        if self.steps <= 0:
            examples = len(self.data.train) * train.num_train_epochs
            self.steps = math.ceil(examples / self.batches.global_batch_size)
        self.scheduler = make_schedule(engine.optimizer, method, options, self.steps)
        self.first_step = self.steps_taken = 0  # steps taken are those that were not skipped
        self.collate = Collator(self.tokenizer)
        self.update_rank = None
        if train.update_rank_layers:
            self.update_rank = UpdateRank(engine, train.update_rank_layers)
        self.state = RunState(engine, self.method, self.scheduler, options)
        self.profile = self.method.clock = make_profile(options, self.method, self.steps)
        self.saving = Saving(self.checkpoints, train)
        self.watch = Watch(world, train.hang_timeout)
        self.records: list[dict[str, Any]] = []  # of each step

    def _find_checkpoint(self) -> Path | None:
        """Where to go on from; whether there is room to write, on a disk of all nodes."""
        train = self.options.train
        check_shared(self.checkpoints, train)
        folder = find_checkpoint(self.checkpoints, train.resume_from_checkpoint)
        if folder is None or folder.parent.resolve() != self.folder.resolve():
            self.world.main_only(lambda: check_output_dir(self.folder, train))
        if folder is None:
            return None
        self.world.main_only(lambda: check_same_run(folder, self.options))
        if train.resume_from_checkpoint != "latest":  # which has just read the newer ones
            found = self.checkpoints.newest_first()
            self.world.main_only(lambda: check_no_newer(folder, self.folder, found))
        return folder

    def run(self) -> dict[str, Any]:
        """Train, evaluate before and after, write the results; returns what summary.json holds.

        Raises:
            Ending: on every rank, after all was written that can be.
        """
        try:
            with self.saving.signals:
                before, after = self._train()
            summary = self._finish(before, after)
        except RuntimeError:
            if gone := self.watch.blame():  # a collective failed, for a rank is no longer there
                self.watch.end(gone)
            raise
        except Ending:
            self._close()
            raise
        self._close()
        return summary

    def _close(self) -> None:
        """Leave no threads behind, in a process that may go on."""
        self.watch.close()
        self.checkpoints.close()

    def _train(self) -> tuple[Evaluation | None, Evaluation | None]:
        """All steps; the evaluations before the first and after the last."""
        train = self.options.train
        micro_batches, history = self._start()
        log = RunLog(
            self.folder,
            is_main=self.world.is_main,
            first_step=self.first_step,
            steps=self.steps,
            logging_steps=train.logging_steps,
            history=history,
        )

        def save(step: int) -> None:
            log.sync()
            self.state.save(self.checkpoints, step, self.steps_taken)

        self.engine.module.train()
        before = self._evaluation_before(history)
        try:
            if not self.first_step:
                before = self._evaluate(log, 0)
            for step in range(self.first_step, self.steps):
                self.profile.start(step + 1)
                record, votes = self._step(step, micro_batches)
                self.watch.pause()  # a slow disk is no hung rank
                self.profile.finish(record)
                self.records.append(record)
                log.step(record)
                done = step + 1
                if train.eval_steps and done % train.eval_steps == 0 and done < self.steps:
                    self._evaluate(log, done)
                self.watch.pause()
                self.saving.after(done, self.records, votes, save)
            self.saving.finish()
            if report := self.method.finish():
                log.note(self.steps, "train", {"carry": report})
            after = self._evaluate(log, self.steps)
        finally:
            log.close()  # before the sentence that a run may end with
        return before, after

    def _start(self) -> tuple[Iterator[dict[str, Tensor]], list[dict[str, Any]]]:
        """Go back to the checkpoint, if there is one; the data from there, the metrics up to it."""
        if self.resumes_from is None:
            if self.world.is_main:
                clear_results(self.folder)
            self.watch.pause()
            self.method.fill_in(self._samples)
            if self.saved_adapter:
                self.saved_adapter.fill(self.method)
            return self._micro_batches(), []
        if self.world.is_main and self.resumes_from.parent.resolve() == self.folder.resolve():
            clear_leftovers(self.folder)
            (self.folder / PREEMPTED).unlink(missing_ok=True)
        elif self.world.is_main:
            clear_results(self.folder)
        self.first_step = step_of(self.resumes_from) or 0
        micro_batches = self._micro_batches()  # draws a seed, as it did at the beginning
        self.steps_taken = self.state.restore(self.checkpoints, self.resumes_from)["steps_taken"]
        history = [
            record
            for record in read_history(self.resumes_from.parent, self.first_step)
            if "loss" in record or record["step"] < self.steps
        ]
        self.records = [record for record in history if "loss" in record]
        logger.info("going on from %s", self.resumes_from)
        return micro_batches, history

    def _samples(self) -> SamplePass:
        """What a method's start may look at."""
        train, examples = self.options.train, len(self.data.train)
        # LoRA-SB's share of the data (section 3), which it found enough.
        count = self.options.method.start_samples or max(25, math.ceil(0.001 * examples))
        return SamplePass(
            partial(self.loss, self.model),
            self.data.train,
            self.collate,
            self.world,
            count=count,
            seed=train.seed,
        )

    def _finish(self, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
        """Write summary, adapter and model."""
        train = self.options.train
        low = self.method.low
        ranks = self.update_rank.measure(low) if self.update_rank else []
        (peak,) = self.world.max(peak_memory_bytes(self.world.device))
        summary = summarize(
            self.options,
            self.records,
            before,
            after,
            world_size=self.world.size,
            rank=self.options.method.rank if "rank" in self.method.method.options else None,
            parameters=self.method.parameters,
            update_rank=ranks,
            carry=self.method.merger.into.summary() if self.method.merger else {},
            peak_memory_bytes=int(peak),
        )
        if self.world.is_main:
            write_json(self.folder / "summary.json", summary)
        self.adapter.write(self.folder / "adapter", low)
        if train.save_model:
            export_model(self.folder / "model", self.engine, self.model, self.tokenizer, low)
        self.profile.close()
        return summary

    def _step(
        self, step: int, micro_batches: Iterator[dict[str, Tensor]]
    ) -> tuple[dict[str, Any], list[float]]:
        """One optimizer step: its record for metrics.jsonl, and all ranks' votes to stop."""
        started = time.perf_counter()
        accumulation = self.options.train.gradient_accumulation_steps
        targets = self.batches.target_tokens(step)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        tokens = torch.zeros((), dtype=torch.int64, device=self.world.device)
        for micro_step in range(accumulation):
            self.watch.at(f"step {step + 1}")
            self.profile.begin("data")
            batch = {k: v.to(self.world.device) for k, v in next(micro_batches).items()}
            self.profile.forward(batch)
            loss = self.loss(self.engine.module, batch).loss
            self.profile.begin("backward")
            # The sum over ranks and micro-batches of these is the mean over all target tokens.
            self.engine.backward(loss / targets, last=micro_step == accumulation - 1)
            loss_sum += loss.detach()
            tokens += batch["attention_mask"].sum()
        self.profile.begin("rest")
        total_loss, total_tokens, *votes = self.world.sum(loss_sum, tokens, *self.saving.votes())
        record: dict[str, Any] = {
            "step": step + 1,
            "loss": total_loss / targets,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        if self.options.train.fp16:
            record["loss_scale"] = self.engine.loss_scale
        if spike := loss_spike(self.records, record["loss"]):
            record["loss_spike"] = spike
            logger.warning(
                "step %d: the loss jumped to %.4f, %.0f deviations above the last steps' median",
                *(step + 1, record["loss"], spike),
            )
        finite = math.isfinite(total_loss)
        if self.engine.step(self.method.before_step(self.steps_taken, finite, record)):
            self.profile.begin("rest")
            self.scheduler.step()
            self.steps_taken += 1
            self.method.after_step(self.steps_taken, record)
        else:
            record["skipped_step"] = True
            logger.warning("step %d skipped: loss or gradients are not finite", step + 1)
        record |= {"tokens": int(total_tokens), "seconds": time.perf_counter() - started}
        return record, votes

    def _micro_batches(self) -> Iterator[dict[str, Tensor]]:
        sampler = RankBatches(
            self.batches,
            micro_batch_size=self.options.train.per_device_train_batch_size,
            rank=self.world.rank,
            world=self.world.size,
            start_step=self.first_step,
        )
        return iter(DataLoader(self.data.train, batch_sampler=sampler, collate_fn=self.collate))

    def _evaluate(self, log: RunLog, step: int) -> Evaluation | None:
        if self.data.evaluation is None:
            return None
        result = evaluate(
            self.engine.module,
            self.loss,
            self.data.evaluation,
            self.collate,
            self.world,
            self.options.train.per_device_eval_batch_size,
            each_batch=lambda: self.watch.at(f"the evaluation after step {step}"),
        )
        self.watch.pause()
        log.evaluation(step, {"eval_loss": result.loss, "eval_exact_match": result.exact_match})
        return result

    def _evaluation_before(self, history: list[dict[str, Any]]) -> Evaluation | None:
        """The evaluation at step 0 that a run which goes on has behind it."""
        for record in history:
            if "eval_loss" in record and record["step"] == 0 and self.data.evaluation is not None:
                loss, matches = record["eval_loss"], record["eval_exact_match"]
                return Evaluation(loss, matches, len(self.data.evaluation))
        return None

    def _check_data(self) -> None:
        """Warn of examples that were cut; make sure that all nodes prepared the same."""
        data, length = self.data, self.options.data.max_length
        # Each rank reads its own batches and counts the global targets by itself.
        check = zlib.crc32(np.asarray(data.train["target_tokens"], dtype=np.int64).tobytes())
        check = zlib.crc32(json.dumps([data.train[0], data.train[-1]]).encode(), check)
        if not self.world.agree(check):
            raise UserError("the nodes prepared different data: share HF_HOME or the data's files")
        if data.truncated:
            logger.warning("%d example(s) longer than %d tokens: cut", data.truncated, length)
        if data.dropped:
            logger.warning("%d example(s) without a target token: dropped", data.dropped)
