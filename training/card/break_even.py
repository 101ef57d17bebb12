"""What an adapter took to make, and after how many tasks it has paid for itself.

    python training/bill.py --adapter ADAPTER --cost cost.json [--backbone BACKBONE] --output bill.json

Reads the adapter's `training.json` (with the totals of the trajectories it was trained on), the JSON of
`training/benchmark_cost.py` and the backbone's `pretraining.json`; prints Markdown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from hf_hyperflow.arguments import parse
from hf_hyperflow.modeling.hub import fetch
from hf_hyperflow.modeling.saving import CheckpointError, write_json

from .offline_cost import bill, bill_markdown


@dataclass
class Arguments:
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    cost: str = field(metadata={"help": "the JSON of benchmark_cost.py for it"})
    output: str = field(metadata={"help": "JSON file to write"})
    backbone: str | None = field(default=None, metadata={"help": "its backbone: Hub id or folder"})


def read(path: Path) -> dict:
    """A JSON file.

    Raises:
        ValueError: it is missing or no JSON; it is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    try:
        training = read(fetch(arguments.adapter, "training.json") / "training.json")
        backbone = None
        if arguments.backbone is not None:
            backbone = read(fetch(arguments.backbone, "pretraining.json") / "pretraining.json")
        found = bill(training, read(Path(arguments.cost)), backbone)
        write_json(arguments.output, found)
    except KeyError as error:
        raise SystemExit(f"error: one of the files has no {error}: it was written by something else.") from error
    except (CheckpointError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(bill_markdown(found))


if __name__ == "__main__":
    main()
