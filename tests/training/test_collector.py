"""`training/collect_trajectories.py` as a user runs it: killed, shared by processes, on damaged and full disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModel, BitImageProcessorPil, Dinov2Config, Dinov2Model

from hf_hyperflow.finetuning.trajectories import load_trajectories
from hf_hyperflow.modeling.fingerprint import compute_fingerprint
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from tests.helpers.hub_server import Hub

SCRIPT = Path(__file__).resolve().parent.parent / "training" / "collect_trajectories.py"

#: Runs the script after some lines of code that are to go wrong later.
AFTER = """import os, runpy, signal, sys
{code}
sys.path.insert(0, {folder!r})
runpy.run_path({script!r}, run_name="__main__")
"""

DIE = "os.kill(os.getpid(), signal.SIGKILL)"
#: Killed with half of the second shard in the draft.
DIE_WRITING = f"""
import pyarrow.parquet
real = pyarrow.parquet.write_table
def write_table(table, path):
    real(table, path)
    if "shard-00001" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        {DIE}
pyarrow.parquet.write_table = write_table
"""
#: Killed with the shard `{}` in place, but not its checksum.
DIE_BEFORE_CHECKSUM = f"""
real = os.replace
def replace(a, b):
    if str(b).endswith("shard-00002.parquet.sha256"):
        {DIE}
    real(a, b)
os.replace = replace
"""
#: No file may grow beyond so many bytes, as on a full disk.
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))"

#: Says how many trajectories there are in the repository on the Hub.
LOAD = """
from transformers import AutoModel
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.finetuning.trajectories import load_trajectories
backbone = AutoModel.from_pretrained({backbone!r})
space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
print(len(load_trajectories("alice/trajectories", space)))
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A tiny backbone and two image folders whose classes differ in colour."""
    folder = tmp_path_factory.mktemp("collecting")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_attention_heads=2, num_hidden_layers=3, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "backbone")
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "backbone"
    )
    generator = np.random.default_rng(0)
    for name in ("alpha", "beta"):
        for c in range(5):
            (folder / name / f"class{c}").mkdir(parents=True)
            colour = generator.integers(0, 256, 3)
            for i in range(14):
                pixels = (colour + generator.normal(0, 30, (28, 28, 3))).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / name / f"class{c}" / f"{i}.png")
    return folder


def flags(ground: Path, output: Path, **changes: object) -> list[str]:
    settings = {"backbone": ground / "backbone", "output_dir": output, "n_trajectories": 12, "group_size": 3}
    settings |= {"last_blocks": 2, "teacher_steps": 3, "n_points": 3, "mixed_precision": "no", "images_per_pass": 40}
    settings |= {"cpu": True} | changes
    data = ["--dataset", str(ground / "alpha"), str(ground / "beta")]
    return data + [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def run(*arguments: str, code: str | None = None, launcher: tuple = (), **env: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
    script = [*launcher, str(SCRIPT)]
    if code is not None:
        script = ["-c", AFTER.format(code=code, folder=str(SCRIPT.parent), script=str(SCRIPT))]
    return subprocess.run(
        [sys.executable, *script, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def rows(folder: Path) -> list[dict]:
    """All rows in order, but for measured seconds."""
    paths = sorted((folder / "data").glob("*.parquet"))
    return [row for path in paths for row in pyarrow.parquet.read_table(path).drop_columns("seconds").to_pylist()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data").iterdir())


def totals(folder: Path) -> dict:
    found = json.loads((folder / "collection.json").read_text())["totals"]
    found.pop("seconds")
    found.pop("bytes")
    return found


@pytest.fixture(scope="module")
def whole(ground, tmp_path_factory) -> Path:
    """A collection made in one go by one process."""
    folder = tmp_path_factory.mktemp("whole") / "trajectories"
    done = run(*flags(ground, folder))
    assert done.returncode == 0, done.stderr
    assert "12 trajectories, 0 diverged" in done.stdout
    return folder


def test_a_collection_is_complete(ground, whole):
    assert files(whole) == sorted(f"shard-0000{n}.parquet{end}" for n in range(4) for end in ("", ".sha256"))
    found = rows(whole)
    assert [row["index"] for row in found] == list(range(12))
    for group in range(4):
        shapes = {(len(row["classes"]), len(row["support"])) for row in found[3 * group : 3 * group + 3]}
        assert len(shapes) == 1
        assert len({row["flops"] for row in found[3 * group : 3 * group + 3]}) == 1
    assert all(row["flops"] > 0 and len(row["losses"]) == 4 for row in found)
    collection = json.loads((whole / "collection.json").read_text())
    assert str(ground) not in json.dumps(collection)  # names, not paths of this machine
    assert [d["name"] for d in collection["domains"]] == ["alpha", "beta"]
    assert collection["totals"]["rows"] == 12
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    loaded = load_trajectories(whole, space, fingerprint=compute_fingerprint(backbone))
    assert loaded.deltas.shape == (12, 3, space.n_tokens, 24)


def test_killed_at_any_moment_it_resumes_with_the_same_rows(ground, whole, tmp_path):
    for code, kept in ((DIE_WRITING, 1), (DIE_BEFORE_CHECKSUM, 2)):
        killed = run(*flags(ground, tmp_path), code=code)
        assert killed.returncode == -9, killed.stderr
        assert sum(name.endswith(".sha256") for name in files(tmp_path)) == kept
    resumed = run(*flags(ground, tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    assert "shard-00002.parquet has no checksum" in resumed.stderr
    assert rows(tmp_path) == rows(whole)
    assert files(tmp_path) == files(whole)
    assert totals(tmp_path) == totals(whole)


def test_two_processes_make_what_one_makes(ground, whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(*flags(ground, tmp_path), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == rows(whole)
    assert files(tmp_path) == files(whole)
    assert totals(tmp_path) == totals(whole)


def test_damage_is_repaired_and_a_collection_is_extended(ground, whole, tmp_path):
    """From a smaller collection with a damaged shard, pushed to the Hub when it is complete."""
    for name in ("collection.json", "data"):
        subprocess.run(["cp", "-r", str(whole / name), str(tmp_path)], check=True)
    path = tmp_path / "data" / "shard-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with Hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(ground / "home"), "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        more = flags(ground, tmp_path, n_trajectories=13, push_to_hub="alice/trajectories")
        done = run(*more, **env)
        assert done.returncode == 0, done.stderr
        pushed = hub.files("alice/trajectories")
        code = LOAD.format(backbone=str(ground / "backbone"))
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
        loaded = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert not hub.unknown
    assert "shard-00000.parquet is damaged" in done.stderr
    found = rows(tmp_path)
    assert found[:12] == rows(whole)
    assert len(found) == 15  # groups are made whole
    there = {f"data/{name}" for name in files(tmp_path)} | {"README.md", "collection.json"}
    assert set(pushed) - {".gitattributes"} == there
    assert pushed["data/shard-00004.parquet"] == (tmp_path / "data" / "shard-00004.parquet").read_bytes()
    assert loaded.stdout.strip() == "15", loaded.stderr


def test_a_full_disk_leaves_nothing_half_written(ground, whole, tmp_path):
    done = run(*flags(ground, tmp_path, group_size=6), code=FULL_DISK)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot write")
    assert str(tmp_path) in last
    assert "when there is room, the same command goes on" in last
    assert files(tmp_path) == []


@pytest.fixture
def collect(monkeypatch):
    """The script's `main` in this process: its error message."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    AcceleratorState._reset_state(reset_partial_state=True)
    import collect_trajectories

    def called(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["collect_trajectories.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            collect_trajectories.main()
        return str(caught.value)

    yield called
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bad_input_is_named(ground, whole, tmp_path, collect):
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    for c in range(2):
        subprocess.run(["cp", "-r", str(ground / "alpha" / f"class{c}"), str(tmp_path / "small")], check=True)
    for name, expected in (
        ("empty", "empty, a domain of at least 3 classes of 9 images"),
        ("small", "needs 3 classes of 9"),
    ):
        arguments = flags(ground, tmp_path / "out")
        arguments[1:3] = [str(tmp_path / name)]
        assert expected in collect(arguments)
    assert not (tmp_path / "out").exists()
    assert "holds other trajectories: arguments.seed differ" in collect(flags(ground, whole, seed=1))
    assert "domains" in collect(flags(ground, whole, max_per_class=12))
    other = shutil.copytree(ground / "backbone", tmp_path / "backbone")
    assert "wrote" in run(*flags(ground, whole, backbone=other)).stdout  # another name of the same weights
    backbone = Dinov2Model.from_pretrained(other)
    torch.nn.init.constant_(backbone.encoder.layer[0].norm1.weight, 3.0)
    backbone.save_pretrained(other)
    assert "the backbone's weights differ" in collect(flags(ground, whole, backbone=other))
    assert "bias, lora or layernorm" in collect(flags(ground, tmp_path / "out", parameters="prompt"))
    assert rows(whole)[0]["index"] == 0


@pytest.mark.parametrize("parameters", ["lora", "layernorm"])
def test_other_parameters_and_a_teacher_that_diverges(ground, tmp_path, collect, parameters, monkeypatch, capsys):
    import collect_trajectories

    arguments = flags(ground, tmp_path, parameters=parameters, n_trajectories=3)
    monkeypatch.setattr(sys, "argv", ["collect_trajectories.py", *arguments, "--learning_rate", "1e30"])
    collect_trajectories.main()
    assert "3 trajectories, 3 diverged" in capsys.readouterr().out
    assert all(row["diverged"] for row in rows(tmp_path))
    names = [name for name, _ in json.loads((tmp_path / "collection.json").read_text())["parameter_space"]["tensors"]]
    assert all(("lora" in name) == (parameters == "lora") for name in names)


def test_teacher_against_a_plain_loop(ground, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    AcceleratorState._reset_state(reset_partial_state=True)
    import benchmark_teacher

    arguments = flags(ground, tmp_path, n_trajectories=6, teacher_steps=6)
    monkeypatch.setattr(sys, "argv", ["benchmark_teacher.py", *arguments])
    benchmark_teacher.main()
    found = json.loads((tmp_path / "teacher.json").read_text())
    assert set(found["methods"]) == {"batched_fp32", "batched_bf16", "loop_fp32", "loop_bf16"}
    for entry in found["methods"].values():
        assert entry["trajectories"] == 6
        assert entry["per_second"] == pytest.approx(6 / entry["seconds"], rel=0.2)
    start = [entry["query_accuracy"]["start"] for entry in found["methods"].values()]
    assert max(start) - min(start) < 10  # the same tasks, from nearly the same start
