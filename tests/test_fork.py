"""Forked processes compute their parent's bits, whichever thread forked and whichever calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from forked import PRELUDE, run_program

PROCESSES = """
import time

model = vitrail.load(bundled(), device="cpu")
unused = in_fork(lambda: rows(model))
wanted = rows(model)
same(unused, wanted, "forked before the first call")
same(in_fork(lambda: rows(model)), wanted, "forked after a call")
same(in_fork(lambda: rows(vitrail.load(bundled(), device="cpu"))), wanted, "loaded in the child")
same(in_fork(lambda: rows(model) and in_fork(lambda: rows(model))), wanted, "a grandchild")


def on_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    time.sleep(0.3)  # the thread still ends, with a lock of MKL that a fork must not meet
    return found[0]


same(on_thread(lambda: rows(model)), wanted, "a thread")
same(on_thread(lambda: in_fork(lambda: rows(model))), wanted, "forked by a thread")
same(in_fork(lambda: on_thread(lambda: rows(model))), wanted, "a thread of a child")
late = on_thread(lambda: vitrail.load(bundled(), device="cpu"))
same(in_fork(lambda: rows(late)), wanted, "loaded by a thread")


def first_calls_meet():
    gate, said = threading.Barrier(8), []

    def call():
        gate.wait()
        said.append(error_of(lambda: model.encode_text(["a cat"] * 3)))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return b"; ".join(sorted(set(said)))


for attempt in range(5):
    same(in_fork(first_calls_meet), b"no error", "threads of a child call at the same time")
print("done")
"""


def test_a_fork_computes_the_bits_of_its_parent(tmp_path: Path) -> None:
    assert run_program(PROCESSES, tmp_path) == "done\n"


ONE_CALL = """
import itertools, signal, time
model = vitrail.load(bundled(), device="cpu")
pixels = np.zeros((300, 64, 48, 3), np.uint8)
wanted = rows(model)


def threads():
    return {thread.name for thread in threading.enumerate() if thread.name != "MainThread"}


def on_main_thread():
    return threading.current_thread() is threading.main_thread()


def state():
    # the helper has the caller's number of threads, context and iterators; errors come through
    torch.set_num_threads(1)
    asked = []

    def photos():
        asked.append((on_main_thread(), torch.get_num_threads()))
        yield pixels[0]

    model.encode_image(photos())
    assert asked == [(True, 1)], asked
    got = []
    model.encode_image(Asking(got))
    assert got == [(False, 1)], got
    try:
        model.encode_image(pixels, batch_size=0)
    except vitrail.InputError as error:
        return str(error).encode()


class Asking(list):
    # a list of an image that notes the thread which reads it
    def __init__(self, got):
        super().__init__([pixels[0]])
        self.got = got

    def __iter__(self):
        if not self.got:
            self.got.append((on_main_thread(), torch.get_num_threads()))
        return super().__iter__()


same(in_fork(state), b"batch_size: got 0, wanted None or a number over 0", "state")


def interrupted():
    # a handler's exception leaves the call at once, and the call stops computing
    stop = threading.Event()

    class Endless(list):
        def __iter__(self):
            for number in itertools.count():
                if number == 50:
                    stop.set()
                time.sleep(0.001)
                yield pixels[0]

    def handler(number, frame):
        raise TimeoutError("too long")

    signal.signal(signal.SIGALRM, handler)
    threading.Thread(target=lambda: stop.wait() and os.kill(os.getpid(), signal.SIGALRM)).start()
    try:
        model.encode_image(Endless([pixels[0]]))
    except TimeoutError:
        pass
    while any(name.startswith("vitrail") for name in threads()):
        time.sleep(0.01)
    return rows(model)


same(in_fork(interrupted), wanted, "interrupted")


def ends():
    rows(model)
    sys.exit(7)


child = os.fork()
if child == 0:
    ends()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print("done")
"""


def test_the_helper_thread_has_the_state_of_its_caller(tmp_path: Path) -> None:
    assert run_program(ONE_CALL, tmp_path) == "done\n"


LOCKS = """
import time
from PIL import Image
from vitrail import fork

model = vitrail.load(bundled(), device="cpu")
wanted = rows(model)


def held_meanwhile(hold, function):
    # function() while another thread is inside hold(entered, go): it leaves once go is set
    entered, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(entered, go))
    thread.start()
    entered.wait()
    try:
        return function(go)
    finally:
        go.set()
        thread.join()


def holding(lock):
    def hold(entered, go):
        with lock:
            entered.set()
            go.wait()

    return hold


def free(lock):
    return b"free" if lock.acquire(timeout=5) else b"taken"


brief, long = fork.lock(), fork.lock(brief=False)


def fork_at_once(go):
    fork.WAIT_SECONDS = 1e6  # nobody waits for it
    same(in_fork(lambda: free(long)), b"free", "a lock that may be long")
    assert long.locked()


def fork_later(go):
    fork.WAIT_SECONDS = 1e6
    threading.Timer(0.2, go.set).start()
    same(in_fork(lambda: free(brief) if go.is_set() else b"early"), b"free", "a brief lock")


def fork_anyway(go):
    fork.WAIT_SECONDS = 0.1
    same(in_fork(lambda: free(brief)), b"free", "a brief lock that is not let go")
    assert brief.locked()


held_meanwhile(holding(long), fork_at_once)
held_meanwhile(holding(brief), fork_later)
held_meanwhile(holding(brief), fork_anyway)
assert not brief.locked() and not long.locked()


class Slow(Image.Image):
    # an image whose pixels another thread is loading
    def load(self):
        if self.entered is not None:
            self.entered.set()
            self.go.wait()
        return super().load()


pictures = [Image.new("RGB", (40, 30)) for _ in range(100)]


def load_slowly(entered, go):
    slow = Slow()
    slow.__dict__.update(pictures[0].__dict__, entered=entered, go=go)
    model.encode_image(slow)


def encode(go):
    def child():
        model.encode_image(pictures)
        return rows(model)

    return in_fork(child)


same(held_meanwhile(load_slowly, encode), wanted, "a picture was being loaded")


def hash_slowly(entered, go):
    make = model._make_fingerprint
    model._make_fingerprint = lambda: (entered.set(), go.wait(), make())[-1]
    model.fingerprint


def fingerprint(go):
    def child():
        go.set()
        return model.fingerprint.encode()

    return in_fork(child)


again = vitrail.load(bundled(), device="cpu").fingerprint.encode()
same(held_meanwhile(hash_slowly, fingerprint), again, "weights were being hashed")

said = []
forks = [
    threading.Thread(target=lambda: said.append(in_fork(lambda: free(brief)))) for _ in range(8)
]
for thread in forks:
    thread.start()
for thread in forks:
    thread.join()
assert said == [b"free"] * 8 and not brief.locked(), said
print("done")
"""


LATE = """
import os, sys, torch

torch.set_num_threads(2)
square = torch.ones(300, 300)
square @ square  # starts OpenMP threads, and nothing ends them before the fork
receiver, sender = os.pipe()
child = os.fork()
exec(sys.argv[1])  # imports Vitrail, here and there
model = vitrail.load(bundled(), device="cpu")
if child == 0:
    assert vitrail.fork.survivor == threading.get_ident()
    said = rows(model)
    same(in_fork(lambda: rows(model)), said, "a grandchild")
    with os.fdopen(sender, "wb") as pipe:
        pipe.write(said)
    os._exit(0)
assert not vitrail.fork.forked
os.close(sender)
with os.fdopen(receiver, "rb") as pipe:
    same(pipe.read(), rows(model), "a child that imports Vitrail first")
os.waitpid(child, 0)
print("done")
"""


@pytest.mark.slow
def test_a_fork_that_is_the_first_to_import_vitrail(tmp_path: Path) -> None:
    assert run_program(LATE, tmp_path, PRELUDE, prelude="") == "done\n"


@pytest.mark.slow
def test_a_fork_finds_no_lock_taken(tmp_path: Path) -> None:
    assert run_program(LOCKS, tmp_path) == "done\n"
