from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from scalora_dist.config.data import DataArguments
from scalora_dist.data.batches import GlobalBatches, RankBatches, eval_batches
from scalora_dist.data.collate import Collator, PaddedExamples
from scalora_dist.data.prompts import IGNORE
from scalora_dist.data.tokenize import tokenize_examples

LAYOUTS = [
    (12, 1, 1),
    (6, 2, 1),
    (6, 1, 2),
    (3, 2, 2),
    (1, 4, 3),
    (2, 1, 6),
]  # (b, g, w), b*g*w = 12


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    rows = [{"prompt": "p" * (i % 5), "completion": "c" * (i + 1)} for i in range(17)]
    return tokenize_examples(Dataset.from_list(rows), tokenizer, DataArguments()).dataset


def ones(num_examples: int) -> list[int]:
    return [1] * num_examples


@pytest.mark.parametrize(("num_examples", "size"), [(17, 4), (17, 17), (5, 12), (1, 3), (12, 4)])
def test_every_epoch_visits_each_example_once(num_examples: int, size: int) -> None:
    batches = GlobalBatches(ones(num_examples), size, seed=3)
    steps = [batches.indices(step) for step in range(3 * num_examples)]
    assert all(len(step) == size for step in steps)
    stream = list(chain(*steps))
    epochs = [stream[e * num_examples : (e + 1) * num_examples] for e in range(3)]
    assert all(sorted(epoch) == list(range(num_examples)) for epoch in epochs)
    if num_examples == 17:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_steps_depend_on_the_seed_alone() -> None:
    def steps(seed: int) -> list[list[int]]:
        return [GlobalBatches(ones(50), 8, seed).indices(k) for k in range(20)]

    assert steps(0) == steps(0) != steps(1)
    backwards = GlobalBatches(ones(50), 8, 0)
    assert [backwards.indices(k) for k in reversed(range(20))][::-1] == steps(0)
    assert len({tuple(step) for step in steps(0)}) == 20


@pytest.mark.parametrize(("b", "g", "w"), LAYOUTS)
def test_layouts_share_the_global_batch(b: int, g: int, w: int) -> None:
    batches = GlobalBatches(ones(17), 12, seed=0)
    ranks = [
        RankBatches(batches, micro_batch_size=b, rank=p, world=w, start_step=0) for p in range(w)
    ]
    seen = [list(islice(rank, 5 * g)) for rank in ranks]
    for step in range(5):
        # Micro-major: reading micro-batch by micro-batch, rank by rank, gives the batch in order.
        micro = [seen[p][step * g + j] for j in range(g) for p in range(w)]
        assert all(len(m) == b for m in micro)
        assert list(chain(*micro)) == batches.indices(step)
    resumed = RankBatches(batches, micro_batch_size=b, rank=w - 1, world=w, start_step=3)
    assert list(islice(resumed, 2 * g)) == seen[w - 1][3 * g :]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        RankBatches(GlobalBatches(ones(9), 10, 0), micro_batch_size=2, rank=0, world=3)


@pytest.mark.parametrize(("b", "g", "w"), LAYOUTS)
def test_target_tokens_is_what_the_micro_batches_hold(
    b: int, g: int, w: int, data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    batches = GlobalBatches(data["target_tokens"], 12, seed=0)
    held = Counter[int]()
    for rank in range(w):
        loader = DataLoader(
            data,
            batch_sampler=RankBatches(batches, micro_batch_size=b, rank=rank, world=w),
            collate_fn=Collator(tokenizer, len(tokenizer)),
        )
        for number, batch in enumerate(islice(loader, 4 * g)):
            held[number // g] += len(batch.targets)
    assert held == {step: batches.target_tokens(step) for step in range(4)}
    assert len(set(held.values())) > 1


def test_collator_pads_right_with_eos_and_hides_it(
    data: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokenizer.pad_token_id is None and tokenizer.padding_side == "left"
    short, long = data[3], data[16]
    batch = Collator(tokenizer, len(tokenizer))([short, long])
    size = len(short["input_ids"])
    ids, mask, length = batch.input_ids, batch.attention_mask, len(long["input_ids"])
    assert mask is not None
    for tensor in (ids, mask, batch.predicting, batch.targets):
        assert tensor.dtype == torch.int64
    assert ids.shape == mask.shape == (2, length)
    assert ids[0, :size].tolist() == short["input_ids"]
    assert set(ids[0, size:].tolist()) == {tokenizer.eos_token_id}
    assert mask[0].tolist() == [1] * size + [0] * (length - size)
    assert mask[1].all()
    assert batch.tokens == size + length
    targets = [
        (row * length + k - 1, label)
        for row, example in enumerate((short, long))
        for k, label in enumerate(example["labels"])
        if k > 0 and label != IGNORE
    ]
    assert list(zip(batch.predicting.tolist(), batch.targets.tolist(), strict=True)) == targets
    assert len(targets) < size + length - 2


@pytest.mark.parametrize("masks", [True, False])
def test_columns_of_arrays_give_the_same_batch(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, masks: bool
) -> None:
    collate = Collator(tokenizer, len(tokenizer), masks=masks)
    arrays = data.with_format("numpy", columns=["input_ids", "labels"])
    one, other = (collate([rows[3], rows[9]]) for rows in (data, arrays))
    assert list(one.inputs) == (["input_ids", "attention_mask"] if masks else ["input_ids"])
    for name, tensor in one.inputs.items():
        assert torch.equal(tensor, other.inputs[name])
    assert torch.equal(one.predicting, other.predicting) and one.tokens == other.tokens
    assert torch.equal(one.targets, other.targets) and one.targets.dtype == other.targets.dtype


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_examples", "size"), [(17, 4), (1, 4), (16, 4), (16, 2)])
def test_eval_batches_are_equally_many_and_complete(
    num_examples: int, size: int, world: int
) -> None:
    ranks = [eval_batches(num_examples, size, rank, world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-num_examples // (size * world))}
    assert all(len(batch) == size for batches in ranks for batch in batches)
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert sorted(i for i in seen if i is not None) == list(range(num_examples))


def test_pad_examples_count_for_nothing(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    assert set(PaddedExamples(data)[None]["labels"]) == {IGNORE}
    total = sum(data["target_tokens"])
    for world in (1, 2, 3):
        held = 0
        for rank in range(world):
            loader = DataLoader(
                PaddedExamples(data),
                batch_sampler=eval_batches(len(data), 4, rank, world),
                collate_fn=Collator(tokenizer, len(tokenizer)),
            )
            for batch in loader:
                assert batch.attention_mask.sum(1).min() > 0
                held += len(batch.targets)
        assert held == total
