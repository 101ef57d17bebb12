"""Exports of tiny adapters, each made once: tracing takes seconds. And a browser for their pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.export import hyperflow_onnx
from hf_hyperflow.modeling.peft_configs import bias_config, lora_config
from tests.cli.running import Command
from tests.helpers.page import Served, chromium, free_port
from tests.helpers.tiny import tiny_adapter, tiny_dinov2

#: Where the files are that are written beside every export.
SOURCES = Path(hyperflow_onnx.__file__).parent

#: The version of onnxruntime-web that the page runs.
RUNTIME_VERSION = re.search(r'VERSION = "(.*)"', (SOURCES / "hyperflow_web.js").read_text())[1]


@dataclass
class Exported:
    """A folder of an export, and what it was made of."""

    folder: Path
    adapter: HyperFlowAdapter
    backbone: object


def make_bias_adapter(backbone: object) -> HyperFlowAdapter:
    """Like the released one: biases, LDA, intermediate features, calibrated scores and rejection; and two views."""
    return tiny_adapter(
        backbone,
        bias_config(backbone, 1),
        last_blocks=1,
        drift_depth=1,
        n_steps=2,
        lda=True,
        intermediate_weight=0.5,
        views=2,
        calibration={"constant": 1.6, "ways": 0.4, "shots": 0.6, "spread": -1.5},
        rejection={"constant": 2.8, "ways": -0.1, "shots": -0.5, "spread": 1.0, "odds": 0.2, "distance": -5.0},
    )


def make_lora_adapter(backbone: object) -> HyperFlowAdapter:
    """LoRA with cosines, a learned start and another solver; images are larger than those that condition the flow."""
    return tiny_adapter(
        backbone,
        lora_config(backbone, 1),
        last_blocks=1,
        drift_depth=1,
        n_steps=1,
        solver="heun",
        learned_start=True,
        image_size=[14, 14],
    )


def export_in_python(adapter: HyperFlowAdapter, backbone: object, folder: Path) -> None:
    from hf_hyperflow.export.exporting import export_onnx

    export_onnx(adapter, backbone, folder)


def export_in_the_shell(adapter: HyperFlowAdapter, backbone: object, folder: Path) -> None:
    adapter.save_pretrained(folder.parent / "adapter")
    backbone.save_pretrained(folder.parent / "backbone")
    pair = ["--adapter", folder.parent / "adapter", "--backbone", folder.parent / "backbone"]
    ended = Command(folder.parent, "export", *pair, "--output_dir", folder, seconds=300).end()
    assert ended.code == 0, ended.err
    assert f"python {folder}/hyperflow_onnx.py adapt" in ended.out


@pytest.fixture(
    scope="session",
    params=[(make_bias_adapter, export_in_python), (make_lora_adapter, export_in_the_shell)],
    ids=["bias", "lora"],
)
def exported(request, tmp_path_factory):
    make_adapter, export = request.param
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    backbone = tiny_dinov2(num_hidden_layers=2)
    adapter = make_adapter(backbone)
    export(adapter, backbone, folder)
    return Exported(folder, adapter, backbone)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, which reaches nothing but this machine."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["https://*"]})
        yield driver


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """`(folder, url)`: a folder that is served as the command says. Tests put into it what they need."""
    folder = tmp_path_factory.mktemp("served")
    port = free_port()
    command = ["-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), str(port)]
    server = Served(folder / "log", command, folder)
    server.wait(f"http://127.0.0.1:{port}")
    yield folder, f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="session")
def runtime(tmp_path_factory):
    """A folder with onnxruntime-web, or a skip that says why it cannot be had."""
    if not shutil.which("npm"):
        pytest.skip("npm, which brings onnxruntime-web, is not installed (Debian: npm)")
    folder = tmp_path_factory.mktemp("npm")
    package = f"onnxruntime-web@{RUNTIME_VERSION}"
    pack = ["npm", "pack", package, "--prefer-offline", "--silent", "--pack-destination", folder]
    packed = subprocess.run(pack, capture_output=True, text=True, timeout=300)
    if packed.returncode:
        pytest.skip(f"npm cannot bring {package}: {packed.stderr.strip()}")
    with tarfile.open(folder / packed.stdout.strip()) as file:
        for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
            (folder / name).write_bytes(file.extractfile(f"package/dist/{name}").read())
    return folder
