"""Trajectories: what is written is what is read, and nothing damaged or foreign is used."""

from __future__ import annotations

import warnings

import pyarrow.parquet
import pytest
import torch
from datasets import load_dataset

from hf_hyperflow.data.parquet import read_parquet
from hf_hyperflow.finetuning.collection import COLLECTION
from hf_hyperflow.finetuning.shards import _checksum_line, get_shard_path
from hf_hyperflow.finetuning.trajectories import Trajectories, load_trajectories, measure_token_scale
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import lora_config
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.recorded import FINGERPRINT, TEACHER, Collected


def assert_rows(loaded: Trajectories, collected: Collected, rows: list[int]) -> None:
    """These rows of the collection were loaded, bit for bit."""
    assert len(loaded) == len(rows)
    assert torch.equal(loaded.deltas, collected.deltas[rows].half())
    for task, row in zip(loaded.tasks, rows, strict=True):
        expected = collected.tasks[row]
        assert (task.transform_seed, task.flip) == (expected.transform_seed, expected.flip)
        assert (task.episode.domain, task.episode.index) == (expected.episode.domain, expected.episode.index)
        for name in ("classes", "support", "support_labels", "query", "query_labels"):
            assert torch.equal(vars(task.episode)[name], vars(expected.episode)[name])


def test_what_is_written_is_read(collected, space, domains):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_trajectories(collected.folder, space, domains=domains, fingerprint=FINGERPRINT)
    assert_rows(loaded, collected, [0, 1, 2, 4, 5])
    assert loaded.diverged == 1
    assert loaded.times.tolist() == pytest.approx(TEACHER.times)
    assert loaded.deltas.dtype == torch.float16
    assert torch.equal(loaded.mask, space.mask)
    assert loaded.collection == collected.description


def test_datasets_opens_the_folder(collected, space, tmp_path):
    rows = load_dataset(str(collected.folder), split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    assert rows["index"][:].tolist() == [task.episode.index for task in collected.tasks]
    assert rows.features["theta"].dtype == "float16"
    assert torch.equal(torch.from_numpy(rows[0]["theta"]).half(), collected.deltas[0][:, space.mask].half())
    assert rows["diverged"][:].tolist() == [False, False, False, True, False, False]


def test_a_damaged_shard_is_named_and_left_out(collected, space):
    path = get_shard_path(collected.folder, 1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"lacks 1 of 3 shards.*shard-00001.parquet"):
        loaded = load_trajectories(collected.folder, space)
    assert_rows(loaded, collected, [0, 1, 4, 5])
    assert loaded.collection["totals"]["rows"] == 4, "the cost is of what there is"


def test_a_collection_that_is_not_finished_has_totals(collected, space):
    write_json(collected.folder / COLLECTION, dict(collected.description, totals=None))
    assert load_trajectories(collected.folder, space).collection["totals"] == collected.description["totals"]


def test_a_collection_of_version_0_1(collected, space):
    write_json(collected.folder / COLLECTION, dict(collected.description, arguments={"made_share": 0.5}))
    for number in range(3):
        path = get_shard_path(collected.folder, number)
        table = read_parquet(path)
        old = ["made_seed" if name == "transform_seed" else name for name in table.column_names]
        pyarrow.parquet.write_table(table.rename_columns(old), path)
        path.with_name(f"{path.name}.sha256").write_text(_checksum_line(path))
    assert_rows(load_trajectories(collected.folder, space), collected, [0, 1, 2, 4, 5])


def test_nothing_whole_is_an_error(collected, space):
    for number in range(3):
        get_shard_path(collected.folder, number).write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match="lacks 3 of 3"), pytest.raises(CheckpointError, match="no whole shard"):
        load_trajectories(collected.folder, space)


def test_a_folder_without_a_collection_is_an_error(tmp_path, space):
    with pytest.raises(CheckpointError, match="holds no trajectories"):
        load_trajectories(tmp_path, space)


def test_another_space_backbone_or_domain_is_refused(collected, backbone, space, domains):
    folder = collected.folder
    with pytest.raises(ValueError, match="another parameter space"):
        load_trajectories(folder, ParameterSpace.from_backbone(backbone, lora_config(backbone, 2)))
    with pytest.raises(ValueError, match="this backbone has other weights"):
        load_trajectories(folder, space, fingerprint=[0.1, 0.3])
    with pytest.raises(ValueError, match="need the domain 'beta'"):
        load_trajectories(folder, space, domains=domains[:1])


def test_token_scale_is_the_root_mean_square_of_the_end(collected, space):
    loaded = load_trajectories(collected.folder, space)
    scale = measure_token_scale(loaded)
    assert scale.shape == (space.n_tokens, 1)
    for token in (0, int(space.mask.sum(dim=1).argmin())):  # the latter is padded, if any is
        numbers = loaded.deltas[:, -1, token].float()[:, space.mask[token]]
        assert scale[token].item() == pytest.approx(numbers.square().mean().sqrt().item(), rel=1e-4)
    loaded.deltas[:, -1, 0] = 0
    scale = measure_token_scale(loaded)
    assert scale[0].item() == pytest.approx(0.01 * scale.max().item())
