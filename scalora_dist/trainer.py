"""The training loop: global batches, summed losses, the rescale before the optimizer's step."""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from scalora_dist.config import ModelArguments, Options, TrainArguments
from scalora_dist.data import Collator, GlobalBatches, RankBatches, prepare_data
from scalora_dist.engines.base import Engine, LayerShards, gradient_shards
from scalora_dist.errors import UserError
from scalora_dist.evaluate import Evaluation, evaluate
from scalora_dist.export import export_model
from scalora_dist.loss import summed_cross_entropy
from scalora_dist.methods import add_layers, make_rescaler
from scalora_dist.metrics import RunLog, write_json
from scalora_dist.rescale import RescaleReport
from scalora_dist.shards import global_norm
from scalora_dist.solve import Rule
from scalora_dist.summary import summarize
from scalora_dist.update_rank import UpdateRank
from scalora_dist.world import World

logger = logging.getLogger(__name__)


class Trainer:
    """Fine-tunes one model on one engine and leaves its results in ``output_dir``."""

    def __init__(self, options: Options, world: World, make_engine: Callable[[], Engine]) -> None:
        """Load data and model, add the method's layers, shard; writes nothing yet.

        The engine, which takes longest to set up, is made when the rest has been checked.

        Raises:
            UserError: on every rank, for every mistake in the options or the data.
        """
        self.options, self.world = options, world
        train = options.train
        self.folder = Path(str(train.output_dir))
        self.world.main_only(lambda: check_output_dir(self.folder, train))
        name = options.model.model_name_or_path
        self.tokenizer = load_tokenizer(options.model)
        self.data = self.world.main_first(
            lambda: prepare_data(options.data, self.tokenizer, train.seed)
        )
        self._check_data()
        self.engine = engine = make_engine()
        torch.manual_seed(train.seed + self.world.rank)  # dropout
        with engine.loading():
            self.model = load_model(options.model, engine.dtype, weights=engine.reads_weights)
        layers = add_layers(self.model, options.method, seed=train.seed, dtype=engine.dtype)
        if train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        engine.attach(self.model, layers, self._make_optimizer)
        logger.info("%s: %d layers adapted", name, len(layers))

        assert train.train_batch_size is not None  # settled by settle_batch
        self.batches = GlobalBatches(
            self.data.train["target_tokens"], train.train_batch_size, train.seed
        )
        self.steps = train.max_steps
        if self.steps <= 0:
            examples = len(self.data.train) * train.num_train_epochs
            self.steps = math.ceil(examples / self.batches.global_batch_size)
        self.scheduler = get_scheduler(
            train.lr_scheduler_type,
            engine.optimizer,
            num_warmup_steps=math.ceil(self.steps * train.warmup_ratio),
            num_training_steps=self.steps,
        )
        self.steps_taken = 0  # those that were not skipped
        self.collate = Collator(self.tokenizer)
        self.rescaler = make_rescaler(engine, options.method)
        self.update_rank = None
        if train.update_rank_layers:
            self.update_rank = UpdateRank(
                engine.layers(gradients=False), train.update_rank_layers, world
            )

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        train = self.options.train
        if train.weight_decay and self.options.method.method == "scalora":
            logger.warning(
                "weight_decay on A and B pulls towards W − s·A Bᵀ of the moment, not the start"
            )
        return torch.optim.AdamW(
            parameters,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )

    def run(self) -> dict[str, Any]:
        """Train, evaluate before and after, write the results; returns what summary.json holds."""
        train = self.options.train
        if self.world.is_main:
            clear_results(self.folder)
        log = RunLog(
            self.folder,
            is_main=self.world.is_main,
            steps=self.steps,
            logging_steps=train.logging_steps,
        )
        self.engine.module.train()
        before = after = self._evaluate(log, 0)
        records = []
        micro_batches = self._micro_batches()
        for step in range(self.steps):
            records.append(self._step(step, micro_batches))
            log.step(records[-1])
            if train.eval_steps and (step + 1) % train.eval_steps == 0 and step + 1 < self.steps:
                self._evaluate(log, step + 1)
        if before:
            after = self._evaluate(log, self.steps)
        log.close()
        low = self.rescaler.low if self.rescaler else {}
        ranks = []
        if self.update_rank:
            ranks = self.update_rank.measure(self.engine.layers(gradients=False), low)
        (peak,) = self.world.max(peak_memory_bytes(self.world.device))
        summary = summarize(self.options, self.world.size, records, before, after, ranks, int(peak))
        if self.world.is_main:
            write_json(self.folder / "summary.json", summary)
        if train.save_model:
            export_model(self.folder / "model", self.engine, self.model, self.tokenizer, low)
        return summary

    def _step(self, step: int, micro_batches: Iterator[dict[str, Tensor]]) -> dict[str, Any]:
        """One optimizer step: its record for metrics.jsonl."""
        started = time.perf_counter()
        accumulation = self.options.train.gradient_accumulation_steps
        targets = self.batches.target_tokens(step)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        tokens = torch.zeros((), dtype=torch.int64, device=self.world.device)
        for micro_step in range(accumulation):
            batch = {k: v.to(self.world.device) for k, v in next(micro_batches).items()}
            labels = batch.pop("labels")
            loss = summed_cross_entropy(self.engine.module(**batch, use_cache=False).logits, labels)
            # The sum over ranks and micro-batches of these is the mean over all target tokens.
            self.engine.backward(loss / targets, last=micro_step == accumulation - 1)
            loss_sum += loss.detach()
            tokens += batch["attention_mask"].sum()
        total_loss, total_tokens = self.world.sum(float(loss_sum), float(tokens))

        record: dict[str, Any] = {
            "step": step + 1,
            "loss": total_loss / targets,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        if self.engine.step(self._transform(math.isfinite(total_loss), record)):
            self.scheduler.step()
            self.steps_taken += 1
        else:
            record["skipped_step"] = True
            logger.warning("step %d skipped: loss or gradients are not finite", step + 1)
        record |= {"tokens": int(total_tokens), "seconds": time.perf_counter() - started}
        return record

    def _transform(
        self, finite: bool, record: dict[str, Any]
    ) -> Callable[[list[LayerShards]], bool]:
        """What happens between backward and the optimizer's step; it fills in ``record``."""
        loss_scale = self.engine.loss_scale

        def measure(layers: list[LayerShards]) -> bool:
            record["grad_norm"] = (
                global_norm(gradient_shards(layers), self.world.device) / loss_scale
            )
            return finite and math.isfinite(record["grad_norm"])

        rescaler = self.rescaler
        if rescaler is None or self.steps_taken % self.options.method.scaling_interval:
            return measure

        def rescale(layers: list[LayerShards]) -> bool:
            started = time.perf_counter()
            report = rescaler(layers) if finite else RescaleReport(applied=False)
            record["grad_norm"] = report.grad_norm / loss_scale
            record["grad_norm_before"] = report.grad_norm_before / loss_scale
            rules = Counter(report.rules or [Rule.SKIPPED] * len(layers))
            record["rescale"] = {rule.name.lower(): rules[rule] for rule in Rule}
            record["rescale"]["seconds"] = time.perf_counter() - started
            return report.applied

        return rescale

    def _micro_batches(self) -> Iterator[dict[str, Tensor]]:
        sampler = RankBatches(
            self.batches,
            micro_batch_size=self.options.train.per_device_train_batch_size,
            rank=self.world.rank,
            world=self.world.size,
        )
        return iter(DataLoader(self.data.train, batch_sampler=sampler, collate_fn=self.collate))

    def _evaluate(self, log: RunLog, step: int) -> Evaluation | None:
        if self.data.evaluation is None:
            return None
        result = evaluate(
            self.engine.module,
            self.data.evaluation,
            self.collate,
            self.world,
            self.options.train.per_device_eval_batch_size,
        )
        log.evaluation(step, {"eval_loss": result.loss, "eval_exact_match": result.exact_match})
        return result

    def _check_data(self) -> None:
        """Warn of examples that were cut; make sure that all nodes prepared the same."""
        data, length = self.data, self.options.data.max_length
        # Each rank reads its own batches and counts the global targets by itself.
        check = zlib.crc32(np.asarray(data.train["target_tokens"], dtype=np.int64).tobytes())
        check = zlib.crc32(json.dumps([data.train[0], data.train[-1]]).encode(), check)
        high, low = self.world.max(check, -check)
        if high != -low:
            raise UserError("the nodes prepared different data: share HF_HOME or the data's files")
        if data.truncated:
            logger.warning("%d example(s) longer than %d tokens: cut", data.truncated, length)
        if data.dropped:
            logger.warning("%d example(s) without a target token: dropped", data.dropped)


def check_output_dir(folder: Path, train: TrainArguments) -> None:
    """Refuse to write where there is something already.

    Raises:
        UserError: ``folder`` is a file, or not empty without ``overwrite_output_dir``.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not train.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder} is not empty: name another, or give --overwrite_output_dir"
        )


def hidden_size(args: ModelArguments) -> int:
    """The model's width, which engines size their buffers by."""
    with _known_model(args) as name:
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    return config.get_text_config().hidden_size


def clear_results(folder: Path) -> None:
    """Remove what an earlier run left, so that nothing of it stands beside ours."""
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tensorboard", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    with _known_model(args) as name:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def load_model(args: ModelArguments, dtype: torch.dtype, *, weights: bool) -> PreTrainedModel:
    """The model in ``dtype``, sharded where the engine's ``loading()`` says so.

    Without ``weights``, its parameters are on "meta" (its buffers are not).
    """
    given = {
        "dtype": dtype,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }
    with _known_model(args) as name:
        if weights:
            return AutoModelForCausalLM.from_pretrained(name, **given)
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, **given)
        model.tie_weights()
        return model


@contextmanager
def _known_model(args: ModelArguments) -> Iterator[str]:
    """The model's name; what transformers raises where it cannot be read, as one sentence."""
    name = args.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing: name a folder or a model of the hub")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"--model_name_or_path {name}: there is no such folder")
    try:
        yield name
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {reason}") from error


def peak_memory_bytes(device: torch.device) -> int:
    """This process's peak: of the CUDA allocator on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
