"""The manifest: a folder is complete if its files are those that it lists, byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dlm_lightning import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder of three files, one of them in a folder of its own and one of them empty."""
    folder = tmp_path / "step=4"
    (folder / "shards").mkdir(parents=True)
    (folder / "a").write_bytes(bytes(range(256)) * 9)
    (folder / "shards" / "b").write_bytes(b"b" * 100)
    (folder / "empty").touch()
    manifest.write(folder, manifest.describe(folder), step=4, recipe="mine")
    return folder


def test_a_manifest_states_facts_sizes_and_hashes(folder):
    content = manifest.verify(folder)
    assert (content["step"], content["recipe"]) == (4, "mine")
    assert content["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in ("a", "empty", "shards/b")
        for data in [(folder / name).read_bytes()]
    }
    assert manifest.read(folder) == content


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_several_processes_share_out_the_files(parts, folder):
    (folder / manifest.NAME).unlink()
    shares = [manifest.describe(folder, part, parts) for part in range(parts)]
    assert sum(map(len, shares)) == 3
    together = {name: measured for share in shares for name, measured in share.items()}
    assert together == manifest.describe(folder)


DAMAGES = ("delete", "folder instead", "lengthen", "truncate", "flip first", "flip last")
CASES = [(name, damage) for name in ("a", "shards/b", manifest.NAME) for damage in DAMAGES]
CASES += [("empty", damage) for damage in DAMAGES[:3]]  # it has no byte to lose


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_every_damage_to_every_file_is_found_and_the_file_named(name, damage, folder):
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "folder instead":
        path.unlink()
        path.mkdir()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "lengthen":
        path.write_bytes(content + b"x")
    else:
        content[0 if damage == "flip first" else -1] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        manifest.verify(folder)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found_or_changes_nothing(folder):
    """Of a newline in JSON another kind of white space can become; then the content is what it was."""
    path = folder / manifest.NAME
    whole, content = path.read_bytes(), manifest.read(folder)
    refused = 0
    for place in range(len(whole)):
        for bit in (0, 2, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert manifest.read(folder) == content, (place, bit)
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 2 * len(whole)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "{}", '{"digest": 1}', '{"files": 3, "digest": ""}'])
def test_any_other_json_is_refused(text, folder):
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        manifest.read(folder)


def test_a_manifest_of_older_content_does_not_pass(folder):
    """Sizes are the same and the digest is right, so only the hash tells."""
    content = json.loads((folder / manifest.NAME).read_text())
    (folder / "a").write_bytes(bytes(256 * 9))
    assert content["files"]["a"]["bytes"] == 256 * 9
    with pytest.raises(ValueError, match="a is damaged"):
        manifest.verify(folder)
