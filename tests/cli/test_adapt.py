"""`hyperflow adapt`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

from transformers import AutoModel

from hf_hyperflow.modeling.checksums import sha256
from hf_hyperflow.modeling.peft_configs import layernorm_config
from tests.cli.running import Command, Outcome, fails, names
from tests.helpers.tiny import picture, tiny_adapter


def test_adapt_takes_solver_and_format(hyperflow, adapting, tmp_path):
    arguments = ["--solver", "heun", "--n_steps", "3", "--format", "lora"]
    assert hyperflow(*adapting, "--output", "task", *arguments).code == 0
    assert json.loads((tmp_path / "task/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert hyperflow("predict", "--task", "task", "--json", adapting[-1] / "red/0.png").code == 0


def test_a_corrupt_image_in_the_middle(hyperflow, adapting, support, tmp_path):
    bad = support / "green" / "1.png"
    bad.write_bytes(bad.read_bytes()[:99])
    fails(hyperflow(*adapting, "--support", support, "--output", "task"), bad, "cannot be read as an image")
    assert not (tmp_path / "task").exists()
    found = hyperflow(*adapting, "--support", support, "--output", "task", "--skip_bad")
    assert found.code == 0, found.err
    assert found.err.startswith(f"skipped: {bad} cannot be read")
    assert found.err.count("\n") == 1
    assert "from 8 images" in found.out


def test_bad_support_folders(hyperflow, adapting, support, tmp_path):
    def refused(folder: Path) -> Outcome:
        return hyperflow(*adapting, "--support", folder, "--output", "task")

    fails(refused(tmp_path / "nowhere"), tmp_path / "nowhere", "one folder of images per class")
    fails(refused(support / "red"), support / "red", "has no folders in it")
    (support / "empty").mkdir()
    fails(refused(support), "class 'empty' has no images")
    assert names(tmp_path) == {"support"}


def test_what_does_not_fit(hyperflow, adapting, saved, tmp_path):
    fails(hyperflow(*adapting, "--backbone", saved / "vit", "--output", "task"), "ViTModel has no modules")
    fails(hyperflow(*adapting, "--backbone", saved / "adapter", "--output", "task"), "is a HyperFlow adapter, not a")
    missing = tmp_path / "nowhere"
    fails(hyperflow(*adapting, "--backbone", missing, "--output", "task"), f"error: there is no folder {missing}")
    fails(hyperflow(*adapting, "--adapter", saved / "task", "--output", "task"), "is an adapted task, not a HyperFlow")
    fails(hyperflow(*adapting, "--adapter", saved / "backbone", "--output", "task"), "is a backbone, not a HyperFlow")
    fails(hyperflow(*adapting, "--solver", "rk5", "--output", "task"), "rk5")
    fails(hyperflow(*adapting, "--output", saved / "adapter"), "holds a model (config.json)")
    assert names(tmp_path) == set()


def test_support_and_output_mixed_up(hyperflow, adapting, saved, support, tmp_path):
    """Nothing is written to the folder of the images, nor read from what is none."""
    before = sorted(tmp_path.rglob("*"))
    for output in (support, support / "task", support / "red" / ".." / "new"):
        fails(hyperflow(*adapting, "--support", support, "--output", output), "is in the folder of the images", support)
    swapped = hyperflow(*adapting, "--support", "my-task", "--output", support)
    fails(swapped, "there is no folder my-task", "--support and --output_dir mixed up?")
    fails(hyperflow(*adapting, "--support", saved / "task", "--output", support), "is an adapted task, not a folder of")
    assert [path for path in sorted(tmp_path.rglob("*")) if "output-" not in str(path)] == before
    shutil.copytree(saved / "task", support / "old")
    fails(hyperflow(*adapting, "--support", support, "--output", "task"), "old is an adapted task, not a class")


def test_a_backbone_by_a_relative_path(hyperflow, adapting, saved, tmp_path):
    """It is found again from elsewhere, and its path is never taken for a Hub id, like which it looks."""
    shutil.copytree(saved / "backbone", tmp_path / "models" / "vit")
    assert hyperflow(*adapting, "--backbone", "models/vit", "--output", "task").code == 0
    noted = json.loads((tmp_path / "task/adapter_config.json").read_text())["base_model_name_or_path"]
    assert noted == str(tmp_path / "models" / "vit")
    assert "models/vit" not in (tmp_path / "task/README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    done = Command(tmp_path / "elsewhere", "predict", "--task", tmp_path / "task", saved / "new").end()
    assert (done.code, done.out.count("\n")) == (0, 3), done.err


def test_the_backbone_that_an_adapter_names(hyperflow, adapting, saved, tmp_path):
    without_backbone = [*adapting[:3], *adapting[5:]]
    assert hyperflow(*without_backbone, "--output", "task").code == 0
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    edit_config(tmp_path / "adapter", "/somebody/elses/folder")
    refused = hyperflow(*without_backbone, "--adapter", "adapter", "--output", "other")
    fails(refused, "adapter was trained for the backbone in /somebody/elses/folder", "name it with --backbone")


def edit_config(adapter: Path, backbone: str) -> None:
    """Put another name of the backbone into the config of a saved adapter, and its new digest into the list."""
    config, checksums = adapter / "config.json", adapter / "model_checksums.json"
    content = json.loads(config.read_text())
    content["backbone"]["name_or_path"] = backbone
    config.write_text(json.dumps(content))
    checksums.write_text(json.dumps(json.loads(checksums.read_text()) | {"config.json": sha256(config)}))


def test_many_classes_are_not_all_listed(hyperflow, adapting, tmp_path):
    for number in range(23):
        folder = tmp_path / "many" / f"class {number:02}"
        folder.mkdir(parents=True)
        picture(number).save(folder / "0.png")
    said = hyperflow(*adapting, "--support", "many", "--output", "task").out
    assert "23 classes (class 00, " in said
    assert "class 09 and 13 more) from 23 images" in said
    said = hyperflow("info", "task").out
    assert "class 09 and 13 more\n" in said
    assert "class 10" not in said


def test_formats_that_cannot_be_written(hyperflow, adapting, saved, tmp_path):
    backbone = AutoModel.from_pretrained(saved / "backbone")
    tiny_adapter(backbone, layernorm_config(backbone, 2)).save_pretrained(tmp_path / "norms")
    found = hyperflow(*adapting, "--adapter", "norms", "--output", "task", "--format", "lora")
    fails(found, "a LN_TUNING adapter cannot be written as LoRA")
    assert names(tmp_path) == {"norms"}


def test_two_commands_and_an_interrupt(hyperflow, adapting, support, tmp_path):
    """The second to write to a folder is turned away, Ctrl-C stops the first, and nothing of either is left."""
    first = Command(tmp_path, *adapting, "--support", support, "--output", "task")
    wait_for(tmp_path / "task" / ".hyperflow-draft")
    os.kill(first.process.pid, signal.SIGSTOP)  # the first command stands still in the middle of it
    fails(hyperflow(*adapting, "--output", "task"), "another command is writing to task now")
    os.kill(first.process.pid, signal.SIGINT)
    os.kill(first.process.pid, signal.SIGCONT)
    stopped = first.end()
    assert stopped.code == 130, stopped
    assert "Traceback" not in stopped.err
    assert names(tmp_path) == {"support"}
    assert hyperflow(*adapting, "--output", "task").code == 0


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            time.sleep(0.05)  # it is locked at once
            return
        time.sleep(0.01)
    raise TimeoutError(path)
