"""The numbers in the cards are those of the files beside the released adapter, and one command makes both."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_hyperflow.benchmark.episode_log import EPISODES, EpisodeLog
from tests.helpers.benchmark_runs import ROOT, with_known_costs
from tests.helpers.modules import run_module
from tests.helpers.tiny import tiny_dinov2, tiny_processor
from tests.helpers.training_runs import make_images
from tests.scripts.test_break_even import cost_record
from training.card.accuracy_tables import build_methods_table, build_summary_table
from training.card.build import FIGURES, FILES, FINE_TUNING_EPISODES, read_results, write_cards
from training.card.cost_tables import build_speed_table
from training.card.records import get
from training.card.tables import build_conditioning_table, fill_tables, make_tables

DRAWN = {name for names in FIGURES.values() for name in names}
ADAPTER = "hyperflow-vit-s14-70"
CARD = f"model_cards/{ADAPTER}/README.md"
REPORT = f"model_cards/{ADAPTER}/results/REPORT.md"


@pytest.fixture(scope="module")
def adapter() -> Path:
    return ROOT / "model_cards" / ADAPTER


@pytest.mark.parametrize("card", ["README.md", CARD, REPORT])
def test_tables_are_those_of_the_results(card, adapter, tmp_path):
    copy = tmp_path / adapter.name / "README.md"
    copy.parent.mkdir()
    shutil.copy(ROOT / card, copy)
    assert "<!-- table: " in copy.read_text()
    own = card == CARD
    write_cards([copy], copy.parent if own else adapter, read_results(adapter / "results"))
    assert copy.read_text() == (ROOT / card).read_text()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (ADAPTER, "same_tasks"),
        ("hyperflow-norms-vit-s14-70", "results"),
        ("hyperflow-lora-vit-s14-70", "results"),
        ("hyperflow-convnext-64", "results"),
    ],
)
def test_the_table_of_adapters_is_that_of_their_results(name, file):
    """In the README, and in the adapter's own card with more digits."""
    folder = ROOT / "model_cards" / name
    results = json.loads((folder / "results" / f"{file}.json").read_text())
    assert results["arguments"]["n_episodes"] == 60
    hyperflow = get(results["means"], method="hyperflow")
    gain = hyperflow["diff_vs_direct"], hyperflow["diff_ci95"]
    against = get(results["hyperflow_against"], domain=None, method="no-flow")
    flow = against["diff"], against["diff_ci95"]
    shapes = json.loads((folder / "config.json").read_text())["tensor_shapes"]
    size = sum(math.prod(shape) for shape in shapes)
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| [`{name}`]")]
    cells = [cell.strip(" *") for cell in row.split("|")][4:8]
    assert cells == [
        f"{size:,}",
        f"{hyperflow['accuracy']:.1f}",
        f"{gain[0]:+.1f} ± {gain[1]:.1f}",
        f"{flow[0]:+.1f} ± {flow[1]:.1f}",
    ]
    if name != ADAPTER:
        card = (folder / "README.md").read_text()
        assert f"| gain over direct transfer | {gain[0]:+.2f} ± {gain[1]:.2f} |" in card
        assert f"| from the flow | {flow[0]:+.2f} ± {flow[1]:.2f} |" in card


def test_every_table_is_shown(adapter):
    texts = [(ROOT / path).read_text() for path in ("README.md", CARD, REPORT)]
    shown = re.findall(r"<!-- table: ([a-z-]+) -->", "".join(texts))
    assert set(shown) == set(make_tables(read_results(adapter / "results")))


def test_the_speed_is_that_of_the_first_image_size():
    records = []
    for side in (70, 224):
        for work, seconds in (("direct", 0.2), ("ready", 0.25), ("bias", 20.0), ("full", 65.4)):
            record = cost_record(work, side * seconds / 70, 1e9)
            records.append(record | {"size": [side, side], "device": "a CPU", "peak_memory_mb": 1024.4})
    lines = build_speed_table({"records": records}).splitlines()
    assert lines[0] == "| 25 images of 5 classes at 70 px, on a CPU | time | peak memory |"
    assert "| **HyperFlow, ready to predict** | 0.25 s | 1,024 MB |" in lines
    assert "| full fine-tuning | 65.4 s | 1,024 MB |" in lines


def test_every_episode_of_fine_tuning_is_there_undamaged(adapter, tmp_path):
    """The log checks its digest, and the means of its accuracies are those of the results."""
    shutil.copy(adapter / "results" / FINE_TUNING_EPISODES, tmp_path / EPISODES)
    rows = EpisodeLog(tmp_path, {}).rows
    results = json.loads((adapter / "results" / FILES["fine_tuning"]).read_text())
    assert results["records"]
    for record in results["records"]:
        key = (record["domain"], record["n_shot"], record["method"])
        accuracies = [row.accuracy for row in rows if (row.domain, row.n_shot, row.method) == key]
        assert len(accuracies) == record["n_episodes"]
        assert sum(accuracies) / len(accuracies) == pytest.approx(record["accuracy"], abs=1e-3)


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


def test_figures_of_the_report_are_there(adapter):
    shown = set(re.findall(r"\((\w+\.png)\)", (ROOT / REPORT).read_text()))
    assert shown == DRAWN
    for name in shown:
        assert (adapter / "results" / name).stat().st_size > 10_000


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no table 'magic': use one of costs"):
        fill_tables("<!-- table: magic -->\n<!-- end -->\n", {"costs": "| a |"})
    assert fill_tables("a\n<!-- table: costs -->\nold\n<!-- end -->\nb", {"costs": "| a |"}) == (
        "a\n<!-- table: costs -->\n| a |\n<!-- end -->\nb"
    )


def mean_record(method: str, n_shot: int, n_domains: int = 2, accuracy: float = 50.0) -> dict[str, Any]:
    gain = None if method == "direct" else 1.25
    return {
        "method": method,
        "n_shot": n_shot,
        "n_domains": n_domains,
        "accuracy": accuracy,
        "diff_vs_direct": gain,
        "diff_ci95": 0.5,
    }


def against_record(method: str) -> dict[str, Any]:
    return {"method": method, "domain": None, "n_shot": 1, "diff": 2.0, "diff_ci95": None}


def test_a_table_of_methods_names_steps_and_leaves_out_what_is_unfinished():
    few = {
        "means": [
            mean_record("direct", 1),
            mean_record("bias", 1),
            mean_record("bias-head", 1),
            mean_record("lora", 1, n_domains=1),
        ],
        "hyperflow_against": [against_record(method) for method in ("direct", "bias", "lora")],
        "arguments": {"hyperparameters": {"bias": {"steps": 7, "learning_rate": 0.1}}},
    }
    more = {
        "means": [mean_record("direct", 5), mean_record("full", 5)],
        "hyperflow_against": [],
        "arguments": {"hyperparameters": {"full": {"steps": 3}}},
    }
    lines = build_methods_table(
        (few, ["direct", "bias", "bias-head", "lora", "layernorm"]), (more, ["full"])
    ).splitlines()
    assert lines[0].count("-shot") == 2
    assert lines[2:] == [
        "| direct transfer |  | +2.00 |  |  |",
        "| bias and norm tuning, 7 steps | +1.25 ± 0.50 | +2.00 |  |  |",
        "| bias and norm tuning, in HyperFlow's head, 7 steps | +1.25 ± 0.50 |  |  |  |",
        "| LoRA tuning |  |  |  |  |",
        "| full fine-tuning, 3 steps |  |  | +1.25 ± 0.50 |  |",
    ]


def test_the_summary_tells_the_head_and_the_flow_apart():
    means = [mean_record(method, 1, accuracy=a) for method, a in (("direct", 40), ("no-flow", 41), ("hyperflow", 43))]
    lines = build_summary_table({"means": means, "hyperflow_against": [against_record("no-flow")]}).splitlines()
    assert lines[2:] == ["| 1 | 40.0 | 43.0 | **+1.25 ± 0.50** | +1.25 ± 0.50 | +2.00 |"]


def test_a_table_of_conditions_has_no_difference_of_the_own_support_set_to_itself():
    records = []
    for condition, advantage in (("own support set", 0.0), ("other episode", 0.5)):
        record = {"condition": condition, "domain": None, "gain": 1.0, "gain_ci95": 0.25}
        records.append(record | {"own_advantage": advantage, "own_advantage_ci95": 0.75})
    lines = build_conditioning_table(("unseen domains", {"records": records})).splitlines()
    assert lines[2:] == [
        "| own support set | +1.00 ± 0.25 |  |",
        "| other episode | +1.00 ± 0.25 | +0.50 ± 0.75 |",
    ]


#: Tables that the card of the test asks for.
ASKED = (
    *("methods", "fine-tuning", "time", "steps", "conditioning", "ablations", "offline-cost", "scores", "unknown"),
    *("protocols", "many-classes", "meta-dataset"),
)


@pytest.mark.slow
def test_one_command_measures_and_writes(tmp_path, adapter):
    pytest.importorskip("easyfsl")
    backbone = tmp_path / "backbone"
    tiny_dinov2(num_hidden_layers=5).save_pretrained(backbone)
    tiny_processor().save_pretrained(backbone)
    for seed, name in enumerate(("alpha", "beta", "unseen")):
        make_images(tmp_path / name, n_classes=6, n_images=40, seed=seed)
    run(
        "training.train_drift",
        *("--backbone", backbone, "--dataset", tmp_path / "alpha", "--drift_width", 12, "--drift_depth", 1),
        *("--lda_tasks", 4, "--episodes_per_step", 2, "--steps", 1, "--output_dir", tmp_path / "made"),
    )
    output, card = tmp_path / "output", tmp_path / "made" / "README.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n" + "".join(f"<!-- table: {t} -->\n<!-- end -->\n" for t in ASKED))
    run(
        "training.calibrate",
        *("--backbone", backbone, "--adapter", tmp_path / "made", "--dataset", tmp_path / "beta", "--n_episodes", 1),
    )
    for folder in ("benchmark", "fine-tuning", "scores", "unbalanced", "many-classes", "meta-dataset"):
        with_known_costs(output / folder, largest=121)
    with_known_costs(output / "ablations" / "episodic-loss" / "benchmark")
    shutil.copy(adapter / "results" / FILES["cost"], output)
    run(
        "training.card.build",
        *("--backbone", backbone, "--adapter", tmp_path / "made", "--unseen", tmp_path / "unseen"),
        *("--dataset", tmp_path / "alpha", tmp_path / "beta", "--tuning", tmp_path / "alpha"),
        *("--ablation_episodes", 2, "--variants", "episodic loss", "--ablation_steps", 1),
        *("--n_episodes", 2, "--max_episodes_gradient", 1, "--tuning_episodes", 1),
        *("--output_dir", output, "--card", card),
    )
    text = card.read_text()
    assert re.search(r"\| bias and norm tuning, in HyperFlow's head, \d+ steps \| ", text)
    assert "| t | 0 | 0.25 |" in text
    assert "| solver steps to t = 1 | 1 |" in text
    assert "| 5-shot, minus HyperFlow as it is | " in text
    assert "| other domain | " in text
    for kind in ("5-way 1-shot", "20-way 5-shot", "Meta-Dataset's", "unbalanced"):
        assert f"| {kind} | " in text
    assert "| episodic loss | " in text
    assert "| episodic | " in text  # the stage of the training, in the offline cost
    (gain,) = {e.metric_type for e in ModelCard.load(card).data.eval_results} - {"accuracy"}
    assert gain == "gain"
    assert {path.name for path in (tmp_path / "made" / "results").iterdir()} == {
        *FILES.values(),
        *DRAWN,
        FINE_TUNING_EPISODES,
    }


def run(module: str, *arguments: object) -> None:
    done = run_module(module, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
