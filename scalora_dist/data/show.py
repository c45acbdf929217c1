"""Shows examples as text, so that a user sees what a run trains on."""

from __future__ import annotations

from itertools import groupby

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from scalora_dist.data.encode import decode
from scalora_dist.data.prompts import IGNORE


def show_examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The text of the first ``count`` tokenized examples, with the targets in ``[[ ]]``.

    Special tokens are written out.
    """
    count = min(count, len(dataset))
    shown = []
    for number, example in enumerate(dataset.select(range(count)), start=1):
        # The first token is never predicted, so it is no target whatever its label.
        targets = [k > 0 and label != IGNORE for k, label in enumerate(example["labels"])]
        pieces, done, text = [], 0, ""
        for hit, run in groupby(targets):
            done, before = done + len([*run]), text
            # From the start: some tokenizers take a text's first blank for one of their own.
            text = decode(tokenizer, example["input_ids"][:done])
            pieces.append(f"[[{text[len(before) :]}]]" if hit else text[len(before) :])
        cut = ", cut" if example["truncated"] else ""
        shown.append(
            f"--- example {number} of {len(dataset)}: {len(targets)} tokens{cut}, "
            f"{example['target_tokens']} of them targets, in [[ ]]\n{''.join(pieces)}"
        )
    return "\n".join(shown)
