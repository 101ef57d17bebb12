"""A small collection of trajectories on disk."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.tasks import draw_task
from hf_hyperflow.finetuning.collection import COLLECTION, describe_domain, describe_space
from hf_hyperflow.finetuning.collection_card import collection_card
from hf_hyperflow.finetuning.shards import build_shard_columns, summarise_shards, write_shard
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from tests.helpers.recorded import FINGERPRINT, TEACHER, Collected, noise, random_recording


@pytest.fixture
def space(backbone):
    return ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))


@pytest.fixture
def domains() -> list[Domain]:
    return [noise("alpha", 5, 20), noise("beta", 6, 25)]


@pytest.fixture
def collected(tmp_path, space, domains) -> Collected:
    tasks, deltas = [], []
    for group in range(3):
        rows = [draw_task(domains, 2 * group + i, seed=0, randomize_prob=0.5, n_way=4, n_shot=2) for i in range(2)]
        trajectories = random_recording(space, 2, group)
        if group == 1:
            trajectories.deltas[1, 2] = float("nan")
            trajectories.diverged[1] = True
        columns = build_shard_columns(rows, trajectories, space.mask, TEACHER.times, seconds=0.5, flops=1000)
        write_shard(tmp_path, group, columns)
        tasks += rows
        deltas.append(trajectories.deltas)
    description = {
        "arguments": {"randomize_prob": 0.5},
        "teacher": {"steps": 6},
        "times": TEACHER.times,
        "backbone": {"name": "tiny", "fingerprint": FINGERPRINT},
        "parameter_space": describe_space(space),
        "domains": [describe_domain(domain, None) for domain in domains],
        "groups": 3,
        "hardware": {"device": "a CPU"},
        "totals": summarise_shards(tmp_path, 3),
    }
    write_json(tmp_path / COLLECTION, description)
    (tmp_path / "README.md").write_text(collection_card(description))
    return Collected(tmp_path, tasks, torch.cat(deltas), description)
