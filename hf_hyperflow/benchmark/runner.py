"""`hyperflow benchmark`: all methods on the same few-shot episodes, with what they cost.

    hyperflow benchmark --adapter DIR --dataset FILE_OR_HUB_ID [...] --n_shot 1 5 20 --output_dir DIR

Episode i of a domain is a function of (seed, domain, i), and so is what a method reaches on it. Processes can therefore
share the episodes, and an interrupted run goes on where it was. More episodes, shots, domains or methods are added to
a folder by running the command again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import AutoModel

from ..arguments import make_parser
from ..data.domains import Domain, load_domain
from ..data.episodes import UNBALANCED_SHOTS, Episode, draw_episode
from ..modeling.adapter import HyperFlowAdapter
from ..modeling.atomic_file import write_json
from ..modeling.model_card import is_hub_id
from ..modeling.saving import atomic_folder, exclusive
from .arguments import BenchmarkArguments
from .bench.measure import TaskCost, measure_method
from .bench.task import CostSetting
from .cost import device_name
from .cost_file import CostFile, CostKey
from .domain_features import DomainFeatures
from .episode_log import EPISODES, EpisodeLog, EpisodeResult
from .evaluation import evaluate_method
from .figures import draw_figures
from .hyperparameters import read_hyperparameters, with_hyperparameters
from .log_settings import HYPERPARAMETERS, describe_settings, require_known
from .methods import FLOW_POINTS, Method, Target, find_methods, list_labels
from .records import Results
from .results import HYPERFLOW, REFERENCE, TUNED_METHODS, EpisodeTable, build_cost_key, summarise

RESULTS, COSTS = "results.json", "costs.json"

#: Episodes of fine-tuning where there is no GPU, if `max_episodes_gradient` does not say.
GRADIENT_EPISODES_ON_CPU = 60

#: Episodes that a process runs between two writings of the log.
EPISODES_PER_WRITE = 50
SLOW_EPISODES_PER_WRITE = 1


def main(argv: list[str] | None = None) -> None:
    """The command line, from `argv` or that of the process."""
    parser = make_parser(BenchmarkArguments, prog="hyperflow benchmark")
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    run(arguments)


def run(arguments: BenchmarkArguments) -> dict[str, Any] | None:
    """Run the episodes that are missing in `output_dir`, measure costs, and write results and figures.

    `episodes.parquet` holds every episode, `costs.json` the measured costs, `results.json` the results of everything
    in the folder (see `Results`). All are written whole or not at all. With several processes, each runs its share of
    the episodes and the first one writes.

    Returns:
        The content of `results.json` in the first process, None in others.

    Raises:
        CheckpointError: the folder cannot be written, is in use, or its files are damaged or of another benchmark.
        ValueError, FileNotFoundError: a dataset or file of hyper-parameters that cannot be used; it is named.
        ImportError: a package that a method needs is not installed.
    """
    accelerator = Accelerator(cpu=arguments.cpu)
    with exclusive(arguments.output_dir) if accelerator.is_main_process else nullcontext():
        benchmark = Benchmark.prepare(arguments, accelerator)
        benchmark.run_episodes()
        results = benchmark.report() if accelerator.is_main_process else None
    accelerator.end_training()  # a process that ends with its group open can be aborted by the group's threads
    return results


@dataclass
class Benchmark:
    """A benchmark that is ready to run. Every process has one; only the first writes, see `run`.

    Attributes:
        methods: as chosen, with their hyper-parameters.
        backbone_name: folder or Hub id.
        left_out: domains and numbers of shots that have too few images, with the reason.
    """

    arguments: BenchmarkArguments
    accelerator: Accelerator
    methods: list[Method]
    backbone_name: str
    target: Target
    domains: list[Domain]
    log: EpisodeLog
    left_out: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def prepare(cls, arguments: BenchmarkArguments, accelerator: Accelerator) -> Benchmark:
        """Load everything that is needed, so that what is missing is found now and not after hours."""
        methods = with_hyperparameters(find_methods(arguments.methods), read_hyperparameters(arguments.hyperparameters))
        for method in methods:
            method.require_packages()
        adapter = HyperFlowAdapter.from_pretrained(arguments.adapter).eval()
        backbone_name = arguments.backbone or adapter.config.backbone["name_or_path"]
        if not (arguments.backbone or is_hub_id(backbone_name) or os.path.isdir(backbone_name)):
            raise ValueError(f"{arguments.adapter} does not say where its backbone lies: give it with --backbone.")
        backbone = AutoModel.from_pretrained(backbone_name).float().eval()
        target = Target(backbone.to(accelerator.device), adapter.to(accelerator.device))
        domains = [load_domain(source, target.processor) for source in arguments.dataset]
        settings = describe_settings(arguments, methods, target, domains)
        log = EpisodeLog(arguments.output_dir, settings)
        require_known(log)
        return cls(arguments, accelerator, methods, backbone_name, target, domains, log)

    def run_episodes(self) -> None:
        """Run what the log lacks."""
        n_episodes = count_episodes(self.arguments, self.methods, self.target.device)
        for domain in self.domains:
            features = DomainFeatures(self.target, domain, self.arguments.views, self.arguments.query_views)
            for n_shot in list_shots(self.arguments):
                if not self._has_episode(domain, n_shot):
                    continue
                for method in n_episodes:
                    self._run_method(method, n_episodes[method], features, n_shot)

    def _has_episode(self, domain: Domain, n_shot: int | None) -> bool:
        """Whether a domain has the images of an episode. Tells the user what is left out or reduced."""
        arguments = self.arguments
        try:
            episode = _draw_episode(arguments, domain, n_shot, 0)
        except ValueError as error:
            size = "an episode" if n_shot is None else f"{n_shot} shots"
            self.accelerator.print(f"{domain.name} has too few images for {size}: left out ({error})")
            self.left_out.append({"domain": domain.name, "n_shot": n_shot, "reason": str(error)})
            return False
        if arguments.protocol != "meta-dataset" and episode.n_way < get_ways(arguments):
            self.accelerator.print(f"{domain.name} has {episode.n_way} classes to use: run {episode.n_way}-way")
        return True

    def _run_method(self, method: Method, n_episodes: int, features: DomainFeatures, n_shot: int | None) -> None:
        """Run what is missing of a method on one domain with one number of shots."""
        domain, accelerator = features.domain, self.accelerator
        done = self.log.done(domain.name, n_shot, method.name) if accelerator.is_main_process else set()
        (done,) = broadcast_object_list([done])
        missing = [index for index in range(n_episodes) if index not in done]
        per_write = SLOW_EPISODES_PER_WRITE if method.is_slow else EPISODES_PER_WRITE
        title = f"{domain.name}, {n_shot or 'any'}-shot, {method.name}"

        def run_episode(index: int) -> list[EpisodeResult]:
            return self._run_episode(method, features, n_shot, index)

        for rows in share_episodes(run_episode, missing, per_write, accelerator, title):
            if accelerator.is_main_process:
                self.log.append(rows)

    def _run_episode(
        self, method: Method, features: DomainFeatures, n_shot: int | None, index: int
    ) -> list[EpisodeResult]:
        """The rows of one episode."""
        episode = _draw_episode(self.arguments, features.domain, n_shot, index)
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.arguments.bf16):
            outcomes = evaluate_method(method, features, episode)
        rows = []
        for name, outcome in outcomes.items():
            row = EpisodeResult(
                domain=episode.domain,
                n_shot=n_shot,
                method=name,
                index=index,
                n_way=episode.n_way,
                n_support=len(episode.support),
                n_query=len(episode.query),
                accuracy=outcome.accuracy,
                log_loss=outcome.log_loss,
                confidence_gaps=outcome.confidence_gaps,
            )
            rows.append(row)
        return rows

    def report(self) -> dict[str, Any]:
        """Measure what is missing of the costs; write results and figures of everything in the log.

        Raises:
            ValueError: the log is empty.
        """
        if not self.log.rows:
            raise ValueError(f"no domain has enough images for an episode: {self.left_out}")
        output = Path(self.arguments.output_dir)
        results = summarise(self.log.rows, self._measure_costs(output / COSTS))
        content = {"arguments": self._describe_arguments(), "left_out": self.left_out}
        content.update(results.to_json())
        write_json(output / RESULTS, content)
        with atomic_folder(output) as draft:
            draw_figures(results, draft)
        self._print_results(results)
        return content

    def _describe_arguments(self) -> dict[str, Any]:
        """The run for the record. Files and folders have their names only, because paths mean nothing elsewhere."""
        arguments, device = self.arguments, self.target.device.type
        description = asdict(arguments)
        del description["output_dir"]
        description["dataset"] = [domain.name for domain in self.domains]
        description["adapter"] = Path(arguments.adapter).name
        description["backbone"] = Path(self.backbone_name).name
        description["hyperparameters"] = {}
        for key, value in self.log.settings.items():
            if key.startswith(HYPERPARAMETERS):
                description["hyperparameters"][key.removeprefix(HYPERPARAMETERS)] = value
        description["device"] = device_name(device)
        description["torch"] = torch.__version__
        return description

    def _measure_costs(self, path: Path) -> dict[CostKey, TaskCost]:
        """Costs of all methods in the log; those measured on this device before are in the file."""
        device = self.target.device.type
        height, width = self.domains[0].images.shape[-2:]
        setting = CostSetting(
            backbone=self.backbone_name,
            adapter=self.arguments.adapter,
            size=(height, width),
            device=device,
            is_autocast=self.arguments.bf16,
            views=self.arguments.views,
            query_views=self.arguments.query_views,
        )
        file = CostFile(path, device)
        missing = []
        for key in self._list_cost_keys():
            if key not in file.costs:
                missing.append(key)
        for key in tqdm(missing, desc="costs", disable=None, leave=False):
            with_images = replace(setting, n_way=key.n_way, n_images=key.n_support)
            file.add(key, measure_method(with_images, self._find_method(key.method)))
        return file.costs

    def _list_cost_keys(self) -> list[CostKey]:
        """The costs to know for the methods in the log, each once."""
        table = EpisodeTable(self.log.rows)
        keys: dict[CostKey, None] = {}
        for domain, n_shot in table.groups():
            for name in list_labels():
                rows = table.rows(domain, n_shot, name)
                if rows and name not in TUNED_METHODS:
                    keys[build_cost_key(rows)] = None
        return list(keys)

    def _find_method(self, name: str) -> Method:
        """A method of the log, with the hyper-parameters that it was run with."""
        hyperparameters = {}
        values = self.log.settings.get(f"{HYPERPARAMETERS}{name}")
        if values:
            hyperparameters[name] = values
        (method,) = with_hyperparameters(find_methods(name), hyperparameters)
        return method

    def _print_results(self, results: Results) -> None:
        for record in results.records:
            print(json.dumps(asdict(record)))
        for mean in results.means:
            print(f"mean over {mean.n_domains} domains: {json.dumps(asdict(mean))}")
        for name in (RESULTS, EPISODES):
            print(f"wrote {Path(self.arguments.output_dir) / name}")


def get_ways(arguments: BenchmarkArguments) -> int:
    """The ways of an episode where a domain has the classes; not for Meta-Dataset's protocol, where they vary."""
    return len(UNBALANCED_SHOTS) if arguments.protocol == "unbalanced" else arguments.n_way


def list_shots(arguments: BenchmarkArguments) -> Sequence[int | None]:
    if arguments.protocol == "cdfsl":
        return arguments.n_shot
    return [None]


def _draw_episode(arguments: BenchmarkArguments, domain: Domain, n_shot: int | None, index: int) -> Episode:
    """Episode `index` of a domain, see `draw_episode`; `n_shot` is None in protocols where shots vary."""
    return draw_episode(
        arguments.protocol,
        domain,
        index,
        n_way=arguments.n_way,
        n_shot=n_shot or 1,
        n_query=arguments.n_query,
        seed=arguments.seed,
    )


def count_episodes(arguments: BenchmarkArguments, methods: Sequence[Method], device: torch.device) -> dict[Method, int]:
    """How many episodes each method runs, points along the flow included."""
    n_slow = arguments.n_episodes
    if arguments.max_episodes_gradient is not None:
        n_slow = min(n_slow, arguments.max_episodes_gradient)
    elif device.type == "cpu":
        n_slow = min(n_slow, GRADIENT_EPISODES_ON_CPU)
    counts = {}
    for method in methods:
        counts[method] = n_slow if method.is_slow else arguments.n_episodes
    if {REFERENCE, HYPERFLOW} <= {method.name for method in methods}:
        for point in FLOW_POINTS:
            counts[point] = min(arguments.flow_episodes, arguments.n_episodes)
    return counts


def share_episodes(
    run_episode: Callable[[int], list[EpisodeResult]],
    indices: list[int],
    per_process: int,
    accelerator: Accelerator,
    title: str,
) -> Iterator[list[EpisodeResult]]:
    """The rows of the episodes `indices`, in chunks that the processes share."""
    size = per_process * accelerator.num_processes
    is_quiet = None if accelerator.is_main_process else True
    bar = tqdm(total=len(indices), desc=title, disable=is_quiet, leave=False)
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        rows = []
        for index in chunk[accelerator.process_index :: accelerator.num_processes]:
            rows += run_episode(index)
        yield gather_object(rows)
        bar.update(len(chunk))
    bar.close()
