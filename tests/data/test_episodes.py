"""Episodes follow their papers' formulas, and are functions of seed, domain and index."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.episodes import (
    UNBALANCED_SHOTS,
    cdfsl_episode,
    episode_generator,
    group_classes,
    meta_dataset_episode,
    unbalanced_episode,
)

ROOT = Path(__file__).parents[2]


def domain(sizes: list[int], name: str = "made", names: list[str] | None = None) -> Domain:
    """A domain of so many images per class, in scrambled order."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    return Domain(name, images, labels, names or [f"c{i}" for i in range(len(sizes))])


def check(episode, source: Domain) -> tuple[torch.Tensor, torch.Tensor]:
    """What holds for any episode; gives the number of support and of query images of each way."""
    assert episode.domain == source.name
    assert len(set(episode.classes.tolist())) == episode.n_way >= 2
    drawn = torch.cat([episode.support, episode.query])
    assert len(drawn.unique()) == len(drawn)
    assert torch.equal(source.labels[episode.support], episode.classes[episode.support_labels])
    assert torch.equal(source.labels[episode.query], episode.classes[episode.query_labels])
    shots = torch.bincount(episode.support_labels, minlength=episode.n_way)
    queries = torch.bincount(episode.query_labels, minlength=episode.n_way)
    assert shots.min() >= 1
    assert queries.min() >= 1
    return shots, queries


def same(a, b) -> bool:
    fields = ("classes", "support", "support_labels", "query", "query_labels")
    return all(torch.equal(vars(a)[f], vars(b)[f]) for f in fields)


# CD-FSL


@pytest.mark.parametrize(("n_way", "n_shot", "n_query"), [(5, 1, 15), (5, 5, 15), (3, 20, 4), (10, 2, 1)])
def test_cdfsl_has_fixed_ways_shots_and_queries(n_way, n_shot, n_query):
    source = domain([40] * 12)
    for index in range(20):
        episode = cdfsl_episode(source, index, n_way=n_way, n_shot=n_shot, n_query=n_query)
        shots, queries = check(episode, source)
        assert episode.n_way == n_way
        assert set(shots.tolist()) == {n_shot}
        assert set(queries.tolist()) == {n_query}


def test_cdfsl_draws_classes_and_images_evenly():
    source = domain([30] * 8)
    classes, images = np.zeros(8), np.zeros(len(source))
    n = 1500
    for index in range(n):
        episode = cdfsl_episode(source, index, n_way=4, n_shot=3, n_query=2)
        classes[episode.classes.numpy()] += 1
        images[episode.support.numpy()] += 1
    assert np.abs(classes / n - 0.5).max() < 5 * math.sqrt(0.25 / n)
    expected = 0.5 * 3 / 30
    assert np.abs(images / n - expected).max() < 5 * math.sqrt(expected / n)


def test_cdfsl_with_fewer_classes_than_ways():
    source = domain([30, 30, 4, 30])
    episode = cdfsl_episode(source, 0, n_way=5, n_shot=5, n_query=15)
    check(episode, source)
    assert sorted(episode.classes.tolist()) == [0, 1, 3]


def test_cdfsl_with_too_few_images():
    with pytest.raises(ValueError, match=r"domain 'made' has 1 classes of at least 20 images .* hold \[30, 19, 19\]"):
        cdfsl_episode(domain([19, 30, 19]), 0, n_way=5, n_shot=5, n_query=15)


# Meta-Dataset


def test_meta_dataset_formulas():
    sizes = [2, 3, 5, 8, 12, 20, 33, 50, 80, 120, 300, 700] + [25] * 60
    source = domain(sizes)
    ways, beta_low = [], 0
    for index in range(300):
        episode = meta_dataset_episode(source, index)
        shots, queries = check(episode, source)
        ways.append(episode.n_way)
        n = torch.tensor([sizes[c] for c in episode.classes.tolist()])
        assert set(queries.tolist()) == {min(10, int((n // 2).min()))}
        rest = n - queries
        assert (shots <= rest).all()
        assert shots.sum() <= 500
        assert shots.sum() <= sum(min(100, int(r)) for r in rest)
        beta_low += int(shots.sum()) < 0.3 * sum(min(100, int(r)) for r in rest)
    assert min(ways) == 5
    assert max(ways) == 50
    assert np.mean(ways) == pytest.approx(27.5, abs=5 * 13.3 / math.sqrt(300))
    assert beta_low > 30  # beta is uniform: small support sets are among them


def test_meta_dataset_follows_the_formulas_draw_by_draw():
    """The same stream of random numbers through the formulas of section 3.2, written out."""
    sizes = [9, 14, 30, 61, 100, 250, 17, 45]
    source = domain(sizes)
    for index in range(50):
        episode = meta_dataset_episode(source, index, seed=3)
        shots, queries = check(episode, source)
        generator = episode_generator(3, "made", index)
        n_way = int(generator.integers(5, 9))
        classes = generator.permutation(8)[:n_way]
        q = min(10, min(sizes[c] // 2 for c in classes))
        r = [sizes[c] - q for c in classes]
        beta = 1 - generator.random()
        total = min(500, sum(math.ceil(beta * min(100, x)) for x in r))
        alpha = generator.uniform(-math.log(2), math.log(2), n_way)
        w = [sizes[c] * math.exp(a) for c, a in zip(classes, alpha, strict=True)]
        k = [min(math.floor(x / sum(w) * (total - n_way)) + 1, y) for x, y in zip(w, r, strict=True)]
        assert episode.classes.tolist() == classes.tolist()
        assert queries.tolist() == [q] * n_way
        assert shots.tolist() == k


def test_meta_dataset_shots_follow_class_sizes():
    source = domain([20, 20, 20, 20, 400])
    ratios = []
    for index in range(200):
        episode = meta_dataset_episode(source, index)
        shots, _ = check(episode, source)
        big = episode.classes.tolist().index(4)
        ratios.append(int(shots[big]) / max(1, int(shots.sum() - shots[big])))
    assert np.median(ratios) > 1.5


@pytest.mark.parametrize(("n_classes", "ways"), [(3, {3}), (5, {5}), (6, {5, 6})])
def test_meta_dataset_with_few_classes(n_classes, ways):
    source = domain([30] * n_classes)
    assert {meta_dataset_episode(source, i).n_way for i in range(40)} == ways


def test_meta_dataset_max_way():
    source = domain([12] * 60)
    assert {meta_dataset_episode(source, i, max_way=7).n_way for i in range(60)} == {5, 6, 7}


def test_meta_dataset_keeps_to_one_alphabet():
    names = [f"{alphabet}/{i}" for alphabet in ("Greek", "Latin", "Tengwar") for i in range(8)] + ["Tiny/0", "Tiny/1"]
    source = domain([20] * 26, names=names)
    seen = set()
    for index in range(60):
        episode = meta_dataset_episode(source, index)
        check(episode, source)
        groups = {names[c].split("/")[0] for c in episode.classes.tolist()}
        assert len(groups) == 1
        seen |= groups
    assert seen == {"Greek", "Latin", "Tengwar"}  # one with fewer than five classes is used only if all are so


def test_meta_dataset_with_small_alphabets_only():
    names = [f"{alphabet}/{i}" for alphabet in "AB" for i in range(3)]
    episode = meta_dataset_episode(domain([20] * 6, names=names), 0)
    assert len({names[c][0] for c in episode.classes.tolist()}) == 1


def test_groups_of_classes():
    names = ["B/x", "A/x", "B/y", "A/y", "plain", "B/z/1"]
    groups = group_classes(domain([1] * 6, names=names), [3, 0, 1, 2, 4, 5])
    assert groups == {"A": [3, 1], "B": [0, 2, 5], "plain": [4]}
    assert list(groups) == ["A", "B", "plain"]


def test_an_alphabet_of_a_single_character_is_no_episode():
    names = ["A/0", "B/0", "B/1", "B/2"]
    source = domain([20] * 4, names=names)
    for index in range(20):
        episode = meta_dataset_episode(source, index)
        check(episode, source)
        assert 0 not in episode.classes


def test_meta_dataset_with_too_few_images():
    with pytest.raises(
        ValueError, match=r"has 1 classes of at least 2 images and an episode needs two; .* \[9, 1, 1\]"
    ):
        meta_dataset_episode(domain([1, 9, 1]), 0)


def test_meta_dataset_with_two_images_per_class():
    source = domain([2] * 6)
    shots, queries = check(meta_dataset_episode(source, 0), source)
    assert set(shots.tolist()) == set(queries.tolist()) == {1}


# Unbalanced


def test_unbalanced_shots_are_dealt_to_the_classes_at_random():
    source = domain([23, 40, 22, 30, 30, 30, 30])
    shots_of: dict[int, set[int]] = {}
    first = set()
    for index in range(60):
        episode = unbalanced_episode(source, index)
        shots, queries = check(episode, source)
        assert sorted(shots.tolist(), reverse=True) == list(UNBALANCED_SHOTS) == [8, 4, 2, 1, 1]
        assert set(queries.tolist()) == {15}
        first.add(int(shots[0]))
        for c, n_shot in zip(episode.classes.tolist(), shots.tolist(), strict=True):
            shots_of.setdefault(c, set()).add(n_shot)
    assert set(shots_of) == {0, 1, 3, 4, 5, 6}  # class 2 has too few images for 8 and 15
    assert all(shots == {1, 2, 4, 8} for shots in shots_of.values())
    assert first == {1, 2, 4, 8}  # a class's place tells nothing of its number


def test_unbalanced_with_few_classes():
    source = domain([30, 30, 30])
    shots, queries = check(unbalanced_episode(source, 0, n_query=4), source)
    assert sorted(shots.tolist()) == [2, 4, 8]
    assert queries.tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="has 1 classes of at least 23 images and an episode needs two"):
        unbalanced_episode(domain([30, 22]), 0)


# Seeds

SAMPLERS = {
    "cdfsl": lambda d, i, **k: cdfsl_episode(d, i, n_way=5, n_shot=2, n_query=3, **k),
    "meta-dataset": meta_dataset_episode,
    "unbalanced": unbalanced_episode,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_episode_depends_on_seed_domain_and_index_alone(sampler):
    draw, source = SAMPLERS[sampler], domain([30] * 9)
    forwards = [draw(source, i, seed=1) for i in range(6)]
    torch.manual_seed(99)
    np.random.default_rng(5).random()
    backwards = [draw(domain([30] * 9), i, seed=1) for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not any(same(a, b) for a, b in zip(forwards, forwards[1:] + forwards[:1], strict=True))
    assert not same(draw(source, 0, seed=2), forwards[0])
    assert not same(draw(domain([30] * 9, name="other"), 0, seed=1), forwards[0])


@pytest.mark.slow
def test_the_same_in_another_process():
    code = (
        "from tests.data.test_episodes import SAMPLERS, domain\n"
        "for s in SAMPLERS.values(): print(s(domain([30] * 9), 4, seed=7).support.tolist())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    expected = [str(draw(domain([30] * 9), 4, seed=7).support.tolist()) for draw in SAMPLERS.values()]
    assert process.stdout.splitlines() == expected


# The stream of random numbers is part of the benchmark: it may not change. Computed with version 0.1.


def test_known_cdfsl_episode():
    episode = cdfsl_episode(domain([4, 5, 6]), 0, n_way=2, n_shot=1, n_query=1)
    assert (episode.classes.tolist(), episode.support.tolist(), episode.query.tolist()) == ([1, 0], [9, 3], [13, 8])


def test_known_meta_dataset_episode():
    episode = meta_dataset_episode(domain([2, 3, 4, 5, 6]), 0)
    assert episode.classes.tolist() == [2, 3, 0, 1, 4]
    assert episode.support.tolist() == [7, 17, 15, 10, 2, 19, 6, 11, 13, 12, 5, 16]
    assert episode.support_labels.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4]
    assert episode.query.tolist() == [1, 14, 18, 0, 3]
    assert episode.query_labels.tolist() == [0, 1, 2, 3, 4]


def test_known_unbalanced_episode():
    episode = unbalanced_episode(domain([4, 5, 6]), 0, shots=(3, 2), n_query=1)
    assert (episode.classes.tolist(), episode.support.tolist(), episode.query.tolist()) == (
        [1, 0],
        [9, 13, 11, 3, 8],
        [7, 5],
    )
    assert episode.support_labels.tolist() == [0, 0, 0, 1, 1]
