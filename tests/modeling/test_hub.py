"""Pushing to and loading from a Hub, with the real client over HTTP, each user in a process of their own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from hf_hyperflow import AdaptedTask, HyperFlowAdapter
from hf_hyperflow.modeling import hub as hub_module
from hf_hyperflow.modeling.peft_configs import bias_config
from tests.helpers.environments import ROOT
from tests.helpers.hub_server import PART_SIZE, Cut, Hub

pytestmark = pytest.mark.hub

# Runs the lines of code it is sent, one after the other, and answers with `result` or the error.
SESSION = """
import json, sys
names = {}
for line in sys.stdin:
    try:
        exec(json.loads(line), names)
        answer = {"result": names.pop("result", None)}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print("\\n@" + json.dumps(answer), flush=True)
"""

PRELUDE = """
import hashlib, os, torch
from transformers import AutoModel
from hf_hyperflow import AdaptedTask, HyperFlowAdapter

def digest(model):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()

def scores(name, **hub):
    task = AdaptedTask.from_pretrained(name, backbone, **hub)
    result = task.class_names, task.logits(pixels).tolist()
    task.reset()
    return result

torch.manual_seed(5)
pixels = torch.randn(3, 3, 28, 28)
backbone = AutoModel.from_pretrained({backbone!r}).eval()
"""


class User:
    """A process with its own cache and token. `do` runs code in it and gives back what it set `result` to."""

    def __init__(self, hub: Hub, home: Path, code: str, token: str | None = None, **env: str):
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
        inherited = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "TRANSFORMERS_OFFLINE")}
        environment = inherited | own | env | ({"HF_TOKEN": token} if token else {})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", SESSION], env=environment, **pipes)
        self.send(code)
        self.ready = False

    def send(self, code: str) -> None:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError("the process has ended")

    def ask(self, code: str) -> dict:
        if not self.ready:
            first, self.ready = self.answer(), True
            assert "error" not in first, first
        self.send(code)
        return self.answer()

    def do(self, code: str) -> object:
        answer = self.ask(code)
        assert "error" not in answer, answer
        return answer["result"]

    def fails(self, code: str) -> str:
        """The message of the `CheckpointError` that the code ends with; one short line."""
        answer = self.ask(code)
        assert answer.get("error") == "CheckpointError", answer
        assert len(answer["message"]) < 400, answer["message"]
        assert "\n" not in answer["message"]
        return answer["message"]

    def kill_at(self, cut: Cut, code: str) -> None:
        """Run code, and kill the process once its connection has come to a cut that stalls."""
        self.do("result = None")  # the process has started
        self.send(code)
        for _ in range(600):
            if cut.reached.wait(1):
                break
            assert self.process.poll() is None, "the process has ended before the cut"
        assert cut.reached.is_set()
        self.close()
        cut.times = 0
        cut.release.set()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub
        assert hub.unknown == [], "the client asked for what the small Hub of the tests does not know"


@pytest.fixture(scope="module")
def prelude(saved):
    return PRELUDE.format(backbone=str(saved / "backbone"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a backbone, of two adapters for it (the second above 10 MB) and of a task; random weights."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=28, patch_size=14)
    backbone = Dinov2Model(config).eval()
    backbone.save_pretrained(folder / "backbone")
    backbone = Dinov2Model.from_pretrained(folder / "backbone").eval()  # it is called by the path of its folder
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for name, width, depth in (("adapter", 32, 2), ("big", 256, 3)):
        adapter = HyperFlowAdapter.from_backbone(
            backbone,
            bias_config(backbone, 2),
            last_blocks=2,
            processor=processor,
            drift_width=width,
            drift_depth=depth,
            drift_heads=2,
        )
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        adapter.save_pretrained(folder / name)
    task = adapter.adapt(backbone, (torch.randn(6, 3, 28, 28), torch.tensor([0, 0, 1, 1, 2, 2])))
    assert task.theta.abs().max() > 1e-3
    task.save_pretrained(folder / "task")
    task.reset()
    assert (folder / "big/model.safetensors").stat().st_size > 2 * PART_SIZE
    return folder


@pytest.fixture(scope="module")
def alice(hub, prelude, saved, tmp_path_factory):
    """Owns everything on the Hub; has pushed the task and the big adapter."""
    user = User(hub, tmp_path_factory.mktemp("alice"), prelude, token="hf_alice")
    code = f"AdaptedTask.from_pretrained({str(saved / 'task')!r}, backbone)"
    user.do(f"task = {code}; task.push_to_hub('alice/task'); task.reset()")
    user.do(push(saved / "big", "alice/big"))
    yield user
    user.close()


@pytest.fixture(scope="module")
def guest(hub, prelude, tmp_path_factory):
    """Has no token."""
    user = User(hub, tmp_path_factory.mktemp("guest"), prelude)
    yield user
    user.close()


def digest(folder: Path) -> str:
    state = HyperFlowAdapter.from_pretrained(folder).state_dict()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest()


def push(folder: Path, repo: str, **options: object) -> str:
    """Code that loads an adapter from a folder, pushes it and gives the sha of the commit."""
    return f"result = HyperFlowAdapter.from_pretrained({str(folder)!r}).push_to_hub({repo!r}, **{options!r}).oid"


def load(repo: str, **options: object) -> str:
    return f"result = digest(HyperFlowAdapter.from_pretrained({repo!r}, **{options!r}))"


def load_anew(repo: str, cache: Path, **options: object) -> str:
    return load(repo, cache_dir=str(cache), **options)


# Round trips


def test_adapter_goes_to_the_hub_and_back_bit_for_bit(hub, alice, guest, saved):
    files = hub.files("alice/big")
    repo = hub.repos["alice/big"]
    assert len(repo.commits) == 2, "the Hub's own first commit and one of ours"
    code = {name for name in files if name.endswith(".py")}  # for trust_remote_code
    assert {"adapter.py", "configuration.py", "drift.py"} <= code
    assert set(files) - code == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "model_checksums.json",
        "preprocessor_config.json",
    }
    assert json.loads(files["config.json"])["weights_sha256"] == hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert len(hub.requests("PUT", "/lfs/")) >= 3, "in parts"
    assert guest.do(load("alice/big")) == digest(saved / "big")
    code = (
        "a = HyperFlowAdapter.from_pretrained('alice/big'); result = [a.name_or_path, a.processor.crop_size['width']]"
    )
    assert guest.do(code) == ["alice/big", 28]
    assert alice.do(load("alice/big")) == digest(saved / "big")
    downloads = hub.requests("GET", "/cdn/")
    assert downloads
    assert not any("authorization" in seen.headers for seen in downloads), "the token went to another host"


def test_task_goes_to_the_hub_and_back_bit_for_bit(hub, alice, guest, saved):
    assert set(hub.files("alice/task")) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
        "preprocessor_config.json",
        "prototypes.safetensors",
    }
    from_hub, from_folder = guest.do(f"result = [scores('alice/task'), scores({str(saved / 'task')!r})]")
    assert from_hub == from_folder
    assert from_hub[0] == ["0", "1", "2"]


def test_save_pretrained_pushes_when_asked(hub, alice, saved, tmp_path):
    code = f"a = HyperFlowAdapter.from_pretrained({str(saved / 'adapter')!r})\n"
    alice.do(code + f"a.save_pretrained({str(tmp_path / 'mine')!r}, push_to_hub=True, private=True)")
    assert hub.repos["alice/mine"].private
    for name in ("model.safetensors", "adapter.py", "README.md", "preprocessor_config.json"):
        assert hub.files("alice/mine")[name] == (tmp_path / "mine" / name).read_bytes()


PUSH_FOLDER = "from hf_hyperflow.modeling.hub import push_folder\n"


def test_push_sends_what_was_saved_and_nothing_else(hub, alice, saved, tmp_path):
    shutil.copytree(saved / "task", tmp_path / "task")
    for name in ("notes.txt", "secret.py", "secret.json", "old.safetensors", ".env", ".git/HEAD", "results/a.json"):
        (tmp_path / "task" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "task" / name).write_text("{}")
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "task/link.json").symlink_to(tmp_path / "id_rsa")
    alice.do(PUSH_FOLDER + f"push_folder({str(tmp_path / 'task')!r}, 'allowed')")
    own = {path.name for path in (saved / "task").iterdir()}
    assert set(hub.files("alice/allowed")) == own | {".gitattributes"}
    code = {path.name for path in Path(hub_module.__file__).parent.glob("*.py")} - {"__init__.py"}
    alice.do(PUSH_FOLDER + f"push_folder({str(saved / 'big')!r}, 'whole')")
    assert set(hub.files("alice/whole")) - {".gitattributes"} == {path.name for path in (saved / "big").iterdir()}
    assert code <= set(hub.files("alice/whole"))
    message = alice.fails(PUSH_FOLDER + f"push_folder({str(tmp_path / 'nothing')!r}, 'nothing')")
    assert f"no folder {tmp_path / 'nothing'}" in message
    message = alice.fails(PUSH_FOLDER + f"push_folder({str(tmp_path)!r}, 'nothing')")
    assert f"{tmp_path} holds nothing to push" in message
    assert "alice/nothing" not in hub.repos


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "prototypes.safetensors"])
def test_push_follows_no_links(hub, alice, saved, tmp_path, name):
    shutil.copytree(saved / "task", tmp_path / "task")
    (tmp_path / "task" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "task" / name).symlink_to(tmp_path / "elsewhere")
    message = alice.fails(PUSH_FOLDER + f"push_folder({str(tmp_path / 'task')!r}, 'linked')")
    assert f"{tmp_path / 'task' / name} is a link, which is not followed" in message
    assert "alice/linked" not in hub.repos


def test_push_of_other_files(hub, alice, saved, tmp_path):
    """What a collection of trajectories consists of; its folder may not be a link either."""
    for name in ("collection.json", "data/shard-0.parquet", "data/notes.txt", "other/shard-0.parquet", "data/.env"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_text("{}")
    code = PUSH_FOLDER + "push_folder({!r}, 'shards', 'collection.json', 'data/shard-*', repo_type='dataset')"
    alice.do(code.format(str(tmp_path / "all")))
    assert set(hub.files("alice/shards")) == {".gitattributes", "collection.json", "data/shard-0.parquet"}
    (tmp_path / "all/data").rename(tmp_path / "data")
    (tmp_path / "all/data").symlink_to(tmp_path / "data")
    assert f"{tmp_path / 'all/data'} is a link" in alice.fails(code.format(str(tmp_path / "all")))


def test_push_carries_no_path_of_this_machine(hub, alice, guest, saved):
    """The backbone came from a folder: its path is in no file, and the digests are those of what was sent."""
    alice.do(push(saved / "big", "alice/anonymous"))
    alice.do(PUSH_FOLDER + f"push_folder({str(saved / 'task')!r}, 'alice/anonymous-task')")
    assert str(saved).encode() in (saved / "task/adapter_config.json").read_bytes()
    assert str(saved).encode() in (saved / "big/config.json").read_bytes()
    for repo in ("alice/anonymous", "alice/anonymous-task", "alice/task", "alice/big"):
        for name, content in hub.files(repo).items():
            assert str(saved).encode() not in content, (repo, name)
    config = json.loads(hub.files("alice/anonymous-task")["adapter_config.json"])
    assert config == json.loads((saved / "task/adapter_config.json").read_text()) | {"base_model_name_or_path": ""}
    assert json.loads(hub.files("alice/anonymous")["config.json"])["backbone"]["name_or_path"] == ""
    for repo, checksums in (("alice/anonymous-task", "checksums.json"), ("alice/anonymous", "model_checksums.json")):
        files = hub.files(repo)
        for name, noted in json.loads(files.get(checksums, b"{}")).items():
            assert noted == hashlib.sha256(files[name]).hexdigest(), name
    assert "name it yourself" in hub.files("alice/anonymous-task")["README.md"].decode()
    assert guest.do(load("alice/anonymous")) == digest(saved / "big")
    assert guest.do("result = scores('alice/anonymous-task')") == guest.do("result = scores('alice/task')")


def test_the_released_adapter_is_pushed_as_it_is(hub, alice, tmp_path):
    """Its backbone has no owner, so the card names no base model. A card that the Hub refuses is named."""
    released = ROOT / "model_cards" / "hyperflow-vit-s14-70"
    alice.do(PUSH_FOLDER + f"push_folder({str(released)!r}, 'alice/hyperflow-vit-s14-70')")
    for name in ("README.md", "model.safetensors", "preprocessor_config.json", "training.json"):
        assert hub.files("alice/hyperflow-vit-s14-70")[name] == (released / name).read_bytes(), name
    for name in ("config.json", "model.safetensors"):
        shutil.copy(released / name, tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: hf_hyperflow\nbase_model: vit-s14-focus-70\n---\n")
    message = alice.fails(PUSH_FOLDER + f"push_folder({str(tmp_path)!r}, 'alice/hyperflow-vit-s14-70')")
    assert 'refuses the metadata at the top of its README.md: "base_model" with value "vit-s14-focus-70"' in message
    assert "connection" not in message


UPLOAD = """
from huggingface_hub import create_repo, upload_folder
create_repo({repo!r}, exist_ok=True)
upload_folder(repo_id={repo!r}, folder_path={folder!r})
"""

FIND_RELEASED = """
from hf_hyperflow.demo.released import ADAPTER, BACKBONE, find_released
os.environ["HYPERFLOW_WEIGHTS"] = "alice"
try:
    released = AutoModel.from_pretrained(find_released(BACKBONE))
    adapter = HyperFlowAdapter.from_pretrained(find_released(ADAPTER))
finally:
    del os.environ["HYPERFLOW_WEIGHTS"]
result = adapter.adapt(released, (torch.randn(4, 3, 70, 70), torch.tensor([0, 0, 1, 1]))).class_names
"""


def test_the_released_pair_comes_from_an_owner_on_the_hub(hub, alice, guest):
    """Uploaded as by `hf upload`, from the folders as they are. Other weights are refused."""
    for name in ("vit-s14-focus-70", "hyperflow-vit-s14-70"):
        alice.do(UPLOAD.format(repo=f"alice/{name}", folder=str(ROOT / "model_cards" / name)) + "result = None")
    assert guest.do(FIND_RELEASED) == ["0", "1"]
    repo = hub.repos["alice/vit-s14-focus-70"]
    weights = hashlib.sha256(b"other weights").hexdigest()
    hub.lfs[weights] = b"other weights"
    repo.add("main", repo.commits[repo.branches["main"]] | {"model.safetensors": {"lfs": weights}})
    assert "is not that of the released vit-s14-focus-70" in guest.fails(FIND_RELEASED)


def test_push_keeps_the_name_of_a_backbone_on_the_hub(hub, alice, saved, tmp_path):
    shutil.copytree(saved / "task", tmp_path / "task")
    config = json.loads((saved / "task/adapter_config.json").read_text()) | {"base_model_name_or_path": "me/vit"}
    (tmp_path / "task/adapter_config.json").write_text(json.dumps(config))
    alice.do(PUSH_FOLDER + f"push_folder({str(tmp_path / 'task')!r}, 'alice/named')")
    assert hub.files("alice/named")["adapter_config.json"] == (tmp_path / "task/adapter_config.json").read_bytes()


def test_pushing_the_same_again_sends_and_commits_nothing(hub, alice, saved):
    first = alice.do(push(saved / "adapter", "alice/same"))
    before, commits = len(hub.requests("PUT", "")), len(hub.repos["alice/same"].commits)
    assert alice.do(push(saved / "adapter", "alice/same")) == first
    assert len(hub.requests("PUT", "")) == before
    assert len(hub.repos["alice/same"].commits) == commits


def test_revisions(hub, alice, guest, saved):
    old, new = digest(saved / "adapter"), digest(saved / "big")
    sha = alice.do(push(saved / "adapter", "alice/pinned"))
    alice.do("from huggingface_hub import create_tag; create_tag('alice/pinned', tag='v1')")
    assert guest.do(load("alice/pinned")) == old
    alice.do(push(saved / "big", "alice/pinned"))
    alice.do(push(saved / "adapter", "alice/pinned", revision="trial/1", commit_message="Try it"))
    assert guest.do(load("alice/pinned")) == new
    assert guest.do(load("alice/pinned", revision=sha)) == old
    assert guest.do(load("alice/pinned", revision="v1")) == old
    assert guest.do(load("alice/pinned", revision="trial/1")) == old
    assert guest.do(load("alice/pinned", revision="main")) == new
    message = guest.fails(load("alice/pinned", revision="v9"))
    assert "alice/pinned has no revision 'v9'" in message


def test_a_card_somebody_wrote_on_the_hub_is_kept(hub, alice, saved):
    alice.do(push(saved / "adapter", "alice/described"))
    card = hub.files("alice/described")["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["library_name"] == "hf_hyperflow"
    assert data["pipeline_tag"] == "image-classification"
    assert "few-shot-learning" in data["tags"]
    own = card.replace("<!-- Written by", "<!-- Was written by") + "\nMy own words.\n"
    upload = f"upload_file(path_or_fileobj={own.encode()!r}, path_in_repo='README.md', repo_id='alice/described')"
    alice.do("from huggingface_hub import upload_file; " + upload)
    alice.do(push(saved / "big", "alice/described"))
    assert hub.files("alice/described")["README.md"].decode() == own
    assert hub.files("alice/described")["model.safetensors"] == (saved / "big/model.safetensors").read_bytes()


# Who may do what


def test_private_repository(hub, alice, guest, saved, tmp_path):
    alice.do(push(saved / "adapter", "alice/secret", private=True))
    assert hub.repos["alice/secret"].private
    assert alice.do(load_anew("alice/secret", tmp_path / "own")) == digest(saved / "adapter")
    for message in (
        guest.fails(load("alice/secret")),
        guest.fails(load("alice/secret", token="hf_bob")),
        guest.fails("scores('alice/secret')"),
    ):
        assert "alice/secret" in message
        assert "private" in message
        assert "hf auth login" in message
    assert guest.do(load("alice/secret", token="hf_alice")) == digest(saved / "adapter")


def test_wrong_token(hub, guest, saved, tmp_path):
    for code in (
        load_anew("alice/task", tmp_path, token="hf_expired"),
        f"scores('alice/task', token='hf_expired', cache_dir={str(tmp_path)!r})",
        push(saved / "adapter", "alice/other", token="hf_expired"),
    ):
        message = guest.fails(code)
        assert "refused the token" in message
        assert "/settings/tokens" in message
        assert "hf auth login" in message
    assert "alice/other" not in hub.repos


def test_missing_repository(guest):
    message = guest.fails(load("alice/nothing"))
    assert "no folder alice/nothing and no such repository" in message
    assert "Check the name" in message
    assert "there is no folder ./adapters/mine" in guest.fails(load("./adapters/mine"))


def test_repositories_of_another_kind(hub, alice, guest, tmp_path):
    alice.do("backbone.push_to_hub('alice/backbone')")
    message = guest.fails(load("alice/backbone"))
    assert "alice/backbone" in message
    assert "does not describe a HyperFlow adapter" in message
    weights = hub.repos["alice/backbone"].commits[hub.repos["alice/backbone"].branches["main"]]["model.safetensors"]
    assert not hub.requests("GET", f"/cdn/{weights['lfs']}"), "fetched the weights before looking at the config"
    message = guest.fails(load("alice/task"))
    assert "alice/task" in message
    assert "AdaptedTask.from_pretrained" in message
    assert "alice/big holds no readable HyperFlow task" in guest.fails("scores('alice/big')")


def test_push_needs_a_token_that_may_write(hub, alice, guest, saved):
    message = guest.fails(push(saved / "adapter", "alice/forbidden"))
    assert "cannot push alice/forbidden" in message
    assert "hf auth login" in message
    for repo, token in (("alice/forbidden", "hf_alice_read"), ("alice/forbidden", "hf_bob"), ("alice/task", "hf_bob")):
        message = guest.fails(push(saved / "adapter", repo, token=token))
        assert f"cannot push {repo}" in message
        assert "may not write" in message
    assert "alice/forbidden" not in hub.repos
    assert "model.safetensors" not in hub.files("alice/task")


# Interruptions


def other_weights(saved: Path, folder: Path, seed: int) -> Path:
    """The big adapter with weights that the Hub has not seen."""
    adapter = HyperFlowAdapter.from_pretrained(saved / "big")
    torch.manual_seed(seed)
    torch.nn.init.normal_(next(p for p in adapter.parameters() if p.ndim == 2))
    adapter.save_pretrained(folder)
    return folder


def test_upload_cut_at_the_commit(hub, alice, guest, saved, tmp_path):
    folder = other_weights(saved, tmp_path / "adapter", seed=9)
    sha = alice.do(push(saved / "adapter", "alice/cut"))
    hub.cut("POST", "/api/models/alice/cut/commit/", after=100)
    before = len(hub.requests("PUT", ""))
    message = alice.fails(push(folder, "alice/cut"))
    assert "connection broke" in message
    assert "Try again" in message
    assert hub.repos["alice/cut"].branches["main"] == sha
    assert guest.do(load_anew("alice/cut", tmp_path / "between")) == digest(saved / "adapter")
    between = len(hub.requests("PUT", ""))
    assert between > before
    alice.do(push(folder, "alice/cut"))
    assert len(hub.requests("PUT", "")) == between, "the weights were there already"
    assert guest.do(load_anew("alice/cut", tmp_path / "after")) == digest(folder)


def test_upload_cut_in_the_middle_of_the_weights_goes_on(hub, alice, guest, saved, tmp_path):
    folder = other_weights(saved, tmp_path / "adapter", seed=1)
    cut = hub.cut("PUT", "/lfs/", after=PART_SIZE // 2)
    alice.do(push(folder, "alice/bumpy"))
    assert cut.reached.is_set()
    assert guest.do(load("alice/bumpy")) == digest(folder)


def test_upload_that_never_gets_through_changes_nothing(hub, alice, saved, tmp_path):
    folder = other_weights(saved, tmp_path / "adapter", seed=2)
    commits = dict(hub.repos["alice/task"].commits)
    cut = hub.cut("PUT", "/lfs/", after=PART_SIZE // 2, times=100)
    no_waiting = "import time; sleep = time.sleep; time.sleep = lambda seconds: None\n"
    message = alice.fails(no_waiting + push(folder, "alice/task"))
    cut.times = 0
    alice.do("time.sleep = sleep")
    assert "cannot push alice/task" in message
    assert "nothing was changed" in message
    assert hub.repos["alice/task"].commits == commits


def test_upload_killed_in_the_middle(hub, guest, prelude, saved, tmp_path):
    folder = other_weights(saved, tmp_path / "adapter", seed=3)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    cut = hub.cut("PUT", f"/lfs/{weights}", after=PART_SIZE // 2, times=1000, stall=True)
    first = User(hub, tmp_path / "home", prelude, token="hf_alice")
    first.kill_at(cut, push(folder, "alice/killed"))
    assert set(hub.files("alice/killed")) == {".gitattributes"}
    assert weights not in hub.lfs
    assert "alice/killed" in guest.fails(load("alice/killed"))
    guest.do(push(folder, "alice/killed", token="hf_alice"))
    assert guest.do(load("alice/killed")) == digest(folder)


def test_download_cut_in_the_middle_resumes_with_a_range_request(hub, alice, guest, saved, tmp_path):
    folder = other_weights(saved, tmp_path / "adapter", seed=4)
    alice.do(push(folder, "alice/long"))
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    cut = hub.cut("GET", f"/cdn/{weights}", after=11_000_000)
    assert guest.do(load("alice/long")) == digest(folder)
    assert cut.reached.is_set()
    ranges = [seen.headers.get("range") for seen in hub.requests("GET", f"/cdn/{weights}")]
    assert ranges == [None, "bytes=10485760-"], "the client keeps what came in whole chunks of 10 MiB"


def test_download_that_never_gets_through_is_never_loaded(hub, guest, saved, tmp_path):
    weights = hashlib.sha256((saved / "big/model.safetensors").read_bytes()).hexdigest()
    cut = hub.cut("GET", f"/cdn/{weights}", after=9_000_000, times=100)
    no_waiting = "import time; sleep = time.sleep; time.sleep = lambda seconds: None\n"
    message = guest.fails(no_waiting + load_anew("alice/big", tmp_path))
    cut.times = 0
    guest.do("time.sleep = sleep")
    assert "cannot load alice/big" in message
    assert "connection broke" in message
    message = guest.fails(load_anew("alice/big", tmp_path, local_files_only=True))
    assert "the cache does not hold all of alice/big" in message
    assert guest.do(load_anew("alice/big", tmp_path)) == digest(saved / "big")


def test_download_killed_in_the_middle_is_never_loaded(hub, guest, prelude, saved, tmp_path):
    weights = hashlib.sha256((saved / "big/model.safetensors").read_bytes()).hexdigest()
    cut = hub.cut("GET", f"/cdn/{weights}", after=11_000_000, times=1000, stall=True)
    first = User(hub, tmp_path / "home", prelude)
    first.kill_at(cut, load_anew("alice/big", tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("*.incomplete")), "killed in the middle, or this test tests nothing"
    message = guest.fails(load_anew("alice/big", tmp_path / "cache", local_files_only=True))
    assert "the cache does not hold all of alice/big" in message
    before = len(hub.requests("GET", "/alice/big/resolve/"))
    assert guest.do(load_anew("alice/big", tmp_path / "cache")) == digest(saved / "big")
    assert len(hub.requests("GET", "/alice/big/resolve/")) == before, "what had come in whole was fetched again"


def test_damage_on_the_way_is_noticed(hub, alice, guest, saved):
    alice.do(push(saved / "adapter", "alice/damaged"))
    repo = hub.repos["alice/damaged"]
    files = repo.commits[repo.branches["main"]]
    data = bytearray(hub.content(files["model.safetensors"]))
    data[-1] ^= 1
    other = hashlib.sha256(data).hexdigest()
    hub.lfs[other] = bytes(data)
    files["model.safetensors"] = {"lfs": other}
    message = guest.fails(load("alice/damaged"))
    assert "damaged or incomplete" in message
    assert "model.safetensors" in message


def test_json_that_was_changed_on_the_way_is_noticed(hub, alice, guest, saved, tmp_path):
    """Although it is as long as what the Hub announced, and is JSON. What the cache then holds can be replaced."""
    alice.do(push(saved / "adapter", "alice/changed"))
    alice.do(PUSH_FOLDER + f"push_folder({str(saved / 'task')!r}, 'alice/changed-task')")
    for repo, name, loading in (
        ("alice/changed", "config.json", "HyperFlowAdapter.from_pretrained"),
        ("alice/changed", "preprocessor_config.json", "HyperFlowAdapter.from_pretrained"),
        ("alice/changed-task", "adapter_config.json", "scores"),
        ("alice/changed-task", "checksums.json", "scores"),
    ):
        sent = hub.files(repo)[name]
        hub.altered[name] = sent.replace(b"2", b"3")
        assert hub.altered[name] != sent
        cache = str(tmp_path / name)
        for _ in range(2):  # from the Hub, and then from the cache
            message = guest.fails(f"{loading}({repo!r}, cache_dir={cache!r})")
            assert f"{name} of {repo} is damaged" in message
            assert "force_download=True" in message
        del hub.altered[name]
        guest.fails(f"{loading}({repo!r}, cache_dir={cache!r})")
        guest.do(f"{loading}({repo!r}, cache_dir={cache!r}, force_download=True)")
        guest.do(f"{loading}({repo!r}, cache_dir={cache!r})")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_the_cache_is_named_with_the_cure(hub, alice, guest, saved, tmp_path, name):
    alice.do(push(saved / "adapter", "alice/worn"))
    guest.do(load_anew("alice/worn", tmp_path))
    [blob] = [path.resolve() for path in tmp_path.glob(f"**/snapshots/*/{name}")]
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.write_bytes(content)
    message = guest.fails(load_anew("alice/worn", tmp_path))
    assert f"{name} of alice/worn is damaged" in message
    assert "force_download=True" in message
    assert str(blob) in message
    guest.do(load_anew("alice/worn", tmp_path, force_download=True))
    assert guest.do(load_anew("alice/worn", tmp_path)) == digest(saved / "adapter")


# A server that never ends

HURRY = """
import time
import hf_hyperflow.modeling.hub as hub
hub.DEADLINE, hub.SLOWEST_UPLOAD = 2, float("inf")
start = time.monotonic()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stall", "drip"])
def test_a_server_that_stalls_does_not_hang_for_ever(hub, alice, prelude, saved, tmp_path, how):
    """Neither the client, at whatever it asks for, nor at the end the process, whose other threads still wait."""
    user = User(hub, tmp_path, HURRY + prelude)
    cuts = []
    try:
        user.do("result = None")
        parts = ["/api/models/alice/big/revision/", "/api/models/alice/big/tree/", "config.json", "/cdn/"]
        for number, part in enumerate(parts):
            cuts.append(hub.cut("GET", part, times=1000, after=1, **{how: True}))
            message = user.fails("start = time.monotonic()\n" + load_anew("alice/big", tmp_path / str(number)))
            assert "cannot load alice/big" in message
            assert "it took longer than 2 s" in message
            assert user.do("result = time.monotonic() - start") < 8
            cuts[-1].times = 0
        if how == "stall":
            code = f"start = time.monotonic(); hub.push_folder({str(saved / 'task')!r}, 'alice/slow', token='hf_alice')"
            for method, part in [("POST", "/api/repos/create"), ("POST", "/preupload/"), ("POST", "/commit/")]:
                cuts.append(hub.cut(method, part, times=1000, after=1, stall=True))
                message = user.fails(code)
                assert "cannot push alice/slow: it took longer than 2 s" in message
                assert user.do("result = time.monotonic() - start") < 8
                cuts[-1].times = 0
            assert set(hub.files("alice/slow")) == {".gitattributes"}
        user.process.stdin.close()
        user.process.wait(30)
    finally:
        user.close()
        for cut in cuts:
            cut.release.set()


# Offline


def test_offline(hub, alice, guest, prelude, saved, tmp_path_factory):
    home = tmp_path_factory.mktemp("traveller")
    alice.do(push(saved / "adapter", "alice/cached"))
    caches = {"cache_dir": str(home / "hub")}
    guest.do(load("alice/cached", **caches))
    task = guest.do(f"result = scores('alice/task', **{caches!r})")
    traveller = User(hub, home, prelude, HF_HUB_OFFLINE="1")
    before = len(hub.seen)
    try:
        assert traveller.do(load("alice/cached")) == digest(saved / "adapter")
        assert traveller.do("result = scores('alice/task')") == task
        cold = traveller.fails(load("alice/big"))
        cold_task = traveller.fails("scores('alice/no-task')")
        pushed = traveller.fails(push(saved / "adapter", "alice/cached"))
    finally:
        traveller.close()
    assert "HF_HUB_OFFLINE" in cold
    assert "the cache does not hold all of alice/big" in cold
    assert "alice/no-task" in cold_task
    assert "Go online to push" in pushed
    assert len(hub.seen) == before


def test_no_connection(hub, guest, prelude, saved, tmp_path_factory):
    """What is in the cache loads; what is not ends with a word about the connection."""
    home = tmp_path_factory.mktemp("cut-off")
    task = guest.do(f"result = scores('alice/task', cache_dir={str(home / 'hub')!r})")
    user = User(hub, home, prelude, token="hf_alice", HF_ENDPOINT="http://127.0.0.1:9")
    try:
        assert user.do("result = scores('alice/task')") == task
        for code in (load("alice/big"), "scores('alice/big')", push(saved / "adapter", "alice/big")):
            message = user.fails(code)
            assert "http://127.0.0.1:9 cannot be reached" in message
            assert "alice/big" in message
    finally:
        user.close()


# Without this package

PLAIN = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_hyperflow":
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Blocker())
import torch
from peft import PeftModel
from transformers import AutoModel

torch.manual_seed(5)
pixels = torch.randn(3, 3, 28, 28)
start = lambda: AutoModel.from_pretrained({backbone!r}).eval()
features = lambda model: model(pixels).last_hidden_state[:, 0].tolist()
torch.set_grad_enabled(False)
"""


def test_peft_and_transformers_load_a_pushed_task_without_this_package(hub, alice, saved, tmp_path):
    plain = User(hub, tmp_path, PLAIN.format(backbone=str(saved / "backbone")))
    try:
        assert plain.ask("import hf_hyperflow")["error"] == "ModuleNotFoundError"
        bare = plain.do("result = features(start())")
        by_peft = plain.do("result = features(PeftModel.from_pretrained(start(), 'alice/task').eval())")
        code = "model = start(); model.load_adapter('alice/task'); result = features(model.eval())"
        by_transformers = plain.do(code)
        modules = plain.do("result = [name for name in sys.modules if name.startswith('hf_hyperflow')]")
    finally:
        plain.close()
    backbone = Dinov2Model.from_pretrained(saved / "backbone").eval()
    task = AdaptedTask.from_pretrained(saved / "task", backbone)
    torch.manual_seed(5)
    with torch.no_grad():
        own = backbone(torch.randn(3, 3, 28, 28)).last_hidden_state[:, 0]
    task.reset()
    assert modules == []
    assert not torch.allclose(torch.tensor(bare), own, atol=1e-3), "the adapter does something"
    torch.testing.assert_close(torch.tensor(by_peft), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(by_transformers), own, rtol=1e-5, atol=1e-6)
