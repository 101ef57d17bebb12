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

folder = Path(__file__).resolve().parent if "__file__" in globals() else Path("model_cards/hyperflow-vit-s14-70")
parser = argparse.ArgumentParser()
parser.add_argument("--backbone", default=folder.parent / "vit-s14-focus-70", help="folder or Hub id")
parser.add_argument("--adapter", default=folder, help="folder or Hub id of the HyperFlow adapter made for it")
parser.add_argument("--output_dir", default="outputs/digits-task", help="folder for the adapted task")
arguments, _ = parser.parse_known_args()  # a notebook has arguments of its own

# %% [markdown]
# ## The data: 8 x 8 pixels, five support images of each digit, twenty others to classify

# %%
digits = load_digits()
images = [PIL.Image.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
generator = np.random.default_rng(0)
support, queries, true_labels = {}, [], []
for digit in range(10):
    rows = generator.permutation(np.flatnonzero(digits.target == digit))
    support[str(digit)] = [images[row] for row in rows[:5]]
    queries += [images[row] for row in rows[5:25]]
    true_labels += [str(digit)] * 20


def accuracy(predicted: list[str]) -> str:
    correct = np.array(predicted) == np.array(true_labels)
    return f"{100 * correct.mean():.1f} %"


# %% [markdown]
# ## Before: direct transfer
# The backbone is used as it is, with plain cosines to the class means.

# %%
backbone = AutoModel.from_pretrained(arguments.backbone).eval()
adapter = HyperFlowAdapter.from_pretrained(arguments.adapter)
direct = adapter.direct_transfer(backbone, support)
print("direct transfer:", accuracy(direct.predict(queries)))

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
# The solver can take fewer or more steps. With early stopping, the flow is followed only as far as the leave-one-out
# accuracy on the support set improves. Several tasks share the backbone: each puts its own weights in when it is used.

# %%
for n_steps in (1, 2, 8):
    print(f"{n_steps} steps:", accuracy(adapter.adapt(backbone, support, n_steps=n_steps).predict(queries)))
stopped = adapter.adapt(backbone, support, early_stopping=True)
print(f"stopped at t = {stopped.stopping_point.time}:", accuracy(stopped.predict(queries)))

# %% [markdown]
# ## The same as a pipeline of transformers

# %%
classify = pipeline("few-shot-image-classification", model=backbone, adapter=adapter, support=support)
print("pipeline:", accuracy([best["label"] for (best,) in classify(queries, batch_size=50, top_k=1)]))

# %% [markdown]
# ## Save the task, and take the adaptation out
# The backbone is what it was before. Nearest class means, computed by hand, show it.

# %%
task.save_pretrained(arguments.output_dir)
task.reset()


@torch.no_grad()
def features(
    model: torch.nn.Module, pictures: list[PIL.Image.Image], block: int = 0, weight: float = 0.0
) -> torch.Tensor:
    """The CLS token of the last hidden state of each picture, `(n, width)`; with a `weight`, also the mean of the patch
    tokens before a block, at `weight` times the length of the CLS token.
    """
    rgb = [picture.convert("RGB") for picture in pictures]
    batches = []
    for pixel_values in adapter.processor(rgb, return_tensors="pt")["pixel_values"].split(50):
        output = model(pixel_values, output_hidden_states=True)
        batch = output.last_hidden_state[:, 0]
        if weight:
            patches = output.hidden_states[block][:, 1:].mean(dim=1)
            batch = torch.cat([normalize(batch, dim=-1), weight * normalize(patches, dim=-1)], dim=-1)
        batches.append(batch)
    return torch.cat(batches)


def nearest(query_features: torch.Tensor, prototypes: torch.Tensor) -> list[str]:
    best = (normalize(query_features, dim=-1) @ prototypes.T).argmax(-1)
    return [list(support)[i] for i in best.tolist()]


means = [normalize(features(backbone, pictures).mean(dim=0), dim=-1) for pictures in support.values()]
print("after reset:", accuracy(nearest(features(backbone, queries), torch.stack(means))))

# %% [markdown]
# ## Load the task with `peft` alone

# %%
model = PeftModel.from_pretrained(backbone, arguments.output_dir).eval()
with safe_open(Path(arguments.output_dir, "prototypes.safetensors"), "pt") as file:
    prototypes, metadata = file.get_tensor("prototypes"), file.metadata()
block, weight = int(metadata["start"]), float(metadata["intermediate_weight"])
print("with peft:", accuracy(nearest(features(model, queries, block, weight), prototypes)))
