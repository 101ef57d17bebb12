"""`collection.json`: read whole or not at all, and refused where it does not fit, with what differs."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.data.domains import Domain
from hf_hyperflow.finetuning.collection import (
    COLLECTION,
    check_backbone,
    check_domains,
    check_space,
    describe_domain,
    read_collection,
)
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config, lora_config
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.recorded import FINGERPRINT, noise


def test_what_is_written_is_read(collected):
    assert read_collection(collected.folder) == collected.description


@pytest.mark.parametrize("content", ["{}", "{", "[]", "null", ""])
def test_a_damaged_file_is_named(collected, content):
    (collected.folder / COLLECTION).write_text(content)
    with pytest.raises(CheckpointError, match=r"collection.json is damaged"):
        read_collection(collected.folder)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(CheckpointError, match="holds no trajectories"):
        read_collection(tmp_path)


def test_a_collection_of_version_0_1(collected):
    old = dict(collected.description, arguments={"made_share": 0.5})
    write_json(collected.folder / COLLECTION, old)
    assert read_collection(collected.folder) == collected.description


def test_what_fits_is_accepted(collected, space, domains):
    check_space(collected.description, "rows", space)
    check_backbone(collected.description, "rows", [value * 1.001 for value in FINGERPRINT])
    check_domains(collected.description, "rows", [noise("one more", 3, 10), *domains])


def test_another_parameter_space_is_refused(collected, backbone):
    lora = ParameterSpace.from_backbone(backbone, lora_config(backbone, 2))
    with pytest.raises(ValueError, match=r"rows are of another parameter space \(n_parameters, peft, tensors differ\)"):
        check_space(collected.description, "rows", lora)
    fewer = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2, norms=False))
    with pytest.raises(ValueError, match=r"another parameter space \(.*tensors"):
        check_space(collected.description, "rows", fewer)


def test_another_backbone_is_refused(collected):
    with pytest.raises(ValueError, match=r"collected on tiny, and this backbone has other weights"):
        check_backbone(collected.description, "rows", [0.1, 0.3])


def test_other_domains_are_refused(collected, domains):
    with pytest.raises(ValueError, match=r"need the domain 'beta', and the domains given are \['alpha'\]"):
        check_domains(collected.description, "rows", domains[:1])
    domains[1].images[3, 0, 2, 2] += 1
    with pytest.raises(ValueError, match="domain 'beta' is not the one that the trajectories of rows"):
        check_domains(collected.description, "rows", domains)


def test_a_domain_is_told_by_its_pixels_and_labels(domains):
    domain = domains[0]
    description = describe_domain(domain, 20)
    assert description["name"] == "alpha"
    assert (description["classes"], description["images"], description["max_per_class"]) == (5, 100, 20)
    assert describe_domain(domain, None)["sha256"] == description["sha256"]
    relabelled = Domain("alpha", domain.images, domain.labels.roll(1), domain.class_names)
    assert describe_domain(relabelled, 20)["sha256"] != description["sha256"]
    # The digest is of the values, however they lie in memory.
    images = domain.images.contiguous(memory_format=torch.channels_last)
    assert describe_domain(Domain("alpha", images, domain.labels, domain.class_names), 20) == description
