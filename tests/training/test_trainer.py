"""`DriftTrainer` and `train_drift.py`: matching, then the episodic loss; killed, resumed, accumulated, shared."""

from __future__ import annotations

import importlib
import json
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
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, ResNetConfig, ResNetModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import describe_arguments, parse
from hf_hyperflow.data.domains import normalise
from hf_hyperflow.data.tasks import draw_task, load_domains, task_images
from hf_hyperflow.extras import MissingExtraError
from hf_hyperflow.modeling.lda import spread_between, within_covariance
from hf_hyperflow.modeling.saving import DRAFT
from hf_hyperflow.training import DriftTrainer, DriftTrainingConfig
from hf_hyperflow.training.progress import WINDOW, RecentValues, TrainingProgress
from hf_hyperflow.training.tracking import require_tracker
from hf_hyperflow.training.trainer import START_TASKS
from tests.helpers.hub_server import Hub
from tests.helpers.tiny import moving
from tests.helpers.training_runs import (
    TWO_PROCESSES,
    die_in_step,
    die_while_saving,
    files_of_at_most,
    make_ground,
    make_images,
    run,
    run_command,
    run_here,
)

STEPS = 5


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def recorded(ground, tmp_path_factory) -> Path:
    """Trajectories on `alpha`, in two shards."""
    folder = tmp_path_factory.mktemp("trajectories")
    teacher = ["--teacher_steps", 2, "--n_points", 3, "--n_views", 1, "--noise", 0.01]
    size = ["--n_trajectories", 8, "--group_size", 4, "--last_blocks", 2, "--mixed_precision", "no"]
    data = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", ground / "beta", "--holdout", "beta"]
    done = run_here("collect_trajectories", *data, *teacher, *size, "--output_dir", folder / "rows")
    assert done.exitcode == 0, done.output
    return folder / "rows"


def arguments(ground: Path, output: Path, *more: object) -> list[str]:
    """Flags of a run on `alpha` that validates on `beta`."""
    data = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", ground / "beta", "--holdout", "beta"]
    sizes = ["--drift_width", 12, "--drift_depth", 1, "--last_blocks", 2, "--n_steps", 2, "--mixed_precision", "no"]
    steps = ["--episodes_per_step", 3, "--warmup_steps", 1, "--lda_tasks", 4, "--checkpointing_steps", 1]
    validation = ["--validation_episodes", 2, "--validate_every", 1]
    return [str(a) for a in [*data, *sizes, *steps, *validation, "--output_dir", output, *more]]


@pytest.fixture(scope="module")
def settings(ground, recorded):
    """Flags of a run of 2 steps of matching, 1 of annealing and 2 of the episodic loss, three of everything a step."""

    def build(output: Path, *more: object) -> list[str]:
        schedule = ["--steps", STEPS, "--matching_steps", 2, "--annealing_steps", 1, "--matching_batch_size", 3]
        return arguments(ground, output, "--trajectories", recorded, *schedule, *more)

    return build


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    done = run_here("train_drift", *settings(folder, "--report_to", "tensorboard"))
    assert done.exitcode == 0, done.output
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def list_folders(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and path.name != DRAFT}


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same weights to the bit, and the same history."""
    first, second = weights(folder), weights(whole)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert record(folder)["history"] == record(whole)["history"]


# From Python


def test_trains_from_python_in_three_lines(ground, tmp_path):
    config = DriftTrainingConfig(
        backbone=str(ground / "backbone"),
        dataset=[str(ground / "alpha"), str(ground / "beta")],
        output_dir=str(tmp_path / "out"),
        last_blocks=2,
        drift_width=12,
        drift_depth=1,
        steps=2,
        episodes_per_step=2,
        lda_tasks=2,
        mixed_precision="no",
        cpu=True,
    )
    trainer = DriftTrainer(config)
    adapter = trainer.train()
    assert isinstance(adapter, HyperFlowAdapter)
    assert not adapter.training
    assert trainer.progress.step == 2
    loaded = HyperFlowAdapter.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(tensor, loaded[name], rtol=1e-3, atol=1e-3, msg=name)  # rounded on disk
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    assert len(adapter.adapt(backbone, ground / "beta").class_names) == 6


def test_its_named_steps_are_the_whole_run(settings, whole, tmp_path):
    """Prepare, step, validate, checkpoint and save, called by hand, are what `train` does."""
    trainer = DriftTrainer(parse(DriftTrainingConfig, [*settings(tmp_path), "--cpu", "true"]))
    trainer.prepare()
    for step in range(STEPS):
        trainer.step(step)
        validation = trainer.validate()
    assert set(validation.accuracies) == {"beta"}
    assert validation.shares is None, "of a single domain"
    trainer.checkpoint()
    trainer.save()
    assert list_folders(tmp_path) == {"checkpoint-5"}
    torch.testing.assert_close(weights(tmp_path), weights(whole), rtol=1e-3, atol=1e-3)


def test_an_infinite_gradient_harms_nothing(ground, tmp_path):
    trainer = DriftTrainer(parse(DriftTrainingConfig, [*arguments(ground, tmp_path), "--cpu", "true"]))
    trainer.prepare()
    trainer.step(0)
    before = {name: tensor.clone() for name, tensor in trainer.adapter.state_dict().items()}
    # The gradient overflows, of a loss that does not.
    trainer.adapter.logit_scale.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match=r"the loss of step 2 is \d.*the norm of its gradient (inf|nan)"):
        trainer.step(1)
    for name, tensor in trainer.adapter.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.isfinite().all()
    assert trainer.progress.step == 1


def test_recent_values_are_of_the_last_unbroken_steps():
    recent = RecentValues()
    for step in range(WINDOW + 10):
        recent.add({"loss": float(step), "accuracy": 1.0}, ["loss", "accuracy"])
    assert recent.means() == {"loss": 10 + (WINDOW - 1) / 2, "accuracy": 1.0}
    assert recent.latest() == {"loss": WINDOW + 9.0, "accuracy": 1.0}
    recent.add({"loss": 0.0, "accuracy": 0.0}, ["loss"])
    assert set(recent.means()) == {"loss"}, "accuracy was not measured"
    progress = TrainingProgress(7, [{"step": 5}], recent)
    assert TrainingProgress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress


# Resumed


def test_damaged_checkpoint_is_passed_over_and_resumed_equals_uninterrupted(settings, whole, tmp_path):
    """From step 4 on."""
    folder = shutil.copytree(whole, tmp_path / "out")
    optimizer = folder / "checkpoint-5" / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    done = run_here("train_drift", *settings(folder, "--resume_from_checkpoint", "latest"))
    assert done.exitcode == 0, done.output
    assert "checkpoint-5 is damaged: optimizer.bin changed" in done.output
    assert "checkpoint-4" in done.output.split("going on from")[1]
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_killed_three_times_and_resumed_equals_uninterrupted(settings, whole, tmp_path):
    output = tmp_path / "out"

    def resume(fault=None):
        again = settings(output, "--resume_from_checkpoint", "latest")
        return run("train_drift", *again, fault=fault, log=tmp_path / "log")

    in_matching = resume(partial(die_in_step, 2))
    assert in_matching.exitcode == -signal.SIGKILL, in_matching.output
    assert "starting from the beginning" in in_matching.output
    assert list_folders(output) == {"checkpoint-1"}
    while_writing = resume(partial(die_while_saving, 2))  # of step 3, in the annealing
    assert while_writing.exitcode == -signal.SIGKILL, while_writing.output
    assert list_folders(output) == {"checkpoint-1", "checkpoint-2"}
    assert (output / DRAFT).is_dir()
    in_episodic = resume(partial(die_in_step, 3))  # step 5: only the episodic loss is left
    assert in_episodic.exitcode == -signal.SIGKILL, in_episodic.output
    assert "checkpoint-2" in in_episodic.output.split("going on from")[1]
    finished = resume()
    assert finished.exitcode == 0, finished.output
    assert_same_run(output, whole)
    assert list_folders(output) == {"checkpoint-4", "checkpoint-5"}, "the limit of two"
    assert not (output / DRAFT).exists()


@pytest.mark.filterwarnings("ignore:.*lacks 1 of 2 shards")
def test_resumed_with_another_network_or_other_data_is_refused(settings, whole, recorded, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    again = settings(folder, "--resume_from_checkpoint", "latest")
    done = run_here("train_drift", *again, "--drift_width", 24)
    assert done.exitcode == 1
    assert "checkpoint-5 does not fit this run" in done.output
    half = tmp_path / "rows"
    (half / "data").mkdir(parents=True)
    shutil.copy(recorded / "collection.json", half)
    for path in (recorded / "data").glob("shard-00000*"):
        shutil.copy(path, half / "data")
    done = run_here("train_drift", *again, "--trajectories", half)
    assert done.exitcode == 1
    assert "was trained so far on" in done.output
    assert "{'rows': 4}" in done.output


def test_resumed_with_other_settings_warns(settings, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out")
    again = settings(folder, "--resume_from_checkpoint", "latest")
    done = run_here("train_drift", *again, "--seed", 1, "--weight_decay", 0.5)
    assert done.exitcode == 0, done.output
    assert "warning: other than when the checkpoint was written: seed, weight_decay" in done.output


# Shared


def assert_same_up_to_rounding(folder: Path, whole: Path) -> None:
    for entry, expected in zip(record(folder)["history"], record(whole)["history"], strict=True):
        for name in ("loss", "episodic_loss", "matching_loss"):
            assert (name in entry) == (name in expected)
            if name in expected:
                assert entry[name] == pytest.approx(expected[name], rel=1e-4), name
    reference = weights(whole / f"checkpoint-{STEPS}")
    for name, tensor in weights(folder / f"checkpoint-{STEPS}").items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=2e-4, msg=name)


def test_accumulated_parts_equal_the_whole_batch(settings, whole, tmp_path):
    """Three rows and three episodes in two parts: unequal shares."""
    done = run_here("train_drift", *settings(tmp_path, "--gradient_accumulation_steps", 2))
    assert done.exitcode == 0, done.output
    assert_same_up_to_rounding(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_equal_one_also_resumed(settings, whole, tmp_path):
    command = [*settings(tmp_path, "--resume_from_checkpoint", "latest"), "--cpu", "true"]
    for _ in ("whole", "from step 4"):
        done = run_command("train_drift", *command, launcher=TWO_PROCESSES)
        assert done.returncode == 0, done.stderr
        assert_same_up_to_rounding(tmp_path, whole)
        shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    assert "checkpoint-4" in (done.stdout + done.stderr).split("going on from")[1]


# What comes out


def test_record_of_the_run(whole, recorded):
    found = record(whole)
    assert {name: phase["runs"] for name, phase in found["phases"].items()} == {
        "lda": 1,
        "preparation": 1,
        "matching": 2,
        "annealing": 1,
        "episodic": 2,
        "validation": STEPS,
    }
    counts = {name: (phase.get("rows", 0), phase.get("episodes", 0)) for name, phase in found["phases"].items()}
    assert counts["matching"] == (6, 0)
    assert counts["annealing"] == (3, 3)
    assert counts["episodic"] == (0, 6)
    assert counts["validation"] == (0, 2 * STEPS)
    assert all(phase["flops"] > 0 and phase["seconds"] > 0 for phase in found["phases"].values())
    (collection,) = found["trajectories"]["collections"]
    assert collection["totals"] == json.loads((recorded / "collection.json").read_text())["totals"]
    assert collection["name"] == "rows"
    assert found["arguments"]["dataset"] == ["alpha", "beta"]
    assert str(whole.parent) not in (whole / "training.json").read_text(), "names, not paths"
    phases = [entry["phase"] for entry in found["history"]]
    assert phases == ["matching", "matching", "annealing", "episodic", "episodic"]
    assert "episodic_loss" not in found["history"][0]
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
        assert "Training domains: `alpha`, `beta`." in text
        assert "| beta | " in text, "the validation"
        assert "| collecting `rows` (" in text
        assert "| matching | 2 | 6 | 0 | " in text
        assert "| `matching_batch_size` | `3` |" in text


def prepare(arguments: list[str]) -> DriftTrainer:
    """A trainer before its first step."""
    trainer = DriftTrainer(parse(DriftTrainingConfig, [*arguments, "--cpu", "true"]))
    trainer.prepare()
    return trainer


def test_token_scale_is_that_of_the_trajectories(settings, tmp_path):
    trainer = prepare(settings(tmp_path))
    assert trainer.recorded is not None
    ends = trainer.recorded.deltas[:, -1].float()
    expected = (ends.square().sum((0, 2)) / (len(ends) * trainer.adapter.space.mask.sum(1))).sqrt()
    scale = trainer.adapter.token_scale.flatten()
    torch.testing.assert_close(scale, expected.clamp(min=0.01 * expected.max()), rtol=1e-3, atol=0)
    assert scale.unique().numel() > 1


def test_token_scale_can_be_set(ground, tmp_path):
    trainer = prepare(arguments(ground, tmp_path, "--token_scale", 0.25))
    assert (trainer.adapter.token_scale == 0.25).all()
    assert (trainer.averaged_adapter.token_scale == 0.25).all()


def test_training_goes_on_from_an_adapter_and_starts_where_its_flow_arrives(whole, ground, tmp_path):
    trained = moving(HyperFlowAdapter.from_pretrained(whole))
    trained.save_pretrained(tmp_path / "trained")
    assert trained.training_record is not None
    go_on = ("--init_adapter", tmp_path / "trained", "--learned_start", "true")
    trainer = prepare(arguments(ground, tmp_path, *go_on))
    for name, tensor in trained.drift.state_dict().items():
        assert torch.equal(trainer.averaged_adapter.drift.state_dict()[name], tensor)
    assert torch.equal(trainer.adapter.token_scale, trained.token_scale)
    assert trainer.init_adapter.training_record == trained.training_record
    assert describe_arguments(trainer.config)["init_adapter"] == "trained", "a name, and not a path"
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    split, injection = trained.split(backbone), trained.space.inject(backbone)
    ways = []
    for episode in trainer.batches.first_episodes(START_TASKS):
        images = episode.pixel_values[: len(episode.support_labels)]
        with torch.no_grad():
            ways.append(trained.follow(split, injection, images, episode.support_labels).theta - injection.start)
    mean = torch.stack(ways).mean(dim=0)
    assert mean.abs().max() > 1e-2
    torch.testing.assert_close(trainer.adapter.start_z * trained.token_scale, mean, rtol=1e-3, atol=1e-6)
    before = trainer.adapter.start_z.detach().clone()
    for step in range(2):  # the learning rate of the first is zero
        trainer.step(step)
    assert not torch.equal(trainer.adapter.start_z, before)
    trainer.averaged_adapter.save_pretrained(tmp_path / "started")
    again = prepare(arguments(ground, tmp_path / "again", "--init_adapter", tmp_path / "started", *go_on[2:]))
    assert torch.equal(again.adapter.start_z, trainer.averaged_adapter.start_z), "it has a start of its own"
    with pytest.raises(ValueError, match=r"--init_adapter .* --drift_width"):
        prepare(arguments(ground, tmp_path / "other", *go_on, "--drift_width", 24))


def test_a_sibling_of_the_backbone_takes_over_a_flow_without_training(whole, ground, tmp_path):
    """Of one step, the first of the warmup, nothing is learned: the networks stay, and the head is measured anew."""
    trained = moving(HyperFlowAdapter.from_pretrained(whole))
    trained.save_pretrained(tmp_path / "trained")
    sibling = AutoModel.from_pretrained(ground / "backbone")
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sibling.save_pretrained(tmp_path / "sibling")
    AutoImageProcessor.from_pretrained(ground / "backbone", backend="pil").save_pretrained(tmp_path / "sibling")
    options = ["--backbone", tmp_path / "sibling", "--init_adapter", tmp_path / "trained", "--steps", 1]
    done = run_here("train_drift", *arguments(ground, tmp_path / "moved", *options))
    assert done.exitcode == 0, done.output
    moved = HyperFlowAdapter.from_pretrained(tmp_path / "moved")
    for network in ("drift", "task_encoder"):
        theirs = trained.get_submodule(network).state_dict()
        for name, tensor in moved.get_submodule(network).state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-6)  # saved in half precision
    assert not torch.allclose(moved.head.variances, trained.head.variances)
    assert moved.config.backbone["fingerprint"] != trained.config.backbone["fingerprint"]


def test_lda_prior_is_the_covariance_of_the_training_tasks(whole, ground):
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
        intermediate = 0.5 * last.norm(dim=1, keepdim=True) * F.normalize(before[:, 1:].mean(dim=1), dim=1)
        features = torch.cat([last, intermediate], dim=1)
        covariances.append(within_covariance(features, labels))
        spreads.append(spread_between(features, labels))
    variances = torch.stack([c.diagonal().mean() for c in covariances])
    covariance = variances.mean() * torch.stack([c / v for c, v in zip(covariances, variances, strict=True)]).mean(0)
    head = adapter.head
    found = head.directions @ head.variances.diag() @ head.directions.T
    torch.testing.assert_close(found, 100 * covariance, rtol=1e-2, atol=0.01 * found.abs().max().item())
    torch.testing.assert_close(head.spread, torch.stack(spreads).mean(), rtol=1e-2, atol=0)


def test_without_lda_there_is_none(ground, tmp_path):
    trainer = prepare(arguments(ground, tmp_path, "--no_lda"))
    assert "head.directions" not in trainer.adapter.state_dict()
    assert "lda" not in trainer.cost.phases


def test_a_separate_encoder_is_frozen_and_saved_with_the_adapter(settings, ground, tmp_path):
    """It sees what the target sees; here a convolutional network, as in the paper."""
    torch.manual_seed(1)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    encoder = ResNetModel(ResNetConfig(**sizes))
    encoder.save_pretrained(tmp_path / "encoder")
    more = ["--encoder", tmp_path / "encoder", "--validate_every", STEPS]
    done = run_here("train_drift", *settings(tmp_path / "out", *more))
    assert done.exitcode == 0, done.output
    assert record(tmp_path / "out")["arguments"]["encoder"] == "encoder"
    adapter = HyperFlowAdapter.from_pretrained(tmp_path / "out")
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(adapter.encoder.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    images = load_domains([str(ground / "alpha")], adapter.processor)[0][0].images[::10]
    support = {str(c): [PIL.Image.fromarray(images[c].permute(1, 2, 0).numpy())] for c in range(3)}
    task = adapter.adapt(AutoModel.from_pretrained(ground / "backbone").eval(), support)
    assert task.prototypes.shape == (3, 48), "final and intermediate features"


@pytest.mark.parametrize("parameters", ["lora", "layernorm"])
def test_other_parameters(ground, parameters, tmp_path):
    more = ["--parameters", parameters, "--steps", 1, "--mixed_precision", "bf16"]
    done = run_here("train_drift", *arguments(ground, tmp_path, *more))
    assert done.exitcode == 0, done.output
    config = HyperFlowAdapter.from_pretrained(tmp_path).config
    assert config.peft["peft_type"] == {"lora": "LORA", "layernorm": "LN_TUNING"}[parameters]


def test_curves_in_tensorboard(whole):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (whole / "logs").rglob("events*") if path.parent.name == "hf_hyperflow"}
    events = EventAccumulator(str(folder)).Reload()
    history = record(whole)["history"]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("matching_loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("episodic_loss")] == [3, 4, 5]
    assert [event.value for event in events.Scalars("matching_weight")] == [1, 1, 0.5, 0, 0]
    assert events.Scalars("loss")[0].value == pytest.approx(history[0]["loss"])
    differences = [event.value for event in events.Scalars("validation/beta/difference")]
    assert differences == pytest.approx([entry["beta"]["difference"] for entry in history])
    assert len(events.Scalars("validation/beta/reading")) == len(history)


@pytest.mark.slow
@pytest.mark.hub
def test_pushed_to_the_hub_with_its_card(settings, whole, tmp_path):
    """Of a finished run resumed nothing is left to train: the adapter is pushed. Who may not push hears so at once.

    As it is usually started, by `accelerate launch`.
    """
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")

    def push(name: str, token: str) -> subprocess.CompletedProcess:
        folder = shutil.copytree(whole, tmp_path / name)
        more = ["--resume_from_checkpoint", "latest", "--push_to_hub", "--hub_model_id", "alice/adapter", "--cpu"]
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        return run_command("train_drift", *settings(folder, *more), launcher=launcher, **environment)

    with Hub() as hub:
        writer, reader = push("writer", "hf_alice"), push("reader", "hf_alice_read")
        assert writer.returncode == 0, writer.stderr
        files = hub.files("alice/adapter")
    assert {"model.safetensors", "config.json", "training.json", "README.md"} <= set(files)
    assert not any(name.startswith(("checkpoint", "logs")) for name in files)
    assert b"Training domains: `alpha`, `beta`." in files["README.md"]
    assert reader.returncode == 1
    assert "permission" in reader.stderr
    assert "train on" not in reader.stdout


# What goes wrong


@pytest.mark.slow
def test_full_disk_is_an_error_and_leaves_what_was_there(settings, whole, tmp_path):
    largest = max(path.stat().st_size for path in (whole / "checkpoint-5").iterdir())
    full = partial(files_of_at_most, largest - 1)
    done = run("train_drift", *settings(tmp_path / "out"), fault=full, log=tmp_path / "log")
    assert done.exitcode == 1
    assert "error: cannot write" in done.output
    assert "checkpoint-1" in done.output
    assert not (tmp_path / "out").exists(), "there was nothing"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--gradient_accumulation_steps", 4], "--episodes_per_step 3"),
        (["--annealing_steps", 1], "needs --trajectories"),
        (["--trajectories", "rows"], "--trajectories are given but never used"),
        (
            ["--trajectories", "rows", "--matching_steps", 1, "--learned_start", "true"],
            "--learned_start and --trajectories",
        ),
        (["--validation_episodes", 1], "--validation_episodes 1"),
        (["--steps", 0, "--checkpoints_total_limit", 0], "--steps 0, --checkpoints_total_limit 0: must be at least 1"),
        (["--intermediate_weight", -1], "--intermediate_weight -1.0"),
        (["--resume_from_checkpoint", "checkpoint-7"], "there is no checkpoint checkpoint-7"),
        (["--backbone", "nowhere"], "nowhere"),
    ],
)
def test_bad_settings_are_named_before_training(ground, more, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # where there is no network, it would be waited for
    done = run_here("train_drift", *arguments(ground, tmp_path, *more))
    assert done.exitcode == 1
    assert done.output.splitlines()[-1].startswith("error: ")
    assert expected in done.output


def test_too_few_images_are_named(ground, tmp_path):
    make_images(tmp_path / "small", n_classes=4, n_images=8)
    more = ["--dataset", tmp_path / "small", ground / "beta"]
    done = run_here("train_drift", *arguments(ground, tmp_path / "out", *more))
    assert done.exitcode == 1
    assert "domain 'small' has 0 classes of at least 9 images" in done.output


def test_trajectories_of_other_parameters_are_refused(settings, tmp_path):
    done = run_here("train_drift", *settings(tmp_path, "--parameters", "layernorm"))
    assert done.exitcode == 1
    assert "of another parameter space" in done.output


def test_missing_tracker_is_named(monkeypatch):
    require_tracker("none")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="--report_to wandb needs the package wandb: pip install wandb"):
        require_tracker("wandb")


def test_missing_package_is_named_with_its_extra(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("hf_hyperflow.training"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(MissingExtraError, match=r'training needs tqdm.*: pip install "hf-hyperflow\[train\]"'):
        importlib.import_module("hf_hyperflow.training")
