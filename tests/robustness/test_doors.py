"""What comes in and goes out by brute force: random support sets, names and chains of redirects; all from a seed."""

from __future__ import annotations

import csv
import io
import random
import sys
import unicodedata

import pytest
import torch

from hf_hyperflow import ImageError
from hf_hyperflow.cli.predict import Result, print_csv, print_lines
from hf_hyperflow.cli.printing import DIRECTION_MARKS, say
from hf_hyperflow.download import MAX_REDIRECTS, download
from hf_hyperflow.modeling.lda import RegularisedLDA
from hf_hyperflow.modeling.leave_one_out import leave_one_out_logits
from hf_hyperflow.modeling.prototypes import unit_means
from tests.modeling.test_stopping import brute_force, lda_with_prior
from tests.test_download import serve

pytestmark = pytest.mark.slow


def random_support(generator: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels: uneven classes, some of a single image, and images that are copies of others or zero."""
    seeded = torch.Generator().manual_seed(generator.randrange(2**31))
    n_way, width = generator.randint(2, 8), generator.choice([4, 16, 48])
    labels = torch.tensor([label for label in range(n_way) for _ in range(generator.choice([1, 2, 2, 3, 5, 9]))])
    labels = labels[torch.randperm(len(labels), generator=seeded)]
    centres = torch.randn(n_way, width, generator=seeded, dtype=torch.float64)
    noise = torch.randn(len(labels), width, generator=seeded, dtype=torch.float64)
    features = 10 ** generator.uniform(-2, 2) * (centres[labels] + 10 ** generator.uniform(-2, 1) * noise)
    for i in range(len(labels)):
        if generator.random() < 0.1:
            features[i] = features[generator.randrange(len(labels))]
        if generator.random() < 0.03:
            features[i] = 0
    return features, labels


def test_leave_one_out_of_random_support_sets():
    """400 support sets, each with class means and with an LDA of a random prior."""
    generator = random.Random(0)
    for number in range(400):
        features, labels = random_support(generator)
        lda = lda_with_prior(
            features.shape[1],
            count=10 ** generator.uniform(-2, 3),
            spread=10 ** generator.uniform(-2, 3),
            rank=generator.choice([None, 1, 3]),
        )
        for head in (unit_means, lda):
            found, expected = leave_one_out_logits(features, labels, 1.0, head), brute_force(features, labels, head)
            kind = "LDA" if isinstance(head, RegularisedLDA) else "means"
            message = f"support set {number}, {kind}"
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda text, m=message: f"{m}: {text}"
            )


def random_name(generator: random.Random) -> str:
    """A string of any characters, those that do harm more often than others."""
    harmful = "\x1b\x9b\r\n\t\x00\x7f\u202e\u2066\u2028\u0085=+-@'\"," + "\udc9b\udcc2\ud800"
    characters = []
    for _ in range(generator.randint(1, 20)):
        if generator.random() < 0.5:
            characters.append(generator.choice(harmful))
        else:
            characters.append(chr(generator.choice([generator.randrange(128), generator.randrange(0x110000)])))
    return "".join(characters)


def read_back(stream: io.TextIOWrapper) -> str:
    """What a terminal makes of the bytes that were written."""
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "replace")


def test_random_names_on_the_terminal_and_in_csv(monkeypatch):
    """5,000 names, as the label and as the image."""
    generator = random.Random(1)
    for _ in range(5000):
        name = random_name(generator)
        stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="surrogateescape", newline="")  # as `cli.main` sets it
        stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", newline="")
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        print_csv([Result(name, [{"label": name, "score": 0.5}])])
        print_lines([Result(name, [{"label": name, "score": 0.5}])])
        say(name)
        out, err = [read_back(stream) for stream in (stdout, stderr)]
        for line in (*out.split("\n"), *err.split("\n")):
            assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in line), repr(name)
            assert not any(c in DIRECTION_MARKS for c in line), repr(name)
        assert out.count("\n") == 3, repr(name)
        rows = list(csv.reader(io.StringIO("\n".join(out.split("\n")[:2]))))
        assert len(rows[1]) == 4, repr(name)
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in rows[1]), repr(name)


def test_random_chains_of_redirects():
    """300 chains of up to 8 redirects with one wrong turn or none: to a file, to a private name, in a circle."""
    generator = random.Random(2)
    with serve() as server:
        site = f"http://127.0.0.1:{server.server_address[1]}"
        for _ in range(300):
            n_redirects = generator.randint(0, 8)
            end = generator.choice([f"{site}/bytes/9", "file:///etc/hostname", "ftp://127.0.0.1/", f"{site}/to/"])
            url = end
            for _ in range(n_redirects):
                url = f"{site}/to/{url}"
            if end.endswith("/bytes/9") and n_redirects <= MAX_REDIRECTS:
                assert download(url, 10) == bytes(9)
            elif n_redirects or not end.startswith(("file", "ftp")):
                with pytest.raises(ImageError, match=r"redirects (more than 5 times|to '(file|ftp)')"):
                    download(url, 10)
