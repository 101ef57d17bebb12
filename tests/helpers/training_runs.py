"""The training scripts run by the tests: a tiny backbone and image folders, and children that may be killed.

Children are forked from a server that has imported everything already, so that a run takes a second, not ten.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

SCRIPTS = Path(__file__).resolve().parent.parent / "training"
SIDE = 28
#: Nearly all that the scripts import.
PRELOADED = ["training_runs", "accelerate", "datasets", "torch.optim.swa_utils", "torch.utils.flop_counter"]
PRELOADED += [f"hf_hyperflow.{room}" for room in ("evaluation", "trajectories", "task_cost")]


def make_ground(folder: Path) -> Path:
    """A tiny backbone and two image folders, `alpha` and `beta`, whose classes differ in colour."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_attention_heads=2, num_hidden_layers=3, image_size=SIDE, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "backbone")
    BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder / "backbone"
    )
    for seed, name in enumerate(("alpha", "beta")):
        make_images(folder / name, n_classes=6, n_images=20, seed=seed)
    return folder


def make_images(folder: Path, *, n_classes: int, n_images: int, seed: int = 0) -> None:
    """An image folder of noisy colours, one per class."""
    generator = np.random.default_rng(seed)
    for c in range(n_classes):
        (folder / f"class{c}").mkdir(parents=True)
        colour = generator.integers(0, 256, 3)
        for i in range(n_images):
            pixels = (colour + generator.normal(0, 30, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")


@dataclass(frozen=True)
class Finished:
    """A run that has ended: exit code (minus the signal that killed it), and what it printed."""

    exitcode: int
    output: str


def run(script: str, *arguments: object, fault: Callable[[], None] | None = None, log: Path) -> Finished:
    """Run `training/<script>.py` on the CPU with one thread.

    Args:
        fault: called in the child before the script; a module-level function or a `partial` of one.
        log: file that gets what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_child, args=(script, [str(a) for a in arguments], fault, str(log)))
    child.start()
    child.join(900)
    if child.is_alive():
        child.kill()
        child.join()
    return Finished(child.exitcode, log.read_text())


def _child(script: str, arguments: list[str], fault: Callable[[], None] | None, log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = [f"{script}.py", *arguments, "--cpu", "true"]
    module = importlib.import_module(script)
    if fault is not None:
        fault()
    module.main()


# Faults


def die_in_step(step: int) -> None:
    """SIGKILL in the optimiser's step number `step` (1 for the first of this run)."""
    from torch.optim import AdamW

    AdamW.step = _deadly(AdamW.step, step)


def die_while_saving(checkpoint: int) -> None:
    """SIGKILL when checkpoint number `checkpoint` of this run has most of its files."""
    from accelerate import Accelerator

    Accelerator.save_state = _deadly(Accelerator.save_state, checkpoint)


def infinite_gradient(step: int) -> None:
    """A gradient that overflows in step number `step`, of a loss that does not."""
    from accelerate import Accelerator

    backward, calls = Accelerator.backward, 0

    def overflowing(self: Accelerator, loss: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        backward(self, loss if calls < step else loss + (loss - loss.detach()) * float("inf"))

    Accelerator.backward = overflowing


def offline() -> None:
    """No Hub, known at once: where there is no network, every file that is asked for is waited for."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def _deadly(function: Callable, call: int) -> Callable:
    calls = 0

    def deadly(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return deadly


def files_of_at_most(n_bytes: int) -> None:
    """A disk that is full: no file can grow beyond `n_bytes`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
