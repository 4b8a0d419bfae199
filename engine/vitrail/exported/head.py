"""The head of an exported record. Every version of Vitrail can read the head of every other.

    "vitrail export\\n"
    SHA-256               of all that follows
    plan grammar          uint32 (`vitrail.plan.record.PLAN_GRAMMAR`)
    kernel ABI            uint32 (`vitrail.plan.record.KERNEL_ABI`)
    version               string: of the Vitrail that exported the folder, for information

The layout of the head never changes. csrc/export_folder.cpp reads it too.
"""

import hashlib
import struct

from vitrail._version import __version__
from vitrail.errors import CheckpointError, refusal, show
from vitrail.plan.record import KERNEL_ABI, PLAN_GRAMMAR, RecordReader, string

MAGIC = b"vitrail export\n"
UNNUMBERED = b"vitrail export 2\n"
"""The first bytes of plan grammar 2, which had no kernel ABI. Digest and version followed."""
AGAIN = "damaged; export it again"


def encode_record(version: str, body: bytes) -> bytes:
    """The record of a folder that Vitrail ``version`` exported; ``body`` follows the head."""
    signed = struct.pack("<II", PLAN_GRAMMAR, KERNEL_ABI) + string(version) + body
    return MAGIC + hashlib.sha256(signed).digest() + signed


def read_head(record: bytes, location: str) -> tuple[str, RecordReader]:
    """The version that exported the folder, and the reader of what follows the head.

    Raises CheckpointError if the record is damaged, or if one of its two numbers is not this
    version's: the message has the numbers of both, and the version that exported the folder.
    """
    head = UNNUMBERED if record.startswith(UNNUMBERED) else MAGIC
    if not record.startswith(head):
        raise refusal(f"{location}: first bytes", show(record[: len(head)]), show(head))
    digest, signed = record[len(head) :][:32], record[len(head) + 32 :]
    if hashlib.sha256(signed).digest() != digest:
        raise refusal(location, "bytes that do not match their digest", f"them to match: {AGAIN}")
    reader = RecordReader(signed, b"")
    try:
        grammar, abi = (2, None) if head == UNNUMBERED else reader.numbers("II")
        version = reader.string().decode()
    except ValueError as error:
        raise refusal(location, str(error), f"a whole record: {AGAIN}") from None
    if (grammar, abi) != (PLAN_GRAMMAR, KERNEL_ABI):
        raise _other_numbers(location, grammar, abi, version)
    return version, reader


def _other_numbers(location: str, grammar: int, abi: int | None, version: str) -> CheckpointError:
    return refusal(
        location,
        f"plan grammar {grammar} and {'no kernel ABI' if abi is None else f'kernel ABI {abi}'}, "
        f"exported by Vitrail {show(version)}",
        f"plan grammar {PLAN_GRAMMAR} and kernel ABI {KERNEL_ABI}, which Vitrail {__version__} "
        "reads: export the checkpoint again with it, or load the folder with a version that has "
        "the folder's two numbers",
    )
