"""`hyperflow benchmark`: all methods on the same few-shot episodes, with what they cost.

    hyperflow benchmark --adapter DIR --dataset FILE_OR_HUB_ID [...] --n_shot 1 5 20 --output DIR

Episode i of a domain is a function of (seed, domain, i), and so is what a method reaches on it: processes share the
episodes, an interrupted run goes on where it was, and more episodes, shots, domains or methods can be added to a
folder by running the command again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import AutoModel, HfArgumentParser

from ..data.domains import Domain, load_domain
from ..data.episodes import Episode, cdfsl_episode, meta_dataset_episode
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.fingerprint import compute_fingerprint
from ..modeling.saving import CheckpointError, atomic_folder, exclusive, write_json
from .easyfsl_methods import EASYFSL_METHODS, import_easyfsl
from .episode_log import EPISODES, EpisodeLog
from .evaluation import DomainFeatures
from .figures import draw_figures
from .hyperparameters import Hyperparameters, read_hyperparameters
from .methods import GRADIENT_METHODS, IN_METRIC, METHODS, Target, accuracies, method_list
from .results import Costs, cost_key, summarise
from .task_cost import CostSetting, device_name, task_cost

RESULTS, COSTS = "results.json", "costs.json"
#: How settings of a method are called in the log.
RECIPE = "recipe of "

#: Episodes of the gradient methods where there is no GPU, if `max_episodes_gradient` does not say.
GRADIENT_EPISODES_ON_CPU = 60


@dataclass
class BenchmarkArguments:
    """What is compared on what; see `run`."""

    adapter: str = field(metadata={"help": "the HyperFlow adapter: folder or Hub id"})
    dataset: list[str] = field(metadata={"help": "domains to report: Parquet files, image folders, Hub ids"})
    output_dir: str = field(metadata={"aliases": ["--output"], "help": "folder for the results"})
    backbone: str | None = field(
        default=None, metadata={"help": "the target: folder or Hub id; default: the one that the adapter names"}
    )
    protocol: str = field(default="cdfsl", metadata={"help": "cdfsl (fixed ways and shots) or meta-dataset (variable)"})
    n_way: int = field(default=5, metadata={"help": "classes of an episode, or all where there are fewer (cdfsl)"})
    n_shot: list[int] = field(
        default_factory=lambda: [1, 5, 20], metadata={"help": "support images of a class, one or more (cdfsl)"}
    )
    n_query: int = field(default=15, metadata={"help": "query images of a class (cdfsl)"})
    n_episodes: int = field(default=600, metadata={"help": "episodes of each domain and number of shots"})
    methods: str = field(
        default=",".join(METHODS),
        metadata={"help": "separated by commas; easyfsl stands for that package's classifiers"},
    )
    max_episodes_gradient: int | None = field(
        default=None,
        metadata={"help": "the gradient methods run on the first so many episodes; default: 60 on a CPU, all on a GPU"},
    )
    flow_episodes: int = field(
        default=60, metadata={"help": "the figures along the flow are drawn from the first so many episodes; 0: none"}
    )
    recipes: str | None = field(
        default=None, metadata={"help": "JSON of training/grid_search.py: settings of the baselines"}
    )
    bf16: bool = field(default=False, metadata={"help": "run the models under bfloat16 autocast"})
    cpu: bool = field(default=False, metadata={"help": "stay on the CPU also where there is a GPU"})
    seed: int = field(default=0, metadata={"help": "of the episodes"})

    def __post_init__(self) -> None:
        if self.protocol not in ("cdfsl", "meta-dataset"):
            raise ValueError(f"unknown protocol {self.protocol!r}: use cdfsl or meta-dataset.")
        numbers = {"n_episodes": self.n_episodes, "n_query": self.n_query, "n_shot": min(self.n_shot, default=0)}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.n_way < 2:
            raise ValueError(f"n_way must be at least 2, not {self.n_way}.")
        if self.flow_episodes < 0:
            raise ValueError(f"flow_episodes must not be negative, but is {self.flow_episodes}.")
        if self.max_episodes_gradient is not None and self.max_episodes_gradient < 1:
            raise ValueError(f"max_episodes_gradient must be at least 1, not {self.max_episodes_gradient}.")
        method_list(self.methods)
        names = [Path(source).stem for source in self.dataset]
        if len(set(names)) < len(names):
            raise ValueError(f"two datasets have the same name among {names}: a domain is known by its name.")


def main(argv: list[str] | None = None) -> None:
    """The command line, from `argv` or that of the process."""
    (arguments,) = HfArgumentParser(BenchmarkArguments, prog="hyperflow benchmark").parse_args_into_dataclasses(argv)
    run(arguments)


def run(arguments: BenchmarkArguments) -> dict | None:
    """Run the episodes that are missing in `output_dir`, measure costs, and write results and figures.

    `episodes.parquet` holds every episode, `costs.json` the measured costs, `results.json` the results of everything
    in the folder (see `summarise`); all are written whole or not at all. With several processes, each runs its share
    of the episodes and the first one writes.

    Returns:
        The results in the first process, None in others.

    Raises:
        CheckpointError: the folder cannot be written, is in use, or its files are damaged or of another benchmark.
        ValueError, FileNotFoundError: a dataset or file of recipes that cannot be used; it is named.
        ImportError: methods of easyfsl without that package.
    """
    accelerator = Accelerator(cpu=arguments.cpu)
    with exclusive(arguments.output_dir) if accelerator.is_main_process else nullcontext():
        results = _run(arguments, accelerator)
    accelerator.end_training()  # a process that ends with its group open can be aborted by the group's threads
    return results


def _run(arguments: BenchmarkArguments, accelerator: Accelerator) -> dict | None:
    recipes = read_hyperparameters(arguments.recipes)
    if set(EASYFSL_METHODS) & set(method_list(arguments.methods)):
        import_easyfsl()  # a missing package is told now, not after hours
    adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval()
    backbone_name = arguments.backbone or adapter.config.backbone["name_or_path"]
    if not backbone_name:
        raise ValueError(f"{arguments.adapter} does not name its backbone: give it with --backbone.")
    backbone = AutoModel.from_pretrained(backbone_name).float().eval()
    settings = _settings(arguments, adapter, backbone, recipes)
    target = Target(backbone.to(accelerator.device), adapter.to(accelerator.device), recipes)
    domains = [load_domain(source, adapter.processor) for source in arguments.dataset]
    settings |= {f"domain {domain.name}": _fingerprint(domain) for domain in domains}
    log = EpisodeLog(arguments.output_dir, settings)
    left_out = []
    for domain in domains:
        features = DomainFeatures(target.split, domain, adapter.processor)
        for n_shot in arguments.n_shot if arguments.protocol == "cdfsl" else [None]:
            try:
                first = _episode(arguments, domain, n_shot, 0)
            except ValueError as error:
                what = "an episode" if n_shot is None else f"{n_shot} shots"
                accelerator.print(f"{domain.name} has too few images for {what}: left out ({error})")
                left_out.append({"domain": domain.name, "n_shot": n_shot, "reason": str(error)})
                continue
            if arguments.protocol == "cdfsl" and first.n_way < arguments.n_way:
                accelerator.print(f"{domain.name} has {first.n_way} classes to use: run {first.n_way}-way")
            _run_episodes(arguments, accelerator, target, features, n_shot, log)
    if not accelerator.is_main_process:
        return None
    return _report(arguments, backbone_name, recipes, domains, log, left_out, accelerator)


def _settings(
    arguments: BenchmarkArguments, adapter: HyperFlowAdapter, backbone: torch.nn.Module, recipes: Hyperparameters
) -> dict[str, object]:
    """What an accuracy depends on beside method, domain, shots and index."""
    settings = {key: vars(arguments)[key] for key in ("protocol", "seed", "bf16")}
    if arguments.protocol == "cdfsl":
        settings |= {"n_way": arguments.n_way, "n_query": arguments.n_query}
    settings |= {"adapter": adapter.config.weights_sha256, "backbone": compute_fingerprint(backbone)}
    return settings | {f"{RECIPE}{m}": recipes.of(m) for m in method_list(arguments.methods) if recipes.of(m)}


def _fingerprint(domain: Domain) -> str:
    digest = hashlib.sha256(domain.images.numpy().tobytes())
    digest.update(domain.labels.numpy().tobytes())
    return digest.hexdigest()[:16]


def _episode(arguments: BenchmarkArguments, domain: Domain, n_shot: int | None, index: int) -> Episode:
    if arguments.protocol == "meta-dataset":
        return meta_dataset_episode(domain, index, seed=arguments.seed)
    ways = {"n_way": arguments.n_way, "n_query": arguments.n_query}
    return cdfsl_episode(domain, index, n_shot=n_shot, seed=arguments.seed, **ways)


def _methods_and_episodes(arguments: BenchmarkArguments, target: Target) -> dict[str, int]:
    """How many episodes each method runs, points along the flow included."""
    few = GRADIENT_EPISODES_ON_CPU if target.device.type == "cpu" else arguments.n_episodes
    few = arguments.max_episodes_gradient or few
    chosen = method_list(arguments.methods)
    episodes = {m: min(few, arguments.n_episodes) if m in GRADIENT_METHODS else arguments.n_episodes for m in chosen}
    if {"direct", "hyperflow"} <= set(chosen):
        episodes |= dict.fromkeys(target.points, min(arguments.flow_episodes, arguments.n_episodes))
    return episodes


def _run_episodes(
    arguments: BenchmarkArguments,
    accelerator: Accelerator,
    target: Target,
    features: DomainFeatures,
    n_shot: int | None,
    log: EpisodeLog,
) -> None:
    """Run what is missing of one domain and number of shots."""
    device_type = accelerator.device.type
    for method, n_episodes in _methods_and_episodes(arguments, target).items():

        def rows_of(index: int, method: str = method) -> list[dict]:
            episode = _episode(arguments, features.domain, n_shot, index)
            with torch.autocast(device_type, torch.bfloat16, enabled=arguments.bf16):
                reached = accuracies(method, target, features, episode)
            counts = {"n_way": episode.n_way, "n_support": len(episode.support), "n_query": len(episode.query)}
            key = {"domain": episode.domain, "n_shot": n_shot, "index": index} | counts
            return [key | {"method": name, "accuracy": value} for name, value in reached.items()]

        done = log.done(features.domain.name, n_shot, method) if accelerator.is_main_process else set()
        (done,) = broadcast_object_list([done])
        missing = [index for index in range(n_episodes) if index not in done]
        title = f"{features.domain.name}, {n_shot or 'any'}-shot, {method}"
        per_process = 1 if method in GRADIENT_METHODS else 50
        for rows in _shared(rows_of, missing, per_process, accelerator, title):
            if accelerator.is_main_process:
                log.append(rows)


def _shared(
    rows_of: Callable[[int], list[dict]], indices: list[int], per_process: int, accelerator: Accelerator, title: str
) -> Iterator[list[dict]]:
    """The rows of `indices`, in chunks that the processes share."""
    size = per_process * accelerator.num_processes
    bar = tqdm(total=len(indices), desc=title, disable=None if accelerator.is_main_process else True, leave=False)
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        mine = chunk[accelerator.process_index :: accelerator.num_processes]
        rows = gather_object([row for index in mine for row in rows_of(index)])
        bar.update(len(chunk))
        yield rows
    bar.close()


def _report(
    arguments: BenchmarkArguments,
    backbone_name: str,
    recipes: Hyperparameters,
    domains: list[Domain],
    log: EpisodeLog,
    left_out: list[dict],
    accelerator: Accelerator,
) -> dict:
    """Measure what is missing of the costs; write results and figures of everything in the log."""
    if not log.rows:
        raise ValueError(f"no domain has enough images for an episode: {left_out}")
    device = accelerator.device.type
    size = tuple(domains[0].images.shape[-2:])
    setting = CostSetting(backbone_name, arguments.adapter, device, arguments.bf16, recipes, size)
    costs = _costs(Path(arguments.output_dir) / COSTS, setting, log)
    results = summarise(log.rows, costs)
    own = {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "backbone", "recipes")}
    own |= {"dataset": [domain.name for domain in domains], "adapter": Path(arguments.adapter).name}
    own |= {"recipes": {k.removeprefix(RECIPE): v for k, v in log.settings.items() if k.startswith(RECIPE)}}
    own |= {"backbone": Path(backbone_name).name, "device": device_name(device), "torch": torch.__version__}
    results = {"arguments": own, "left_out": left_out} | results
    write_json(Path(arguments.output_dir) / RESULTS, results)
    with atomic_folder(arguments.output_dir) as draft:
        draw_figures(results, draft)
    for record in results["records"]:
        accelerator.print(json.dumps(record))
    for mean in results["means"]:
        accelerator.print(f"mean over {mean['n_domains']} domains: {json.dumps(mean)}")
    for name in (RESULTS, EPISODES):
        accelerator.print(f"wrote {Path(arguments.output_dir) / name}")
    return results


def _costs(path: Path, setting: CostSetting, log: EpisodeLog) -> Costs:
    """Costs by `cost_key`, those measured on this device before from the file."""
    device = device_name(setting.device)
    known = _read_costs(path)
    costs = {(c["method"], c["n_way"], c["n_support"]): c["cost"] for c in known if c["device"] == device}
    groups: dict[tuple, list[dict]] = {}
    for row in log.rows:
        if not row["method"].startswith("hyperflow ") and row["method"] not in IN_METRIC.values():
            groups.setdefault((row["domain"], row["n_shot"], row["method"]), []).append(row)
    wanted = dict.fromkeys(cost_key(rows) for rows in groups.values())
    for key in tqdm([key for key in wanted if key not in costs], desc="costs", disable=None, leave=False):
        costs[key] = task_cost(key[0], setting, key[1], key[2])
        known.append(dict(zip(("method", "n_way", "n_support"), key, strict=True)) | {"device": device})
        known[-1]["cost"] = costs[key]
        write_json(path, known)
    return costs


def _read_costs(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        known = json.loads(path.read_text())
        complete = all({"method", "n_way", "n_support", "device", "cost"} <= set(entry) for entry in known)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it to measure again.") from error
    if not complete:
        raise CheckpointError(f"{path} is not the costs of a benchmark: remove it to measure again.")
    return known
