"""Files, folders and globs by local path and by URL are one code path."""

import gzip
import http.server
import threading
from functools import partial

import fsspec
import pytest
from fsspec.registry import known_implementations

from dlm_lightning.data.files import absolute, find, suffix, train_and_val


@pytest.fixture
def folder(tmp_path):
    """Four texts over two folders, one of them compressed, and a picture."""
    files = {"a/0.txt": b"zero", "a/deep/1.md": b"one", "b/2.txt": b"caf\xe9", "b/3.txt.gz": gzip.compress(b"three")}
    for name, content in {**files, "b/picture.png": b"\x89PNG"}.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(content)
    return tmp_path / "texts"


@pytest.fixture
def in_memory(folder):
    """The same files under memory://, as a bucket would hold them."""
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/texts", recursive=True)
    yield "memory://bucket/texts"
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def server(folder):
    """The same files over http, from this process."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def look_up(*paths, suffixes=(".txt", ".md")):
    return find("data.paths", list(map(str, paths)), suffixes)


def read(file):
    with file.open() as content:
        return content.read()


CONTENT = {"a/0.txt": "zero", "a/deep/1.md": "one", "b/2.txt": "caf\ufffd", "b/3.txt.gz": "three"}


@pytest.mark.parametrize("places", [[""], ["**/*.txt", "*/*.gz", "a"], ["?"], ["a", "b/2.txt", "b/3.txt.gz"]])
def test_a_url_finds_what_a_local_path_finds(folder, in_memory, places):
    for root in (folder, folder.as_uri(), in_memory):
        files = look_up(*(f"{root}/{place}".rstrip("/") for place in places))
        assert {file.name: read(file) for file in files} == CONTENT


def test_files_over_http(server, folder):
    files = look_up(f"{server}/a/0.txt", f"{server}/b/3.txt.gz")
    assert {file.name: read(file) for file in files} == {"a/0.txt": "zero", "b/3.txt.gz": "three"}
    assert files[0].url == f"{server}/a/0.txt"


def test_local_and_remote_files_go_together(folder, in_memory):
    files = look_up(folder / "a" / "0.txt", f"{in_memory}/a/0.txt")
    assert [read(file) for file in files] == ["zero", "zero"]
    assert len({file.name for file in files}) == 2


def test_links_lead_where_they_point_to_and_nowhere_twice(folder, tmp_path):
    """The hub's own cache of files consists of links."""
    (folder / "a" / "link.txt").symlink_to(folder / "b" / "2.txt")
    (folder / "a" / "broken.txt").symlink_to(folder / "nowhere")
    (folder / "a" / "folder.txt").symlink_to(folder / "b")
    (tmp_path / "linked").symlink_to(folder)
    names = {*CONTENT, "a/link.txt"}
    assert {file.name for file in look_up(folder)} == {file.name for file in look_up(tmp_path / "link*")} == names


def test_a_version_follows_the_content(folder, in_memory, server):
    def versions():
        places = [folder / "a" / "0.txt", f"{in_memory}/a/0.txt", f"{server}/a/0.txt"]
        return [look_up(place)[0].version() for place in places]

    before = versions()
    assert versions() == before
    (folder / "a" / "0.txt").write_text("longer than it was")
    fsspec.filesystem("memory").pipe("/bucket/texts/a/0.txt", b"one!")
    fsspec.filesystem("http").invalidate_cache()
    assert all(old != new for old, new in zip(before, versions(), strict=True))


@pytest.mark.parametrize(
    ("path", "error", "says"),
    [
        ("nowhere/*.txt", FileNotFoundError, r"data.paths: nothing matches nowhere/\*.txt$"),
        ("memory://bucket/none", FileNotFoundError, "data.paths: nothing matches memory://bucket/none$"),
        ("http://127.0.0.1:1/a.txt", FileNotFoundError, "data.paths: nothing matches http.*Cannot connect"),
        ("what://ever", ValueError, "data.paths: what://ever cannot be looked up: Protocol not known: what"),
    ],
)
def test_what_cannot_be_found_is_named(path, error, says):
    with pytest.raises(error, match=says):
        look_up(path)


@pytest.mark.parametrize("paths", [["empty"], ["a", "empty"], ["empt?"]])
def test_a_folder_without_any_such_file_is_named(folder, paths):
    (folder / "empty").mkdir()
    (folder / "empty" / "picture.png").touch()
    with pytest.raises(FileNotFoundError, match=r"data.paths: .*empt. holds no file \(.txt .md\)$"):
        look_up(*(folder / path for path in paths))


def test_what_is_for_validation_is_not_for_training(folder):
    train, val = train_and_val([str(folder)], [str(folder / "a" / ".." / "b")], (".txt", ".md"))
    assert [[file.name for file in files] for files in (train, val)] == [
        ["a/0.txt", "a/deep/1.md"],
        ["2.txt", "3.txt.gz"],
    ]
    assert [len(files) for files in train_and_val([str(folder)], None, (".txt", ".md"))] == [4, 0]


def test_files_all_kept_for_validation_leave_nothing_to_train_on(folder):
    for val_paths in ([folder], [folder / "b", folder / "a"]):
        with pytest.raises(ValueError, match=r"^data.val_paths keeps all files of data.paths for validation, so"):
            train_and_val([str(folder)], list(map(str, val_paths)), (".txt", ".md"))
    assert train_and_val([], [str(folder)], (".txt", ".md"))[0] == []  # of a hub set there are no paths


DAMAGED = {  # name: (content, what the reader says)
    "a.txt.gz": (b"plain", "Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(b"three" * 999)[:-9], "Compressed file ended before"),
    "a.txt.bz2": (b"plain", "Invalid data stream"),
    "a.txt.xz": (b"plain", "Input format not supported"),
    "a.txt.zip": (b"plain", "File is not a zip file"),
}


@pytest.mark.parametrize("mode", ["r", "rb"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(folder, name, mode):
    content, says = DAMAGED[name]
    (folder / name).write_bytes(content)
    [file] = look_up(folder / name)
    with pytest.raises(ValueError, match=rf"^{folder}/{name} cannot be read: {says}"), file.open(mode) as opened:
        opened.read()


def test_a_file_system_that_is_not_installed_is_named(monkeypatch):
    missing = {"class": "not_installed.FileSystem", "err": "Install s3fs to access S3"}
    monkeypatch.setitem(known_implementations, "bucket", missing)
    with pytest.raises(ValueError, match=r"data.paths: bucket://x cannot be looked up: Install s3fs to access S3"):
        look_up("bucket://x")


def test_local_paths_become_absolute_and_urls_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["a/../b", "~/c", "/d", "s3://bucket/a", "https://host/a?b", "zip://a.txt::c.zip"]
    assert [absolute(path) for path in paths] == [f"{tmp_path}/b", "/home/me/c", *paths[2:]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.txt", ".txt"), ("a.jsonl.gz", ".jsonl"), ("a.json.bz2", ".json"), ("a.gz", ""), ("a.b/c", ""), (".txt", "")],
)
def test_a_suffix_of_compression_does_not_count(name, expected):
    assert suffix(name) == expected
