"""A fork of a process that had started CUDA says so. Without a GPU: PyTorch's flag is faked, and
the driver is the stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forked import run_program

SENTENCE = """
SENTENCE = (
    "DeviceError: this process was forked from one that had started CUDA, and CUDA does not "
    "survive a fork: start processes by 'spawn' or 'forkserver', or load models on a GPU in "
    "the forked processes alone"
)
"""

BY_TORCH = """
import functools, types
from vitrail.torch_modes import public_call

model = vitrail.load(bundled(), device="cpu")
pixels = np.zeros((2, 64, 48, 3), np.uint8)
floats = model.preprocess(pixels)
ids = model.tokenize("a cat")
load = functools.partial(vitrail.load, bundled())
calls = {
    "load cuda": lambda: load(device="cuda"),
    "load 0": lambda: load(device="cuda:0"),
    "load auto": lambda: load(device="auto"),
    "output_device": lambda: model.encode_text("a cat", output_device="cuda"),
}
on_gpu = {
    "encode_image": lambda: model.encode_image(pixels),
    "encode_text": lambda: model.encode_text("a cat"),
    "classify": lambda: model.classify(pixels, ["cat"]),
    "forward": lambda: model.forward(pixel_values=floats),
    "call": lambda: model(input_ids=ids),
    "layers": lambda: model.get_intermediate_layers(floats),
}


def lost(gpus):
    # what PyTorch says in such a child
    torch.cuda._is_in_bad_fork = lambda: True
    torch.cuda.device_count = lambda: gpus


def ask(name):
    lost(1)
    if name in on_gpu:
        model.device = torch.device("cuda", 0)
    return error_of({**calls, **on_gpu}[name])


for name in (*calls, *on_gpu):
    same(in_fork(lambda: ask(name)).decode(), SENTENCE, name)


def tensor():
    lost(1)
    operator = public_call(lambda pixels: pixels)
    return error_of(lambda: operator(types.SimpleNamespace(device=torch.device("cuda", 0))))


same(in_fork(tensor).decode(), SENTENCE, "an operator")


def host():
    # preprocessing needs no GPU, and a CPU model computes; without a GPU "auto" is the CPU
    lost(1)
    cpu = rows(model)
    model.device = torch.device("cuda", 0)
    assert torch.equal(model.preprocess(pixels), floats)
    assert torch.equal(model.tokenize("a cat"), ids)
    lost(0)
    assert load(device="auto").device.type == "cpu"
    return cpu


same(in_fork(host), rows(model), "without a GPU")
print("done")
"""


def test_a_fork_of_a_process_with_cuda_says_so(tmp_path: Path) -> None:
    assert run_program(SENTENCE + BY_TORCH, tmp_path) == "done\n"


BY_DRIVER = """
import standin
from vitrail import _C
from vitrail.cuda import refuse_lost_cuda

driver = standin.Standin(standin.Path(sys.argv[1]))
SAID = "this process was forked from one that had started CUDA, and CUDA does not survive a fork: "


def start():
    return _C.Gpu(str(driver.path), 0)


refuse_lost_cuda()  # no driver was started
same(in_fork(lambda: b"%d" % _C.driver_lost()), b"0", "before the driver")
same(in_fork(lambda: start().name.encode()), start().name.encode(), "started in the child")

gpu = start()
kernels = _C.Kernels(gpu)
assert not _C.driver_lost()
refuse_lost_cuda()


def child():
    global gpu, kernels
    before = driver.calls()
    assert _C.driver_lost()
    assert SENTENCE.encode() == error_of(refuse_lost_cuda)
    assert error_of(start).startswith(b"DriverError: " + SAID.encode()), error_of(start)
    kernels = gpu = None  # released in the parent alone
    assert driver.calls() == before
    return b"lost"


same(in_fork(child), b"lost", "a child")
same(in_fork(lambda: in_fork(child)), b"lost", "a grandchild")
start()
assert driver.complaint() == "", driver.complaint()
print("done")
"""


def test_a_fork_of_a_process_with_the_driver_says_so(tmp_path: Path, libcuda: Any) -> None:
    assert run_program(SENTENCE + BY_DRIVER, tmp_path, str(libcuda.path)) == "done\n"
