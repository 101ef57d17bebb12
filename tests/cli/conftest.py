"""Models, tasks and pictures that the commands are run on."""

from __future__ import annotations

import pytest
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from tests.cli.running import Command
from tests.helpers.tiny import pictures, tiny_adapter, tiny_dinov2, tiny_vit, write_pictures


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders of a backbone, an adapter for it, a task, support pictures and new ones."""
    folder = tmp_path_factory.mktemp("saved")
    backbone = tiny_dinov2()
    backbone.save_pretrained(folder / "backbone")
    tiny_adapter(AutoModel.from_pretrained(folder / "backbone")).save_pretrained(folder / "adapter")
    tiny_vit().save_pretrained(folder / "vit")
    write_pictures(folder / "pictures", pictures(n_way=3, n_shot=3))
    (folder / "new").mkdir()
    for name, images in pictures(n_way=3, n_shot=1, seed=7).items():
        images[0].save(folder / "new" / f"{name}.png")
    model = AutoModel.from_pretrained(folder / "backbone").eval()
    task = HyperFlowAdapter.from_pretrained(folder / "adapter").eval().adapt(model, folder / "pictures")
    task.save_pretrained(folder / "task")
    return folder


@pytest.fixture
def hyperflow(tmp_path):
    """Runs a command in `tmp_path` to its end."""
    return lambda *arguments, **options: Command(tmp_path, *arguments, **options).end()


@pytest.fixture
def adapting(saved):
    """The arguments of a complete `adapt` but its output; later ones override."""
    return ["adapt", "--adapter", saved / "adapter", "--backbone", saved / "backbone", "--support", saved / "pictures"]


@pytest.fixture
def support(saved, tmp_path):
    """A copy of the support pictures that may be spoiled."""
    for path in (saved / "pictures").rglob("*.png"):
        target = tmp_path / "support" / path.relative_to(saved / "pictures")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "support"
