from __future__ import annotations

import pytest
import torch

from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.methods import FLOW_POINTS, DirectTransfer, HyperFlow, NoFlow, Target
from hf_hyperflow.data.domains import normalise
from hf_hyperflow.data.episodes import cdfsl_episode
from tests.helpers.tiny import tiny_adapter


@pytest.mark.parametrize("early_stopping", [False, True])
def test_it_does_what_adapt_does(target, colours, early_stopping):
    for index in range(3):
        episode = cdfsl_episode(colours, index, n_way=5, n_shot=2, n_query=6)
        images, labels = colours.images[episode.support], episode.support_labels
        classifier = HyperFlow(n_steps=3, early_stopping=early_stopping).fit(target.support(images, labels))
        support = (normalise(images, target.processor), labels)
        task = target.adapter.adapt(target.backbone, support, n_steps=3, early_stopping=early_stopping)
        assert classifier.stopping_point.time == task.stopping_point.time
        torch.testing.assert_close(classifier.theta, task.theta, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier.prototypes, task.prototypes, rtol=1e-3, atol=1e-4)
        queries = colours.images[episode.query]
        logits = task.logits(normalise(queries, target.processor))
        chosen = logits.gather(1, classifier.predict(target.images(queries)).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(chosen, logits.amax(dim=1), rtol=1e-3, atol=1e-3)
        task.reset()


@pytest.mark.parametrize("early_stopping", [False, True])
def test_it_does_what_adapt_does_on_images_larger_than_those_of_training(target, colours, episode, early_stopping):
    """The flow reads them reduced, whether or not the hidden states of the large images are known already."""
    target.adapter.config.image_size = [14, 14]
    images, labels = colours.images[episode.support], episode.support_labels
    assert images.shape[-1] > 14
    features = DomainFeatures(target, colours)
    task = target.adapter.adapt(
        target.backbone, (normalise(images, target.processor), labels), early_stopping=early_stopping
    )
    for support in (target.support(images, labels), features.support(episode)):
        classifier = HyperFlow(early_stopping=early_stopping).fit(support)
        torch.testing.assert_close(classifier.theta, task.theta, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier.prototypes, task.prototypes, rtol=2e-2, atol=1e-2)  # half precision
    target.adapter.config.image_size = None
    at_full_size = HyperFlow().fit(target.support(images, labels)).theta
    assert not torch.allclose(at_full_size, task.theta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("views", "query_views"), [(4, 1), (2, 3)])
def test_views_and_scores_are_those_of_adapt_and_logits(target, colours, episode, views, query_views):
    """Of HyperFlow and of direct transfer, for images and for what is known of a domain's images."""
    adapter = target.adapter
    adapter.config.calibration = {"constant": 1.0, "ways": 0.5, "shots": 0.3, "spread": -0.2}
    labels = episode.support_labels
    support, queries = (normalise(colours.images[rows], target.processor) for rows in (episode.support, episode.query))
    features = DomainFeatures(target, colours, views, query_views)
    cases = (
        (HyperFlow(n_steps=3), adapter.adapt(target.backbone, (support, labels), n_steps=3, views=views)),
        (DirectTransfer(), adapter.direct_transfer(target.backbone, (support, labels), views=views)),
    )
    for method, task in cases:
        expected, one_view = task.logits(queries, views=query_views), task.logits(queries)
        assert not torch.allclose(expected, one_view, rtol=1e-2) or query_views == 1
        uncached = method.fit(target.support(colours.images[episode.support], labels, views=views))
        cached = method.fit(features.support(episode))
        torch.testing.assert_close(uncached.prototypes, task.prototypes, rtol=1e-3, atol=1e-4)
        for classifier, images in (
            (uncached, target.images(colours.images[episode.query], query_views)),
            (cached, features.queries(episode)),
        ):
            assert classifier.scale == pytest.approx(task.scale, rel=1e-3)
            found = classifier.classify(images).log_probabilities.float()
            torch.testing.assert_close(found, expected.log_softmax(-1), rtol=2e-2, atol=2e-2)  # half precision
    assert cases[0][1].scale != pytest.approx(cases[1][1].scale, rel=0.1)


def test_early_stopping_is_where_leave_one_out_is_best(target, colours, episode):
    support = target.support(colours.images[episode.support], episode.support_labels)
    point = HyperFlow(early_stopping=True).fit(support).stopping_point
    assert point.accuracies[point.time] == max(point.accuracies.values())
    assert len(point.accuracies) == target.adapter.config.n_steps + 1


def test_the_flow_begins_without_the_flow(target, colours, episode):
    images, labels = colours.images[episode.support], episode.support_labels
    expected = NoFlow().fit(target.support(images, labels)).prototypes
    along = HyperFlow(end_time=0.0).fit(target.support(images, labels)).prototypes
    torch.testing.assert_close(along, expected)
    path = HyperFlow().follow_flow(target.support(images, labels))
    assert path.times[0] == 0
    assert torch.equal(path.thetas[0], target.adapter.space.inject(target.backbone).start)
    moved = HyperFlow().fit(target.support(images, labels)).prototypes
    assert not torch.allclose(moved, expected, rtol=0.05)


def test_a_learned_start_is_where_the_flow_begins(target, features, episode):
    adapter = tiny_adapter(target.backbone, lda=True, learned_start=True)
    torch.nn.init.normal_(adapter.start_z, std=5)
    other = Target(target.backbone, adapter)
    support = DomainFeatures(other, features.domain).support(episode)
    begin = HyperFlow(end_time=0.0).fit(support)
    assert torch.equal(begin.theta, HyperFlow().follow_flow(support).thetas[0])
    without = NoFlow().fit(support)
    assert not torch.allclose(begin.prototypes, without.prototypes, rtol=0.05)


def test_the_end_of_the_flow_is_hyperflow(target, features, episode):
    assert target.adapter.config.n_steps % 4 == 0
    expected = HyperFlow().fit(features.support(episode)).theta
    for point in (HyperFlow(end_time=1.0), HyperFlow(n_steps=target.adapter.config.n_steps)):
        assert torch.equal(point.fit(features.support(episode)).theta, expected)
    path = HyperFlow(end_time=0.5).follow_flow(features.support(episode))
    assert path.times[-1] == path.stopping_point.time == 0.5
    assert not torch.allclose(path.theta, expected, atol=1e-3)


def test_steps_to_a_point():
    assert HyperFlow().count_steps(6) == 6
    assert HyperFlow(end_time=0.25).count_steps(4) == 1
    assert HyperFlow(end_time=1.5).count_steps(4) == 6
    assert HyperFlow(n_steps=16).count_steps(4) == 16
    assert HyperFlow(end_time=0.75).count_steps(6) == 6  # steps of 1/8: not longer than those of 1/6
    lengths = {point.end_time / point.count_steps(10) for point in FLOW_POINTS if point.end_time}
    assert lengths == {1 / 12}


def test_names_of_points():
    names = [point.name for point in FLOW_POINTS]
    assert names[:3] == ["hyperflow t=0", "hyperflow t=0.25", "hyperflow t=0.5"]
    assert names[-1] == "hyperflow steps=50"
    assert HyperFlow(early_stopping=True).name == "hyperflow-early-stopping"
    assert HyperFlow(n_steps=8).hyperparameters() == {"n_steps": 8}
