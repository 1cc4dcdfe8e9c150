"""Read the built-in Wikipedia dump as prose: its articles, and their paragraphs without markup.

`load_passages` calls `wikipedia_passages` for the text source ``wikipedia``.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from kvsharer_exp.data.passages import Passage
from kvsharer_exp.model.assets import fetch
from kvsharer_exp.model.folders import cache_dir

WIKIPEDIA_PARSER_VERSION = 1  # part of the cache file's name: raise it when the parser changes
MIN_PARAGRAPH_CHARACTERS = 200


def wikipedia_passages() -> tuple[Passage, ...]:
    """Load the paragraphs of the built-in dump.

    The dump is parsed once. The result is kept as JSON lines in the cache folder.
    """
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
    """Yield (title, markup) of every article in a bz2 MediaWiki XML dump.

    Redirects and pages that are not articles, such as talk pages, are left out.
    """
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


_HOLE = "\N{REPLACEMENT CHARACTER}"  # stands where a formula was: its paragraph is left out


_FORMULA = re.compile(r"<(math|source|syntaxhighlight)\b[^>]*>.*?</\1\s*>", re.DOTALL | re.I)


_CONVERT = re.compile(r"\{\{(?:convert|cvt)\|([^|{}]+)\|([^|{}]+)[^{}]*\}\}", re.IGNORECASE)


_LANG = re.compile(r"\{\{lang\|[^|{}]+\|([^|{}]+)\}\}", re.IGNORECASE)


_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\n\s*\|\}", re.DOTALL)


_MEDIA = re.compile(r"\[\[\s*(?:file|image|category)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I)


_NOT_PROSE = re.compile(r"^[*#:;|!=].*$", re.MULTILINE)


_EMPTY_BRACKETS = re.compile(r"\(\s*[;,]*\s*\)")


_LEFTOVER = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|[<>|]|" + _HOLE)


def wikipedia_paragraphs(markup: str) -> list[str]:
    """Extract the prose paragraphs of an article, at least 200 characters each, without markup.

    Tables, references, pictures, lists and headings are removed. A paragraph with a formula, or
    with markup that did not parse, is left out as a whole, so that no paragraph has a hole in it.
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
