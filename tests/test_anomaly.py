"""What a notebook cell cannot show of set anomaly detection: killed in training, on two processes, and the installed command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

COMMAND = Path(sys.executable).with_name("tut_anomaly")

# Real pictures and features, few of them; sizes that neither two processes nor a batch divide: 1,395 / 155 / 279
SCRIPT = """
import json, sys
from transformers_tut.anomaly import ImageSource, train_anomaly
from transformers_tut.features import picture_cnn
from transformers_tut.pictures import CHARACTERS, CharacterPictures

def pictures(train, per_class): return CharacterPictures(train=train, per_class=per_class, characters=CHARACTERS[:31], progress=False)
source = ImageSource(pictures(True, 50), pictures(False, 9), picture_cnn())
options = json.loads(sys.argv[1])
_, metrics = train_anomaly(data="few", source=source, set_size=5, batch_size=30, epochs=8, accelerator="cpu", progress=False, **options)
print("RESULT", json.dumps(metrics))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def start(folder, data, **options):
    env = os.environ | {"PATH_CHECKPOINT": str(folder), "PATH_DATASETS": str(data)}
    (folder / "run.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, folder / "run.py", json.dumps(options)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def results(process):
    "What each process reported"
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    return [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]


def run_folder(folder):
    (run,) = folder.glob("SetAnomalyTask/*/run-*")
    return run


def weights(folder):
    return torch.load(run_folder(folder) / "best.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    "An undisturbed run"
    folder = tmp_path_factory.mktemp("whole")
    (metrics,) = results(start(folder, data))
    return folder, metrics


def test_killed_in_mid_epoch_it_ends_with_the_same_weights(whole, tmp_path, data):
    process = start(tmp_path, data)
    for _ in range(3000):
        if list(tmp_path.rglob("last.ckpt")):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.rglob("result.json"))
    assert results(start(tmp_path, data)) == [whole[1]]  # sets are drawn by seed and epoch: the same ones again
    for name, value in weights(whole[0]).items():
        assert torch.equal(value, weights(tmp_path)[name]), name


def test_two_processes_give_one_right_result(tmp_path, data):
    first, second = results(start(tmp_path, data, strategy="ddp", devices="2"))
    assert first == second and set(first) == {"train_acc", "val_acc", "test_acc"}
    assert first["test_acc"] > 0.5  # of sets of five: chance is 0.2
    assert json.loads((run_folder(tmp_path) / "result.json").read_text())["steps"] == 8 * 46  # a batch is shared out, not multiplied
    (alone,) = results(start(tmp_path, data))  # one process finds the model, and counts the same sets right
    assert alone == pytest.approx(first, abs=1e-6)


def test_offline_the_published_setting_names_the_way_without_a_network(tmp_path):
    env = os.environ | {"PATH_DATASETS": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    run = subprocess.run([COMMAND, "--data", "cifar100", "--no-progress"], env=env, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and "--data pictures" in run.stderr
    assert not list(tmp_path.rglob("*.gz"))


def test_usage_errors_name_the_option():
    run = subprocess.run([COMMAND, "--set-size", "2", "--no-progress"], capture_output=True, text=True)
    assert run.returncode == 2 and "set_size must be at least 3" in run.stderr and "Traceback" not in run.stderr
