"""The card of a collection: valid front matter, and the collection's own numbers."""

from __future__ import annotations

import yaml

from hf_hyperflow.finetuning.collection_card import collection_card


def test_card(collected, space):
    card = collection_card(collected.description)
    front_matter, text = card.split("---\n")[1:3]
    assert yaml.safe_load(front_matter)["configs"][0]["data_files"][0]["path"] == "data/*.parquet"
    assert "# Fine-tuning trajectories of tiny" in text
    assert "6 few-shot tasks, each fine-tuned for 6 steps (1 of them diverged)" in text
    assert f"(3, {space.n_parameters})" in text
    assert "alpha (5 classes, 100 images), beta (6 classes, 150 images)" in text
    accuracy = collected.description["totals"]["query_accuracy"]
    assert f"{accuracy['start']} % at the start, {accuracy['end']} % at the end" in text
