"""The numbers in the cards are those of the files beside the released adapter, and one command makes both."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_hyperflow.demo.released import ADAPTER, find_released
from tests.benchmark.test_runner import ENVIRONMENT, with_known_costs
from tests.helpers.tiny import tiny_dinov2, tiny_processor
from tests.helpers.training_runs import SCRIPTS, make_images

sys.path.insert(0, str(SCRIPTS))  # the scripts of training/ find each other so
from training.card.build import FIGURES, FILES, FINE_TUNING_EPISODES, read, write_cards
from training.card.tables import filled, methods_table

ROOT = SCRIPTS.parent
DRAWN = {name for names in FIGURES.values() for name in names}


@pytest.fixture(scope="module")
def adapter() -> Path:
    return Path(find_released(ADAPTER))


@pytest.mark.parametrize("card", ["README.md", "training/README.md", f"model_cards/{ADAPTER}/README.md"])
def test_tables_are_those_of_the_results(card, adapter, tmp_path):
    copy = tmp_path / adapter.name / "README.md"
    copy.parent.mkdir()
    shutil.copy(ROOT / card, copy)
    assert "<!-- table: " in copy.read_text()
    own = (ROOT / card).parent == adapter
    write_cards([copy], copy.parent if own else adapter, read(adapter / "results"))
    assert copy.read_text() == (ROOT / card).read_text()


def test_model_index_has_every_domain_and_number_of_shots(adapter):
    results = json.loads((adapter / "results" / FILES["results"]).read_text())
    expected = {
        (r["domain"], f"{r['n_way']:g}-way {r['n_shot']}-shot", kind): round(r[key], 2)
        for r in results["records"]
        for kind, key in (("accuracy", "accuracy"), ("gain", "diff_vs_direct"))
        if r["method"] == "hyperflow"
    }
    card = ModelCard.load(adapter / "README.md")
    found = {(e.dataset_type, e.dataset_config, e.metric_type): e.metric_value for e in card.data.eval_results}
    assert found == expected


def test_figures_of_the_card_are_there(adapter):
    shown = set(re.findall(r"\(results/(\w+\.png)\)", (adapter / "README.md").read_text()))
    assert shown
    assert shown <= DRAWN
    for name in shown:
        assert (adapter / "results" / name).stat().st_size > 10_000


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no table 'magic': use one of costs"):
        filled("<!-- table: magic -->\n<!-- end -->\n", {"costs": "| a |"})
    assert filled("a\n<!-- table: costs -->\nold\n<!-- end -->\nb", {"costs": "| a |"}) == (
        "a\n<!-- table: costs -->\n| a |\n<!-- end -->\nb"
    )


def test_a_table_of_methods_names_steps_and_leaves_out_what_is_unfinished():
    def mean(method: str, n_shot: int, n_domains: int = 2) -> dict:
        found = {"method": method, "n_shot": n_shot, "n_domains": n_domains}
        return found | {"diff_vs_direct": None if method == "direct" else 1.25, "diff_ci95": 0.5}

    def against(method: str) -> dict:
        return {"method": method, "domain": None, "n_shot": 1, "diff": 2.0, "diff_ci95": None}

    few = {
        "means": [mean("direct", 1), mean("bias", 1), mean("bias-metric", 1), mean("lora", 1, n_domains=1)],
        "hyperflow_against": [against(m) for m in ("direct", "bias", "lora")],
        "arguments": {"recipes": {"bias": {"steps": 7, "learning_rate": 0.1}}},
    }
    more = {
        "means": [mean("direct", 5), mean("full", 5)],
        "hyperflow_against": [],
        "arguments": {"recipes": {"full": {"steps": 3}}},
    }
    lines = methods_table((few, ["direct", "bias", "bias-metric", "lora", "layernorm"]), (more, ["full"])).splitlines()
    assert lines[0].count("-shot") == 2
    assert lines[2:] == [
        "| direct transfer (cosines to class means) |  | +2.00 |  |  |",
        "| bias and norm tuning, 7 steps | +1.25 ± 0.50 | +2.00 |  |  |",
        "| bias and norm tuning, 7 steps, in the metric | +1.25 ± 0.50 |  |  |  |",
        "| LoRA tuning |  |  |  |  |",
        "| full fine-tuning, 3 steps |  |  | +1.25 ± 0.50 |  |",
    ]


#: Tables that the card of the test asks for.
ASKED = ("methods", "fine-tuning", "time", "steps", "conditioning", "ablations", "bill")


def test_one_command_measures_and_writes(tmp_path, adapter):
    pytest.importorskip("easyfsl")
    backbone = tmp_path / "backbone"
    tiny_dinov2(num_hidden_layers=5).save_pretrained(backbone)
    tiny_processor().save_pretrained(backbone)
    for seed, name in enumerate(("alpha", "beta", "unseen")):
        make_images(tmp_path / name, n_classes=6, n_images=40, seed=seed)
    domains = ["--dataset", tmp_path / "alpha", tmp_path / "beta", "--tuning", tmp_path / "alpha"]
    sizes = ["--drift_width", 12, "--drift_depth", 1, "--metric_tasks", 4, "--episodes_per_step", 2]
    training = [SCRIPTS / "train_drift.py", "--backbone", backbone, "--dataset", tmp_path / "alpha", *sizes]
    run([*training, "--steps", 1, "--output_dir", tmp_path / "made"])
    output, card = tmp_path / "output", tmp_path / "made" / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n" + "".join(f"<!-- table: {t} -->\n<!-- end -->\n" for t in ASKED))
    for folder in ("benchmark", "fine-tuning"):
        with_known_costs(output / folder, largest=121)
    with_known_costs(output / "ablations" / "task-objective" / "benchmark")
    shutil.copy(adapter / "results" / FILES["cost"], output)
    numbers = ["--n_episodes", 2, "--max_episodes_gradient", 1, "--tuning_episodes", 1, "--ablation_steps", 1]
    command = [SCRIPTS / "card.py", "--backbone", backbone, "--adapter", tmp_path / "made", *domains]
    command += ["--unseen", tmp_path / "unseen", "--ablation_episodes", 2, "--variants", "task objective", *numbers]
    run([*command, "--output_dir", output, "--card", card])
    text = card.read_text()
    assert re.search(r"\| bias and norm tuning, \d+ steps, in the metric \| ", text)
    assert "| t | 0 | 0.25 |" in text
    assert "| solver steps to t = 1 | 1 |" in text
    assert "| 5-shot, minus HyperFlow as it is | " in text
    assert "| other domain | " in text
    assert "| task objective | " in text
    assert "| task | " in text
    (gain,) = {e.metric_type for e in ModelCard.load(card).data.eval_results} - {"accuracy"}
    assert gain == "gain"
    assert {path.name for path in (tmp_path / "made" / "results").iterdir()} == {
        *FILES.values(),
        *DRAWN,
        FINE_TUNING_EPISODES,
    }


def run(command: list) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
