"""Python environments in which some of the packages installed here are missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Environment:
    """A virtual environment with all that is installed here but `hf_hyperflow` and what is `missing`.

    Args:
        missing: top-level modules and distributions, as they are called in `site-packages`.
        only: all others of these are missing, too; None stands for none.
        has_package: whether `hf_hyperflow` is there nevertheless, as it is in this repository.
    """

    def __init__(
        self,
        folder: Path,
        missing: Collection[str] = (),
        has_package: bool = False,
        only: Collection[str] | None = None,
    ):
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        packages = folder / "packages"
        packages.mkdir()
        for source in {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}:
            for entry in source.iterdir():
                name = re.split("[-.]", entry.name)[0]
                is_own = "hf_hyperflow" in entry.name or entry.suffix == ".pth"  # installed, or editable
                is_wanted = name not in missing and (only is None or name in only)
                if is_wanted and not is_own:
                    (packages / entry.name).symlink_to(entry)
        if has_package:
            (packages / "hf_hyperflow").symlink_to(ROOT / "hf_hyperflow")
        print_folder = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site_packages = subprocess.check_output([self.python, "-c", print_folder], text=True)
        Path(site_packages.strip(), "packages.pth").write_text(f"{packages}\n")
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        self.env.update(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        self.cwd = folder

    def install(self, wheel: Path) -> None:
        """Install a wheel and nothing else, without looking at any index."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, wheel], env=self.env, check=True)

    def run(self, code: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        """Run a script, given as text."""
        return self._run("-c", code, *arguments)

    def run_file(self, path: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
        """Run `python path`."""
        return self._run(path, *arguments)

    def run_module(self, module: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        """Run `python -m module`."""
        return self._run("-m", module, *arguments)

    def run_command(self, name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        """Run a command that an installed wheel brought."""
        return self._run(self.python.with_name(name), *arguments)

    def _run(self, *arguments: str | Path) -> subprocess.CompletedProcess:
        command = [self.python, *map(str, arguments)]
        return subprocess.run(command, env=self.env, cwd=self.cwd, capture_output=True, text=True)


def build_wheels(folder: Path) -> tuple[Path, Path]:
    """Build the wheel of the library and that of the released weights in a folder, without network access.

    They are built from copies: setuptools leaves its own files beside the sources.
    """
    sources = folder / "sources"
    for name in ("hf_hyperflow", "model_cards"):
        shutil.copytree(
            ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        )
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, ".", "./model_cards"], cwd=sources, check=True)
    [library], [weights] = folder.glob("hf_hyperflow-*.whl"), folder.glob("hf_hyperflow_weights-*.whl")
    return library, weights
