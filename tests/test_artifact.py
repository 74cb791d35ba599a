"""An artifact is either whole or refused: every flipped bit, cut file and newer format is found."""

import json
from pathlib import Path

import pytest

from alignpipe.artifact import (
    FORMAT,
    MANIFEST,
    Manifest,
    Parent,
    damage,
    publish,
    read_manifest,
    seal,
    set_aside,
    sha256_file,
    verify,
    write_json,
    write_text,
)
from alignpipe.errors import CheckpointError, MachineError


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A sealed folder with a file, a file below a folder and an empty one."""
    folder = tmp_path / "sealed"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(16)))
    (folder / "inner" / "한국어 name.txt").write_text("text", encoding="utf-8")
    (folder / "empty").touch()
    parents = {"policy": Parent("0123", "4567")}
    seal(folder, Manifest("sft", "89ab", parents, {"settings": {"seed": 1}}, {"loss": 0.5}))
    return folder


def test_sealed_folder_verifies_to_what_was_sealed(sealed: Path) -> None:
    manifest = verify(sealed)
    assert set(manifest.files) == {"weights.bin", "inner/한국어 name.txt", "empty"}
    assert manifest.files["weights.bin"].size == 16
    # Known answer: sha256 of the bytes 0 to 15.
    assert manifest.files["weights.bin"].sha256.startswith("be45cb2605bf36bebde684841a28f0fd")
    assert manifest.parents == {"policy": Parent("0123", "4567")}
    assert (manifest.kind, manifest.key, manifest.metrics) == ("sft", "89ab", {"loss": 0.5})
    assert manifest.inputs == {"settings": {"seed": 1}}
    assert {"python", "torch", "transformers"} <= set(manifest.versions)


def test_every_flipped_bit_is_found_by_verify_and_by_nothing_less(sealed: Path) -> None:
    path = sealed / "weights.bin"
    whole = path.read_bytes()
    manifest = verify(sealed)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match=r"weights\.bin: its content changed"):
            verify(sealed)
        assert damage(sealed, manifest, read_files=False) is None
    path.write_bytes(whole)
    verify(sealed)


def test_every_flipped_bit_of_the_manifest_is_found(sealed: Path) -> None:
    path = sealed / MANIFEST
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match=r"not a manifest|is newer"):
            read_manifest(sealed)


def test_manifest_of_the_first_format_has_no_hash_of_its_own(sealed: Path) -> None:
    raw = json.loads((sealed / MANIFEST).read_text(encoding="utf-8"))
    del raw["sha256"]
    write_json(sealed / MANIFEST, raw | {"format": 1})
    assert verify(sealed).key == "89ab"
    write_json(sealed / MANIFEST, raw)
    with pytest.raises(CheckpointError, match="not a manifest"):
        verify(sealed)


def test_cut_and_missing_files_are_found_by_size_alone(sealed: Path) -> None:
    manifest = verify(sealed)
    (sealed / "weights.bin").write_bytes(bytes(7))
    assert "has 7 bytes, 16 were written" in str(damage(sealed, manifest, read_files=False))
    (sealed / "weights.bin").unlink()
    assert "weights.bin: missing" in str(damage(sealed, manifest, read_files=False))


def test_digest_names_content_and_not_when_it_was_written(sealed: Path) -> None:
    before = verify(sealed).digest
    assert seal(sealed, Manifest("sft", "other", metrics={"loss": 9.0})).digest == before
    (sealed / "empty").write_text("x")
    assert seal(sealed, Manifest("sft", "89ab")).digest != before


def test_folder_without_manifest_was_never_finished(sealed: Path) -> None:
    (sealed / MANIFEST).unlink()
    assert read_manifest(sealed) is None
    with pytest.raises(CheckpointError, match="never finished"):
        verify(sealed)


def test_newer_format_is_refused(sealed: Path) -> None:
    raw = json.loads((sealed / MANIFEST).read_text(encoding="utf-8"))
    write_json(sealed / MANIFEST, raw | {"format": FORMAT + 1})
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1} is newer"):
        read_manifest(sealed)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', "null", '{"format": "x"}', "\udcff"])
def test_manifest_that_is_none_is_refused_in_one_line(sealed: Path, text: str) -> None:
    (sealed / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="not a manifest") as caught:
        read_manifest(sealed)
    assert "\n" not in str(caught.value)


def test_failed_write_leaves_the_old_text_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"old": 1})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it" * 10_000 + "\ud800")
    assert json.loads(path.read_text()) == {"old": 1}
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}


def test_refused_write_is_an_error_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"run\.json: cannot be written"):
        write_json(tmp_path / "absent" / "run.json", {})


def test_publish_moves_the_folder_and_replaces_nothing(sealed: Path, tmp_path: Path) -> None:
    final = tmp_path / "stages" / "sft-89ab"
    publish(sealed, final)
    assert not sealed.exists()
    verify(final)
    second = tmp_path / "second"
    second.mkdir()
    (second / "other").touch()
    with pytest.raises(MachineError, match="cannot be made"):
        publish(second, final)
    verify(final)
    assert not (final / "other").exists()


def test_set_aside_deletes_nothing_however_often(tmp_path: Path) -> None:
    for content in ("one", "two", "three"):
        (tmp_path / "rm-1").mkdir()
        (tmp_path / "rm-1" / "file").write_text(content)
        set_aside(tmp_path / "rm-1", "replaced")
    kept = [(tmp_path / f"rm-1.replaced-{number}" / "file").read_text() for number in (1, 2, 3)]
    assert kept == ["one", "two", "three"]


def test_hash_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # The first test vector of FIPS 180-4.
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")
