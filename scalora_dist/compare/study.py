"""Reads study.yaml and checks all of it, before anything runs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scalora_dist.compare.runs import Cell, Grid, Run
from scalora_dist.config.data import DataArguments
from scalora_dist.config.method import MethodArguments
from scalora_dist.config.option import declarations
from scalora_dist.config.options import Options
from scalora_dist.config.parser import parse_options, read_yaml
from scalora_dist.config.words import option_words
from scalora_dist.engines.build import check_engine_choice
from scalora_dist.errors import UserError

# What the study sets for each run; and options whose results are deleted with the run's folder.
SET_BY_THE_STUDY = frozenset(
    {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "local_rank"}
    | {"seed", "learning_rate", "rank", "config"}
    | {"eval_dataset", "eval_dataset_config_name", "eval_dataset_split", "eval_size"}
    | {"adapter_rank", "profile", "profile_window", "peak_tflops"}
    | {"push_to_hub", "hub_model_id", "hub_private_repo"}
)
# Where the data is read from, before it is cut.
SOURCE = frozenset(
    {"dataset", "dataset_config_name", "dataset_split", "dataset_size", "dataset_options"}
    | {"column_names"}
)
# How it is read, then and by the runs.
READ = frozenset({"prompt_template", "completion_template"})
# What must be equal for all methods.
SHARED = (
    frozenset(each.name for each, _ in declarations(DataArguments))
    | {"model_name_or_path", "model_revision", "adapter_name_or_path"}
    | {"max_steps", "num_train_epochs", "train_batch_size"}
)
# Without train_batch_size these decide how many examples a step has.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Runs of a study keep no models and no checkpoints, unless `common` says so.
DEFAULTS: dict[str, Any] = {"save_model": False, "save_steps": 0}
KEYS: dict[str, Any] = {
    "common": {},
    "setups": None,
    "validation_size": 1000,
    "test_size": 1000,
    "ranks": [8],
    "methods": None,
    "baseline": None,
    "against": {},
    "learning_rates": None,
    "tuning_seeds": 2,
    "final_seeds": 5,
    "choose_by": "eval_loss",
    "gpus_per_run": 1,
    "smoke": False,
}
REQUIRED = ("setups", "methods", "baseline")
FEWEST_FINAL_SEEDS = 5
FIRST_TUNING_SEED = 1000
FIRST_FINAL_SEED = 2000
NAME = re.compile(r"\w[\w .,+=()-]*")  # names become folders and files


@dataclass(frozen=True)
class Setup:
    """A base model and a task.

    Attributes:
        name: its name in the study.
        options: options of ``scalora train`` for all its runs, but for the data's source.
        source: the options that name the training data and say how to read it.
        test_dataset: where the test data is read from; None: cut from the training data.
        test_dataset_split: split of ``test_dataset``.
    """

    name: str
    options: dict[str, Any]
    source: DataArguments
    test_dataset: str | None
    test_dataset_split: str


@dataclass(frozen=True)
class StudyMethod:
    """A method of a study.

    Attributes:
        label: its name in the study.
        options: its options of ``scalora train``.
        grid: learning rates before they are widened.
        ranks: values of ``--rank``; None alone: the method does not read it.
        setups: names of the set-ups that it runs in.
    """

    label: str
    options: dict[str, Any]
    grid: Grid
    ranks: tuple[int | None, ...]
    setups: tuple[str, ...]


@dataclass(frozen=True)
class Against:
    """An extra comparison of a method with another at ``times_rank`` times its rank."""

    method: str
    times_rank: int


@dataclass(frozen=True)
class Study:
    """A checked study.yaml. Fields without a comment are the file's.

    Attributes:
        tuning_seeds: seeds of tuning runs.
        final_seeds: other seeds, of final runs.
    """

    setups: dict[str, Setup]
    methods: dict[str, StudyMethod]
    baseline: str
    against: dict[str, Against]
    validation_size: int
    test_size: int
    tuning_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    choose_by: str
    gpus_per_run: int
    smoke: bool

    @property
    def cells(self) -> list[Cell]:
        """All cells: by set-up, then by rank, those without a rank first, then by method."""
        found = [
            Cell(setup, label, rank)
            for setup in self.setups
            for label, method in self.methods.items()
            if setup in method.setups
            for rank in method.ranks
        ]
        order = list(self.setups)
        return sorted(found, key=lambda cell: (order.index(cell.setup), cell.rank or 0))

    @property
    def quantized(self) -> bool:
        """Whether a run may have a base in 4 bits."""
        options = [setup.options for setup in self.setups.values()]
        options += [method.options for method in self.methods.values()]
        return any(each.get("load_in_4bit") for each in options)

    def ranks(self, setup: str) -> list[int | None]:
        """The ranks of a set-up's tables. Methods without a rank are in each of them."""
        ranks = {cell.rank for cell in self.cells if cell.setup == setup} - {None}
        return sorted(ranks, key=lambda rank: rank or 0) or [None]

    def options(self, run: Run) -> dict[str, Any]:
        """The options of a run, but for its data (`data.data_options`) and ``output_dir``."""
        options = DEFAULTS | self.setups[run.cell.setup].options
        options |= self.methods[run.cell.label].options
        options |= {
            "rank": run.cell.rank,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
        }
        return {name: value for name, value in options.items() if value is not None}


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as words of the command line of ``scalora train``."""
    return [word for name, value in options.items() for word in option_words(name, value)]


def parse_folderless(options: Mapping[str, Any]) -> Options:
    """Parse the options of a run that has no folder yet. Raises as `parse_options` does."""
    return parse_options(words_of({**options, "output_dir": "-"}))


def method_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the method of a run reads, as JSON holds it: its options with their defaults, and ηL.

    Args:
        options: as from `Study.options`.
    """
    method = parse_folderless(options).method
    names = [each.name for each, _ in declarations(MethodArguments) if method.reads(each.name)]
    read = {name: getattr(method, name) for name in names}
    if "eta_lipschitz" in read:
        read["eta_lipschitz"] = method.eta_l
    return dict(json.loads(json.dumps(read)))


def read_study(path: str) -> Study:
    """Read a study.

    Raises:
        UserError: the first mistake in it, also in an option of a run.
    """
    try:
        return _study(read_yaml(path, path))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(path) else f"{path}: {text}") from error


def _study(given: dict[str, Any]) -> Study:
    _known(given, KEYS, "")
    for key in REQUIRED:
        if not given.get(key):
            raise UserError(f"{key} is missing")
    values = KEYS | given
    common = _mapping(values["common"], "common")
    _allowed(common, SET_BY_THE_STUDY, "common")
    setups: dict[str, Setup] = {}
    for key, options in _mapping(values["setups"], "setups").items():
        name = _name(key, "setups")
        setups[name] = _setup(name, common, options)
    methods: dict[str, StudyMethod] = {}
    for key, options in _mapping(values["methods"], "methods").items():
        name = _name(key, "methods")
        methods[name] = _method(name, options, values, setups)
    baseline = str(values["baseline"])
    if baseline not in methods:
        raise UserError(f"baseline {baseline}: name one of the methods ({', '.join(methods)})")
    smoke = values["smoke"]
    if not isinstance(smoke, bool):
        raise UserError(f"smoke {smoke!r}: set true or false")
    if values["choose_by"] not in ("eval_loss", "eval_exact_match"):
        raise UserError(f"choose_by {values['choose_by']}: set eval_loss or eval_exact_match")
    finals = _count(values, "final_seeds")
    if finals < (2 if smoke else FEWEST_FINAL_SEEDS):
        raise UserError(
            f"final_seeds {finals}: give at least {FEWEST_FINAL_SEEDS}, or at least 2 and "
            "`smoke: true`, which is no study"
        )
    tuning = _count(values, "tuning_seeds")
    if tuning > FIRST_FINAL_SEED - FIRST_TUNING_SEED:
        raise UserError(f"tuning_seeds {tuning}: give fewer")
    study = Study(
        setups=setups,
        methods=methods,
        baseline=baseline,
        against=_against(values["against"], methods),
        validation_size=_count(values, "validation_size"),
        test_size=_count(values, "test_size"),
        tuning_seeds=tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning)),
        final_seeds=tuple(range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + finals)),
        choose_by=values["choose_by"],
        gpus_per_run=_count(values, "gpus_per_run"),
        smoke=smoke,
    )
    for setup in setups:
        if not any(setup in method.setups for method in methods.values()):
            raise UserError(f"setups, {setup}: no method runs in it")
    return study


def _setup(name: str, common: dict[str, Any], given: Any) -> Setup:
    where = f"setups, {name}"
    own = _mapping(given, where)
    _allowed(own, SET_BY_THE_STUDY, where)
    options = common | own
    for key in ("model_name_or_path", "dataset"):
        if not options.get(key):
            raise UserError(f"{where}: {key} is missing")
    test = options.pop("test_dataset", None)
    if not isinstance(test, str | None):
        raise UserError(f"{where}: test_dataset {test}: give a file, a folder or a name")
    split = options.pop("test_dataset_split", None)
    if test is None and split is not None:
        raise UserError(f"{where}: test_dataset_split is set, but test_dataset is not")
    named = {
        key: value for key, value in options.items() if key in SOURCE | READ and value is not None
    }
    try:
        source = parse_folderless(named).data
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    kept = {key: value for key, value in options.items() if key not in SOURCE}
    return Setup(name, kept, source, test, str(split or "test"))


def _method(
    label: str, given: Any, values: dict[str, Any], setups: Mapping[str, Setup]
) -> StudyMethod:
    where = f"methods, {label}"
    options = dict(_mapping(given, where))
    own = {key: options.pop(key) for key in ("learning_rates", "ranks", "setups") if key in options}
    _allowed(options, SET_BY_THE_STUDY | SHARED, where)
    if options.get("method") is None:
        raise UserError(f"{where}: method is missing")
    names = own.get("setups", list(setups))
    if not isinstance(names, list) or not names:
        raise UserError(f"{where}: setups {names}: give a list of set-ups")
    chosen = list(dict.fromkeys(map(str, names)))
    for name in chosen:
        if name not in setups:
            raise UserError(f"{where}: there is no set-up {name}")
        for option in BATCH:
            if option in options and setups[name].options.get("train_batch_size") is None:
                raise UserError(
                    f"{where}: {option} changes the examples of a step: set train_batch_size in "
                    "common"
                )
    rates = own.get("learning_rates", values["learning_rates"])
    if rates is None:
        raise UserError(f"{where}: learning_rates is missing")
    if not isinstance(rates, list) or any(isinstance(rate, bool) for rate in rates):
        raise UserError(f"{where}: learning_rates {rates}: give a list of numbers")
    try:
        grid = Grid(tuple(float(rate) for rate in rates))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: learning_rates {rates}: give a list of numbers") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    ranks = own.get("ranks", values["ranks"])
    if not isinstance(ranks, list) or not ranks or not all(map(_is_count, ranks)):
        raise UserError(f"{where}: ranks {ranks}: give a list of numbers of at least 1")
    reads = False
    for name in chosen:
        parsed = _parse(f"{label} in {name}", setups[name], options, values)
        reads = parsed.method.reads("rank")
    kept = tuple(sorted(set(ranks))) if reads else (None,)
    return StudyMethod(label, options, grid, kept, tuple(chosen))


def _parse(where: str, setup: Setup, options: dict[str, Any], values: dict[str, Any]) -> Options:
    """Parse the options of a method in a set-up, as a run will."""
    given = {name: x for name, x in (setup.options | options).items() if x is not None}
    try:
        parsed = parse_folderless(given)
        check_engine_choice(parsed, _count(values, "gpus_per_run"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return parsed


def _against(given: Any, methods: Mapping[str, StudyMethod]) -> dict[str, Against]:
    found = {}
    for key, other in _mapping(given, "against").items():
        label = str(key)
        where = f"against, {label}"
        fields = _mapping(other, where)
        _known(fields, ("method", "times_rank"), where)
        name, times = str(fields.get("method")), fields.get("times_rank", 1)
        for one in (label, name):
            if one not in methods:
                raise UserError(f"{where}: there is no method {one}")
        if not _is_count(times):
            raise UserError(f"{where}: times_rank {times}: give a number of at least 1")
        if (label, 1) == (name, times):
            raise UserError(f"{where}: this is {label} itself: name another method or times_rank")
        if None in methods[label].ranks + methods[name].ranks:
            raise UserError(f"{where}: only methods with a rank are compared at other ranks")
        if not any(rank and rank * times in methods[name].ranks for rank in methods[label].ranks):
            raise UserError(f"{where}: {name} has no rank that is {times} times one of {label}'s")
        found[label] = Against(name, times)
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold lines of `name: value`")
    return value


def _known(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)
            says = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
            raise UserError(f"{where}{', ' if where else ''}unknown key {key!r}: {says}")


def _allowed(options: Mapping[str, Any], refused: frozenset[str], where: str) -> None:
    for name in options:
        if name in refused:
            shared = name in SHARED - SET_BY_THE_STUDY
            sets = "the study sets it, or deletes what it writes: leave it out"
            why = "put it into common or a set-up" if shared else sets
            raise UserError(f"{where}: {name} cannot be set here; {why}")


def _name(key: Any, where: str) -> str:
    """A name as text: YAML reads some, such as no and null, as other values.

    Raises:
        UserError: it is no text or number, or has other characters than file names have.
    """
    where = f"{where}, {key}"
    if key is None or isinstance(key, bool):
        raise UserError(f"{where}: YAML reads this name as a value: write it in quotes")
    name = str(key)
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: use letters, digits, blanks and . , + = - ( ) in names")
    return name


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _count(values: Mapping[str, Any], key: str) -> int:
    if not _is_count(values[key]):
        raise UserError(f"{key} {values[key]}: give a number of at least 1")
    return int(values[key])
