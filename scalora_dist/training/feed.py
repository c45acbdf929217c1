"""Provides a run's data: the tokenizer, the examples, and the examples of each step."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.config.options import Options
from scalora_dist.data.batches import GlobalBatches, RankBatches
from scalora_dist.data.collate import Collator
from scalora_dist.data.micro_batch import MicroBatch
from scalora_dist.data.prepare import (
    Prepared,
    TokenFiles,
    prepare_data,
    split_data,
    tokenize_data,
)
from scalora_dist.data.show import show_examples
from scalora_dist.distributed.worker_signals import outlive_signals
from scalora_dist.distributed.world import World
from scalora_dist.errors import UserError
from scalora_dist.methods.init.samples import SamplePass
from scalora_dist.modeling.load import load_tokenizer
from scalora_dist.modeling.loss import TargetLoss
from scalora_dist.modeling.padding import needs_mask
from scalora_dist.modeling.tables import Tables, check_fits, read_tables
from scalora_dist.training.summary import CHAT_TURNS

logger = logging.getLogger(__name__)


class DataFeed:
    """The tokenized data of a run, and the iterators over it.

    Attributes:
        options: all options of the run.
        world: the ranks.
        tokenizer: the tokenizer of the base model.
        tables: sizes of the base model's tables of tokens and positions.
        data: tokenized examples for training and for evaluation.
        batches: the examples of each step's global batch.
        collate: makes a padded batch of examples.
        examples: number of examples that the whole run trains on, with repeats. It may end within
            an example, as a run of 1.5 epochs over 3 does.
        steps: number of optimizer steps of the whole run.
    """

    def __init__(self, options: Options, world: World) -> None:
        """Prepare the data, once per node.

        Args:
            options: all options of the run. Those of the model say what to read.

        Raises:
            UserError: on every rank, for every mistake in the data or its options.
        """
        self.options = options
        self.world = world
        train = options.train
        self.tokenizer, self.tables = world.node_first(
            lambda: (load_tokenizer(options.model), read_tables(options.model))
        )

        def tokenize() -> str:
            written = tokenize_data(options.data, self.tokenizer, train.seed)
            return json.dumps([asdict(part) for part in written])

        def split(text: str) -> Prepared:
            written = [TokenFiles(**part) for part in json.loads(text)]
            return split_data(options.data, written, train.seed)

        self.data = world.from_node_first(tokenize, split)
        self._check()
        if options.data.show_examples and world.is_main:
            print(show_examples(self.data.train, self.tokenizer, options.data.show_examples))
        assert train.train_batch_size is not None  # resolved
        self.batches = GlobalBatches(
            self.data.train["target_tokens"], train.train_batch_size, train.seed
        )
        batch = self.batches.global_batch_size
        self.examples = len(self.data.train) * train.num_train_epochs
        if train.max_steps > 0:
            self.examples = train.max_steps * batch
        self.steps = math.ceil(self.examples / batch)
        self.collate = Collator(self.tokenizer, self.tables.rows)

    def fit(self, model: PreTrainedModel) -> None:
        """From now on, make batches for ``model``: with an attention mask only if it needs one."""
        self.collate.masks = needs_mask(model)

    def micro_batches(self, first_step: int) -> MicroBatches:
        """This rank's micro-batches from ``first_step`` on, counted from 0.

        Draws one number from torch's random generator, with any number of workers.
        """
        sampler = RankBatches(
            self.batches,
            micro_batch_size=self.options.train.per_device_train_batch_size,
            rank=self.world.rank,
            world=self.world.size,
            start_step=first_step,
        )
        run, workers = os.getpid(), self.options.train.dataloader_num_workers
        if multiprocessing.current_process().daemon:  # it may start no processes
            workers = 0
        loader = DataLoader(
            # Arrays of numbers: reading and padding them takes a fifth of the time of lists.
            self.data.train.with_format("numpy", columns=["input_ids", "labels"]),
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=workers,
            worker_init_fn=lambda _: outlive_signals(run),
            # Forks of this process share its data, and start at once.
            multiprocessing_context="fork" if workers else None,
        )
        return MicroBatches(iter(loader), self.world.device)

    def samples(self, loss: TargetLoss, model: PreTrainedModel) -> SamplePass:
        """A pass over the few examples that a method's initialization uses."""
        examples = len(self.data.train)
        # 0.1 % of the data: LoRA-SB's paper (section 3) found this enough.
        count = self.options.method.start_samples or max(25, math.ceil(0.001 * examples))
        return SamplePass(
            partial(loss, model),
            self.data.train,
            self.collate,
            self.world,
            count=count,
            seed=self.options.train.seed,
        )

    def _check(self) -> None:
        """Check the data on all nodes and against the model. Warn of what is odd in it."""
        workers, cores = self.options.train.dataloader_num_workers, os.cpu_count() or 1
        if workers > cores:
            raise UserError(
                f"--dataloader_num_workers {workers}: each rank starts so many processes, and this "
                f"machine has {cores} cores: set a smaller number"
            )
        data = self.data
        # Each rank reads its own batches and counts the targets of the global batch by itself.
        # 13 hexadecimal digits are 52 bits, which float64 holds exactly.
        if not self.world.agree(int(data.checksum[:13], 16)):
            raise UserError("the nodes prepared different data: share HF_HOME or the data's files")
        self.world.main_only(partial(check_parts, data, self.tables, self.tokenizer))
        warn_of(data, self.options.data)


class MicroBatches(Iterator[MicroBatch]):
    """A rank's micro-batches, on its device.

    ``load_next`` is called while the device computes with the current one. Then neither the host
    nor the device waits for the next.
    """

    def __init__(self, batches: Iterator[MicroBatch], device: torch.device) -> None:
        """
        Args:
            batches: the micro-batches, on the CPU.
            device: where they are needed.
        """
        self._batches = batches
        self._device = device
        self._next: MicroBatch | None = None

    def load_next(self) -> None:
        """Send the next micro-batch to the device, if there is one.

        The host does not wait for the device.
        """
        if self._next is None and (batch := next(self._batches, None)) is not None:
            self._next = batch.to(self._device)

    def __next__(self) -> MicroBatch:
        self.load_next()
        batch, self._next = self._next, None
        if batch is None:
            raise StopIteration
        return batch

    def close(self) -> None:
        """There are no more. Ends the workers: one that died later would end the run with it."""
        self._batches = iter(())
        self._next = None


def show_data(options: Options) -> None:
    """Print the first examples that a run would train on. Loads no model.

    Raises:
        UserError: a mistake in the data or its options.
    """
    tokenizer, tables = load_tokenizer(options.model), read_tables(options.model)
    data = prepare_data(options.data, tokenizer, options.train.seed)
    check_parts(data, tables, tokenizer)
    warn_of(data, options.data)
    print(show_examples(data.train, tokenizer, options.data.show_examples))


def check_parts(data: Prepared, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model has rows and positions for both parts of the data.

    Raises:
        UserError: it has not.
    """
    for part in (data.train, data.evaluation):
        if part is not None:
            check_fits(tables, part, tokenizer)


def warn_of(data: Prepared, args: DataArguments) -> None:
    """Say how the data was read, and warn of what is odd in it."""
    for turns, examples in data.turns.items():
        logger.info("chats: targets of %d example(s) are %s", examples, CHAT_TURNS[turns])
    if data.endless:
        logger.warning(
            "%d example(s) of chats have no end token: the model does not learn to stop",
            data.endless,
        )
    if data.ignored:
        logger.warning("in the data, but not used: %s", ", ".join(data.ignored))
    if data.without_effect:
        logger.warning(
            "options without effect: %s", ", ".join(f"--{n}" for n in data.without_effect)
        )
    if data.truncated:
        logger.warning("%d example(s) longer than %d tokens: cut", data.truncated, args.max_length)
    if data.dropped:
        logger.warning(
            "%d example(s) without a target token: dropped; the first is %s",
            data.dropped,
            data.first_dropped,
        )
    if data.repeated:
        assert data.evaluation is not None
        logger.warning(
            "%d of %d evaluation examples are also training examples (same tokens)",
            data.repeated,
            len(data.evaluation),
        )
