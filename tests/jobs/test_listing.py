"""Inputs to sources: files, folders, patterns, lists and tars."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from vitrail.errors import InputError
from vitrail.jobs import listing
from vitrail.jobs.listing import Source, TarMember, shown


def find_images(inputs: list[str], lists: list[str] | None = None) -> list[Source]:
    return listing.find_images(inputs, lists or []).sources


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_a_folder_gives_its_images_sorted_in_any_case_without_hidden_ones(tmp_path: Path) -> None:
    images = ["b.JPG", "a.jpeg", "sub/z.png", "sub/deep/c.WebP", "sub.bmp", "x.gif", "A.jpg"]
    touch(tmp_path, *images, "notes.txt", "a.jpg.bak", ".hidden.jpg", ".cache/t.jpg", "jpg")
    expected = sorted(str(tmp_path / name) for name in images)
    assert [str(path) for path in find_images([str(tmp_path)])] == expected


def test_files_are_taken_whatever_their_name_as_often_as_named(tmp_path: Path) -> None:
    touch(tmp_path, "scan", "a[1].jpg", "b.jpg")
    inputs = [str(tmp_path / name) for name in ("scan", "b.jpg", "a[1].jpg", "b.jpg")]
    assert [str(path) for path in find_images(inputs)] == inputs


def test_a_link_to_nothing_is_an_input_whose_row_will_say_so(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert find_images([str(tmp_path / "gone.jpg")]) == find_images([str(tmp_path)])


def test_patterns_match_sorted_and_cross_folders_with_two_stars(tmp_path: Path) -> None:
    touch(tmp_path, "2.jpg", "10.jpg", "1.png", "sub/3.jpg", "sub/deep/4.jpg", "sub/notes.txt")

    def names(pattern: str) -> list[str]:
        return [os.path.relpath(str(p), tmp_path) for p in find_images([str(tmp_path / pattern)])]

    assert names("*.jpg") == ["10.jpg", "2.jpg"]
    assert names("**/*.jpg") == ["10.jpg", "2.jpg", "sub/3.jpg", "sub/deep/4.jpg"]
    assert names("s*") == ["sub/3.jpg", "sub/deep/4.jpg"]
    assert names("sub/**") == ["sub/3.jpg", "sub/deep/4.jpg", "sub/notes.txt"]


def test_folders_and_patterns_list_no_path_twice(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "sub/c.jpg")
    inputs = [
        str(tmp_path / "b.jpg"),
        str(tmp_path / "sub"),
        str(tmp_path),
        str(tmp_path / "*.jpg"),
    ]
    names = [os.path.basename(str(path)) for path in find_images(inputs)]
    assert names == ["b.jpg", "c.jpg", "a.jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jpg", "missing.jpg': no such file or folder"),
        ("*.nothing", r"\*.nothing': matches no file"),
        ("empty", "empty: no image there, wanted .bmp, .gif"),
        ("empt*", r"empt\*: no image there"),
    ],
)
def test_an_input_that_gives_nothing_is_named(name: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "empty/notes.txt")
    with pytest.raises(InputError, match=message):
        find_images([str(tmp_path / "a.jpg"), str(tmp_path / name)])


def test_an_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(InputError, match="'': no such file or folder"):
        find_images([""])


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="locked: cannot list the folder: Permission denied"):
        find_images([str(tmp_path)])


def test_every_missing_input_is_named_at_once(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{i}.jpg") for i in range(7)]
    with pytest.raises(InputError, match=r"0.jpg.*4.jpg' and 2 more: no such file"):
        find_images(names)


def test_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.tif", "c.TIF", "sub/d.heic", "notes.txt")
    images = listing.find_images([str(tmp_path)])
    assert [os.path.basename(str(s)) for s in images.sources] == ["a.jpg"]
    assert images.unread == {".tif": 2, ".heic": 1}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"no image there but 1 .heic, 2 .tif, which Vitrail does"):
        find_images([str(tmp_path)])


# Lists


@pytest.mark.parametrize(
    "data",
    [
        b"a.jpg\n\nno such file.jpg\na.jpg",
        b"\xef\xbb\xbfa.jpg\r\nno such file.jpg\r\na.jpg\r\n",
        b"a.jpg\0no such file.jpg\0a.jpg\0",
    ],
)
def test_a_list_is_taken_as_it_is_written(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(data)
    expected = ["a.jpg", "no such file.jpg", "a.jpg"]
    assert find_images([], [str(tmp_path / "list")]) == expected


def test_a_list_keeps_names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"caf\xe9.jpg\n")
    (name,) = find_images([], [str(tmp_path / "list")])
    assert os.fsencode(str(name)) == b"caf\xe9.jpg"


def test_a_list_can_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg\nb.jpg\n")))
    assert find_images([], ["-"]) == ["a.jpg", "b.jpg"]


def test_an_empty_or_missing_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\n\n")
    with pytest.raises(InputError, match="the list is empty"):
        find_images([], [str(tmp_path / "list")])
    with pytest.raises(InputError, match="cannot read the list: No such file"):
        find_images([], [str(tmp_path / "missing")])


# Tars


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


MEMBERS = {
    "b/2.jpg": b"two" * 300,
    "b/2.json": b"{}",
    "../1.PNG": b"one",
    "b/.hidden.jpg": b"no",
    "x.webp": b"",
}


def test_a_tar_gives_its_images_in_its_own_order_and_their_bytes(tmp_path: Path) -> None:
    tar = tmp_path / "shard.tar"
    make_tar(tar, MEMBERS)
    with tarfile.open(tar, "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    members = find_images([str(tar)])
    assert [str(member) for member in members] == [
        f"{tar}/{n}" for n in ("b/2.jpg", "../1.PNG", "x.webp")
    ]
    assert [m.read_bytes() for m in members if isinstance(m, TarMember)] == [
        b"two" * 300,
        b"one",
        b"",
    ]
    assert find_images([str(tmp_path / "*.tar")]) == members
    assert not (tmp_path.parent / "1.PNG").exists()


@pytest.mark.parametrize("cut", [0, 1, 700, 1300, 2000, 2600, 3300])
def test_a_tar_that_was_cut_is_refused(cut: int, tmp_path: Path) -> None:
    tar = tmp_path / "shard.tar"
    make_tar(tar, MEMBERS)
    data = tar.read_bytes()
    tar.write_bytes(data[:cut])
    with pytest.raises(InputError, match=r"shard.tar: .*(cut short|not an uncompressed tar)"):
        find_images([str(tar)])


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    tar = tmp_path / "shard.tar"
    make_tar(tar, MEMBERS)
    data = bytearray(tar.read_bytes())
    at = data.index(b"../1.PNG")
    data[at + 148 : at + 154] = b"999999"
    tar.write_bytes(data)
    with pytest.raises(InputError, match=rf"cut short at byte {at}, after 1 images"):
        find_images([str(tar)])


def test_a_compressed_tar_is_told_what_to_do(tmp_path: Path) -> None:
    make_tar(tmp_path / "shard.tar", MEMBERS, "w:gz")
    with pytest.raises(InputError, match="not an uncompressed tar; decompress"):
        find_images([str(tmp_path / "shard.tar")])


def test_a_tar_that_shrinks_later_costs_its_members_only(tmp_path: Path) -> None:
    tar = tmp_path / "shard.tar"
    make_tar(tar, MEMBERS)
    member, *_ = find_images([str(tar)])
    assert isinstance(member, TarMember)
    os.truncate(tar, member.offset + 10)
    with pytest.raises(OSError, match="ends after 10 of 900 bytes"):
        member.read_bytes()


def test_a_million_paths_take_little_memory(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"".join(b"photos/%09d.jpg\n" % i for i in range(200_000)))
    sources = find_images([], [str(tmp_path / "list")])
    assert sum(sys.getsizeof(source) for source in sources) < 120 * len(sources)


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert shown("a\nb\x1b[2J\u202e.jpg") == r"a\nb\x1b[2J\u202e.jpg"
    assert shown(os.fsdecode(b"caf\xe9 \xc3\xa9.jpg")) == r"caf\xe9 é.jpg"
