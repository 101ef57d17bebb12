# %% [markdown]
# # Ten handwritten digits from five examples each
#
# Adapt a vision transformer to scikit-learn's digits without gradients, look at what that brings, save the result as a
# plain PEFT adapter and load it with `peft` alone. Everything runs offline on a CPU in a minute. Open this file as a
# notebook (VS Code, Jupytext) or run it: `python model_cards/hyperflow-vit-s14-70/example.py`.

# %%
import argparse
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from peft import PeftModel
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch.nn.functional import normalize
from transformers import AutoModel, pipeline

from hf_hyperflow import HyperFlowAdapter

here = Path(__file__).resolve().parent if "__file__" in globals() else Path("model_cards/hyperflow-vit-s14-70")
parser = argparse.ArgumentParser()
parser.add_argument("--backbone", default=here.parent / "vit-s14-focus-70", help="folder or Hub id")
parser.add_argument("--adapter", default=here, help="folder or Hub id of the HyperFlow adapter made for it")
parser.add_argument("--output", default="outputs/digits-task", help="folder for the adapted task")
arguments, _ = parser.parse_known_args()  # a notebook has arguments of its own

# %% [markdown]
# ## The data: 8x8 pixels, five support images of each digit, twenty others to classify

# %%
digits = load_digits()
images = [PIL.Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
generator = np.random.default_rng(0)
rows = {digit: generator.permutation(np.flatnonzero(digits.target == digit)) for digit in range(10)}
support = {str(digit): [images[i] for i in rows[digit][:5]] for digit in rows}
queries = [images[i] for digit in rows for i in rows[digit][5:25]]
truth = [str(digit) for digit in rows for _ in range(20)]


def accuracy(predicted: list[str]) -> str:
    hits = [a == b for a, b in zip(predicted, truth, strict=True)]
    return f"{100 * np.mean(hits):.1f} %"


# %% [markdown]
# ## Before: direct transfer
# The class of the nearest mean feature, with the backbone as it is.

# %%
backbone = AutoModel.from_pretrained(arguments.backbone).eval()
adapter = HyperFlowAdapter.from_pretrained(arguments.adapter)


@torch.no_grad()
def features(
    model: torch.nn.Module, pictures: list[PIL.Image.Image], *, start: int = 0, middle: float = 0.0
) -> torch.Tensor:
    """The first token of the last hidden state of each picture, `(n, width)`; with a `middle` also the mean of the
    others before block `start`, at so many times its length.
    """
    rgb = [picture.convert("RGB") for picture in pictures]
    chunks = []
    for pixel_values in adapter.processor(rgb, return_tensors="pt")["pixel_values"].split(50):
        output = model(pixel_values, output_hidden_states=True)
        halves = [normalize(output.last_hidden_state[:, 0], dim=-1)]
        if middle:
            halves.append(middle * normalize(output.hidden_states[start][:, 1:].mean(dim=1), dim=-1))
        chunks.append(torch.cat(halves, dim=-1))
    return torch.cat(chunks)


def nearest(found: torch.Tensor, prototypes: torch.Tensor) -> list[str]:
    return [list(support)[i] for i in (normalize(found, dim=-1) @ prototypes.T).argmax(-1)]


means = normalize(torch.stack([features(backbone, pictures).mean(dim=0) for pictures in support.values()]), dim=-1)
print("direct transfer:", accuracy(nearest(features(backbone, queries), means)))

# %% [markdown]
# ## Adapt
# Some forward passes of a small network generate the weights of a PEFT adapter.

# %%
start = time.perf_counter()
task = adapter.adapt(backbone, support)
print(f"adapted in {time.perf_counter() - start:.2f} s, {adapter.space.n_parameters:,} parameters")
print("HyperFlow:", accuracy(task.predict(queries)))
print("the first query:", task(queries[0], top_k=3))

# %% [markdown]
# Fewer or more steps of the solver, and a guard that follows the flow only as far as leave-one-out accuracy on the
# support set says. Several tasks share the backbone: each puts its own weights in when it is used.

# %%
for n_steps in (1, 2, 8):
    print(f"{n_steps} steps:", accuracy(adapter.adapt(backbone, support, n_steps=n_steps).predict(queries)))
guarded = adapter.adapt(backbone, support, guard="loo")
print(f"guarded, stopped at t = {guarded.choice.time}:", accuracy(guarded.predict(queries)))

# %% [markdown]
# ## The same as a pipeline of transformers

# %%
classify = pipeline("few-shot-image-classification", model=backbone, adapter=adapter, support=support)
print("pipeline:", accuracy([best["label"] for (best,) in classify(queries, batch_size=50, top_k=1)]))

# %% [markdown]
# ## Save, take the adaptation out, and load the task with `peft` alone

# %%
task.save_pretrained(arguments.output)
task.reset()
print("after reset:", accuracy(nearest(features(backbone, queries), means)))

model = PeftModel.from_pretrained(backbone, arguments.output).eval()
with safe_open(Path(arguments.output, "prototypes.safetensors"), "pt") as file:
    prototypes, about = file.get_tensor("prototypes"), file.metadata()
found = features(model, queries, start=int(about["start"]), intermediate_weight=float(about["middle"]))
print("with peft:", accuracy(nearest(found, prototypes)))
