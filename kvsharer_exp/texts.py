"""Texts: load passages, split them into parts that never meet, cut them into token windows.

Three parts: *calibration* (layer means, the fitness), *search* (tasks a candidate is scored on)
and *report* (what is told in the end). Parts are split by document and checked by content, so
that no sentence is both searched on and reported. It does not know models: a tokenizer comes in
from outside.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from kvsharer_exp.errors import InputError

WIKIPEDIA_PARSER_VERSION = 1  # part of the cache file's name: raise it when the parser changes
MIN_PARAGRAPH_CHARACTERS = 200
MIN_SENTENCE_CHARACTERS = 40  # shorter ones ("He died in 1912.") repeat by chance
PARTS = ("calibration", "search", "report")
_SHARES = (0.3, 0.6)  # calibration below the first, search below the second, report above
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Passage:
    """One paragraph or line; ``document``: the article's title, or ``file.txt:12``."""

    text: str
    document: str


@dataclass(frozen=True, slots=True)
class TextParts:
    """Passages of each part; ``sources``: part → the source it was cut from."""

    calibration: tuple[Passage, ...]
    search: tuple[Passage, ...]
    report: tuple[Passage, ...]
    sources: Mapping[str, str]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Part → 12 hex characters that identify its content."""
        return {part: _fingerprint(getattr(self, part)) for part in PARTS}


def load_passages(source: str) -> tuple[Passage, ...]:
    """Passages of ``wikipedia``, ``news``, a ``.txt`` (one passage a line), a ``.jsonl`` (key
    "text"), or ``hub:<dataset>[/<config>][:<split>]`` (column "text", default split ``train``).

    Blank lines are skipped; every line of a file is its own document.

    Raises:
        InputError: missing, empty or malformed file, or a data set that cannot be fetched.
    """
    if source == "wikipedia":
        return _wikipedia()
    if source == "news":
        from kvsharer_exp.assets import fetch

        return _lines(fetch("news"), _line_text)
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source)
    readers = {".txt": _line_text, ".jsonl": _json_text}
    if path.suffix not in readers:
        raise InputError(
            f"text source {_short(source)!r} is unknown: give wikipedia, news, a .txt, "
            "a .jsonl, or hub:<dataset>[/<config>][:<split>]"
        )
    return _lines(path, readers[path.suffix])


def _lines(path: Path, read: Callable[[str, str], str]) -> tuple[Passage, ...]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {_tail(path)} is not UTF-8 (byte {error.start}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(
            f"text file {_tail(path)} cannot be read ({error.strerror}): "
            "give a .txt with one passage a line, or wikipedia"
        ) from error
    passages = tuple(
        Passage(" ".join(read(line, f"{_tail(path)} line {number}").split()), document)
        for number, line in enumerate(content.split("\n"), start=1)
        if line.strip()
        for document in (f"{path.name}:{number}",)
    )
    if not passages:
        raise InputError(f"text file {_tail(path)} is empty: give at least one passage a line")
    return passages


def _line_text(line: str, where: str) -> str:
    return line


def _json_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f'{where} is not JSON ({error.msg}): give one object a line, like {{"text": "…"}}'
        ) from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where} has no "text": give one object a line, like {{"text": "…"}}')
    return text


@contextmanager
def offline_when_unreachable() -> Iterator[None]:
    """Put the hub's clients in offline mode where the hub does not answer.

    Data sets fetched before still load then; others fail at once instead of after 23 s of
    retries. Undone at the end.
    """
    import datasets
    import huggingface_hub.constants as hub
    from huggingface_hub.utils import get_session

    before = (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    try:
        if not any(before):
            try:
                get_session().head(hub.ENDPOINT, timeout=5)
            except Exception as error:  # the HTTP library, and so its errors, differ by version
                _log.info("hub unreachable (%s): using data sets fetched before", error)
                hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _hub(source: str) -> tuple[Passage, ...]:
    import datasets

    from kvsharer_exp.assets import cache_dir

    name, _, split = source.removeprefix("hub:").partition(":")
    if not name:
        raise InputError(f"text source {source!r} names no data set: give hub:<dataset>[:<split>]")
    head, _, tail = name.rpartition("/")
    # "a/b" is an organisation's data set, or (older) data set a with configuration b.
    tries: list[tuple[str, str | None]] = [(name, None)] if name.count("/") < 2 else []
    tries += [(head, tail)] if head else []
    problem = ""
    for dataset, config in tries:
        try:
            with offline_when_unreachable():
                rows = datasets.load_dataset(
                    dataset,
                    config,
                    split=split or "train",
                    cache_dir=str(cache_dir() / "datasets"),
                )
            break
        except (OSError, ValueError, RuntimeError) as error:
            problem = problem or _short(" ".join(str(error).split()), 70)
    else:
        raise InputError(
            f"text source {_short(source)!r} cannot be fetched ({problem}): "
            "give a .txt or .jsonl file, or wikipedia"
        )
    if "text" not in rows.column_names:
        columns = _short(", ".join(rows.column_names), 60)
        raise InputError(
            f'text source {_short(source)!r} has no column "text" but {columns}: '
            'save it as a .jsonl with "text"'
        )
    passages = tuple(
        Passage(" ".join(text.split()), f"{dataset}:{number}")
        for number, text in enumerate(rows["text"], start=1)
        if isinstance(text, str) and text.strip()
    )
    if not passages:
        raise InputError(f"text source {_short(source)!r} has no text: name another split")
    return passages


def _wikipedia() -> tuple[Passage, ...]:
    """The built-in dump, parsed once and kept as JSON lines in the cache folder."""
    from kvsharer_exp.assets import cache_dir, fetch

    dump = fetch("wikipedia")
    digest = hashlib.sha256(dump.read_bytes()).hexdigest()[:12]
    cache = cache_dir() / f"wikipedia-{digest}-v{WIKIPEDIA_PARSER_VERSION}.jsonl"
    if not cache.exists():
        rows = [
            json.dumps({"document": title, "text": text}, ensure_ascii=False)
            for title, markup in wikipedia_articles(dump)
            for text in wikipedia_paragraphs(markup)
        ]
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=cache.parent, suffix=".part", delete=False
        ) as file:
            file.write("\n".join(rows))
        os.replace(file.name, cache)
    with cache.open(encoding="utf-8") as lines:
        return tuple(Passage(row["text"], row["document"]) for row in map(json.loads, lines))


def wikipedia_articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, markup) of every article of a bz2 MediaWiki XML dump; no redirects, no talk."""
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if element.tag.rpartition("}")[2] != "page":
                continue
            is_article = element.findtext("{*}ns") == "0"
            if is_article and element.find("{*}redirect") is None:
                title = element.findtext("{*}title") or ""
                yield title, element.findtext("{*}revision/{*}text") or ""
            element.clear()


_DROPPED = re.compile(
    r"<!--.*?-->|<ref\b[^<>]*/>|<(ref|gallery|timeline|score|table)\b[^>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_HOLE = "\N{REPLACEMENT CHARACTER}"  # a formula stood here: the paragraph cannot be read
_FORMULA = re.compile(r"<(math|source|syntaxhighlight)\b[^>]*>.*?</\1\s*>", re.DOTALL | re.I)
_CONVERT = re.compile(r"\{\{(?:convert|cvt)\|([^|{}]+)\|([^|{}]+)[^{}]*\}\}", re.IGNORECASE)
_LANG = re.compile(r"\{\{lang\|[^|{}]+\|([^|{}]+)\}\}", re.IGNORECASE)
_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\n\s*\|\}", re.DOTALL)
_MEDIA = re.compile(r"\[\[\s*(?:file|image|category)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I)
_NOT_PROSE = re.compile(r"^[*#:;|!=].*$", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"\(\s*[;,]*\s*\)")
_LEFTOVER = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|[<>|]|" + _HOLE)


def wikipedia_paragraphs(markup: str) -> list[str]:
    """Prose paragraphs of an article, at least 200 characters each, without markup.

    Tables, references, pictures, lists and headings go; a paragraph with a formula, or with
    markup that did not parse, goes as a whole rather than with a hole in it.
    """
    import mwparserfromhell

    text = _FORMULA.sub(_HOLE, _DROPPED.sub("", markup))
    text = _LANG.sub(r"\1", _CONVERT.sub(r"\1 \2", text))
    while (shorter := _INNERMOST.sub("", text)) != text:
        text = shorter
    text = _NOT_PROSE.sub("", _MEDIA.sub("", text))
    plain = mwparserfromhell.parse(text, skip_style_tags=False).strip_code()
    paragraphs = (" ".join(_EMPTY_BRACKETS.sub("", line).split()) for line in plain.split("\n"))
    return [
        re.sub(r" +([,.;:)])", r"\1", paragraph)
        for paragraph in paragraphs
        if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS and not _LEFTOVER.search(paragraph)
    ]


def split_texts(
    calibration_source: str = "wikipedia", heldout_source: str = "wikipedia"
) -> TextParts:
    """Calibration, search and report passages; ``check_disjoint`` holds for the result.

    One source: its documents, ordered by the SHA-256 of their names, are cut at 30 % and 60 % of
    the passages. Two sources: the first is all calibration, the second is cut at 60 %; the report
    part of a source is therefore the same whatever the calibration text.

    Raises:
        InputError: a part is empty, or a calibration file repeats held-out text.
    """
    heldout = load_passages(heldout_source)
    same = _resolved(calibration_source) == _resolved(heldout_source)
    first, second, report = _cut(heldout)
    if same:
        calibration, search = first, second
    else:
        calibration, search = load_passages(calibration_source), first + second
    sources = dict(zip(PARTS, (calibration_source, heldout_source, heldout_source), strict=True))
    parts = check_disjoint(TextParts(calibration, search, report, sources))
    for part in PARTS:
        if not getattr(parts, part):
            raise InputError(
                f"{part} part of {_short(sources[part])!r} is empty ({len(heldout)} passages): "
                "give a text of more documents"
            )
    return parts


def _cut(passages: Sequence[Passage]) -> tuple[tuple[Passage, ...], ...]:
    """Three parts of about 30, 30 and 40 % of the passages, whole documents each."""
    documents: dict[str, list[Passage]] = {}
    for passage in passages:
        documents.setdefault(passage.document, []).append(passage)
    parts: tuple[list[Passage], ...] = ([], [], [])
    before = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        middle = (before + len(documents[name]) / 2) / len(passages)
        parts[sum(middle >= share for share in _SHARES)].extend(documents[name])
        before += len(documents[name])
    return tuple(tuple(part) for part in parts)


def check_disjoint(parts: TextParts) -> TextParts:
    """The parts without passages that repeat a sentence of an earlier part.

    Sentences of 40 characters or more are compared, case and white space aside. Within one source
    the later part loses the passage (logged with its count).

    Raises:
        InputError: parts of different sources share a sentence.
    """
    seen: dict[str, str] = {}
    kept: dict[str, tuple[Passage, ...]] = {}
    for part in PARTS:
        source, keep, own = parts.sources[part], [], set()
        for passage in getattr(parts, part):
            sentences = _sentences(passage.text)
            shared = next((sentence for sentence in sentences if sentence in seen), None)
            if shared is None:
                keep.append(passage)
                own.update(sentences)
            elif _resolved(source) != _resolved(parts.sources[seen[shared]]):
                raise InputError(
                    f"{seen[shared]} text repeats {part} text ({_short(shared, 50)!r}): "
                    "parts may not overlap; remove it, or give another text"
                )
        dropped = len(getattr(parts, part)) - len(keep)
        if dropped:
            _log.info("%s part: %d passages repeat an earlier part: left out", part, dropped)
        kept[part] = tuple(keep)
        seen.update(dict.fromkeys(own, part))
    return TextParts(kept["calibration"], kept["search"], kept["report"], parts.sources)


def _sentences(text: str) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.casefold().split()))
    return [sentence for sentence in sentences if len(sentence) >= MIN_SENTENCE_CHARACTERS]


def token_windows(
    passages: Sequence[Passage],
    tokenizer: Any,
    *,
    num_windows: int,
    window_tokens: int,
    seed: int,
    at_most: bool = False,
    add_bos: bool = False,
) -> torch.Tensor:
    """Windows of equal length, ``(num_windows, window_tokens)`` int64, none overlapping another.

    ``at_most``: fewer, even none, where the text gives no more.

    Paragraphs of a document that are shorter than a window are joined with a blank line. Every
    stretch gives its first window before any gives a second one; their order is drawn by ``seed``.
    ``add_bos`` makes the tokenizer's BOS the first of the ``window_tokens``.

    Raises:
        InputError: a number out of range, no BOS token, or too little text.
    """
    if num_windows < 1 or window_tokens < 2:
        raise InputError(
            f"{num_windows} windows of {window_tokens} tokens: "
            "give at least 1 window of at least 2 tokens"
        )
    if add_bos and tokenizer.bos_token_id is None:
        raise InputError("add_bos_token=true but the tokenizer has no BOS token: set it to false")
    bos = [tokenizer.bos_token_id] if add_bos else []
    body = window_tokens - len(bos)
    stretches = list(_stretches(passages, tokenizer, body))
    available = sum(len(stretch) // body for stretch in stretches)
    if available < num_windows and not at_most:
        raise InputError(
            f"text gives {available} windows of {window_tokens} tokens, {num_windows} are asked: "
            "give more text, or fewer or shorter windows"
        )
    random.Random(seed).shuffle(stretches)
    num_windows = min(num_windows, available)
    windows: list[list[int]] = []
    start = 0
    while len(windows) < num_windows:
        full = (s[start : start + body] for s in stretches if len(s) >= start + body)
        windows += [bos + tokens for tokens in full]
        start += body
    return torch.tensor(windows[:num_windows], dtype=torch.long).view(-1, window_tokens)


def _stretches(passages: Sequence[Passage], tokenizer: Any, body: int) -> Iterator[list[int]]:
    """Token ids of consecutive paragraphs of one document, at least ``body`` in each stretch."""

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    for _, group in groupby(passages, key=lambda passage: passage.document):
        texts = [passage.text for passage in group]
        joined: list[tuple[list[str], list[int]]] = []
        open_texts: list[str] = []
        length = 0
        for text, ids in zip(texts, encode(texts), strict=True):
            open_texts.append(text)
            length += len(ids)
            if length >= body:
                ids = ids if len(open_texts) == 1 else encode(["\n\n".join(open_texts)])[0]
            if len(ids) >= body:
                joined.append((open_texts, ids))
                open_texts, length = [], 0
        if open_texts and joined:  # the rest of the document is no window of its own
            texts = joined[-1][0] + open_texts
            joined[-1] = (texts, encode(["\n\n".join(texts)])[0])
        yield from (ids for _, ids in joined)


def _resolved(source: str) -> str:
    return str(Path(source).resolve()) if source.endswith((".txt", ".jsonl")) else source


def _fingerprint(passages: Sequence[Passage]) -> str:
    rows = [[passage.document, passage.text] for passage in passages]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _tail(path: Path, limit: int = 60) -> str:
    text = str(path)
    return text if len(text) <= limit else "…" + text[1 - limit :]
