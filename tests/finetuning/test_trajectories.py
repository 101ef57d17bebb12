"""Collections of trajectories on disk: what is written is what is read, and nothing damaged or foreign is used."""

from __future__ import annotations

import json
import subprocess
import warnings

import pytest
import torch
from datasets import load_dataset

from hf_hyperflow.data.tasks import draw_task
from hf_hyperflow.finetuning.shards import shard_columns, shard_path, shard_problem, totals, write_shard
from hf_hyperflow.finetuning.teacher import Recording, Teacher
from hf_hyperflow.finetuning.trajectories import (
    COLLECTION,
    collection_card,
    describe_domain,
    describe_space,
    load_trajectories,
    measure_token_scale,
)
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config, lora_config
from hf_hyperflow.modeling.saving import CheckpointError, write_json
from tests.data.test_tasks import domain

TEACHER = Teacher(steps=6, n_points=3)
FINGERPRINT = [0.1, 0.2]


@pytest.fixture
def space(backbone):
    return ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))


@pytest.fixture
def domains():
    return [domain("alpha", 5, 20), domain("beta", 6, 25)]


def recording(space: ParameterSpace, n: int, seed: int) -> Recording:
    generator = torch.Generator().manual_seed(seed)
    deltas = 0.01 * torch.randn(n, 3, *space.mask.shape, generator=generator) * space.mask
    accuracies = 100 * torch.rand(2, n, 3, generator=generator)
    losses = torch.rand(n, 7, generator=generator)
    return Recording(deltas, losses, *accuracies, diverged=torch.zeros(n, dtype=torch.bool))


@pytest.fixture
def collection(tmp_path, space, domains):
    """A folder of three groups of two tasks, and what was put into it; the fourth row diverged."""
    tasks, recordings = [], []
    for group in range(3):
        rows = [draw_task(domains, 2 * group + i, seed=0, randomize_prob=0.5, n_way=4, n_shot=2) for i in range(2)]
        found = recording(space, 2, group)
        if group == 1:
            found.deltas[1, 2] = float("nan")
            found.diverged[1] = True
        columns = shard_columns(rows, found, space.mask, TEACHER.times, seconds=0.5, flops=1000)
        write_shard(tmp_path, group, columns)
        tasks += rows
        recordings.append(found)
    described = {
        "arguments": {},
        "teacher": {"steps": 6},
        "times": TEACHER.times,
        "backbone": {"name": "tiny", "fingerprint": FINGERPRINT},
        "parameter_space": describe_space(space),
        "domains": [describe_domain(d, None) for d in domains],
        "groups": 3,
        "hardware": {"device": "a CPU"},
        "totals": totals(tmp_path, 3),
    }
    write_json(tmp_path / COLLECTION, described)
    (tmp_path / "README.md").write_text(collection_card(described))
    return tmp_path, tasks, torch.cat([r.deltas for r in recordings])


def test_what_is_written_is_read(collection, space, domains):
    folder, tasks, deltas = collection
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_trajectories(folder, space, domains=domains, fingerprint=FINGERPRINT)
    kept = [0, 1, 2, 4, 5]
    assert len(found) == 5
    assert found.diverged == 1
    assert found.times.tolist() == pytest.approx(TEACHER.times)
    assert found.deltas.dtype == torch.float16
    assert torch.equal(found.deltas, deltas[kept].half())
    for task, row in zip(found.tasks, kept, strict=True):
        expected = tasks[row]
        assert (task.transform_seed, task.flip) == (expected.transform_seed, expected.flip)
        for key, value in vars(expected.episode).items():
            there = vars(task.episode)[key]
            assert torch.equal(there, value) if isinstance(value, torch.Tensor) else there == value


def test_datasets_opens_the_folder(collection, space, tmp_path):
    folder, tasks, deltas = collection
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    assert rows["index"][:].tolist() == [task.episode.index for task in tasks]
    assert rows.features["theta"].dtype == "float16"
    assert torch.equal(torch.from_numpy(rows[0]["theta"]).half(), deltas[0][:, space.mask].half())
    assert rows["diverged"][:].tolist() == [False, False, False, True, False, False]
    assert rows[0]["bytes"] == 3 * space.n_parameters * 2


def test_checksums_are_those_of_sha256sum(collection):
    folder, *_ = collection
    done = subprocess.run(
        ["sha256sum", "-c", *(f"{shard_path('.', n).name}.sha256" for n in range(3))], cwd=folder / "data", check=False
    )
    assert done.returncode == 0


def test_totals(collection):
    folder, *_ = collection
    found = json.loads((folder / COLLECTION).read_text())["totals"]
    assert (found["rows"], found["diverged"], found["seconds"], found["flops"]) == (6, 1, 3.0, 6000)
    assert found["bytes"] == sum(shard_path(folder, n).stat().st_size for n in range(3))
    assert 0 <= found["query_accuracy"]["end"] <= 100


@pytest.mark.parametrize("harm", ["flip a bit", "cut off", "lose", "no checksum"])
def test_damaged_shards_are_named_and_left_out(collection, space, harm):
    folder, tasks, _ = collection
    path = shard_path(folder, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "flip a bit":
        path.write_bytes(data)
    elif harm == "cut off":
        path.write_bytes(data[:100])
    elif harm == "lose":
        path.unlink()
    else:
        path.with_name(f"{path.name}.sha256").unlink()
    assert [shard_problem(folder, n) is None for n in range(3)] == [True, False, True]
    with pytest.warns(UserWarning, match=r"lacks 1 of 3 shards.*shard-00001.parquet"):
        found = load_trajectories(folder, space)
    assert [task.episode.index for task in found.tasks] == [tasks[i].episode.index for i in (0, 1, 4, 5)]
    assert found.collection["totals"]["rows"] == 4, "the bill is of what there is"


def test_a_collection_that_is_not_finished_has_totals(collection, space):
    folder, *_ = collection
    described = json.loads((folder / COLLECTION).read_text())
    write_json(folder / COLLECTION, described | {"totals": None})
    assert load_trajectories(folder, space).collection["totals"] == described["totals"]


def test_nothing_whole_is_an_error(collection, space):
    folder, *_ = collection
    for number in range(3):
        shard_path(folder, number).write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match="lacks 3 of 3"), pytest.raises(CheckpointError, match="no whole shard"):
        load_trajectories(folder, space)
    (folder / COLLECTION).write_text("{}")
    with pytest.raises(CheckpointError, match=r"collection.json is damaged"):
        load_trajectories(folder, space)
    (folder / COLLECTION).unlink()
    with pytest.raises(CheckpointError, match="holds no trajectories"):
        load_trajectories(folder, space)


def test_another_space_backbone_or_domain_is_refused(collection, backbone, space, domains):
    folder, *_ = collection
    for other in (lora_config(backbone, 2), bias_config(backbone, 2, norms=False)):
        with pytest.raises(ValueError, match=r"another parameter space \(.*tensors"):
            load_trajectories(folder, ParameterSpace.from_backbone(backbone, other))
    with pytest.raises(ValueError, match=r"collected on tiny, and this backbone has other weights"):
        load_trajectories(folder, space, fingerprint=[0.1, 0.3])
    with pytest.raises(ValueError, match=r"need the domain 'beta', and the domains given are \['alpha'\]"):
        load_trajectories(folder, space, domains=domains[:1])
    domains[1].images[3, 0, 2, 2] += 1
    with pytest.raises(ValueError, match="domain 'beta' is not the one"):
        load_trajectories(folder, space, domains=domains)


def test_token_scale_is_the_root_mean_square_of_the_end(collection, space):
    folder, *_ = collection
    found = load_trajectories(folder, space)
    scale = measure_token_scale(found)
    assert scale.shape == (space.n_tokens, 1)
    token = int(space.mask.sum(dim=1).argmin())  # padded, if any is
    numbers = found.deltas[:, -1, token].float()[:, space.mask[token]]
    assert scale[token].item() == pytest.approx(numbers.square().mean().sqrt().item(), rel=1e-4)
    found.deltas[:, -1, 0] = 0
    scale = measure_token_scale(found)
    assert scale[0] == pytest.approx(0.01 * scale.max().item())
