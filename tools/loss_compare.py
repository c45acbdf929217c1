"""Whether two commits train alike: losses, gradient norms and rules of small runs.

    python tools/loss_compare.py main HEAD                   # two commits
    python tools/loss_compare.py before.json .               # a file against the working tree
    python tools/loss_compare.py HEAD --save before.json     # only record

Each set-up is a tiny random model that takes a few steps with one engine, method and precision. A
side's own `launch/train.py` is started as a process; nothing of the package is imported. Run it
before and after a change that must not change numbers, and expect no difference. The exit status is
1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPOSITORY = Path(__file__).parents[1]
STEPS = 6

# What every set-up shares. 4 examples a step: one rank accumulates 4 micro-batches, two ranks 2.
COMMON: dict[str, Any] = {
    "max_length": 32,
    "eval_size": 5,
    "rank": 4,
    "lora_alpha": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "max_steps": STEPS,
    "train_batch_size": 4,
    "max_grad_norm": 1.0,
    "save_steps": 0,
    "save_model": "false",
    "update_rank_layers": 3,
}

# Options of a method or a precision, by a short name.
OPTIONS: dict[str, dict[str, Any]] = {
    "scalora": {"method": "scalora"},
    "paper": {"method": "scalora", "scaling_rule": "paper"},
    "scalar": {"method": "scalora", "scaling_rule": "scalar"},
    "nnls": {"method": "scalora", "scaling_rule": "nnls", "scaling_interval": 2},
    "auto": {"method": "scalora", "scaling_interval": "auto"},
    "carry": {"method": "scalora", "merge_target": "carry", "carry_rank": 6, "carry_room": 4},
    "4bit": {"load_in_4bit": "true", "carry_rank": 6, "carry_room": 4},
    "nearest": {"method": "scalora", "merge_rounding": "nearest"},
    "monitor": {"method": "scalora", "rank_monitor_steps": 2, "lora_dropout": 0.1},
    "checkpointing": {"method": "scalora", "gradient_checkpointing": "true"},
    "relora": {"method": "relora", "relora_interval": 3, "relora_warmup_steps": 1},
    "lora-sb": {"method": "lora-sb", "lora_alpha": 16, "start_samples": 6},
    "lora-ga": {"method": "lora-ga", "rank": 3, "start_samples": 6},
    "bf16": {"bf16": "true"},
    "fp16": {"fp16": "true"},
    "saves": {"save_steps": 3},
}
# These read fewer options than COMMON has.
LEFT_OUT = {
    "lora-sb": ["lora_alpha"],
    "mora": ["lora_alpha"],
    "hira": ["lora_alpha"],
    "full": ["rank", "lora_alpha"],
}
OTHER_MODELS = ("gemma3",)
# Longer than the default, since the first steps are skipped until its loss scale fits.
FP16_STEPS = 10


@dataclass(frozen=True)
class SetUp:
    """One small run.

    Attributes:
        engine: "local" (one process), "fsdp", or the name of a file in ds_configs/.
        words: names from OPTIONS, or of methods; the first model in OTHER_MODELS, else a Llama.
        resumes: the name of the set-up whose checkpoint of step 3 this one goes on from.
    """

    engine: str
    words: tuple[str, ...]
    resumes: str = ""

    @property
    def name(self) -> str:
        return "-".join([self.engine, *self.words, *(["resumed"] if self.resumes else [])])

    @property
    def ranks(self) -> int:
        return 1 if self.engine == "local" else 2

    @property
    def model(self) -> str:
        return next((word for word in self.words if word in OTHER_MODELS), "llama")

    def options(self, inputs: Path) -> dict[str, Any]:
        """Command-line options but ``output_dir``; ``inputs`` as ``make_inputs`` filled it."""
        options: dict[str, Any] = {
            "model_name_or_path": inputs / self.model,
            "dataset": inputs / "texts.jsonl",
        }
        options |= COMMON
        for word in self.words:
            if word not in OTHER_MODELS:
                options |= OPTIONS.get(word, {"method": word})
        if "fp16" in self.words:
            options["max_steps"] = FP16_STEPS
        for name in LEFT_OUT.get(str(options.get("method")), []):
            del options[name]
        return options

    def engine_options(self, ds_configs: Path, inputs: Path) -> dict[str, Any]:
        if self.engine == "local":
            return {}
        if self.engine == "fsdp":
            return {"fsdp": "true"}
        path = ds_configs / f"{self.engine}.json"
        if "fp16" in self.words:
            # A smaller first loss scale than DeepSpeed's 2¹⁶: a short run would skip every step.
            config = json.loads(path.read_text())
            config["fp16"] = {"enabled": "auto", "initial_scale_power": 12, "hysteresis": 1}
            path = inputs / f"{self.engine}-fp16.json"
            path.write_text(json.dumps(config))
        return {"ds_config": path}


def set_ups() -> list[SetUp]:
    """All of them. A set-up that another one resumes from comes before it."""
    rows = {
        "local": "scalora paper scalar nnls auto carry 4bit relora lora-pro lora lora-sb lora-xs "
        "dora full mora hira pissa lora-ga scalora+bf16 nearest+bf16 carry+bf16 gemma3 saves",
        "zero0": "scalora+bf16",
        "zero1": "scalora scalora+bf16 scalora+fp16 lora lora-pro",
        "zero2": "nnls scalora+fp16 relora+bf16 monitor carry",
        "zero3": "scalora paper scalar nnls auto carry 4bit monitor relora lora-pro lora lora-sb "
        "lora-xs dora full mora lora-ga scalora+bf16 scalora+fp16 4bit+bf16 gemma3 checkpointing "
        "saves",
        "fsdp": "scalora paper scalar nnls auto carry 4bit monitor relora lora-pro lora lora-sb "
        "lora-xs dora full pissa scalora+bf16 4bit+bf16 gemma3 checkpointing saves",
    }
    found = [
        SetUp(engine, tuple(row.split("+")))
        for engine, rest in rows.items()
        for row in rest.split()
    ]
    found += [
        SetUp(engine, ("saves",), resumes=f"{engine}-saves")
        for engine in ("local", "zero3", "fsdp")
    ]
    return found


# Rows that neither 2, 3 nor 4 divides (35, 37, and a vocabulary of 259), fewer rows than 4 ranks
# can share (6), and weights large enough for attention to matter.
ODD_SIZES = {
    "vocab_size": 259,
    "hidden_size": 35,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte. A usual vocabulary would make the LM head all of a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_odd_model(folder: Path, architecture: str, **sizes: Any) -> None:
    """A tiny random model whose rows 2, 3 and 4 do not divide, with a byte tokenizer.

    Args:
        architecture: "llama" or "gemma3".
        sizes: sizes that replace those of ``ODD_SIZES``.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if architecture == "gemma3":
        config = Gemma3TextConfig(
            **ODD_SIZES | sizes,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=5,
            query_pre_attn_scalar=6,
            tie_word_embeddings=True,
        )
        model = Gemma3ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**ODD_SIZES | sizes, tie_word_embeddings=False))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def save_texts(folder: Path, letters: str, *, longest: int, count: int, shortest: int = 8) -> None:
    """Write texts.jsonl: random texts of these letters, ``shortest`` to ``longest`` - 1 long."""
    generator, choices = np.random.default_rng(0), np.array(list(letters))
    with open(folder / "texts.jsonl", "w") as file:
        for length in generator.integers(shortest, longest, count):
            file.write(json.dumps({"text": "".join(generator.choice(choices, length))}) + "\n")


def make_inputs(folder: Path) -> None:
    """A model of each architecture, and a file of texts."""
    for architecture in ("llama", *OTHER_MODELS):
        save_odd_model(folder / architecture, architecture)
    # Many letters: with few of them gradients are nearly parallel, and rounding decides a rule.
    save_texts(folder, string.ascii_letters, longest=32, count=41)


# What is compared of a line of metrics.jsonl; and of summary.json.
LINE = (
    *("step", "loss", "learning_rate", "grad_norm", "grad_norm_before", "tokens", "rescale"),
    *("loss_scale", "loss_spike", "skipped_step", "carry", "rank_monitor"),
    *("eval_loss", "eval_exact_match"),
)
SUMMARY = ("trained_parameters", "update_rank", "layers_by_rule")


def read_results(folder: Path) -> dict[str, Any]:
    """{"lines": of metrics.jsonl, "summary": …} of a run, without what depends on its speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "lines": [_timeless({k: v for k, v in line.items() if k in LINE}) for line in lines],
        "summary": {k: v for k, v in summary.items() if k in SUMMARY},
    }


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _timeless(item) for name, item in value.items() if name != "seconds"}


# Tells DeepSpeed that a CPU has fp16, which is slow and right; it says no by itself.
FP16_SCRIPT = """
import runpy, sys
from deepspeed.accelerator import get_accelerator
get_accelerator().is_fp16_supported = lambda: True
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(set_up: SetUp, code: Path, inputs: Path, results: Path) -> dict[str, Any]:
    """Start ``code``'s launch/train.py and wait; what it left in ``results``/name.

    Raises:
        RuntimeError: it failed; the last lines that it printed.
    """
    folder = results / set_up.name
    options = set_up.options(inputs) | set_up.engine_options(code / "ds_configs", inputs)
    if set_up.resumes:
        options["resume_from_checkpoint"] = results / set_up.resumes / "checkpoint-3"
    words = [
        w
        for name, value in {**options, "output_dir": folder}.items()
        for w in (f"--{name}", str(value))
    ]
    script = [str(code / "launch" / "train.py")]
    if "fp16" in set_up.words:
        (inputs / "fp16.py").write_text(FP16_SCRIPT)
        script = [str(inputs / "fp16.py"), *script]
    launcher = [sys.executable]
    if set_up.ranks > 1:
        ranks = str(set_up.ranks)
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    environment = {
        "PYTHONPATH": str(code),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*launcher, *script, *words],
        cwd=code,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{set_up.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return read_results(folder)


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with the files of a commit; ".": the working tree itself."""
    if revision == ".":
        yield REPOSITORY
        return
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        subprocess.run(
            [*git, "add", "--detach", str(code), revision], check=True, capture_output=True
        )
        try:
            yield code
        finally:
            subprocess.run([*git, "remove", "--force", str(code)], check=True, capture_output=True)


def record(revision: str, chosen: list[SetUp], keep: Path | None = None) -> dict[str, Any]:
    """{set-up: its results} of a commit, or of an earlier call's file."""
    if revision.endswith(".json"):
        return json.loads(Path(revision).read_text())
    found = {}
    with checked_out(revision) as code, tempfile.TemporaryDirectory() as folder:
        inputs, results = Path(folder) / "inputs", keep or Path(folder) / "results"
        inputs.mkdir()
        make_inputs(inputs)
        bar = tqdm(chosen, desc=revision)
        for set_up in bar:
            bar.set_postfix_str(set_up.name)
            try:
                found[set_up.name] = run(set_up, code, inputs, results)
            except RuntimeError as error:
                found[set_up.name] = {"error": str(error)}
                bar.write(str(error))
    return found


def write_trajectories(folder: Path, results: Mapping[str, Any]) -> None:
    """``results`` as one file per engine, one line of text per line of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    engines = {set_up.name: set_up.engine for set_up in set_ups()}
    for engine in sorted({engines[name] for name in results}):
        texts = []
        for name, result in results.items():
            if engines[name] == engine:
                lines = ",\n".join(json.dumps(line) for line in result["lines"])
                rest = json.dumps(result["summary"])
                texts.append(f'"{name}": {{"summary": {rest}, "lines": [\n{lines}]}}')
        (folder / f"{engine}.json").write_text("{" + ",\n".join(texts) + "}\n")


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of everything in nested dicts and lists that is neither."""
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{where}.{name}".strip("."))
    else:
        yield where, value


def differences(before: Any, after: Any) -> dict[str, float]:
    """{place: relative difference} of two results of one set-up, where they are not equal.

    Infinite where only one has a value, or the values are no numbers.
    """
    first, second = dict(leaves(before)), dict(leaves(after))
    found = {}
    for place in {**first, **second}:
        a, b = first.get(place, "nothing"), second.get(place, "nothing")
        if a != b:
            numbers = isinstance(a, int | float) and isinstance(b, int | float)
            found[place] = abs(a - b) / max(abs(a), abs(b)) if numbers else math.inf
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> int:
    """Print how the results of some set-ups differ; the number of those that do."""
    differ = steps = numbers = 0
    for name in names:
        result = after.get(name, {})
        taken = sum("loss" in line for line in result.get("lines", []))
        steps += taken
        numbers += len(list(leaves(result)))
        found = differences(before.get(name, {}), result)
        if found:
            differ += 1
            place, largest = next(iter(found)), max(found.values())
            print(f"{name:32} differs by up to {largest:.2g}, first at {place}")
        elif not taken:
            differ += 1
            print(f"{name:32} took no step")
        else:
            print(f"{name:32} equal, {taken} steps")
    print(f"{len(names)} set-ups, {steps} steps, {numbers} values: {differ or 'none'} differ")
    return differ


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "before", help="a commit, . (the working tree), or a file that --save wrote"
    )
    parser.add_argument("after", nargs="?", help="likewise; without it, BEFORE is only recorded")
    parser.add_argument("--only", default="", help="set-ups whose name contains this")
    parser.add_argument("--save", type=Path, help="write the results of the last side to this file")
    parser.add_argument("--trajectories", type=Path, help="write a file per engine to this folder")
    parser.add_argument("--keep", type=Path, help="keep the last side's output folders here")
    args = parser.parse_args()
    chosen = [set_up for set_up in set_ups() if args.only in set_up.name]
    before = record(args.before, chosen, None if args.after else args.keep)
    after = record(args.after, chosen, args.keep) if args.after else before
    if args.save:
        args.save.write_text(json.dumps(after, indent=1) + "\n")
    if args.trajectories:
        write_trajectories(args.trajectories, after)
    failed = [name for name, result in after.items() if "error" in result]
    if not args.after:
        print(f"{len(after)} set-ups recorded, {len(failed)} of them failed {' '.join(failed)}")
        return int(bool(failed))
    return int(compare(before, after, [set_up.name for set_up in chosen]) > 0)


if __name__ == "__main__":
    sys.exit(main())
