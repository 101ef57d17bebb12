"""`TaskStore`: what was added is there, in this process and in others, and memory is bounded."""

from __future__ import annotations

import copy
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_hyperflow import AdaptedTask, CheckpointError, TaskStore
from hf_hyperflow.modeling.injection import get_injection
from hf_hyperflow.modeling.peft_configs import lora_config
from hf_hyperflow.modeling.saving import DRAFT
from tests.helpers.files import flip_bit
from tests.helpers.tiny import Snapshot, pictures, same_bits, tiny_adapter, tiny_dinov2

NAMES = ["alice", "bob", "carol"]


@pytest.fixture
def tasks(adapter, backbone) -> dict[str, AdaptedTask]:
    supports = [pictures(n_way=2 + number, n_shot=1, seed=number) for number in range(3)]
    return dict(zip(NAMES, adapter.adapt_many(backbone, supports), strict=True))


@pytest.fixture
def store(tasks, backbone, tmp_path) -> TaskStore:
    store = TaskStore(tmp_path / "tasks", backbone)
    for name, task in tasks.items():
        store.add(name, task)
    return store


def test_what_was_added_is_there(store, tasks, pixels):
    before = Snapshot(tiny_dinov2())
    again = TaskStore(store.folder, before.model)  # as after a kill: nothing is written later than by `add`
    for opened in (store, again):
        assert list(opened) == NAMES
        assert len(opened) == 3
        assert "bob" in opened
        assert "dave" not in opened
        for name, task in tasks.items():
            assert same_bits(opened[name].theta, task.theta)
            assert opened[name].class_names == task.class_names
            torch.testing.assert_close(opened[name].scores(pixels), task.scores(pixels), rtol=1e-5, atol=1e-6)
            assert opened.predict(name, pixels, batch_size=2) == task.predict(pixels)
    names = ["carol", "alice", "alice", "bob", "carol"]
    expected = [tasks[name].predict(image) for name, image in zip(names, pixels, strict=True)]
    assert store.predict_mixed(names, pixels) == expected
    again["bob"].reset()
    before.assert_unchanged()


def test_a_saved_folder_is_a_task_of_the_store(store, tasks, pixels):
    tasks["alice"].save_pretrained(store.folder / "by-hand")
    assert store.predict("by-hand", pixels) == tasks["alice"].predict(pixels)


def test_memory_is_bounded_and_nothing_is_lost(store, tasks, backbone, pixels):
    sizes = {name: task.theta.nbytes + task.prototypes.nbytes for name, task in tasks.items()}
    small = TaskStore(store.folder, backbone, max_bytes=sizes["alice"] + sizes["bob"])
    for name in (*NAMES, "alice", "carol", "bob"):
        assert small.predict(name, pixels) == tasks[name].predict(pixels)
        assert sizes[name] <= small.n_bytes <= small.max_bytes
    assert small.n_bytes == sizes["bob"], "carol and bob together are too large, and bob was used last"
    none = TaskStore(store.folder, backbone, max_bytes=0)
    assert none.predict("carol", pixels) == tasks["carol"].predict(pixels)
    assert none.n_bytes == sizes["carol"], "the task that was used last is kept"


def test_half_precision_takes_half_the_space_and_scores_stay(store, tasks, backbone, pixels, tmp_path):
    half = TaskStore(tmp_path / "half", backbone, half=True)
    for name, task in tasks.items():
        half.add(name, task)
        assert (half[name].scores(pixels) - task.scores(pixels)).abs().max() < 5e-3
        assert half.predict(name, pixels) == task.predict(pixels)
        weights = [one.folder / name / "adapter_model.safetensors" for one in (half, store)]
        assert len(load_file(weights[0])) == len(load_file(weights[1]))
        assert weights[0].stat().st_size < 0.8 * weights[1].stat().st_size
        assert half[name].theta.nbytes == task.theta.nbytes / 2
    mixed = half.predict_mixed([*NAMES, "bob", "bob"], pixels)
    assert mixed == store.predict_mixed([*NAMES, "bob", "bob"], pixels)
    huge = copy.copy(tasks["alice"])
    huge.theta = 1e6 * huge.theta
    with pytest.raises(ValueError, match="beyond 65504, which half precision cannot hold: save with half=False"):
        half.add("huge", huge)
    assert list(half) == NAMES


def test_changing_between_tasks_puts_nothing_into_the_backbone_anew(store, backbone, pixels):
    store.predict("alice", pixels)
    injection = get_injection(backbone)
    for name in ("bob", "carol", "alice"):
        store.predict(name, pixels)
        assert get_injection(backbone) is injection


def test_what_others_write_is_seen(store, tasks, backbone, pixels):
    other = TaskStore(store.folder, backbone)
    assert store.predict("alice", pixels) == tasks["alice"].predict(pixels)
    other.add("alice", tasks["carol"])
    assert store["alice"].class_names == tasks["carol"].class_names
    other.remove("alice")
    assert "alice" not in store
    with pytest.raises(KeyError, match=r"there is no task 'alice' in .*tasks"):
        store["alice"]
    with pytest.raises(KeyError, match="there is no task 'alice'"):
        store.remove("alice")
    assert list(store) == ["bob", "carol"]


def test_a_task_that_is_given_out_can_be_reset_and_merged(store, tasks, pixels):
    expected = tasks["alice"].predict(pixels)
    given = store["alice"]
    given.reset()
    assert store.predict("alice", pixels) == expected
    given = store["alice"]
    given.merge()
    with pytest.raises(ValueError, match="a task is merged into this"):
        store.predict("alice", pixels)
    given.reset()
    assert store.predict("alice", pixels) == expected


def test_names_are_folders_of_the_store_and_nothing_else(store, tasks):
    before = sorted(store.folder.parent.rglob("*"))
    for name in ("", ".", "..", "../x", "a/b", "-x", ".x", "x" * 101, "a\n", "é", "a b", "C:x"):
        assert name not in store
        for use in (store.__getitem__, lambda name: store.add(name, tasks["alice"]), store.remove):
            with pytest.raises(ValueError, match="cannot be the name of a task: use up to 100 letters"):
                use(name)
    assert sorted(store.folder.parent.rglob("*")) == before


def test_a_damaged_task_is_an_error_of_its_own(store, tasks, pixels):
    path = store.folder / "bob" / "prototypes.safetensors"
    path.write_bytes(flip_bit(path.read_bytes(), 500, 1))
    with pytest.raises(CheckpointError, match="prototypes"):
        store.predict("bob", pixels)
    assert store.predict("alice", pixels) == tasks["alice"].predict(pixels)
    store.add("bob", tasks["bob"])
    assert store.predict("bob", pixels) == tasks["bob"].predict(pixels)


def leave_killed_writer(folder: Path, committed: Path) -> None:
    """A writer that was killed when its version counted, and before its files were moved."""
    (folder / DRAFT).mkdir(parents=True)
    committed.rename(folder / DRAFT / "committed")


def test_what_a_kill_left(store, tasks, backbone, pixels, tmp_path):
    tasks["alice"].save_pretrained(tmp_path / "new")
    store.predict("bob", pixels)  # the version before is in memory
    leave_killed_writer(store.folder / "bob", tmp_path / "new")
    assert store["bob"].class_names == tasks["alice"].class_names
    tasks["carol"].save_pretrained(tmp_path / "new")
    leave_killed_writer(store.folder / "first", tmp_path / "new")
    assert "first" in store
    (store.folder / "alice").rename(store.folder / ".removed-0")
    assert list(TaskStore(store.folder, backbone)) == ["bob", "carol", "first"]
    assert not list(store.folder.glob(".removed*"))


def test_a_store_of_too_little_memory(backbone, tmp_path):
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, not -1"):
        TaskStore(tmp_path, backbone, max_bytes=-1)


@pytest.mark.slow
def test_threads_share_a_store(store, tasks, backbone, pixels):
    """They predict, alone and mixed, while tasks are evicted, replaced by themselves and removed."""
    small = TaskStore(store.folder, backbone, max_bytes=tasks["carol"].theta.nbytes)
    expected = {name: task.scores(pixels) for name, task in tasks.items()}
    labels = {name: task.predict(pixels[0]) for name, task in tasks.items()}
    wrong: list[str] = []

    def use(seed: int) -> None:
        random_names = random.Random(seed)
        for turn in range(6):
            name = random_names.choice(NAMES)
            if not same_bits(small[name].scores(pixels), expected[name]):
                wrong.append(name)
            if small.predict_mixed(NAMES, pixels[[0, 0, 0]]) != list(labels.values()):
                wrong.append("mixed")
            if turn == seed:
                small.add(name, tasks[name])
            small.add(f"own-{seed}", tasks[name])
            small.remove(f"own-{seed}")

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert list(small) == NAMES


def test_tasks_of_an_adapter_with_frozen_factors(tmp_path, pixels):
    """When they are loaded, they share one injection."""
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone, lora_config(backbone, 2), frozen_tensors=("lora_A",))
    store = TaskStore(tmp_path, backbone)
    tasks = adapter.adapt_many(backbone, [pictures(n_way=2, n_shot=1, seed=seed) for seed in range(3)])
    for number, task in enumerate(tasks):
        store.add(f"{number}", task)
    names = ["0", "1", "2", "1", "0"]
    expected = [tasks[int(name)].predict(image) for name, image in zip(names, pixels, strict=True)]
    assert store.predict_mixed(names, pixels) == expected
    injection = get_injection(backbone)
    assert [store.predict(name, image) for name, image in zip(names, pixels, strict=True)] == expected
    assert get_injection(backbone) is injection
