"""`train_drift.py` as a user runs it: matching, then the task objective; killed, resumed, accumulated, shared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, ResNetConfig, ResNetModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.data.domains import normalise
from hf_hyperflow.data.tasks import draw_task, load_domains, task_images
from hf_hyperflow.modeling.lda import spread_between, within_covariance
from tests.helpers.hub_server import Hub
from tests.helpers.training_runs import (
    SCRIPTS,
    die_in_step,
    die_while_saving,
    files_of_at_most,
    infinite_gradient,
    make_ground,
    make_images,
    offline,
    run,
)

STEPS = 5


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def recorded(ground, tmp_path_factory) -> Path:
    """Trajectories on `alpha`."""
    folder = tmp_path_factory.mktemp("trajectories")
    teacher = ["--teacher_steps", 2, "--n_points", 3, "--n_views", 1, "--noise", 0.01]
    size = ["--n_trajectories", 8, "--group_size", 4, "--last_blocks", 2, "--mixed_precision", "no"]
    data = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", ground / "beta", "--holdout", "beta"]
    done = run("collect_trajectories", *data, *teacher, *size, "--output_dir", folder / "rows", log=folder / "log")
    assert done.exitcode == 0, done.output
    return folder / "rows"


def arguments(ground: Path, output: Path, *more: object) -> list:
    sizes = ["--drift_width", 12, "--drift_depth", 1, "--last_blocks", 2, "--n_steps", 2, "--mixed_precision", "no"]
    batch = [
        "--metric_tasks",
        4,
        "--episodes_per_step",
        3,
        "--warmup_steps",
        1,
        "--validation_episodes",
        2,
        "--validate_every",
        1,
    ]
    data = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", ground / "beta", "--holdout", "beta"]
    return [*data, *sizes, *batch, "--checkpointing_steps", 1, "--output_dir", output, *more]


@pytest.fixture(scope="module")
def settings(ground, recorded):
    """Arguments of a run of 2 steps of matching, 1 of both and 2 of the task objective, 3 of everything in a step."""

    def of(output: Path, *more: object) -> list:
        schedule = ["--steps", STEPS, "--matching_steps", 2, "--annealing_steps", 1, "--matching_batch_size", 3]
        return arguments(ground, output, "--trajectories", recorded, *schedule, *more)

    return of


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run("train_drift", *settings(folder / "adapter", "--report_to", "tensorboard"), log=folder / "log")
    assert done.exitcode == 0, done.output
    return folder / "adapter"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def test_killed_three_times_and_resumed_equals_uninterrupted(settings, whole, tmp_path):
    def resumed(fault=None):
        more = ["--resume_from_checkpoint", "latest"]
        return run("train_drift", *settings(tmp_path / "out", *more), fault=fault, log=tmp_path / "log")

    in_matching = resumed(partial(die_in_step, 2))
    assert in_matching.exitcode == -signal.SIGKILL, in_matching.output
    assert "starting from the beginning" in in_matching.output
    assert [f.name for f in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-1"]
    while_writing = resumed(partial(die_while_saving, 2))  # of step 3, in the blend
    assert while_writing.exitcode == -signal.SIGKILL, while_writing.output
    assert {f.name for f in (tmp_path / "out").glob("checkpoint*")} == {
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint.partial",
    }
    in_task = resumed(partial(die_in_step, 3))  # step 5: only the task objective is left
    assert in_task.exitcode == -signal.SIGKILL, in_task.output
    assert "going on from" in in_task.output
    assert "checkpoint-2" in in_task.output
    finished = resumed()
    assert finished.exitcode == 0, finished.output
    assert same(weights(whole), weights(tmp_path / "out"))
    assert record(whole)["history"] == record(tmp_path / "out")["history"]
    names = {f.name for f in (tmp_path / "out").iterdir() if f.is_dir()}
    assert names == {"checkpoint-4", "checkpoint-5"}, "the limit of two"


def test_damaged_checkpoint_is_named_and_passed_over(settings, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    last = tmp_path / "out/checkpoint-5"
    (last / "optimizer.bin").write_bytes((last / "optimizer.bin").read_bytes()[:-1])
    done = run("train_drift", *settings(tmp_path / "out", "--resume_from_checkpoint", "latest"), log=tmp_path / "log")
    assert done.exitcode == 0, done.output
    assert "checkpoint-5 is damaged: optimizer.bin changed" in done.output
    assert "checkpoint-4" in done.output.split("going on from")[1]
    assert same(weights(whole), weights(tmp_path / "out"))


def test_an_infinite_gradient_harms_nothing(settings, tmp_path):
    done = run("train_drift", *settings(tmp_path / "out"), fault=partial(infinite_gradient, 2), log=tmp_path / "log")
    assert done.exitcode == 1
    assert "the loss of step 2 is 0." in done.output
    assert "the norm of its gradient" in done.output
    assert [f.name for f in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-1"]
    assert all(t.isfinite().all() for t in weights(tmp_path / "out/checkpoint-1").values())


def test_resumed_with_another_network_or_other_data_is_refused(settings, whole, recorded, ground, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    again = [tmp_path / "out", "--resume_from_checkpoint", "latest"]
    done = run("train_drift", *settings(*again, "--drift_width", 24), log=tmp_path / "log")
    assert done.exitcode == 1
    assert "checkpoint-5 does not fit this run" in done.output
    shutil.copytree(recorded, tmp_path / "rows")
    shutil.rmtree(tmp_path / "rows/data")
    (tmp_path / "rows/data").mkdir()
    for path in (recorded / "data").glob("shard-00000*"):
        shutil.copy(path, tmp_path / "rows/data")
    done = run("train_drift", *settings(*again, "--trajectories", tmp_path / "rows"), log=tmp_path / "log")
    assert done.exitcode == 1
    assert "was trained so far on" in done.output
    assert "{'rows': 4}" in done.output


def losses(folder: Path) -> list[float]:
    keys = ("loss", "task_loss", "matching_loss")
    return [found[key] for found in record(folder)["history"] for key in keys if key in found]


def assert_same_training(folder: Path, whole: Path) -> None:
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-4)
    reference = weights(whole / f"checkpoint-{STEPS}")
    for name, tensor in weights(folder / f"checkpoint-{STEPS}").items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=2e-4, msg=name)


def test_accumulated_parts_equal_the_whole_batch(settings, whole, tmp_path):
    parts = settings(tmp_path / "out", "--gradient_accumulation_steps", 2)
    done = run("train_drift", *parts, log=tmp_path / "log")
    assert done.exitcode == 0, done.output
    assert_same_training(tmp_path / "out", whole)


def test_two_processes_equal_one_also_resumed(settings, whole, tmp_path):
    """Three rows and three episodes on two processes: unequal shares."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    resume = ["--resume_from_checkpoint", "latest"]
    command = [*launcher, SCRIPTS / "train_drift.py", *settings(tmp_path / "out"), *resume, "--cpu"]
    for _ in ("whole", "from step 4"):
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert_same_training(tmp_path / "out", whole)
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{STEPS}")
    assert "checkpoint-4" in (done.stdout + done.stderr).split("going on from")[1]


def test_record_of_the_run(whole, recorded):
    found = record(whole)
    assert {name: phase["runs"] for name, phase in found["phases"].items()} == {
        "metric": 1,
        "preparation": 1,
        "matching": 2,
        "blend": 1,
        "task": 2,
        "validation": STEPS,
    }
    counts = {name: (phase.get("rows", 0), phase.get("episodes", 0)) for name, phase in found["phases"].items()}
    assert counts["matching"] == (6, 0)
    assert counts["blend"] == (3, 3)
    assert counts["task"] == (0, 6)
    assert counts["validation"] == (0, 2 * STEPS)
    assert all(phase["flops"] > 0 and phase["seconds"] > 0 for phase in found["phases"].values())
    (collection,) = found["trajectories"]["collections"]
    assert collection["totals"] == json.loads((recorded / "collection.json").read_text())["totals"]
    assert collection["name"] == "rows"
    assert found["arguments"]["dataset"] == ["alpha", "beta"]
    assert str(whole.parent) not in (whole / "training.json").read_text(), "names, not paths"
    phases = [entry["phase"] for entry in found["history"]]
    assert phases == ["matching", "matching", "blend", "task", "task"]
    assert "task_loss" not in found["history"][0]
    assert "matching_loss" not in found["history"][-1]


def test_adapter_and_card_are_ready_to_use(whole, ground, tmp_path):
    adapter = HyperFlowAdapter.from_pretrained(whole)
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    task = adapter.adapt(backbone, ground / "beta")
    assert task.class_names == [f"class{c}" for c in range(6)]
    adapter.save_pretrained(tmp_path)
    assert record(tmp_path) == record(whole), "the record stays with the adapter"
    for folder in (whole, tmp_path):
        text = ModelCard.load(folder / "README.md").text
        assert "On the domains `alpha`, `beta`." in text
        assert "| beta | " in text, "the validation"
        assert "| collecting `rows` (" in text
        assert "| matching | 2 | 6 | 0 | " in text
        assert "| `matching_batch_size` | `3` |" in text


def test_token_scale_is_that_of_the_trajectories(settings, whole, tmp_path):
    measured = weights(whole)["token_scale"].float()
    assert measured.shape[0] == len(measured)
    assert measured.unique().numel() > 1
    fixed = settings(tmp_path / "out", "--token_scale", 0.25)
    done = run("train_drift", *fixed, fault=partial(die_in_step, 2), log=tmp_path / "log")
    assert done.exitcode == -signal.SIGKILL, done.output
    assert (weights(tmp_path / "out/checkpoint-1")["adapter.token_scale"] == 0.25).all()


def test_metric_is_the_covariance_of_the_training_tasks(settings, whole, ground, tmp_path):
    adapter = HyperFlowAdapter.from_pretrained(whole)
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    training, _ = load_domains([str(ground / "alpha")], adapter.processor)
    covariances, spreads = [], []
    for index in range(4):
        task = draw_task(training, index, seed=0, randomize_prob=0.6)
        pixels = normalise(task_images(task, training[0]), adapter.processor)
        labels = torch.cat([task.episode.support_labels, task.episode.query_labels])
        with torch.no_grad():
            output = backbone(pixels, output_hidden_states=True)
        last, before = output.last_hidden_state[:, 0], output.hidden_states[-3]  # 2 blocks are adapted
        middle = 0.5 * last.norm(dim=1, keepdim=True) * F.normalize(before[:, 1:].mean(dim=1), dim=1)
        features = torch.cat([last, middle], dim=1)
        covariances.append(within_covariance(features, labels))
        spreads.append(spread_between(features, labels))
    variances = torch.stack([c.diagonal().mean() for c in covariances])
    covariance = variances.mean() * torch.stack([c / v for c, v in zip(covariances, variances, strict=True)]).mean(0)
    metric = adapter.head
    found = metric.directions @ metric.variances.diag() @ metric.directions.T
    torch.testing.assert_close(found, 100 * covariance, rtol=1e-2, atol=0.01 * found.abs().max().item())
    torch.testing.assert_close(metric.spread, torch.stack(spreads).mean(), rtol=1e-2, atol=0)
    plain = settings(tmp_path / "out", "--no_metric")
    done = run("train_drift", *plain, fault=partial(die_in_step, 2), log=tmp_path / "log")
    assert done.exitcode == -signal.SIGKILL, done.output
    assert "adapter.head.directions" not in weights(tmp_path / "out/checkpoint-1")


def test_a_separate_encoder_is_frozen_and_saved_with_the_adapter(settings, ground, tmp_path):
    """It sees what the target sees; here a convolutional network, as in the paper."""
    torch.manual_seed(1)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    encoder = ResNetModel(ResNetConfig(**sizes))
    encoder.save_pretrained(tmp_path / "encoder")
    done = run("train_drift", *settings(tmp_path / "out", "--encoder", tmp_path / "encoder"), log=tmp_path / "log")
    assert done.exitcode == 0, done.output
    assert record(tmp_path / "out")["arguments"]["encoder"] == "encoder"
    adapter = HyperFlowAdapter.from_pretrained(tmp_path / "out")
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(adapter.encoder.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    images = load_domains([str(ground / "alpha")], adapter.processor)[0][0].images[::10]
    support = {str(c): [PIL.Image.fromarray(images[c].permute(1, 2, 0).numpy())] for c in range(3)}
    task = adapter.adapt(AutoModel.from_pretrained(ground / "backbone").eval(), support)
    assert task.prototypes.shape == (3, 48), "of both halves of the features"


def test_curves_in_tensorboard(whole):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (whole / "logs").rglob("events*") if path.parent.name == "hf_hyperflow"}
    events = EventAccumulator(str(folder)).Reload()
    history = record(whole)["history"]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("matching_loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("task_loss")] == [3, 4, 5]
    assert [event.value for event in events.Scalars("matching_weight")] == [1, 1, 0.5, 0, 0]
    assert events.Scalars("loss")[0].value == pytest.approx(history[0]["loss"])
    found = [event.value for event in events.Scalars("validation/beta/difference")]
    assert found == pytest.approx([entry["beta"]["difference"] for entry in history])


def test_full_disk_is_an_error_and_leaves_what_was_there(settings, whole, tmp_path):
    largest = max(path.stat().st_size for path in (whole / "checkpoint-5").iterdir())
    done = run(
        "train_drift",
        *settings(tmp_path / "out"),
        fault=partial(files_of_at_most, largest - 1),
        log=tmp_path / "log",
    )
    assert done.exitcode == 1
    assert "error: cannot write" in done.output
    assert "checkpoint-1" in done.output
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("parameters", ["lora", "layernorm"])
def test_other_parameters(ground, parameters, tmp_path):
    more = ["--parameters", parameters, "--steps", 1, "--mixed_precision", "bf16"]
    done = run("train_drift", *arguments(ground, tmp_path / "out", *more), log=tmp_path / "log")
    assert done.exitcode == 0, done.output
    config = HyperFlowAdapter.from_pretrained(tmp_path / "out").config
    assert config.peft["peft_type"] == {"lora": "LORA", "layernorm": "LN_TUNING"}[parameters]


def test_pushed_to_the_hub_with_its_card(settings, whole, tmp_path):
    """Of a finished run resumed nothing is left to train: the adapter is pushed. Who may not push hears so at once.

    As it is usually started, by `accelerate launch`.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]

    def push(name: str, token: str) -> subprocess.CompletedProcess:
        shutil.copytree(whole, tmp_path / name)
        more = ["--resume_from_checkpoint", "latest", "--push_to_hub", "--hub_model_id", "alice/adapter", "--cpu"]
        command = [*launcher, str(SCRIPTS / "train_drift.py"), *map(str, settings(tmp_path / name, *more))]
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / name), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
        environment = os.environ | own | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    with Hub() as hub:
        writer, reader = push("writer", "hf_alice"), push("reader", "hf_alice_read")
        assert writer.returncode == 0, writer.stderr
        files = hub.files("alice/adapter")
    assert {"model.safetensors", "config.json", "training.json", "README.md"} <= set(files)
    assert not any(name.startswith(("checkpoint", "logs")) for name in files)
    assert b"On the domains `alpha`, `beta`." in files["README.md"]
    assert reader.returncode == 1
    assert "permission" in reader.stderr
    assert "train on" not in reader.stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--gradient_accumulation_steps", 4], "--episodes_per_step 3"),
        (["--annealing_steps", 1], "needs --trajectories"),
        (["--validation_episodes", 1], "--validation_episodes 1"),
        (["--resume_from_checkpoint", "checkpoint-7"], "there is no checkpoint checkpoint-7"),
        (["--backbone", "nowhere"], "nowhere"),
    ],
)
def test_bad_settings_are_named_before_training(ground, more, said, tmp_path):
    done = run("train_drift", *arguments(ground, tmp_path / "out", *more), fault=offline, log=tmp_path / "log")
    assert done.exitcode == 1
    assert "error: " in done.output
    assert said in done.output


def test_too_few_images_are_named(ground, tmp_path):
    make_images(tmp_path / "small", n_classes=4, n_images=8)
    done = run(
        "train_drift",
        *arguments(ground, tmp_path / "out", "--dataset", tmp_path / "small", ground / "beta"),
        log=tmp_path / "log",
    )
    assert done.exitcode == 1
    assert "domain 'small' has 0 classes of at least 9 images" in done.output


def test_trajectories_of_other_parameters_are_refused(settings, tmp_path):
    other = settings(tmp_path / "out", "--parameters", "layernorm")
    done = run("train_drift", *other, log=tmp_path / "log")
    assert done.exitcode == 1
    assert "of another parameter space" in done.output


def test_missing_tracker_is_named():
    code = "import sys; sys.modules['wandb'] = None; from tracking import require_tracker; require_tracker('none')"
    command = [sys.executable, "-c", f"{code}; require_tracker('wandb')"]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: --report_to wandb needs the package wandb: pip install wandb" in done.stderr
