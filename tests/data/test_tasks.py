"""Training tasks: functions of (seed, index), true to their domain, and clear about datasets that are too small."""

from __future__ import annotations

import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.tasks import (
    TrainingTask,
    draw_group_shape,
    draw_task,
    load_domains,
    query_count,
    require_enough,
    task_images,
)
from tests.helpers.recorded import noise


@pytest.fixture
def domains():
    alphabets = [f"alphabet{c // 6}/letter{c}" for c in range(18)]
    return [noise("many", 20, 30), noise("few", 4, 30), noise("letters", 18, 20, alphabets)]


def same(a, b) -> bool:
    one, two = vars(a.episode), vars(b.episode)
    equal = all(torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one)
    return equal and (a.transform_seed, a.flip) == (b.transform_seed, b.flip)


def draw(domains, index, *, seed=3, randomize_prob=0.5, **shape):
    return draw_task(domains, index, seed=seed, randomize_prob=randomize_prob, **shape)


def test_a_task_depends_on_seed_and_index_alone(domains):
    torch.manual_seed(0)
    first = [draw(domains, i) for i in range(20)]
    torch.manual_seed(1)
    again = [draw(domains, i) for i in reversed(range(20))][::-1]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(first[i], first[j]) for i in range(20) for j in range(i))
    assert not any(same(a, draw(domains, i, seed=4)) for i, a in enumerate(first))


def test_a_task_is_true_to_its_domain(domains):
    seen = set()
    for i in range(60):
        episode = draw(domains, i).episode
        home = next(d for d in domains if d.name == episode.domain)
        seen.add(home.name)
        assert torch.equal(home.labels[episode.support], episode.classes[episode.support_labels])
        assert torch.equal(home.labels[episode.query], episode.classes[episode.query_labels])
        rows = torch.cat([episode.support, episode.query])
        assert len(rows.unique()) == len(rows)
        assert 3 <= episode.n_way <= min(10, len(home.class_names))
        shots = torch.bincount(episode.support_labels)
        assert shots.min() >= 1
        assert shots.max() <= 10
        assert (torch.bincount(episode.query_labels) == query_count(episode.n_way)).all()
    assert seen == {"many", "few", "letters"}


def test_half_the_tasks_of_alphabets_keep_to_one(domains):
    tasks = [draw(domains[2:], i, n_way=5, n_shot=2) for i in range(60)]
    names = domains[2].class_names
    single = sum(len({names[c].split("/")[0] for c in task.episode.classes}) == 1 for task in tasks)
    assert 18 <= single <= 42
    # An alphabet has six letters: a task of eight takes them from all.
    assert draw(domains[2:], 0, n_way=8, n_shot=2).episode.n_way == 8


def test_given_ways_and_shots_are_kept(domains):
    for i in range(30):
        episode = draw(domains, i, n_way=7, n_shot=4).episode
        assert episode.n_way == 7
        assert episode.domain != "few"
        assert (torch.bincount(episode.support_labels) == 4).all()
    with pytest.raises(ValueError, match=r"needs 30 classes of 9 images"):
        draw(domains, 0, n_way=30, n_shot=5)
    for shape in ({"n_way": 5}, {"n_shot": 5}):
        with pytest.raises(ValueError, match="give both or neither"):
            draw(domains, 0, **shape)


def test_shapes_of_groups_fit_a_domain(domains):
    small = noise("small", 3, 10)
    for group in range(40):
        n_way, n_shot = draw_group_shape([small], group, seed=0)
        assert n_way == 3
        assert n_shot + query_count(n_way) <= 10
        assert draw([small], group, n_way=n_way, n_shot=n_shot).episode.n_way == 3
        assert draw([small], group).episode.n_way == 3
    shapes = {draw_group_shape(domains, group, seed=0) for group in range(60)}
    assert {n_way for n_way, _ in shapes} == set(range(3, 11))
    assert len({n_shot for _, n_shot in shapes}) >= 8


def real_images(task, domain) -> torch.Tensor:
    return domain.images[torch.cat([task.episode.support, task.episode.query])].float()


def test_images_are_the_real_ones_or_mirrored(domains):
    tasks = [draw(domains[:1], i, randomize_prob=0) for i in range(12)]
    assert {task.flip for task in tasks} == {True, False}
    for task in tasks:
        expected = real_images(task, domains[0])
        assert task.transform_seed is None
        assert torch.equal(task_images(task, domains[0]), expected.flip(-1) if task.flip else expected)


def test_images_of_a_randomised_task(domains):
    tasks = [draw(domains[:1], i, randomize_prob=1) for i in range(12)]
    assert len({task.transform_seed for task in tasks}) == 12
    for task in tasks:
        images = task_images(task, domains[0])
        assert torch.equal(images, task_images(task, domains[0]))
        real = real_images(task, domains[0])
        assert (images - real).abs().max() > 1
        assert (images - real.flip(-1)).abs().max() > 1


def test_images_come_from_the_domain_of_the_task(domains):
    task = draw(domains[:1], 0)
    with pytest.raises(ValueError, match="was drawn from 'many', not from 'few'"):
        task_images(task, domains[1])


def test_what_is_needed_is_said(domains):
    require_enough(domains, 4, 5, 10)
    with pytest.raises(ValueError, match=r"'few' has 4 classes of at least 15 images.*needs 5 classes of 15 images"):
        require_enough(domains, 5, 5, 10)
    with pytest.raises(ValueError, match=r"'letters' has 0 classes .*18 classes, the largest of 20, 20"):
        require_enough(domains[2:], 3, 20, 1)


# Trajectories and trainings name tasks by their number: what is drawn may not change. Computed with version 0.1.

#: Domain, classes, support images, CRC-32 of the drawn rows, transform seed and flip of each task.
KNOWN = [
    ("letters", [1, 4, 9, 2, 0, 13, 11, 3, 14, 10], 30, 1535897449, None, False),
    ("letters", [17, 14, 15, 13, 12, 16], 12, 739348850, 1122468800, True),
    ("few", [2, 3, 0], 6, 2281567692, None, True),
    ("many", [19, 8, 13, 9, 18, 2, 3, 4], 32, 2542369501, 847616910, True),
    ("many", [18, 1, 16, 10], 8, 1482896119, 276225827, False),
    ("many", [8, 14, 10, 1, 17, 11], 18, 3114503262, 1356718860, True),
]
KNOWN_OF_A_SHAPE = {
    0: ("letters", [8, 15, 11, 17, 12], 10, 152487325, 1632743010, True),
    3: ("letters", [16, 15, 13, 17, 14], 10, 2578487442, None, False),
    4: ("many", [8, 18, 1, 7, 16], 10, 981147713, 1314478228, False),
    6: ("letters", [3, 4, 5, 1, 0], 10, 1288503106, 1926956591, False),
    7: ("many", [0, 12, 1, 18, 4], 10, 649702223, 1806451961, True),
}


def striped(name: str, n_classes: int, per_class: int, class_names: list[str] | None = None) -> Domain:
    """The labels 0, 1, ..., 0, 1, ... on images of one black pixel."""
    labels = torch.arange(n_classes * per_class) % n_classes
    images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    return Domain(name, images, labels, class_names or [f"c{c}" for c in range(n_classes)])


@pytest.fixture
def striped_domains():
    alphabets = [f"alphabet{c // 6}/letter{c}" for c in range(18)]
    return [striped("many", 20, 30), striped("few", 4, 30), striped("letters", 18, 20, alphabets)]


def summarise(task: TrainingTask) -> tuple:
    episode = task.episode
    rows = zlib.crc32(str([episode.support.tolist(), episode.query.tolist()]).encode())
    return episode.domain, episode.classes.tolist(), len(episode.support), rows, task.transform_seed, task.flip


def test_known_tasks(striped_domains):
    assert [summarise(draw(striped_domains, i, seed=0)) for i in range(6)] == KNOWN
    episode = draw(striped_domains, 2, seed=0).episode
    assert episode.support.tolist() == [38, 86, 119, 15, 8, 84]
    assert episode.query.tolist()[:8] == [78, 90, 114, 30, 10, 50, 62, 58]


@pytest.mark.parametrize("index", KNOWN_OF_A_SHAPE)
def test_known_tasks_of_a_shape(striped_domains, index):
    task = draw(striped_domains, index, seed=3, n_way=5, n_shot=2)
    assert summarise(task) == KNOWN_OF_A_SHAPE[index]


def test_known_shapes_of_groups(striped_domains):
    shapes = [draw_group_shape(striped_domains, group, seed=0) for group in range(6)]
    assert shapes == [(4, 2), (4, 4), (9, 1), (9, 5), (6, 6), (4, 7)]
    shapes = [draw_group_shape([striped("small", 3, 10)], group, seed=0) for group in range(3)]
    assert shapes == [(3, 2), (3, 2), (3, 1)]


def image_folder(folder, n_classes: int, per_class: int):
    generator = np.random.default_rng(0)
    for c in range(n_classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 256, (30, 30, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")
    return str(folder)


def test_domains_and_what_is_held_out(tmp_path, processor):
    sources = [image_folder(tmp_path / "a", 6, 10), image_folder(tmp_path / "b", 4, 10)]
    training, validation = load_domains(sources, processor, holdout=["a:3", "b"])
    assert [(d.name, len(d.class_names)) for d in training] == [("a", 4)]
    assert [(d.name, len(d.class_names)) for d in validation] == [("a-held-out", 2), ("b", 4)]
    assert training[0].class_names == ["class1", "class2", "class4", "class5"]
    assert validation[0].class_names == ["class0", "class3"]
    with pytest.raises(ValueError, match=r"holdout names \['c'\], but the domains are \['a', 'b'\]"):
        load_domains(sources, processor, holdout=["c"])
    with pytest.raises(ValueError, match="no domain is left"):
        load_domains(sources, processor, holdout=["a", "b"])
    for entry in ("a:0", "a:1", "a:some", "a:", ":2", ""):
        with pytest.raises(ValueError, match=f"holdout {entry!r}: give NAME"):
            load_domains(sources, processor, holdout=[entry])
    with pytest.raises(ValueError, match=r"several datasets are called \['a'\]"):
        load_domains([sources[0], image_folder(tmp_path / "other" / "a", 6, 10)], processor)


def test_datasets_that_are_no_use_are_named_with_what_is_needed(tmp_path, processor):
    with pytest.raises(ValueError, match=r"'few' has 0 classes of at least 9 images.* needs 3 classes of 9 images"):
        load_domains([image_folder(tmp_path / "few", 5, 6)], processor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot train on .*empty, a domain of at least 3 classes of 9 images"):
        load_domains([str(tmp_path / "empty")], processor)
    with pytest.raises(ValueError, match=r"cannot train on .*nowhere"):
        load_domains([str(tmp_path / "nowhere")], processor)
