"""Makes the models and the tasks of the study of small models (docs/studies/small-models.md).

    python tools/small_models.py FOLDER [--sizes small medium]

It pre-trains Llamas of 0.9 and 5.0 million parameters on four tasks: copy a word, sort it, count a
letter in it, add two numbers. A letter is a token. It then writes tasks that these models do not
know, each as train.jsonl and test.jsonl. What is in FOLDER already is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import string
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scalora_dist.config.parser import parse_options
from scalora_dist.data.generated import generate_examples
from scalora_dist.engines.build import join
from scalora_dist.training.trainer import Trainer

CHARACTERS = string.ascii_letters + string.digits + " \n+-*/=<>().,:?|&^%"
# hidden size, intermediate size, layers, steps of pre-training
SIZES = {"small": (192, 512, 2, 3000), "medium": (320, 864, 4, 2500)}
TRAIN, TEST = 20000, 1000

Example = tuple[str, str]  # a question and its answer
Task = Callable[[random.Random], Example]


def word(draw: random.Random, shortest: int = 4, longest: int = 8) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(shortest, longest)))


def learnt(draw: random.Random) -> Example:
    """An example of one of the four tasks of pre-training; a capital letter says which."""
    text = word(draw)
    kind = draw.choice("CSNA")
    if kind == "C":
        return f"C{text}", text
    if kind == "S":
        return f"S{text}", "".join(sorted(text))
    if kind == "N":
        letter = draw.choice(text)
        text = "".join(c if draw.random() < 0.6 else letter for c in text)
        return f"N{text}:{letter}", str(text.count(letter))
    a, b = draw.randrange(1000), draw.randrange(1000)
    return f"A{a}+{b}", str(a + b)


def _table(seed: int) -> dict[int, int]:
    letters = list(string.ascii_lowercase)
    random.Random(seed).shuffle(letters)
    return str.maketrans(string.ascii_lowercase, "".join(letters))


TABLES = [_table(seed) for seed in range(2)]
CODE = TABLES[0]
FEW = string.ascii_lowercase[:6]
PAIRS = {
    a + b: string.ascii_lowercase[(7 * i + 3 * j + i * j) % 26]
    for i, a in enumerate(FEW)
    for j, b in enumerate(FEW)
}


def substitute(draw: random.Random) -> Example:
    """Each letter replaced using a fixed table."""
    text = word(draw)
    return f"X{text}", text.translate(CODE)


def alternate(draw: random.Random) -> Example:
    """Letters at even places replaced using one table, those at odd places using another."""
    text = word(draw)
    return f"E{text}", "".join(c.translate(TABLES[i % 2]) for i, c in enumerate(text))


def cipher(draw: random.Random) -> Example:
    """A word backward, with each letter replaced using the fixed table."""
    text = word(draw)
    return f"R{text}", text[::-1].translate(CODE)


def pairs(draw: random.Random) -> Example:
    """Each letter and the next one (the first follows the last) replaced using a table of pairs."""
    text = "".join(draw.choices(FEW, k=draw.randint(4, 8)))
    return f"P{text}", "".join(PAIRS[a + b] for a, b in zip(text, text[1:] + text[0], strict=True))


STRINGS: dict[str, Task] = {
    "substitute": substitute,
    "alternate": alternate,
    "cipher": cipher,
    "pairs": pairs,
}
TASKS = (*STRINGS, "sum")
# These have few short questions. Of examples that differ, the first ones are shorter than later
# ones: so they are shuffled before test and train are cut from them.
FEW_QUESTIONS = ("pairs", "sum")


def sums(size: int) -> Iterator[Example]:
    """Different examples of reasoning_gym's chain_sum; of a question, what differs is left."""
    options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    for entry in generate_examples("chain_sum", seed=2, size=size, options=options):
        yield " ".join(re.findall(r"[\d+-]+", entry["query"])), entry["response"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    special = ["<pad>", "<s>", "</s>"]
    ids = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    made = Tokenizer(models.WordLevel(ids, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write(file: Path, examples: list[Example]) -> None:
    lines = [json.dumps({"query": question, "response": answer}) for question, answer in examples]
    file.write_text("\n".join(lines) + "\n")


def drawn(task: Task, seed: int) -> Iterator[Example]:
    """Different examples without end."""
    draw, seen = random.Random(seed), set()
    while True:
        example = task(draw)
        if example[0] not in seen:
            seen.add(example[0])
            yield example


def write_task(folder: Path, name: str) -> None:
    """Write ``folder/name/test.jsonl`` and ``train.jsonl``."""
    if (folder / name).exists():
        return
    size = TEST + TRAIN
    made = sums(size) if name == "sum" else drawn(STRINGS[name], seed=2)
    examples = list(islice(made, size))
    if name in FEW_QUESTIONS:
        random.Random(3).shuffle(examples)
    scratch = folder / f"{name}.partial"
    scratch.mkdir(parents=True, exist_ok=True)
    write(scratch / "test.jsonl", examples[:TEST])
    write(scratch / "train.jsonl", examples[TEST:])
    scratch.rename(folder / name)


def pretrain(folder: Path, size: str) -> None:
    """Pre-train a model and save it at ``folder/size``."""
    hidden, intermediate, layers, steps = SIZES[size]
    scratch = folder / f"{size}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    examples = drawn(learnt, seed=1)
    write(scratch / "train.jsonl", list(islice(examples, 100_000)))
    write(scratch / "test.jsonl", list(islice(examples, TEST)))
    tokens = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(scratch / "random")
    tokens.save_pretrained(scratch / "random")
    words = f"""--model_name_or_path {scratch}/random --output_dir {scratch}/run --method full
        --dataset {scratch}/train.jsonl --eval_dataset {scratch}/test.jsonl
        --eval_dataset_split train --eval_steps 500 --max_steps {steps} --learning_rate 2e-3
        --per_device_train_batch_size 64 --per_device_eval_batch_size 64
        --lr_scheduler_type cosine --warmup_ratio 0.03 --save_steps 0 --update_rank_layers 0"""
    options = parse_options(words.split())
    Trainer(options, join(options)).run()
    (scratch / "run" / "model").rename(folder / size)
    shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    args = parser.parse_args()
    for name in TASKS:
        write_task(args.folder, name)
    for size in args.sizes:
        if not (args.folder / size).exists():
            pretrain(args.folder, size)


if __name__ == "__main__":
    main()
