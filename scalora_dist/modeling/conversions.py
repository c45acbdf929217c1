"""transformers' conversions between a model's tensors in memory and in files, a few at a time.

transformers renames, fuses and splits tensors when it loads a model, and undoes it when it saves
one: GPT-NeoX's ``embed_out`` is ``lm_head`` in memory, and the experts of a layer are one tensor.
Its own functions hold all tensors at once. Here each group of tensors that belong together is
converted alone. The loops follow ``transformers.core_model_loading`` of version 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Group:
    """Tensors that are made together from others. Mostly one from one, with a new name.

    Attributes:
        sources: {name of a tensor that is needed: the converter's pattern that it fits}, in order.
        results: {name of a tensor that is made: a meta tensor of its shape and dtype}, in order.
        converter: makes the results; None: the result is the source itself.
        first: the name that the converter completes its results' names from.
    """

    sources: Mapping[str, str]
    results: Mapping[str, Tensor]
    converter: WeightConverter | None
    first: str

    def make(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> list[Tensor]:
        """The results, in order.

        Args:
            tensors: the sources by name.
            model: the model, which may have no storage: for its config and its shapes.
        """
        if self.converter is None:
            return [tensors[name] for name in self.sources]
        return list(_convert(self.converter, self.first, self.sources, tensors, model).values())


class Conversions:
    """The conversions of one model between its files and memory.

    Attributes:
        model: the model, without storage.
        used: the transforms that some name in the files needs. To save the model, they are undone.
        loads: {parameter or buffer that is in the files: the group that makes it}.
    """

    def __init__(self, model: PreTrainedModel, files: Mapping[str, Tensor]) -> None:
        """
        Args:
            model: the model, without storage.
            files: {key in the model's files: a meta tensor of its shape and dtype}.
        """
        self.model = model
        transforms = get_model_conversion_mapping(model)
        renamings, converters = _by_kind(transforms)
        known, prefix = model.state_dict(), model.base_model_prefix
        found: dict[str, dict[str, str | None]] = {}  # {first result: {key: its pattern}}
        for key in sorted(files, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name in known:
                found.setdefault(name, {})[key] = pattern
        self.used = [transform for transform in transforms if transform.was_used()]
        self.loads: dict[str, Group] = {}
        for group in _groups(found, converters, files, model):
            self.loads |= dict.fromkeys(group.results, group)

    def saves(self, state: Mapping[str, Tensor]) -> list[Group]:
        """How each tensor that ``save_pretrained`` writes is made, in its order.

        Args:
            state: {parameter or buffer: a meta tensor of its shape and dtype}. Of tied ones, one.
        """
        renamings, converters = _by_kind([x.reverse_transform() for x in reversed(self.used)])
        found: dict[str, dict[str, str | None]] = {}
        for name in sorted(state, key=dot_natural_key):
            key, pattern = name, None
            for converter in converters:  # at most one fits
                key, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    break
            else:
                key = _renamed(name, renamings)
            found.setdefault(key, {})[name] = pattern
        return list(_groups(found, converters, state, self.model, renamings))


def _by_kind(
    transforms: Sequence[WeightTransform],
) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
    return renamings, [x for x in transforms if isinstance(x, WeightConverter)]


def _renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _groups(
    found: Mapping[str, Mapping[str, str | None]],
    converters: Sequence[WeightConverter],
    tensors: Mapping[str, Tensor],
    model: PreTrainedModel,
    renamings: Sequence[WeightRenaming] = (),
) -> Iterator[Group]:
    """The group of each first result in ``found``. What a converter makes is then renamed."""
    of_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    for first, patterns in found.items():
        name, pattern = next(iter(patterns.items()))
        if pattern is None:  # of several tensors with one new name, the first counts
            yield Group({name: name}, {first: tensors[name]}, None, first)
            continue
        converter = of_pattern[pattern]
        sources = {name: str(pattern) for name, pattern in patterns.items()}
        made = _convert(converter, first, sources, tensors, model)
        results = {_renamed(key, renamings): tensor for key, tensor in made.items()}
        yield Group(sources, results, converter, first)


def _convert(
    converter: WeightConverter,
    first: str,
    sources: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    """What a converter makes of these tensors, {name: tensor}."""
    once = deepcopy(converter)  # it collects tensors
    for name, pattern in sources.items():
        once.add_tensor(first, name, pattern, tensors[name])
    made = once.convert(first, model=model, config=model.config)
    return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}
