"""The model card (README.md) of an exported model or adapter.

A card is made to be uploaded. So it names no path of the machine that trained: a local base model
or data file appears by its last component.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from scalora_dist.config.option import declarations, default_of
from scalora_dist.config.options import Options

Kind: TypeAlias = Literal["model", "adapter"]

NAME = "README.md"
# A snapshot in the hub's cache, such as ~/.cache/huggingface/hub/models--org--name/snapshots/1a2b.
SNAPSHOT = re.compile(r".*/(?:models|datasets)--([^/]+)/snapshots/[^/]+/?")
THIS = {"model": "path/or/hub-name/of/this/model", "adapter": "path/or/hub-name/of/this/adapter"}
BASE = "path/of/the/base/model"  # of one that is not on the hub
SCALORA = "[ScaLoRA](https://arxiv.org/abs/2510.23818)"
# Options of the training that a resume must keep, and that say nothing of the result; the dtype has
# a line of its own.
UNTOLD = ("bf16", "fp16", "rank_monitor_steps", "rank_monitor_layers")
ALWAYS_TOLD = ("dataset", "max_length")  # options of the data


def model_card(
    kind: Kind, options: Options, summary: Mapping[str, Any], versions: Mapping[str, str]
) -> str:
    """The text of README.md for ``model/`` or ``adapter/``.

    Args:
        kind: which of the two folders.
        options: all options of the run, resolved.
        summary: the contents of summary.json, as far as they are known: a key that is missing, or
            is None, has no line in the card.
        versions: {library: version} of the libraries that trained.
    """
    base = str(options.model.model_name_or_path)
    hub_base = hub_name(base)
    data = [name for name in (options.data.dataset, options.data.eval_dataset) if name]
    head = ModelCardData(
        base_model=hub_base,
        base_model_relation=("finetune" if kind == "model" else "adapter") if hub_base else None,
        library_name="transformers" if kind == "model" else "peft",
        pipeline_tag="text-generation",
        tags=["scalora_dist", options.method.name],
        datasets=list(dict.fromkeys(filter(None, map(hub_name, data)))) or None,
    )
    parts = [
        f"# {code(public_name(base))}, fine-tuned with {options.method.name}",
        _introduction(kind, options, summary),
        f"## How to load it\n\n{fenced('python', _loading(kind, options))}",
    ]
    if rows := list(_results(summary)):
        parts.append("## Results\n\n" + _table(rows))
    parts.append(
        "## Settings\n\nOptions of `scalora train` that decide the numbers, as a recipe "
        f"(`--config`):\n\n{fenced('yaml', _settings(options))}"
    )
    if versions:
        rows = [(code(name), code(version)) for name, version in versions.items()]
        parts.append("## Versions\n\n" + _table(rows))
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def names_on_hub(options: Options) -> list[str]:
    """Those of a run's names of models and data that are no paths here but names on the hub."""
    model, data = options.model, options.data
    names = (model.model_name_or_path, model.adapter_name_or_path, data.dataset, data.eval_dataset)
    return [name for name in names if name and hub_name(name)]


def without_paths(options: Options, on_hub: Collection[str]) -> Options:
    """Options for a card that is written elsewhere: what is not in ``on_hub`` becomes a path.

    Args:
        options: options of a run.
        on_hub: what ``names_on_hub`` returned where the run was.
    """
    hidden = {}
    for name in ("model_name_or_path", "adapter_name_or_path", "dataset", "eval_dataset"):
        group = options.data if name.endswith("dataset") else options.model
        value = getattr(group, name)
        hidden[name] = f"/{Path(value).name}" if value and value not in on_hub else value
    return options.having(**hidden)


def hub_name(name: str) -> str | None:
    """The name on the hub of a model or data set. None: it is local, or generated.

    Args:
        name: as an option gives it. A snapshot in the hub's cache has the name of its repository.
    """
    match = SNAPSHOT.fullmatch(name)
    repository = match[1].replace("--", "/", 1) if match else name
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return None if Path(repository).exists() else repository


def public_name(name: str) -> str:
    """What a card calls a model or data set: its name on the hub, or a path's last component."""
    return hub_name(name) or Path(name).resolve().name or "local"


def code(text: str) -> str:
    """``text`` as code in a line or a table of Markdown, whatever characters it has."""
    text = " ".join(text.split()).replace("|", "\\|")
    ticks = _longer_than_any(text, 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(language: str, text: str) -> str:
    """``text`` as a block of code."""
    ticks = _longer_than_any(text, 3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _longer_than_any(text: str, least: int) -> str:
    """Backticks, more than ``text`` has in a row and at least ``least``."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _introduction(kind: Kind, options: Options, summary: Mapping[str, Any]) -> str:
    """What this is, what it was made of, and what it is not."""
    model, method, train = options.model, options.method, options.train
    base = code(public_name(str(model.model_name_or_path)))
    if hub := hub_name(str(model.model_name_or_path)):
        base = f"[{base}](https://huggingface.co/{hub})"
    if revision := model.model_revision:
        base += f" (revision {code(revision)})"
    said = [f"{'A fine-tune of' if kind == 'model' else 'A LoRA adapter for'} {base}."]
    name = SCALORA if method.name == "scalora" else f"the method `{method.name}`"
    count = summary.get("steps")
    steps = f" for {count:,} step{'s' * (count != 1)}" if count else ""
    said.append(
        f"It was trained with {name} by scalora_dist{steps} on "
        f"{code(public_name(str(options.data.dataset)))}."
    )
    if model.adapter_name_or_path:
        said.append(f"It continues the adapter {code(public_name(model.adapter_name_or_path))}.")
    if model.load_in_4bit:
        said.append(f"In the training its base was in 4 bits ({model.bnb_4bit_quant_type}).")
    if kind == "model":
        said.append("All updates are merged into its weights: it needs no adapter.")
    elif train.adapter_rank is not None:
        said.append(
            f"The adapter is the best approximation of rank {train.adapter_rank} of what the run "
            "has changed. `approximation.json` has the error of each layer. The results below are "
            "those of the trained model, not of this adapter."
        )
    return "\n".join(said)


def _loading(kind: Kind, options: Options) -> str:
    """Lines of Python that load it. An adapter needs its base as the training had it."""
    model, dtype = options.model, str(options.train.dtype).removeprefix("torch.")
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    if kind == "model":
        return "\n".join(
            [
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f'name = "{THIS[kind]}"',
                f"tokenizer = AutoTokenizer.from_pretrained(name{trust})",
                f'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto"{trust})',
            ]
        )
    hub, revision = hub_name(str(model.model_name_or_path)), model.model_revision
    rest = (f", revision={revision!r}" if hub and revision else "") + trust
    quantized = model.load_in_4bit
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", BitsAndBytesConfig" if quantized else ""),
        "",
        f'base = "{hub or BASE}"',
        f"tokenizer = AutoTokenizer.from_pretrained(base{rest})",
    ]
    if quantized:
        lines += [
            "quantization = BitsAndBytesConfig(",
            "    load_in_4bit=True,",
            f'    bnb_4bit_quant_type="{model.bnb_4bit_quant_type}",',
            f"    bnb_4bit_use_double_quant={model.bnb_4bit_use_double_quant},",
            f'    bnb_4bit_compute_dtype="{model.bnb_4bit_compute_dtype or dtype}",',
            ")",
        ]
    return "\n".join(
        [
            *lines,
            "model = AutoModelForCausalLM.from_pretrained(",
            f'    base, dtype="{dtype}"'
            + (", quantization_config=quantization" if quantized else "")
            + rest,
            ")",
            f'model = PeftModel.from_pretrained(model, "{THIS[kind]}")',
        ]
    )


def _results(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of what was measured."""
    known = {name: value for name, value in summary.items() if value not in (None, [], {})}
    held_out = f" ({known['eval_examples']:,} examples)" if "eval_examples" in known else ""
    if "eval_loss" in known:
        yield f"held-out loss{held_out}, before → after", _change(known["eval_loss"], ".3f")
    if "eval_exact_match" in known:
        yield f"held-out exact match{held_out}", _change(known["eval_exact_match"], ".1%")
    if "loss_first" in known and "loss_last" in known:
        losses = [known["loss_first"], known["loss_last"]]
        yield "training loss, first → last step", _change(losses, ".3f")
    elif "loss_last" in known:
        yield "training loss, last step", _number(known["loss_last"], ".3f")
    if "steps" in known:
        skipped = f" ({known['skipped_steps']:,} skipped)" if known.get("skipped_steps") else ""
        yield "steps", f"{known['steps']:,}{skipped}"
    if "trained_parameters" in known:
        yield "trained parameters", f"{known['trained_parameters']:,}"
    if ranks := known.get("update_rank"):
        spread = f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.0f}"
        yield f"rank of the accumulated update ({len(ranks)} layers measured)", spread
    if "world_size" in known:
        yield "ranks that trained", f"{known['world_size']:,}"


def _change(values: list[float | None], form: str) -> str:
    return " → ".join(_number(value, form) for value in values)


def _number(value: float | None, form: str) -> str:
    """A number; JSON has null for one that is not finite."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)


def _settings(options: Options) -> str:
    """The options that decide the numbers, as YAML, one paragraph for each group."""
    train, data, method, model = options.train, options.data, options.method, options.model
    wanted = {
        "training": {
            each.name: getattr(train, each.name)
            for each, declaration in declarations(train)
            if declaration.resume != "free" and each.name not in UNTOLD
        },
        "method": {
            each.name: getattr(method, each.name)
            for each, declaration in declarations(method)
            if declaration.read_by(method.name)
        },
        "data": {
            each.name: getattr(data, each.name)
            for each, declaration in declarations(data)
            if each.name in ALWAYS_TOLD
            or (declaration.resume != "free" and getattr(data, each.name) != default_of(each))
        },
        "model": {"model_name_or_path": model.model_name_or_path},
    }
    # Only one of the two decides.
    wanted["training"].pop("num_train_epochs" if train.max_steps > 0 else "max_steps")
    wanted["training"] |= {name: True for name in ("bf16", "fp16") if getattr(train, name)}
    if model.load_in_4bit:
        wanted["model"] |= {
            name: value
            for name, value in asdict(model).items()
            if name == "load_in_4bit" or name.startswith("bnb_")
        }
    if revision := model.model_revision:
        wanted["model"]["model_revision"] = revision
    if model.adapter_name_or_path:
        wanted["model"]["adapter_name_or_path"] = model.adapter_name_or_path
    for group in wanted.values():
        for name in ("model_name_or_path", "adapter_name_or_path", "dataset", "eval_dataset"):
            if group.get(name):
                group[name] = public_name(group[name])
    return "\n".join(f"# {title}\n{_yaml(group)}" for title, group in wanted.items() if group)


def _yaml(group: Mapping[str, Any]) -> str:
    told = {name: value for name, value in group.items() if value is not None}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000)
