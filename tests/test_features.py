"""What a notebook cell cannot show of `extract_features`: killed outright, interrupted, and on two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Each batch leaves a line with its size, each process what it got
SCRIPT = """
import os, sys, time, torch
from torch import nn
from transformers_tut.features import extract_features
from transformers_tut.training import Machine

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        time.sleep(<pause>)
        with open("calls", "a") as f: print(len(x), file=f)
        return self.conv(x.float() / 255).relu().mean((-1, -2))

if __name__ == "__main__":
    images = torch.randint(256, (150, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))[:<n>]
    machine = Machine("cpu", "<devices>", "<strategy>", progress=False)
    for rebuild in <rebuild>:
        features = extract_features(images, "f.pt", Slow(), batch_size=8, machine=machine, rebuild=rebuild)
    torch.save(features, f"got-{os.environ.get('LOCAL_RANK', 0)}")
"""


def start(folder, n=150, devices=1, strategy="auto", pause=0, rebuild=(False,)):
    text = SCRIPT
    for name, value in dict(n=n, devices=devices, strategy=strategy, pause=pause, rebuild=rebuild).items():
        text = text.replace(f"<{name}>", str(value))
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(text)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "script.py"], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    return out + err


def calls(folder):
    "Sizes of the batches that were computed, without the last four rows that are looked at again"
    return [int(line) for line in (folder / "calls").read_text().split() if line != "4"]


def wait_for_parts(folder, process, number=3):
    for _ in range(3000):
        if len(list(folder.glob("f.pt.parts/0*.pt"))) >= number:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the parts never came")


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("f.pt") or path.name.startswith("."))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed extraction"
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder)) == ""  # and a quiet one
    assert calls(folder) == [8] * 18 + [6]
    return torch.load(folder / "got-0")


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_goes_on(whole, tmp_path, kill):
    process = start(tmp_path, pause=0.1)
    wait_for_parts(tmp_path, process)
    os.killpg(process.pid, kill)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert kill == signal.SIGKILL or "what was done is kept in f.pt.parts" in err
    done = len(list(tmp_path.glob("f.pt.parts/0*.pt")))
    assert 3 <= done < 19 and not (tmp_path / "f.pt").exists()
    (tmp_path / "calls").unlink()
    finish(start(tmp_path))
    assert len(calls(tmp_path)) == 19 - done
    assert torch.load(tmp_path / "got-0").equal(whole)
    assert files(tmp_path) == ["f.pt"]


# one batch for two processes; 19, an odd number, and a file that is found, and one made anew while both run
@pytest.mark.parametrize("n, rebuild", [(7, [False]), (150, [False, False, True])])
def test_two_processes_give_what_one_does(whole, tmp_path, n, rebuild):
    finish(start(tmp_path, n, 2, "ddp", rebuild=rebuild))
    first, second = torch.load(tmp_path / "got-0"), torch.load(tmp_path / "got-1")
    assert first.equal(second) and first.shape == (n, 4)
    assert first.equal(whole) if n == 150 else torch.allclose(first, whole[:n])
    times = 1 + rebuild.count(True)
    assert sorted(calls(tmp_path)) == sorted(([8] * (n // 8) + [n % 8]) * times)  # no batch twice
    assert files(tmp_path) == ["f.pt", "f.pt.old-1"][:times]


def test_two_processes_share_what_one_left(whole, tmp_path):
    process = start(tmp_path, pause=0.1)
    wait_for_parts(tmp_path, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = len(list(tmp_path.glob("f.pt.parts/0*.pt")))
    (tmp_path / "calls").unlink()
    finish(start(tmp_path, devices=2, strategy="ddp"))
    assert len(calls(tmp_path)) == 19 - done
    assert torch.load(tmp_path / "got-1").equal(whole)
