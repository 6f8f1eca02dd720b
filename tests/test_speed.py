"""The command `tut_speed`. That it runs is tested, and what it prints; no time is."""

import re
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("tut_speed")


def test_quick_prints_one_table_and_leaves_two_figures(tmp_path):
    run = subprocess.run([COMMAND, "--quick", "--out-dir", tmp_path / "speed"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    table, files = run.stdout.rsplit("\ntable: ", 1)
    assert re.match(r"PyTorch .* one thread: ", table) and len(re.findall("naive +ours +torch.nn", table)) == 1
    for line in ["attention, T = ", "attention maps, 4 layers", "a batch of 64 sets", "ResNet34 features", "resizing",
                 "reverse: a training step", "anomaly: a training step"]:  # fmt: skip
        assert re.search(rf"^{line}.* ms .* \d+\.\d\d", table, flags=re.M), line
    assert sorted(path.name for path in (tmp_path / "speed").iterdir()) == ["length.png", "step.png", "table.txt"]
    assert (tmp_path / "speed" / "table.txt").read_text() == table + "\n"
    assert len(files.splitlines()) == 3 and "Traceback" not in run.stderr


def test_usage_errors_name_the_option():
    run = subprocess.run([COMMAND, "--quik"], capture_output=True, text=True)
    assert run.returncode == 2 and "unrecognized arguments: --quik" in run.stderr
