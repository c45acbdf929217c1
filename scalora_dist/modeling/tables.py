"""Knows the tables in which a model looks up tokens and positions, before its weights are loaded.

A number beyond a table ends in an IndexError in the first step, or on a GPU in a device-side assert
that names nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalora_dist.config.model import ModelArguments
from scalora_dist.data.extent import Extent, extent, stored_extent
from scalora_dist.errors import UserError
from scalora_dist.layers.target_modules import reached_by_text
from scalora_dist.modeling.load import outline

Wrong: TypeAlias = Callable[[dict[str, Any]], bool]  # whether an example has the mistake

# The last part of the name of a table of positions: wpe, embed_positions, pos_encoding …
NAME = re.compile(r"position|pos_e|wpe")
# Model types that make a table in each forward, for as many positions as this setting says.
MADE_IN_FORWARD = {"mpt": "max_seq_len"}


@dataclass(frozen=True)
class Tables:
    """The sizes of a model's tables.

    Attributes:
        rows: number of rows of the input embedding; token ids are below it.
        logits: number of logits of a token; targets are below it.
        positions: length of the longest example, if the model looks positions up in a table; None
            if it computes them for any length.
    """

    rows: int
    logits: int
    positions: int | None

    def longest(self, length: int) -> int:
        """The largest length up to ``length`` that the model has positions for."""
        return length if self.positions is None else min(length, self.positions)


def read_tables(args: ModelArguments) -> Tables:
    """The tables of a model that is not loaded. Builds it on the meta device: a tenth of a second.

    Raises:
        UserError: the model cannot be built.
    """
    return tables_of(outline(args, torch.float32))


def tables_of(model: PreTrainedModel) -> Tables:
    """The tables of a model whose weights are not sharded. They may be on the meta device."""
    rows = len(model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    logits = rows if head is None else len(head.weight)
    return Tables(rows, logits, positions_of(model))


def positions_of(model: PreTrainedModel) -> int | None:
    """Length of the longest example that a model's tables of positions allow; None: any."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None) or 0
    # A smaller table is for other things than the text, such as the patches of an image.
    found = [usable for rows, usable in _position_tables(model) if rows >= stated]
    if setting := MADE_IN_FORWARD.get(config.model_type):
        found.append(getattr(config, setting))
    return min(found, default=None)


def _position_tables(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """(number of rows, number of positions) of each table of positions that text reaches.

    Models that compute positions have no such table, and neither has XGLM, whose table grows.
    """
    reached = reached_by_text(model)
    for name, module in model.named_modules():
        if module not in reached:
            continue
        if isinstance(module, nn.Embedding) and _is_table(name, module.weight):
            rows = module.num_embeddings
            # OPT's first positions are left out. So are RoBERTa's, up to that of the padding.
            unused = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                unused += module.padding_idx + 1
            yield rows, rows - unused
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if _is_table(buffer_name, buffer):  # sines and cosines, as of GPT-J
                yield len(buffer), len(buffer)


def _is_table(name: str, tensor: Tensor) -> bool:
    leaf = name.rpartition(".")[2]
    return tensor.dim() == 2 and tensor.is_floating_point() and bool(NAME.search(leaf))


def check_fits(tables: Tables, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model has a row for each token id and position, and a logit for each target.

    Args:
        tables: the model's tables.
        dataset: examples as of ``tokenize_examples``.
        tokenizer: the tokenizer of these ids, to name a token.

    Raises:
        UserError: an id, a target or a length is beyond the tables.
    """

    def mistake(of: Callable[[Dataset, str], Extent]) -> tuple[str, Wrong] | None:
        ids, target = of(dataset, "input_ids"), of(dataset, "labels").most
        if ids.least < 0 or ids.most >= tables.rows:
            wrong = ids.most if ids.least >= 0 else ids.least
            return (
                f"it has the token id {_named(wrong, tokenizer)}, but the model's embedding has "
                f"{tables.rows} rows: use the model's own tokenizer, or save the model after "
                "resize_token_embeddings"
            ), lambda row: wrong in row["input_ids"]
        if tables.positions is not None and ids.longest > tables.positions:
            return (
                f"it has {ids.longest} tokens, but the model has a table of {tables.positions} "
                f"positions: set --max_length {tables.positions}, which cuts longer ones"
            ), lambda row: len(row["input_ids"]) == ids.longest
        if target >= tables.logits:
            return (
                f"it has the target {_named(target, tokenizer)}, but the model predicts "
                f"{tables.logits} tokens: leave this token out of the completions"
            ), lambda row: target in row["labels"]
        return None

    # Rows that were not selected may be beyond the tables.
    if mistake(stored_extent) and (found := mistake(extent)):
        told, is_wrong = found
        raise UserError(f"{next(row['place'] for row in dataset if is_wrong(row))}: {told}")


def _named(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """An id with the token that it stands for, if there is one."""
    token = tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
    return f"{token_id} ({token})" if token else str(token_id)
