"""Training tasks: functions of (seed, index), true to their domain, and clear about datasets that are too small."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.tasks import (
    draw_group_shape,
    draw_task,
    load_domains,
    query_count,
    require_enough,
    task_images,
)


def domain(name: str, n_classes: int, per_class: int, class_names: list[str] | None = None) -> Domain:
    """Noise; labels in a shuffled order."""
    generator = torch.Generator().manual_seed(len(name))
    labels = torch.arange(n_classes).repeat_interleave(per_class)[
        torch.randperm(n_classes * per_class, generator=generator)
    ]
    images = torch.randint(0, 256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Domain(name, images, labels, class_names or [f"c{c}" for c in range(n_classes)])


@pytest.fixture
def domains():
    alphabets = [f"alphabet{c // 6}/letter{c}" for c in range(18)]
    return [domain("many", 20, 30), domain("few", 4, 30), domain("letters", 18, 20, alphabets)]


def same(a, b) -> bool:
    one, two = vars(a.episode), vars(b.episode)
    equal = all(torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one)
    return equal and (a.transform_seed, a.flip) == (b.transform_seed, b.flip)


def draw(domains, index, **changes):
    return draw_task(domains, index, **{"seed": 3, "randomize_prob": 0.5} | changes)


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


def test_shapes_of_groups_fit_a_domain(domains):
    small = domain("small", 3, 10)
    for group in range(40):
        n_way, n_shot = draw_group_shape([small], group, seed=0)
        assert (n_way, n_shot) == (3, n_shot)
        assert n_shot + query_count(n_way) <= 10
        assert draw([small], group, n_way=n_way, n_shot=n_shot).episode.n_way == 3
        assert draw([small], group).episode.n_way == 3
    shapes = {draw_group_shape(domains, group, seed=0) for group in range(60)}
    assert {n_way for n_way, _ in shapes} == set(range(3, 11))
    assert len({n_shot for _, n_shot in shapes}) >= 8


def test_images_are_the_real_ones_made_up_or_mirrored(domains):
    pixels = [task_images(draw(domains[:1], i, randomize_prob=0), domains[0]) for i in range(12)]
    tasks = [draw(domains[:1], i, randomize_prob=0) for i in range(12)]
    assert {task.flip for task in tasks} == {True, False}
    for task, images in zip(tasks, pixels, strict=True):
        rows = torch.cat([task.episode.support, task.episode.query])
        expected = domains[0].images[rows].float()
        assert task.transform_seed is None
        assert torch.equal(images, expected.flip(-1) if task.flip else expected)
    made = [draw(domains[:1], i, randomize_prob=1) for i in range(12)]
    assert len({task.transform_seed for task in made}) == 12
    for task in made:
        images = task_images(task, domains[0])
        assert torch.equal(images, task_images(task, domains[0]))
        rows = torch.cat([task.episode.support, task.episode.query])
        assert not torch.equal(images, domains[0].images[rows].float())
    with pytest.raises(ValueError, match="was drawn from 'many', not from 'few'"):
        task_images(tasks[0], domains[1])


def test_what_is_needed_is_said(domains):
    require_enough(domains, 4, 5, 10)
    with pytest.raises(ValueError, match=r"'few' has 4 classes of at least 15 images.*needs 5 classes of 15 images"):
        require_enough(domains, 5, 5, 10)
    with pytest.raises(ValueError, match=r"'letters' has 0 classes .*18 classes, the largest of 20, 20"):
        require_enough(domains[2:], 3, 20, 1)


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
