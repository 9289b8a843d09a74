"""The programs that a newcomer runs first: README, custom loop, quickstart."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOOP = ROOT / "examples" / "custom_loop.py"


def run(*command: str, cwd: Path = ROOT) -> str:
    finished = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_custom_loop_is_short_and_c4_is_three_lines_of_it() -> None:
    lines = LOOP.read_text().splitlines()
    assert len(lines) < 100
    assert sum(line.endswith("# C4") for line in lines) == 3


def test_the_custom_loop_runs_with_c4_and_without_its_three_lines(tmp_path: Path) -> None:
    assert "mean return in Hopper-v5" in run(str(LOOP), "4")
    plain = tmp_path / "examples" / "plain.py"
    plain.parent.mkdir()
    (tmp_path / "data").symlink_to(ROOT / "data")
    plain.write_text("\n".join(line for line in LOOP.read_text().splitlines() if not line.endswith("# C4")))
    assert "mean return in Hopper-v5" in run(str(plain), "4")


def test_the_custom_loop_of_active_runs() -> None:
    assert len((ROOT / "examples" / "active_custom_loop.py").read_text().splitlines()) < 130
    assert "mean return in Hopper-v5" in run("examples/active_custom_loop.py", "4")


def test_the_readmes_first_program_runs_as_printed_but_for_its_length(tmp_path: Path) -> None:
    program, wrapping, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(program.strip().splitlines()) <= 14
    shorter, changed = re.subn(r"n_steps=[\d_]+, n_steps_per_epoch=[\d_]+", "n_steps=8, n_steps_per_epoch=4", program)
    assert changed == 1
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "program.py").write_text(shorter + wrapping)
    run("program.py", cwd=tmp_path)


SB3_PREAMBLE = """
import gymnasium
import d3rlpy
from c4buffer import CovariancePenalty, load_d4rl
from c4buffer.integrations.d3rlpy import dataset_of
from c4buffer.integrations.sb3 import *
from stable_baselines3 import SAC

env, transitions = gymnasium.make("Hopper-v5"), load_d4rl("data/hopper-medium-expert-10k.hdf5")[:2500]
dataset = dataset_of(transitions)
"""


@pytest.mark.parametrize("page", ["README.md", "docs/sb3.md"])
def test_what_is_printed_of_stable_baselines3_runs_but_for_its_length(page: str, tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    chosen = [program for program in programs if "sb3" in program or page != "README.md"]
    assert chosen
    shorter = re.sub(r"\b(100_000|50_000)\b", "110", "\n".join(chosen))
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "program.py").write_text(SB3_PREAMBLE + shorter)
    run("program.py", cwd=tmp_path)


D3RLPY_PREAMBLE = """
import d3rlpy
import torch
from c4buffer import load_d4rl
from c4buffer.integrations.d3rlpy import C4Config, dataset_of

dataset = dataset_of(load_d4rl("data/hopper-medium-expert-10k.hdf5")[:300])
"""


def test_the_page_on_d3rlpy_runs_as_printed_but_for_its_length_and_its_gpu(tmp_path: Path) -> None:
    first, resumption = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "d3rlpy.md").read_text(), flags=re.DOTALL)
    program = D3RLPY_PREAMBLE + first + resumption
    program = re.sub(r"n_steps=\d+_000", "n_steps=6, n_steps_per_epoch=3", program).replace("cuda:0", "cpu")
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "program.py").write_text(program)
    run("program.py", cwd=tmp_path)


def test_the_page_on_active_runs_as_printed_but_for_its_length_and_its_gpu(tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "active.md").read_text(), flags=re.DOTALL)
    preamble = D3RLPY_PREAMBLE.replace("[:300]", "[:2500]")  # of one trajectory, returns would have no span
    program = preamble + "\n".join(programs)
    program = re.sub(r"n_steps=\d+_000", "n_steps=2, n_steps_per_epoch=2", program).replace("cuda:0", "cpu")
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "program.py").write_text(program)
    run("program.py", cwd=tmp_path)


def test_the_page_on_torchrl_runs_as_printed_but_for_its_length(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torchrl.md").read_text(), flags=re.DOTALL)
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "program.py").write_text(program.replace("100_000", "5") + "assert batch['cluster'].min() >= 0\n")
    run("program.py", cwd=tmp_path)


def test_the_quickstart_prints_its_table_and_writes_its_pictures(tmp_path: Path) -> None:
    printed = run("examples/quickstart.py", "--updates", "47", "--out", str(tmp_path))
    for words in ("mean Q", "TD loss", "within clusters", "between clusters", "updates per second", "normalised score"):
        assert words in printed
    assert "One seed says little" in printed
    for name in ("training.png", "cross_covariance.png", "gradient_space.png"):
        assert (tmp_path / name).stat().st_size > 20_000


@pytest.mark.parametrize("script", ["quickstart.py", "custom_loop.py", "active_custom_loop.py"])
def test_no_example_depends_on_anything_outside_the_project(script: str) -> None:
    text = (ROOT / "examples" / script).read_text()
    assert ".." not in re.sub(r"\.\.\.", "", text)
