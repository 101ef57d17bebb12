"""Forged files of saved adapters and tasks, and a process of limited time and memory that tries to load them."""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from hf_hyperflow import AdaptedTask, CheckpointError, HyperFlowAdapter, ImageError
from hf_hyperflow.modeling.checksums import sha256
from hf_hyperflow.modeling.finite import NotFiniteError
from hf_hyperflow.modeling.trunks import IncompatibleBackboneError
from tests.helpers.tiny import Snapshot, pictures, tiny_adapter, tiny_dinov2

#: Seconds that one load and one use may take on a busy machine, and bytes by which the process may grow.
TIME_LIMIT = 30
MEMORY_LIMIT = 2 << 30

#: What stands in for a place in a JSON text where raw text goes.
_MARK = "@place@"


@dataclass(frozen=True)
class Forgery:
    """One change of one file of a saved adapter or task.

    Attributes:
        kind: "adapter" or "task".
        file: the name of the file.
        operation: a key of `JSON_OPERATIONS`, `BYTE_OPERATIONS` or `TENSOR_OPERATIONS`.
        place: the path in the JSON of the file or of its header, the position of the byte, or the name of the tensor.
        value: what is put there.
        is_noted: whether the digests are noted anew afterwards, as a forger can do.
    """

    kind: str
    file: str
    operation: str
    place: Any = None
    value: Any = None
    is_noted: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a forgery.

    Attributes:
        verdict: "right", "clear error", or what is wrong: "raw error", "not finite", "backbone changed", "hang".
        detail: the error, in words.
    """

    verdict: str
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.verdict in ("right", "clear error")


JSON_OPERATIONS = ("set", "delete", "duplicate", "nest")
BYTE_OPERATIONS = ("flip", "cut", "fill", "insert", "text")
FILLS = {"nan": float("nan"), "infinite": float("inf"), "huge": 1e30, "zero": 0.0}
TYPES = {"half": torch.float16, "double": torch.float64, "integer": torch.int32}
TENSOR_OPERATIONS = (*FILLS, *TYPES, "flat", "longer", "gone", "renamed")


def read_json_part(file: str, content: bytes) -> Any:
    """The JSON of a file, or of its header if it holds tensors."""
    if file.endswith(".safetensors"):
        length = struct.unpack("<Q", content[:8])[0]
        return json.loads(content[8 : 8 + length])
    return json.loads(content)


def list_places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The paths of all values inside a JSON value, and of itself."""
    yield place
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from list_places(item, (*place, key))


def forge(forgery: Forgery, content: bytes) -> bytes:
    """The forged content of a file."""
    if forgery.operation in JSON_OPERATIONS:
        return _forge_json(forgery, content)
    if forgery.operation in TENSOR_OPERATIONS:
        return _forge_tensor(forgery, content)
    return _forge_bytes(forgery, content)


def _forge_json(forgery: Forgery, content: bytes) -> bytes:
    document = read_json_part(forgery.file, content)
    *parents, last = forgery.place or [None]
    raw = json.dumps(forgery.value)
    if forgery.operation == "nest":
        raw = "[" * forgery.value + "]" * forgery.value
    if last is None:
        document = _MARK
    else:
        container = document
        for key in parents:
            container = container[key]
        if forgery.operation == "delete":
            del container[last]
        elif forgery.operation == "duplicate" and isinstance(container, dict):
            container[_MARK + last] = _MARK
        elif isinstance(container, dict):
            container[last] = _MARK
        else:
            container[last : last + 1] = [_MARK]
    text = json.dumps(document).replace(f'"{_MARK}"', raw).replace(_MARK, "").encode()
    if not forgery.file.endswith(".safetensors"):
        return text
    length = struct.unpack("<Q", content[:8])[0]
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _forge_tensor(forgery: Forgery, content: bytes) -> bytes:
    metadata = read_json_part(forgery.file, content).get("__metadata__")
    tensors = load(content)
    tensor = tensors[forgery.place]
    if forgery.operation in FILLS:
        tensor.view(-1)[forgery.value % tensor.numel()] = FILLS[forgery.operation]
    elif forgery.operation in TYPES:
        tensors[forgery.place] = tensor.to(TYPES[forgery.operation])
    elif forgery.operation == "flat":
        tensors[forgery.place] = tensor.reshape(1, -1)
    elif forgery.operation == "longer":
        tensors[forgery.place] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    else:
        del tensors[forgery.place]
        if forgery.operation == "renamed":
            tensors[forgery.value] = tensor
    return save(tensors, metadata)


def _forge_bytes(forgery: Forgery, content: bytes) -> bytes:
    if forgery.operation == "text":
        return forgery.value.encode("utf-8", "surrogatepass")
    position = forgery.place % max(1, len(content))
    if forgery.operation == "cut":
        return content[:position]
    if forgery.operation == "insert":
        return content[:position] + bytes(forgery.value) + content[position:]
    if forgery.operation == "fill":
        return content[:position] + b"\0" * forgery.value + content[position + forgery.value :]
    changed = bytearray(content)
    changed[position] ^= 1 << (forgery.value % 8)
    return bytes(changed)


class Saved:
    """A tiny adapter and a task that it made, in folders, and the files in them by kind and name."""

    def __init__(self, folder: Path):
        self.backbone = tiny_dinov2()
        self.folders = {"adapter": folder / "adapter", "task": folder / "task"}
        calibration = {"constant": 2.0, "ways": 0.3, "shots": 0.5, "spread": -1.0}
        adapter = tiny_adapter(
            self.backbone,
            lda=True,
            intermediate_weight=0.5,
            image_size=[28, 28],
            views=2,
            calibration=calibration,
            rejection={**calibration, "odds": 0.5, "distance": -2.0},
        )
        released = Path(__file__).resolve().parents[2] / "model_cards" / "hyperflow-vit-s14-70" / "training.json"
        adapter.training_record = json.loads(released.read_text())
        adapter.save_pretrained(self.folders["adapter"])
        task = adapter.adapt(self.backbone, pictures())
        task.save_pretrained(self.folders["task"])
        task.reset()
        self.files: dict[str, dict[str, bytes]] = {}
        for kind, path in self.folders.items():
            self.files[kind] = {}
            for file in sorted(path.iterdir()):
                if file.suffix in (".json", ".safetensors"):
                    self.files[kind][file.name] = file.read_bytes()

    def write(self, forgery: Forgery) -> None:
        """Put a forged file in its folder, and note the digests anew if the forger does."""
        folder = self.folders[forgery.kind]
        content = self.files[forgery.kind].get(forgery.file, b"")
        (folder / forgery.file).write_bytes(forge(forgery, content))
        if forgery.is_noted:
            self._note_digests(folder, forgery.file)

    def _note_digests(self, folder: Path, changed: str) -> None:
        if changed == "model.safetensors":
            config = json.loads((folder / "config.json").read_text())
            config["weights_sha256"] = sha256(folder / changed)
            (folder / "config.json").write_text(json.dumps(config))
        for path in folder.glob("*checksums.json"):
            if changed != path.name:
                digests = json.loads(path.read_text())
                for name in digests:
                    digests[name] = sha256(folder / name)
                path.write_text(json.dumps(digests))

    def restore(self, kind: str) -> None:
        """Make the files in a folder what they were."""
        folder = self.folders[kind]
        for file in folder.iterdir():
            if file.suffix in (".json", ".safetensors") and file.name not in self.files[kind]:
                file.unlink()
        for name, content in self.files[kind].items():
            (folder / name).unlink(missing_ok=True)  # it may be a pipe
            (folder / name).write_bytes(content)

    def attempt(self, forgery: Forgery) -> Outcome:
        """Load the forged folder and use what was loaded."""
        before = Snapshot(self.backbone)
        self.write(forgery)
        try:
            # Other weights than those of training are worth a warning only.
            warnings.filterwarnings("ignore", "the weights of this", UserWarning)
            outcome = self._use(forgery.kind)
        except (CheckpointError, ImageError, IncompatibleBackboneError, NotFiniteError) as error:
            outcome = Outcome("clear error", f"{error}")
        except Exception as error:
            outcome = Outcome("raw error", f"{type(error).__name__}: {error}")
        self.restore(forgery.kind)
        try:
            before.assert_unchanged()
        except AssertionError:
            self.backbone = tiny_dinov2()
            return Outcome("backbone changed", f"{outcome.verdict} {outcome.detail}")
        return outcome

    def _use(self, kind: str) -> Outcome:
        if kind == "adapter":
            adapter = HyperFlowAdapter.from_pretrained(self.folders[kind])
            task = adapter.adapt(self.backbone, pictures())
        else:
            task = AdaptedTask.from_pretrained(self.folders[kind], self.backbone)
        try:
            scores = task.scores(pictures(n_way=1)["red"])
        finally:
            task.reset()
        is_right = scores.isfinite().all() and scores.shape == (2, len(task.class_names))
        return Outcome("right" if is_right else "not finite")


class Prisoner:
    """A process that tries forgeries in limited memory. It is killed, and another one started, where one hangs."""

    def __init__(self, saved: Saved):
        self.saved = saved
        self._context = multiprocessing.get_context("fork")
        self._start()

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(self.saved, other), daemon=True)
        self._process.start()
        other.close()

    def attempt(self, forgery: Forgery) -> Outcome:
        """What becomes of a forgery, within the limits."""
        self._connection.send(copy.deepcopy(forgery))
        try:
            if self._connection.poll(TIME_LIMIT):
                return self._connection.recv()
            outcome = Outcome("hang", f"longer than {TIME_LIMIT} s")
        except EOFError:
            outcome = Outcome("raw error", "the process died")
        self.close()
        self.saved.restore(forgery.kind)
        self._start()
        return outcome

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(saved: Saved, connection: Connection) -> None:
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        connection.send(saved.attempt(connection.recv()))
