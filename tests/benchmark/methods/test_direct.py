from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_hyperflow.benchmark.methods import DirectTransfer, HyperFlow, NoFlow
from hf_hyperflow.data.domains import normalise
from hf_hyperflow.modeling.prototypes import class_means


def test_prototypes_are_class_means_of_the_plain_backbone(backbone, target, colours, episode):
    images, labels = colours.images[episode.support], episode.support_labels
    with torch.no_grad():
        features = backbone(normalise(images, target.processor)).last_hidden_state[:, 0]
    expected = F.normalize(class_means(features, labels), dim=1)
    HyperFlow().fit(target.support(images, labels))  # whatever it leaves in the backbone
    torch.testing.assert_close(DirectTransfer().fit(target.support(images, labels)).prototypes, expected)


def test_queries_get_the_most_similar_class(backbone, target, colours, episode):
    classifier = DirectTransfer().fit(target.support(colours.images[episode.support], episode.support_labels))
    queries = colours.images[episode.query]
    with torch.no_grad():
        features = backbone(normalise(queries, target.processor)).last_hidden_state[:, 0]
    cosines = F.normalize(features, dim=1) @ classifier.prototypes.T
    chosen = cosines.gather(1, classifier.predict(target.images(queries)).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, cosines.amax(dim=1))


def test_no_flow_is_the_adapter_s_head_on_the_plain_backbone(target, colours, episode):
    images, labels = colours.images[episode.support], episode.support_labels
    with torch.no_grad():
        features = target.split.forward_features(normalise(images, target.processor))
        expected = target.adapter.head(features, labels)
    HyperFlow().fit(target.support(images, labels))
    classifier = NoFlow().fit(target.support(images, labels))
    assert classifier.prototypes.shape == (5, 64)
    torch.testing.assert_close(classifier.prototypes, expected)
