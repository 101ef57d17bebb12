"""`hyperflow info` and `hyperflow push`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_hyperflow import HyperFlowAdapter
from tests.cli.running import Outcome, fails
from tests.helpers.hub_server import Hub


def test_info(hyperflow, saved, tmp_path):
    found = hyperflow("info", saved / "adapter")
    assert found.code == 0, found.err
    rows = dict(line.split("  ", 1) for line in found.out.splitlines())
    rows = {key: value.strip() for key, value in rows.items()}
    adapter = HyperFlowAdapter.from_pretrained(saved / "adapter")
    assert rows["kind"] == "HyperFlow adapter"
    assert rows["backbone"] == f"{saved / 'backbone'} (dinov2, 4 blocks of width 32)"
    assert f"{adapter.space.n_parameters:,} parameters in {adapter.space.n_tokens} tokens" in rows["generates"]
    assert rows["drift network"].startswith(f"{sum(p.numel() for p in adapter.drift.parameters()):,} parameters")
    assert rows["solver"] == "euler, 4 steps"
    said = hyperflow("info", saved / "task").out
    for words in ("adapted task", "3: blue, green, red", "PEFT BEFT", str(saved / "backbone"), "3 of width 32"):
        assert words in said
    fails(hyperflow("info", saved / "vit"), "does not describe a HyperFlow adapter")
    fails(hyperflow("info", tmp_path), "neither a HyperFlow adapter nor an adapted task")
    fails(hyperflow("info", "no where"), "there is no folder no where")


def test_damage_is_noticed(hyperflow, saved, tmp_path):
    for name, weights in (("adapter", "model.safetensors"), ("task", "prototypes.safetensors")):
        damaged = tmp_path / name
        damaged.mkdir()
        for path in (saved / name).iterdir():
            (damaged / path.name).write_bytes(path.read_bytes())
        (damaged / weights).write_bytes((saved / name / weights).read_bytes()[:-4])
        fails(hyperflow("info", damaged), weights, "is damaged or incomplete")
        fails(hyperflow("push", damaged, "alice/x"), weights, "is damaged or incomplete")
    (damaged / weights).unlink()
    fails(hyperflow("predict", "--task", damaged, saved / "new/red.png"), weights)


@pytest.mark.hub
def test_push(saved, tmp_path):
    """With the real client over HTTP; with and without a token."""
    with Hub() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | own

        def push(*arguments: str | Path, **token: str) -> subprocess.Popen:
            command = [Path(sys.executable).with_name("hyperflow"), "push", *arguments]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen(command, env=environment | token, **pipes)

        arguments = [saved / "task", "alice/pets", "--private", "--revision", "v2"]
        with push(*arguments, HF_TOKEN="hf_alice") as alice, push(saved / "adapter", "alice/flow") as guest:
            said, complained = alice.communicate()
            refused = Outcome(0, *guest.communicate())
        assert (alice.returncode, complained) == (0, "")
        assert f"{hub.url}/alice/pets/commit/" in said
        assert hub.repos["alice/pets"].private
        pushed = hub.files("alice/pets", "v2")
        assert set(pushed) - {".gitattributes"} == {path.name for path in (saved / "task").iterdir()}
        for name in ("adapter_model.safetensors", "prototypes.safetensors", "README.md"):
            assert pushed[name] == (saved / "task" / name).read_bytes()
        assert not [name for name, content in pushed.items() if str(saved).encode() in content]
        refused.code = guest.returncode
        fails(refused, "cannot push alice/flow: ", "hf auth login")
        assert "alice/flow" not in hub.repos


def test_push_of_no_folder(hyperflow, tmp_path):
    fails(hyperflow("push", "nowhere", "alice/x"), "there is no folder nowhere")


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.parametrize("secret", ["hf_" + "s" * 30, "hf_" + "s" * 30 + "\x01t", "unusualtoken"])
def test_no_token_is_printed(saved, tmp_path, secret):
    """Neither one that the Hub refuses, nor one that HTTP cannot carry and its library therefore complains about."""
    with Hub() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment = os.environ | own | {"HF_TOKEN": secret}
        hyperflow = Path(sys.executable).with_name("hyperflow")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = []
        for arguments in (["push", saved / "task", "alice/x"], ["--debug", "info", "alice/x"]):
            processes.append(subprocess.Popen([hyperflow, *arguments], env=environment, **pipes))
        for process, has_traceback in zip(processes, (False, True), strict=True):
            out, err = process.communicate()
            assert process.returncode == 1
            assert secret not in out + err
            assert "s" * 16 not in out + err
            assert ("Traceback" in err) == has_traceback
            assert "error" in err.lower()
