"""The command line as people meet it: every command in a process of its own."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest
from peft import PeftModel
from transformers import AutoModel

from hf_hyperflow import AdaptedTask, HyperFlowAdapter, cli
from hf_hyperflow.modeling.checksums import sha256
from hf_hyperflow.modeling.peft_configs import layernorm_config
from tests.helpers.hub_server import Hub
from tests.helpers.tiny import picture, pictures, tiny_adapter, tiny_dinov2, tiny_vit, write_pictures


@dataclass
class Outcome:
    code: int
    out: str
    err: str


class Command:
    """`hyperflow ...` in a process forked from one that has imported the package: that takes seconds."""

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(
        ["hf_hyperflow.cli", "hf_hyperflow.info", "transformers.models.dinov2.modeling_dinov2", "pydantic"]
    )

    def __init__(self, folder: Path, *arguments: str | Path, missing: str | None = None):
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}"
        self.output.mkdir()
        arguments = ["hyperflow", *map(str, arguments)]
        self.process = self._context.Process(target=run, args=(self.output, folder, arguments, missing))
        self.process.start()

    def end(self) -> Outcome:
        self.process.join(60)
        out, err = [(self.output / name).read_bytes().decode(errors="replace") for name in ("out", "err")]
        return Outcome(self.process.exitcode, out, err)


def run(output: Path, cwd: Path, arguments: list[str], missing: str | None) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    sys.argv = arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background inherit that it is off
    if missing is not None:
        sys.modules[missing] = None  # what makes an import fail
    cli.main()


@pytest.fixture(scope="module")
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


def fails(outcome: Outcome, *words: str | Path) -> None:
    """One line on stderr, after warnings if any, that says `words`; nothing on stdout, exit code 1."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    *warnings, error = outcome.err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings), outcome.err
    assert error.startswith("error: ")
    for word in words:
        assert str(word) in error


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.startswith("output-")}


@pytest.mark.slow
def test_the_installed_command(saved, tmp_path):
    """From pictures to predictions, as typed into a shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    hyperflow = [Path(sys.executable).with_name("hyperflow")]
    module = [sys.executable, "-m", "hf_hyperflow"]

    def shell(command: list[str | Path], *arguments: str | Path) -> str:
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "no progress bars where nobody watches"
        return done.stdout

    said = shell(
        hyperflow,
        *("adapt", "--adapter", saved / "adapter", "--backbone", saved / "backbone"),
        *("--support", saved / "pictures", "--output_dir", "my/task", "--early_stopping"),
    )
    assert "Adapted to 3 classes (blue, green, red) from 9 images in " in said
    assert "leave-one-out accuracy" in said
    assert "Saved my/task" in said
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(saved / "backbone"), tmp_path / "my/task")
    assert model.peft_config["default"].peft_type == "BEFT"
    images = sorted((saved / "new").iterdir())
    records = json.loads(shell(module, "predict", "--task", "my/task", "--json", "--top_k", "2", *images))
    assert len(records) == 3
    for record in records:
        assert record["predictions"][0]["label"] == Path(record["image"]).stem
        assert len(record["predictions"]) == 2


def test_predictions_are_those_of_the_library(saved, hyperflow):
    images = sorted(str(p) for p in (saved / "new").iterdir())
    backbone = AutoModel.from_pretrained(saved / "backbone").eval()
    expected = AdaptedTask.from_pretrained(saved / "task", backbone)(images)
    printed = hyperflow("predict", "--task", saved / "task", "--top_k", "9", "--json", *images)
    assert printed.code == 0, printed.err
    records = json.loads(printed.out)
    assert [record["image"] for record in records] == images
    for record, predictions in zip(records, expected, strict=True):
        scores = {p["label"]: p["score"] for p in record["predictions"]}
        assert scores == pytest.approx({p["label"]: p["score"] for p in predictions}, abs=1e-5)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)

    # The other formats say the same of the best class, which is ahead by far in these pictures of one colour each.
    rows = list(csv.DictReader(io.StringIO(hyperflow("predict", "--task", saved / "task", "--csv", *images).out)))
    assert len(rows) == len(images)
    for row, image, predictions in zip(rows, images, expected, strict=True):
        best, second = predictions[:2]
        assert best["score"] > second["score"] + 0.01
        assert (row["image"], row["rank"], row["label"]) == (image, "1", best["label"])
        assert float(row["score"]) == pytest.approx(best["score"], abs=1e-5)
    lines = hyperflow("predict", "--task", saved / "task", images[0], images[0]).out.splitlines()
    assert len(lines) == 2
    for line in lines:
        name, label, score = line.rsplit(" ", 2)
        assert (name, label) == (f"{images[0]}:", expected[0][0]["label"])
        assert float(score.removesuffix("%")) == pytest.approx(100 * expected[0][0]["score"], abs=0.06)


def test_dashes_are_underscores(hyperflow, adapting, tmp_path):
    """`--n-steps` is `--n_steps`; names of files and folders keep their dashes."""
    arguments = ["--n-steps", "2", "--output-dir", "my-task", "--skip-bad", "--early-stopping"]
    done = hyperflow(*adapting, *arguments)
    assert done.code == 0, done.err
    assert names(tmp_path) == {"my-task"}
    done = hyperflow("predict", "--task", "my-task", "--top-k=2", "--json", adapting[-1] / "red" / "0.png")
    [record] = json.loads(done.out)
    assert len(record["predictions"]) == 2
    said = hyperflow("adapt", "--help").out
    for option in ("--n_steps", "--skip_bad", "--early_stopping", "--output_dir"):
        assert option in said
    assert "--n-steps" not in said


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("quickstart", "rich", "benchmark"),
        ("quickstart", "sklearn", "benchmark"),
        ("benchmark", "matplotlib", "benchmark"),
        ("demo", "gradio", "demo"),
        ("demo", "matplotlib", "demo"),
    ],
)
def test_a_missing_extra_is_named(hyperflow, tmp_path, command, missing, extra):
    done = hyperflow(command, missing=missing)
    expected = f'error: the {command} needs {missing}, which is not installed: pip install "hf-hyperflow[{extra}]"\n'
    assert (done.code, done.out, done.err) == (1, "", expected)
    assert names(tmp_path) == set()


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
    good = support / "red" / "0.png"
    fails(hyperflow("predict", "--task", "task", good, bad, good), bad)
    found = hyperflow("predict", "--task", "task", "--skip_bad", "--json", good, bad, good)
    assert [record["image"] for record in json.loads(found.out)] == [str(good), str(good)]
    assert f"skipped: {bad}" in found.err
    found = hyperflow("predict", "--task", "task", "--skip_bad", bad, "nowhere.png")
    assert found.code == 1
    assert found.err.splitlines()[-1] == "error: none of the images can be read."


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
    fails(hyperflow(*adapting, "--backbone", tmp_path / "nowhere", "--output", "task"), "nowhere", "cannot load the")
    fails(hyperflow(*adapting, "--adapter", saved / "task", "--output", "task"), "It is an adapted task")
    fails(hyperflow(*adapting, "--adapter", saved / "backbone", "--output", "task"), "not describe a HyperFlow adapter")
    fails(hyperflow(*adapting, "--solver", "rk5", "--output", "task"), "rk5")
    fails(hyperflow(*adapting, "--output", saved / "adapter"), "holds a model (config.json)")
    assert names(tmp_path) == set()
    image = saved / "new/red.png"
    fails(hyperflow("predict", "--task", saved / "task", "--backbone", saved / "vit", image), "ViTModel", "no modules")
    fails(hyperflow("predict", "--task", saved / "adapter", image), "is not an adapted task")
    fails(hyperflow("predict", "--task", saved / "task", "nowhere.png"), "nowhere.png", "there is no file")


def test_formats_that_cannot_be_written(hyperflow, adapting, saved, tmp_path):
    backbone = AutoModel.from_pretrained(saved / "backbone")
    tiny_adapter(backbone, layernorm_config(backbone, 2)).save_pretrained(tmp_path / "norms")
    found = hyperflow(*adapting, "--adapter", "norms", "--output", "task", "--format", "lora")
    fails(found, "a LN_TUNING adapter cannot be written as LoRA")
    assert names(tmp_path) == {"norms"}


def test_wrong_usage(hyperflow, adapting, saved, tmp_path):
    image = saved / "new/red.png"
    for arguments, words in [
        (["adap"], "No such command"),
        (["adapt", "--adapter", "x"], "Missing option"),
        ([*adapting, "--output", "task", "--format", "onnx"], "'lora'"),
        ([*adapting, "--output", "task", "--n_steps", "0"], "n_steps"),
        (["predict", "--task", saved / "task"], "IMAGES"),
        (["predict", "--task", saved / "task", "--json", "--csv", image], "--json and --csv"),
        (["predict", "--task", saved / "task", "--top_k", "0", image], "top_k"),
    ]:
        found = hyperflow(*arguments)
        assert found.code == 2, found
        assert words in found.err
        assert "Traceback" not in found.err
    assert names(tmp_path) == set()


def test_help_everywhere(hyperflow):
    commands = ["adapt", "predict", "info", "push", "quickstart", "benchmark", "demo"]
    top = hyperflow("--help")
    assert top.code == 0
    assert all(command in top.out for command in commands)
    for command in commands:
        found = hyperflow(command, "--help")
        assert found.code == 0
        assert f"hyperflow {command}" in found.out
        assert "--help" in found.out
    assert "Usage" in hyperflow().out + hyperflow().err


def test_debug_shows_where(hyperflow, saved):
    found = hyperflow("--debug", "predict", "--task", saved / "task", "nowhere.png")
    assert found.code == 1
    assert "Traceback (most recent call last)" in found.err
    assert "ImageError: nowhere.png: there is no file" in found.err


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


def test_file_names_of_any_bytes(hyperflow, saved, tmp_path):
    """A file name that is no UTF-8 is printed as it is."""
    PIL.Image.open(saved / "new/red.png").save(os.fsencode(tmp_path) + b"/\xff.png", format="png")
    found = hyperflow("predict", "--task", saved / "task", os.fsdecode(b"\xff.png"))
    assert found.code == 0, found.err
    assert (tmp_path / "output-0" / "out").read_bytes().startswith(b"\xff.png: red ")


# Names and tokens that are not for the terminal

ESCAPE, OVERRIDE = "\x1b[31m\x9b2J", "\u202e"


def is_printable(text: str) -> bool:
    return not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") or c == OVERRIDE for c in text.replace("\n", ""))


@pytest.fixture
def hostile_task(saved, hyperflow, adapting, tmp_path):
    """A task whose labels are formulas; and a hostile name of an image."""
    labels = [f"dog{OVERRIDE}gnp.exe", "=1+1", "-2", "@SUM(A1)", "+3"]
    for number, label in enumerate(labels):
        folder = tmp_path / "support" / label
        folder.mkdir(parents=True)
        picture(number).save(folder / "0.png")
    done = hyperflow(*adapting, "--support", tmp_path / "support", "--output", "task")
    assert done.code == 0, done.err
    name = f"=cmd{ESCAPE}{OVERRIDE}.png"
    picture(0).save(tmp_path / name)
    return sorted(labels), name


@pytest.mark.parametrize("label", [f"cat{ESCAPE}", "two\nlines\u2028three"])
def test_control_characters_in_class_names_are_refused(saved, hyperflow, adapting, tmp_path, label):
    for number, name in enumerate((label, "plain")):
        folder = tmp_path / "support" / name
        folder.mkdir(parents=True)
        picture(number).save(folder / "0.png")
    refused = hyperflow(*adapting, "--support", tmp_path / "support", "--output", "task")
    fails(refused, "control characters", "Rename the class")
    assert is_printable(refused.err)


def test_control_characters_do_not_reach_the_terminal(hyperflow, hostile_task):
    labels, name = hostile_task
    arguments = ["predict", "--task", "task", "--top_k", "9", name]
    for arguments_of_format in (arguments, [*arguments, "--csv"]):
        said = hyperflow(*arguments_of_format)
        assert said.code == 0, said.err
        assert is_printable(said.out)
        assert "=cmd\\x1b[31m\\x9b2J\\u202e.png" in said.out
    failed = hyperflow("predict", "--task", "task", f"nowhere{name}")
    fails(failed, "nowhere=cmd\\x1b[31m\\x9b2J\\u202e.png")
    assert is_printable(failed.err)
    said = hyperflow("--debug", "predict", "--task", f"no{ESCAPE}where", name)
    assert said.code == 1
    assert is_printable(said.err)
    [record] = json.loads(hyperflow(*arguments, "--json").out)
    assert record["image"] == name
    assert sorted(prediction["label"] for prediction in record["predictions"]) == labels


def test_formulas_are_text_in_csv(hyperflow, hostile_task):
    labels, name = hostile_task
    said = hyperflow("predict", "--task", "task", "--top_k", "9", "--csv", name)
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert len(rows) == len(labels)
    assert {row["label"] for row in rows} == {"dog\\u202egnp.exe", "'=1+1", "'-2", "'@SUM(A1)", "'+3"}
    assert {row["image"][:5] for row in rows} == {"'=cmd"}
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    assert "apostrophe" in hyperflow("predict", "--help").out


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain", "plain"),
        ("日本語 é 👩\u200d🔬", "日本語 é 👩\u200d🔬"),
        ("a\tb\r\n", "a\\tb\\r\\n"),
        ("\udcff.png", "\udcff.png"),  # a byte of a file name that is no UTF-8
        ("\udcc2\udc9b", "\\udcc2\\udc9b"),  # bytes that together are a control character
        ("\ud800", "\\ud800"),
        ("\u2066\u0085", "\\u2066\\x85"),
    ],
)
def test_what_terminals_print_is_left(text, printed):
    assert cli._make_printable(text) == printed


def name_backbone(task: Path, name: str) -> None:
    """Put another name into the PEFT config of a saved task, and its new digest into the list of digests."""
    path, checksums = task / "adapter_config.json", task / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    digests = json.loads(checksums.read_text())
    checksums.write_text(json.dumps(digests | {path.name: sha256(path)}))


def test_a_task_without_the_name_of_its_backbone(saved, hyperflow, tmp_path):
    """As it comes from the Hub, where nobody has this folder."""
    shutil.copytree(saved / "task", tmp_path / "task")
    name_backbone(tmp_path / "task", "")
    image = saved / "new/red.png"
    fails(hyperflow("predict", "--task", "task", image), "task does not name its backbone", "give it with --backbone")
    assert "unnamed" in hyperflow("info", "task").out
    assert hyperflow("predict", "--task", "task", "--backbone", saved / "backbone", image).code == 0
    name_backbone(tmp_path / "task", "/somebody/elses/folder")
    fails(hyperflow("predict", "--task", "task", image), "/somebody/elses/folder", "name it with --backbone")


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
