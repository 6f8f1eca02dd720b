"""What a notebook cell cannot show of `tut_reverse`: the installed command, killed, interrupted, on two processes, offline."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

COMMAND = Path(sys.executable).with_name("tut_reverse")
# six epochs of 100 steps each, enough for 100 %; sizes that neither two processes nor a batch divide
SMALL = ["--train-size", "12800", "--epochs", "6", "--test-size", "1001", "--val-size", "333", "--accelerator", "cpu", "--no-progress"]


def start(folder, *options):
    env = os.environ | {"PATH_CHECKPOINT": str(folder), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [COMMAND, *SMALL, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


def runs(folder):
    return sorted(path.name for path in (folder / "ReverseTask").iterdir())


def weights(folder):
    (run,) = (folder / "ReverseTask").iterdir()
    return torch.load(run / "best.ckpt", weights_only=True)["state_dict"]


def wait_for(folder, pattern, process):
    "Until a file is there"
    for _ in range(3000):
        if list(folder.glob(pattern)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{pattern} never came")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed run"
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(folder))


def test_the_command_reports_where_everything_is(whole):
    folder, out = whole
    assert re.findall(r"(\S+ accuracy): (\S+ %)", out) == [("validation accuracy", "100.00 %"), ("test accuracy", "100.00 %")]
    for name in ["checkpoint", "result", "attention map"]:
        assert Path(re.search(rf"^{name}: (.+)$", out, flags=re.M)[1]).stat().st_size > 0
    assert "found a model trained for 600 steps" in finish(start(folder))
    assert len(runs(folder)) == 1


def test_fresh_keeps_the_older_files(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (run,) = (folder / "ReverseTask").iterdir()
    finish(start(tmp_path, "--fresh"))
    assert runs(tmp_path) == [run.name, f"{run.name}.old-1"]
    for path in run.iterdir():
        assert path.read_bytes() == (tmp_path / "ReverseTask" / f"{run.name}.old-1" / path.name).read_bytes()


def test_killed_in_mid_epoch_it_ends_with_the_same_weights(whole, tmp_path):
    process = start(tmp_path)
    wait_for(tmp_path, "ReverseTask/*/last.ckpt", process)  # the first epoch is done, the second under way
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.rglob("result.json"))
    out = finish(start(tmp_path))
    assert out.count("100.00 %") == 2 and "trained 600 steps" in out
    for name, value in weights(whole[0]).items():
        assert torch.equal(value, weights(tmp_path)[name]), name
    assert not [path.name for path in tmp_path.rglob(".*")], "scratch files were left"


def test_ctrl_c_says_how_to_go_on(tmp_path):
    process = start(tmp_path)
    wait_for(tmp_path, "ReverseTask/*/last.ckpt", process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "start again with the same settings to go on" in err and "Traceback" not in err
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] >= 100
    assert finish(start(tmp_path)).count("100.00 %") == 2


def test_two_processes_give_one_right_result(whole, tmp_path):
    out = finish(start(tmp_path, "--strategy", "ddp", "--devices", "2"))
    assert out.count("validation accuracy") == 1, "both processes reported"
    assert re.findall("accuracy: .*", out) == re.findall("accuracy: .*", whole[1])  # of 333 and 1001 sequences, both odd
    assert runs(tmp_path) == runs(whole[0])
    (run,) = (tmp_path / "ReverseTask").iterdir()
    names = ["attention_map.png", "best.ckpt", "last.ckpt", "result.json", "settings.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 600  # a batch is shared out, not multiplied
    # one process finds the model, and agrees on the loss of every sample
    assert "found a model trained for 600 steps" in finish(start(tmp_path))
    again = json.loads((whole[0] / "ReverseTask" / run.name / "result.json").read_text())
    assert result["test_acc"] == again["test_acc"] == 1


def test_published_says_in_one_sentence_that_there_is_no_network(tmp_path):
    env = os.environ | {"PATH_CHECKPOINT": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    run = subprocess.run([COMMAND, "--published", "--no-progress"], env=env, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and "it needs a network connection" in run.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


def test_usage_errors_name_the_option():
    run = subprocess.run([COMMAND, "--num-heads", "3", "--no-progress"], capture_output=True, text=True)
    assert run.returncode == 2 and "embed_dim must be a multiple of num_heads" in run.stderr and "Traceback" not in run.stderr
