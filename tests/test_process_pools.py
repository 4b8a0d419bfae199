"""Pools, DataLoaders and preforking servers give the bits of the process that loaded the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from forked import run_program

pytestmark = pytest.mark.slow

POOL = """
import multiprocessing


def start(inherited_or_pickled):
    global model
    model = inherited_or_pickled
    torch.set_num_threads(2)


def work(number):
    return os.getpid(), rows(model)


if __name__ == "__main__":
    model = vitrail.load(bundled(), device="cpu")
    wanted = rows(model) if sys.argv[2] == "used" else None
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(2, start, (model,)) as pool:
        said = pool.map(work, range(6), chunksize=1)
    wanted = wanted or rows(model)
    assert len(said) == 6 and os.getpid() not in dict(said)
    for process, got in said:
        same(got, wanted, process)
    print("done")
"""


@pytest.mark.parametrize(
    ("method", "before"),
    [("fork", "used"), ("fork", "unused"), ("spawn", "used"), ("forkserver", "used")],
)
def test_a_pool(tmp_path: Path, method: str, before: str) -> None:
    assert run_program(POOL, tmp_path, method, before) == "done\n"


LOADER = """
from torch.utils.data import DataLoader, Dataset


class Photos(Dataset):
    def __init__(self, preprocess):
        self.preprocess = preprocess

    def __len__(self):
        return len(FILES)

    def __getitem__(self, index):
        return os.getpid(), self.preprocess(FILES[index])[0]


FILES = sorted(str(file) for file in (bundled().parent / "photos").glob("*.jpg"))

if __name__ == "__main__":
    assert len(FILES) >= 6
    model = vitrail.load(bundled(), device="cpu")
    pixels_wanted = model.preprocess(FILES)
    wanted = model.encode_image(pixels_wanted, batch_size=2)
    preprocess = model.preprocess if sys.argv[2] == "model" else model.preprocessor
    for attempt in range(2):
        loader = DataLoader(
            Photos(preprocess),
            batch_size=2,
            num_workers=2,
            multiprocessing_context=sys.argv[1],
            timeout=50,
        )
        workers, got = set(), []
        for processes, pixels in loader:
            workers |= set(processes.tolist())
            got.append(pixels)
        assert len(workers) == 2 and os.getpid() not in workers
        assert torch.equal(torch.cat(got), pixels_wanted)
        assert torch.equal(torch.cat([model.encode_image(pixels) for pixels in got]), wanted)
    print("done")
"""


@pytest.mark.parametrize(
    ("method", "preprocess"),
    [("fork", "model"), ("fork", "value"), ("spawn", "value"), ("forkserver", "value")],
)
def test_a_data_loader(tmp_path: Path, method: str, preprocess: str) -> None:
    assert run_program(LOADER, tmp_path, method, preprocess) == "done\n"


PREFORK = """
import signal, struct

model = vitrail.load(bundled(), device="cpu")
pixels = np.random.default_rng(1).integers(0, 256, (40, 64, 48, 3), np.uint8)


def task(number):
    images = model.encode_image(pixels[: number + 1])
    texts = model.encode_text([f"task {n}" for n in range(30 * number + 1)])
    return images.numpy().tobytes() + texts.numpy().tobytes()


class Worker:
    # as a prefork pool has it: a child that answers over pipes until its requests end
    def __init__(self):
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self.requests)
            while number := os.read(requests, 1):
                answer = task(number[0])
                answer = struct.pack("q", len(answer)) + answer
                while answer:
                    answer = answer[os.write(answers, answer) :]
            sys.exit(3)  # the interpreter ends as usual
        os.close(requests)
        os.close(answers)

    def read(self, size):
        data = b""
        while len(data) < size and (more := os.read(self.answers, size - len(data))):
            data += more
        return data

    def ask(self, number):
        os.write(self.requests, bytes([number]))

    def answer(self):
        header = self.read(8)
        return self.read(struct.unpack("q", header)[0]) if header else b""

    def end(self):
        os.close(self.requests)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


numbers = (0, 3, 7, 12, 20)
workers = [Worker()]
workers.append(Worker())
for round in range(3):
    said = []
    for number in numbers:
        for worker in workers:
            worker.ask(number)
        said += [worker.answer() for worker in workers]
    wanted = [task(number) for number in numbers for _ in workers]
    assert said == wanted, round
    # one worker is killed in the middle of a task and another takes its place; the parent has
    # computed in the meantime
    killed = workers.pop(0)
    killed.ask(39)
    os.kill(killed.process, signal.SIGKILL)
    assert killed.end() == -signal.SIGKILL
    workers.append(Worker())
assert [worker.end() for worker in reversed(workers)] == [3, 3]
print("done")
"""


def test_a_prefork_pool_whose_workers_are_killed_and_replaced(tmp_path: Path) -> None:
    assert run_program(PREFORK, tmp_path) == "done\n"


OTHERS = """
folder, options = sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:])
model = vitrail.load(folder, device="cpu", **options)
unused = in_fork(lambda: rows(model))
wanted = rows(model)
same(unused, wanted, "forked before the first call")
same(in_fork(lambda: rows(model)), wanted, "forked after a call")
again = in_fork(lambda: rows(vitrail.load(folder, device="cpu", **options)))
same(again, wanted, "loaded in the child")
module = model.as_module("image")
pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (32, 64, 64, 3), np.uint8))
same(in_fork(lambda: module(pixels).numpy().tobytes()), module(pixels).numpy().tobytes(), "module")
replicas = vitrail.load_replicas(folder, devices=["cpu", "cpu"], **options)
embed = lambda: replicas.encode_image(pixels.numpy(), batch_size=8).numpy().tobytes()
same(in_fork(embed), embed(), "replicas")
print("done")
"""


@pytest.mark.parametrize("options", [("dtype=int8",), ("dtype=bf16",), ("resize=device",)])
def test_other_models(
    tmp_path: Path, request: pytest.FixtureRequest, options: tuple[str, ...]
) -> None:
    from vitrail.demo.demo import bundled

    quantized = options == ("dtype=int8",)
    folder = request.getfixturevalue("int8_clip") if quantized else bundled()
    assert run_program(OTHERS, tmp_path, str(folder), *options) == "done\n"


STRESS = """
import time
from PIL import Image

model = vitrail.load(bundled(), device="cpu")
limited = vitrail.load(bundled(), device="cpu", memory_limit="8M")
wanted = rows(model)
ended = threading.Event()
pictures = [Image.new("RGB", (60, 80), (8 * n, 0, 0)) for n in range(8)]
texts = [f"a photo of {n} things" for n in range(50)]
calls = (
    lambda: model.encode_image(pictures, batch_size=2),
    lambda: model.encode_text(texts),
    lambda: model.classify(pictures, [f"{time.time()}", "b"]),
    lambda: limited.encode_image(pictures),
    lambda: rows(model),
)
counts = [0] * len(calls)


def work(number):
    while not ended.is_set():
        calls[number]()
        counts[number] += 1


threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
for thread in threads:
    thread.start()


def child():
    got = rows(model)
    for call in calls:
        call()
    return got


try:
    for number in range(50):
        same(in_fork(child), wanted, number)
finally:
    ended.set()
for thread in threads:
    thread.join()
assert min(counts) > 1, counts
print("done")
"""


def test_forks_while_other_threads_compute(tmp_path: Path) -> None:
    assert run_program(STRESS, tmp_path) == "done\n"
