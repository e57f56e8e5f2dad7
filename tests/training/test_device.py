from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fahooks.plugins import Doubtful, InputError
from fahooks.recipe import Recipe
from fahooks.training import device as devices
from fahooks.training.setup import prepare

Tiny = Callable[..., Recipe]


def test_channels_last_and_bf16_reach_model_and_images(tiny: Tiny):
    setup = prepare(tiny("train.channels_last=true", "train.precision=bf16"))
    assert setup.model.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)
    with setup.autocast:
        assert setup.forward(next(iter(setup.train)).images).dtype == torch.bfloat16


def test_threads_are_set_only_if_given(tiny: Tiny):
    torch.set_num_threads(2)
    prepare(tiny("train.threads=null"))
    assert torch.get_num_threads() == 2
    prepare(tiny("train.threads=1"))
    assert torch.get_num_threads() == 1


def test_more_threads_than_cores_are_warned_of(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    prepare(tiny("train.threads=2"))
    with pytest.warns(Doubtful, match="^train.threads=3 on 2 cores is slower than train.threads=2$"):
        prepare(tiny("train.threads=3"))
    assert torch.get_num_threads() == 3
    with pytest.raises(InputError, match="train.threads: must be less than or equal to 1024"):
        tiny("train.threads=1025")


def test_float32_is_rounded_where_that_is_asked_for_and_nowhere_else(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    prepare(tiny())
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
    with pytest.raises(InputError, match="train.precision=tf32 is a precision of GPUs, and this runs on the CPU"):
        prepare(tiny("train.precision=tf32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(tiny: Tiny):
    with pytest.raises(InputError, match="torch finds no GPU here: use train.device=cpu"):
        prepare(tiny("train.device=cuda"))
    assert prepare(tiny("train.device=auto")).device.type == "cpu"


def test_processes_share_no_gpu(monkeypatch: pytest.MonkeyPatch):
    """What torch says of GPUs is made up; test_gpu.py has a real one."""
    gpus = 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert devices.choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for gpus, said in ((1, "there is 1 GPU: start one for each"), (2, "there are 2 GPUs: start one for each")):
        with pytest.raises(InputError, match=f"^torchrun started 3 processes here, and {said} .--nproc-per-node {gpus}."):
            devices.choose_device("auto")
    assert devices.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(InputError):
        devices.choose_device("cuda")
    gpus = 1  # maybe each process sees one of its own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert devices.choose_device("cuda") == torch.device("cuda", 0)


FAULTS = """
import ctypes, resource, sys
import torch
from fahooks.training.device import M_MMAP_THRESHOLD, tune_allocator

ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
if sys.argv[1] == "kept":
    tune_allocator()
counts = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**22) for _ in range(8)]
    del blocks
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(counts[-1])
"""


LARGE_PAGES = """
import re, sys
from pathlib import Path
import torch
from fahooks.training.device import tune_allocator

if sys.argv[1] == "kept":
    tune_allocator()
block = torch.ones(2**22)
address = block[2**21:].data_ptr()
for area in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
    begin, end = (int(bound, 16) for bound in area.split(" ", 1)[0].split("-"))
    if begin <= address < end:
        print(int(" hg" in area.partition("VmFlags:")[2]))
"""

GROWTH = """
import ctypes, sys
from fahooks.training.device import tune_allocator

if sys.argv[1] == "kept":
    tune_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
begin = libc.sbrk(0)
while libc.sbrk(0) == begin:  # takes no memory, since nothing is written
    libc.malloc(ctypes.c_size_t(100_000))
print(libc.sbrk(0) - begin)
"""

LEFT_TO_ALLOCATOR = """
import sys
from concurrent.futures import ThreadPoolExecutor
from fahooks.rules import workspace
from fahooks.training.device import tune_allocator

def left():
    tune_allocator()
    return int(workspace._kept.left_to_allocator)

print(left() if sys.argv[1] == "first thread" else ThreadPoolExecutor(1).submit(left).result())
"""

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}


def number(script: str, how: str, **environment: str) -> int:
    command = [sys.executable, "-c", script, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT | environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not on glibc")
def test_freed_memory_is_kept_for_its_next_use():
    assert number(FAULTS, "kept") < 100
    assert number(FAULTS, "given back") > 1000, "control: 128 MiB, mapped anew"
    assert number(FAULTS, "kept", MALLOC_MMAP_THRESHOLD_="65536") > 1000, "what the environment says is left alone"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not on glibc")
def test_rules_leave_memory_to_the_allocator_where_it_keeps_what_is_freed():
    assert number(LEFT_TO_ALLOCATOR, "first thread") == 1
    assert number(LEFT_TO_ALLOCATOR, "another thread") == 0, "whose heap glibc gives back"
    assert number(LEFT_TO_ALLOCATOR, "first thread", GLIBC_TUNABLES="glibc.malloc.tcache_count=7") == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not on glibc")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no large pages")
def test_tensors_ask_for_large_pages():
    assert number(LARGE_PAGES, "kept") == 1
    assert number(LARGE_PAGES, "as it was") == 0, "control"
    assert number(GROWTH, "kept") < 2**20, "once its 2 GiB are full, the heap grows as ever"
    assert number(LARGE_PAGES, "kept", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576") == 0
