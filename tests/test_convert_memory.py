"""What a worker of the converter holds, with the real encoder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SIDE = 2048
RUN = """
import sys, threading, time
from rbe import convert
def anonymous():
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
small, source = sys.argv[1:3]
convert.compress(small, small + ".seeds", 0.5, "fast", threads=1)
before, most, ended = anonymous(), 0, threading.Event()
def watch():
    global most
    while not ended.wait(0.002):
        most = max(most, anonymous())
other = threading.Thread(target=watch)
other.start()
convert.compress(source, source + ".seeds", 0.5, "fast", threads=1)
ended.set()
other.join()
print(most - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts resident pages as Linux does")
@pytest.mark.parametrize("name", ["extreme", "plain"])
def test_a_worker_holds_one_copy_of_its_matrix(tmp_path: Path, name: str) -> None:
    """And some parts of fixed size, whether weights are kept beside the seeds or not."""
    torch.manual_seed(0)
    tensors = {f"m{k}.weight": torch.randn(SIDE, SIDE).clamp(-5, 5) for k in range(2)}
    if name == "extreme":
        for weight in tensors.values():
            weight[3, 3] = 60.0
    save_file(tensors, tmp_path / "large.safetensors")
    save_file({"m.weight": torch.randn(64, 64)}, tmp_path / "small.safetensors")
    # Freed blocks go back to the system at once: how the allocator fragments is another matter, and changes by chance.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", RUN, tmp_path / "small.safetensors", tmp_path / "large.safetensors"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    assert grown < 4 * SIDE * SIDE + (32 << 20)
