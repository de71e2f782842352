"""Read captions from files of any format and split the photos, for 02_vocab."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import html
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

import storyteller_utils as st

# How names may be compared, the strictest way first.
_WRITTEN = {
    "as written": str,
    "if letter case and Unicode form are ignored": lambda name: unicodedata.normalize(
        "NFC", name
    ).casefold(),
    "if the suffix is ignored": lambda name: _without_suffix(
        unicodedata.normalize("NFC", name).casefold()
    ),
    "as a web address": lambda name: _without_suffix(
        unicodedata.normalize("NFC", unquote(name.partition("?")[0])).casefold()
    ),
    "by its number": lambda name: _number(_without_suffix(name.casefold())),
}


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in st.PHOTO_SUFFIXES else name


def _number(name: str) -> str:
    """Return the number that a name is, without COCO's prefix and zeros; else the name."""
    hit = re.fullmatch(r"(?:.*/)?(?:coco_[a-z]+\d*_)?0*(\d+)(?:\.0)?", name)
    return hit[1] if hit else name


def _endings(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


class _Names:
    """Find the photo that a caption file names, by the end of its path if that is unique."""

    def __init__(self, photos: dict[str, Path]):
        self.paths = {str(path): name for name, path in photos.items()}
        self.known, self.cache = {}, {}
        for way, change in _WRITTEN.items():
            ends: dict[str, str | None] = {}
            whole: dict[str, str | None] = {}
            for name in photos:
                key = change(name)
                whole[key] = None if key in whole else name
                for end in _endings(key)[1:]:
                    ends[end] = None if end in ends else name
            self.known[way] = ends | whole

    def find(self, name: str, folder: Path | str = "") -> tuple[str | None, str]:
        """Return the photo, None if there is none or more than one, and how it was written."""
        beside = self.paths.get(os.path.join(folder, name))
        if beside:
            return beside, "as written"
        if name not in self.cache:
            self.cache[name] = None, ""
            if ".." not in name.split("/"):
                self.cache[name] = self._search(name)
        return self.cache[name]

    def _search(self, name: str) -> tuple[str | None, str]:
        for way, change in _WRITTEN.items():
            for end in _endings(change(name)):
                if self.known[way].get(end):
                    return self.known[way][end], way
        return None, ""

    def weight(self, value) -> int:
        """Rate a cell as a photo's name: 2 for one that exists, 1 more for one with a suffix.

        A number may be of anything: 1.
        """
        name = _name(value)
        if not 0 < len(name) < 1000 or "\n" in name:
            return 0
        photo, way = self.find(name)
        known = 0 if photo is None else 1 if way == "by its number" else 2
        return known + (_without_suffix(name) != name)


def _decode(data: bytes) -> tuple[str, str]:
    """Decode a text file. Returns the text and its encoding."""
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    for mark, encoding in marks.items():
        if data.startswith(mark):
            return data.decode(encoding, "replace"), encoding
    # Half of UTF-16's bytes are zero where it writes names and spaces.
    even, odd = data[::2].count(0), data[1::2].count(0)
    if 16 * abs(even - odd) > len(data):
        encoding = "utf-16-be" if even > odd else "utf-16-le"
        return data.decode(encoding, "replace"), encoding
    text = data.decode("utf-8", "surrogateescape")
    broken = len(re.findall("[\udc80-\udcff]", text))
    if broken <= len(re.findall("[^\0-\x7f\udc80-\udcff]", text)):
        return data.decode("utf-8", "replace"), "utf-8"
    # Lines of pure ASCII say nothing about the encoding, and make every one look likely.
    foreign = b"\n".join(line for line in data.splitlines() if not line.isascii())
    encoding = _by_letters(foreign[:20_000])
    stray = 20 * broken < data.count(b"\n")  # a byte here and there
    if encoding is None and not stray:
        import charset_normalizer

        guess = charset_normalizer.from_bytes(foreign[:100_000], cp_isolation=_ENCODINGS).best()
        encoding = guess.encoding if guess is not None else "cp1252"
    if stray and encoding != "cp1252":
        encoding = "utf-8"
    return data.decode(encoding, "replace"), f"{encoding}, as it seems"


@dataclass(frozen=True)
class _Language:
    """What texts of a language, or of several, look like beyond ASCII.

    encodings  single-byte, the most common first
    letters    in lower case
    common     those that make up most of a text, in a script of its own; empty: Latin
    weight     of its letters: below 1 if a language with fewer letters is likelier
    """

    encodings: tuple[str, ...]
    letters: str
    common: str = ""
    weight: float = 1.0

    def rate(self, before: str, sign: str, after: str) -> float:
        """Rate a character between two others: 1 where it is usual, -2 where no text has it."""
        good = 0.4 if self.common else self.weight
        if sign in _SIGNS:
            inside = before.isalpha() and after.isalpha()
            if sign == "\xb7" and not inside:  # Catalan writes l\xb7l
                return -2
            return -2 if inside and sign not in _JOINING else good
        if before in "[{}\\`" or after in "[{}\\`":  # half of a Japanese sign
            return -1
        lower = "i" if sign == "\u0130" else sign.lower()  # the Turkish capital of i
        if lower not in self.letters + "i" * ("\u0131" in self.letters):
            return -2
        if sign.isupper() and before.islower():
            return -2
        around = [other.isascii() for other in (before, after) if other.isalpha()]
        if self.common and any(around):  # in the middle of a Latin word
            return -2
        if not self.common and around == [False, False]:  # no ASCII letter for long: rare
            return -1
        return 1 if lower in self.common else good


_JOINING = "\u2019\u2014\u2026\xb7"  # these stand between letters too
_SIGNS = (
    _JOINING + "\u2013\u201a\u201e\u201c\u201d\u2018\xa0\xa1\xa3\xa7\xb0\xb4\xab\xbb\xbd\xbf\u20ac"
)
_WESTERN = ("cp1252", "mac_roman", "iso8859_15", "cp850")
_CENTRAL = ("cp1250", "iso8859_2", "cp852")
_BALTIC = ("cp1257", "iso8859_13")

# If two fit equally well, the first is chosen.
_LANGUAGES = [
    _Language(_WESTERN, "àâæçéèêëîïôœùûü"),  # French
    _Language(_WESTERN, "äöüß"),  # German
    _Language(_WESTERN, "áéíñóúü"),  # Spanish
    _Language(_WESTERN, "àèéìíòóùú"),  # Italian
    _Language(_WESTERN, "áâãàçéêíóôõúü"),  # Portuguese
    _Language(_WESTERN, "àçèéíïòóúü"),  # Catalan
    _Language(_WESTERN, "åäæéöø"),  # Danish, Finnish, Norwegian, Swedish
    _Language(_WESTERN, "áèéëíïóöúü"),  # Dutch
    _Language(("cp1254",), "âçîöûüğış"),  # Turkish
    _Language(_WESTERN, "äöõüšž"),  # Estonian
    _Language(_WESTERN, "áæéíðóöúýþ"),  # Icelandic
    _Language(_CENTRAL, "óąćęłńśźż"),  # Polish
    _Language(_CENTRAL, "áéíóúýčďěňřšťůž"),  # Czech
    _Language(_CENTRAL, "áäéíóôúýčďĺľňŕšťž"),  # Slovak
    _Language(_CENTRAL, "áéíóöúüőű"),  # Hungarian
    _Language(_CENTRAL, "âîăşţ"),  # Romanian
    _Language(_CENTRAL, "čćđšž"),  # Bosnian, Croatian, Serbian, Slovenian
    _Language(_BALTIC, "ąčęėįšųūž"),  # Lithuanian
    _Language(_BALTIC, "āčēģīķļņšūž"),  # Latvian
    # Names from elsewhere, and several languages in a file.
    _Language(_WESTERN, "àáâãäåæçèéêëìíîïñòóôöõøùúûüœß", weight=0.9),
    _Language(
        ("cp1251", "koi8_r", "koi8_u", "iso8859_5", "cp866", "mac_cyrillic"),
        "абвгдежзийклмнопрстуфхцчшщъыьэюяёіїєґў",
        "оеаинтср",
    ),
    _Language(("cp1253", "iso8859_7"), "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ", "αοιετσνη"),
    _Language(("cp1256", "iso8859_6"), "ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىيًٌٍَُِّْ،؛؟", "المنويرةت"),
    _Language(("cp1255",), "אבגדהוזחטיךכלםמןנסעףפץצקרשת", "יוהלארבת"),
]


def _by_letters(data: bytes) -> str | None:
    """Return the encoding in which a text has the letters of a language, or None.

    Short captions are too little for letter frequencies; which letters occur says more.
    """
    best, rating = None, 0.5
    read: dict[str, Counter] = {}
    for language in _LANGUAGES:
        for encoding in language.encodings:
            if encoding not in read:
                text = "\n" + data.decode(encoding, "replace") + "\n"
                triples = zip(text, text[1:], text[2:], strict=False)
                read[encoding] = Counter(triple for triple in triples if not triple[1].isascii())
            counts = read[encoding]
            rates = sum(n * language.rate(*triple) for triple, n in counts.items())
            rates *= 0.99 ** language.encodings.index(encoding)
            if rates / max(counts.total(), 1) > rating:
                best, rating = encoding, rates / counts.total()
    return best


# For what letters cannot tell: other scripts and multi-byte encodings.
_ENCODINGS = [
    *("cp1252", "cp1250", "cp1254", "cp1251", "koi8_r", "cp866", "mac_cyrillic", "cp1253"),
    *("cp1255", "cp1256", "tis_620", "gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"),
]


@dataclass
class _Table:
    """A caption file as rows of cells, whatever its format."""

    form: str
    header: list[str]
    rows: list[tuple[int, list]]  # line number (or record's), cells
    separator: str = ""

    def values(self) -> list[list]:
        """Return the rows' cells, those of text files without their quotes."""
        return [[v for _, v in cells] if self.separator else cells for _, cells in self.rows]


def _read_table(path: Path, names: _Names) -> tuple[_Table | None, str]:
    """Read a file as a table, None if it names no photos. Returns the table and its encoding."""
    if path.suffix.lower() == ".parquet":
        import pandas as pd

        try:
            return _table_of_records(pd.read_parquet(path).to_dict("records"), "Parquet"), ""
        except ImportError:
            raise st.ArtifactError(f"{path} is Parquet, which needs: pip install pyarrow") from None
        except (OSError, ValueError) as error:
            raise st.ArtifactError(f"{path} cannot be read: {error}") from None
    text, encoding = _decode(path.read_bytes())
    if text.lstrip()[:1] in ("{", "["):
        if read := _read_json(text):
            return _table_of_records(*read), encoding
        if path.suffix.lower().startswith(".json"):
            raise st.ArtifactError(f"{path} is not valid JSON.")
    return _parse_text(text, names), encoding


def _read_json(text: str) -> tuple[list, str] | None:
    """Read JSON or JSON lines as records; of lines, a broken one is an empty record."""
    decode = json.JSONDecoder(object_pairs_hook=_object, strict=False).decode
    with contextlib.suppress(ValueError, RecursionError):
        return _records(decode(text)), "JSON"
    lines = []
    for line in filter(str.strip, _LINE_END.split(text)):
        lines.append({})
        with contextlib.suppress(ValueError, RecursionError):
            lines[-1] = decode(line.strip().rstrip(","))
    whole = sum(isinstance(line, dict | list) and bool(line) for line in lines)
    return (_records(lines), "JSON lines") if 2 * whole > len(lines) else None


def _object(pairs: list[tuple]) -> dict:
    """Make an object of JSON, with all the values of a name that is there several times."""
    value = dict(pairs)
    if len(value) < len(pairs):
        several = defaultdict(list)
        for name, one in pairs:
            several[name].append(one)
        value = {name: found if found[1:] else found[0] for name, found in several.items()}
    return value


def _records(value) -> list:
    """Return the list of records in COCO's, Karpathy's or other JSON."""
    if isinstance(value, list):
        if all(isinstance(record, dict) and len(record) < 2 for record in value):
            return [inner for record in value for inner in _records(record) or [record]]
        return value
    if not isinstance(value, dict):
        return []
    images, annotations = value.get("images"), value.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list) and annotations:
        of = {str(i.get("id", i.get("image_id"))): i for i in images if isinstance(i, dict)}
        notes = [note for note in annotations if isinstance(note, dict)]
        return [{**of.get(str(note.get("image_id")), {}), **note} for note in notes]
    filled = {k: v for k, v in value.items() if isinstance(v, dict | list) and v}
    named = any(_without_suffix(name) != name for name in filled)  # as photos are
    lists = {k: v for k, v in filled.items() if isinstance(v, list) and isinstance(v[0], dict)}
    if isinstance(images, list) or isinstance(annotations, list) or (len(lists) == 1 and not named):
        return images or annotations or next(iter(lists.values()), [])
    is_split = _SPLIT_FILE.search if lists == filled else _SPLIT_FILE.fullmatch
    if len(filled) > 1 and all(map(is_split, filled)):  # under the names of their splits
        return [
            (record if isinstance(record, dict) else {"image": record}) | {"split": split}
            for split, records in filled.items()
            for record in _records(records)
        ]
    if len(filled) == 1 and not named and isinstance(inner := next(iter(filled.values())), dict):
        return _records(inner)
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list):
        rows = [row for row in data if isinstance(row, list)]
        return [dict(zip(map(str, columns), row, strict=False)) for row in rows]
    if not named and any(_CAPTION_HEADER.search(str(key).lower()) for key in value):
        columns = [list(v.values()) if isinstance(v, dict) else v for v in value.values()]
        if not all(isinstance(column, list) for column in columns):
            return [value]
        return [dict(zip(value, cells, strict=True)) for cells in itertools.zip_longest(*columns)]
    return [
        {"": name, **inner}
        if isinstance(inner, dict) and not all(map(str.isdigit, inner))
        else {"image": name, "caption": inner}
        for name, inner in value.items()
    ]


def _table_of_records(records: list, form: str) -> _Table:
    records = [
        r if isinstance(r, dict) else dict(enumerate(r))
        for r in records
        if isinstance(r, dict | list)
    ]
    header = list(dict.fromkeys(key for record in records for key in record))
    rows = [(i, [record.get(key) for key in header]) for i, record in enumerate(records, 1)]
    return _Table(form, [str(key) for key in header], rows)


_BLANK = " \t\r\n\ufeff\u200b\u2060"  # some have no width; Python takes them for letters
_LINE_END = re.compile(r"\r\n|\r|\n")  # splitlines() knows others, which stand in captions

_MISSING = ("nan", "NaN", "NA", "N/A", "<NA>", "null", "NULL", "None")  # as programs write it


_ASKING = ("human", "user", "system")


def _texts(value) -> list[str]:
    """List the captions in a cell: one, several, records of them, or the answer of a dialogue."""
    if isinstance(value, dict):
        values = [v for key, v in value.items() if _CAPTION_HEADER.search(str(key).lower())]
        numbered = list(value.values()) if all(map(str.isdigit, value)) else None
        value = values[0] if values else numbered
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        speakers = [turn.get("from", turn.get("role")) for turn in value]
        if {"gpt", "assistant"} & {str(speaker) for speaker in speakers}:
            said = [turn.get("value", turn.get("content")) for turn in value]
            answers = [a for a, who in zip(said, speakers, strict=True) if who not in _ASKING]
            value = answers[0] if len(answers) == 1 else None  # of several, which is the caption?
    if isinstance(value, str):
        value = _written_list(value) or value
    if isinstance(value, list | tuple | np.ndarray):
        return [text for inner in value for text in _texts(inner)]
    missing = value is None or value != value or value in _MISSING
    return [] if missing else [" ".join(str(value).strip(_BLANK).split())]


def _written_list(text: str) -> list[str] | None:
    """Parse a list of captions in a cell of text, as JSON, Python or NumPy writes it."""
    if not re.fullmatch(r"""\s*\[\s*["'].*["']\s*\]\s*""", text, re.DOTALL):
        return None
    found = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
    if found is None:  # NumPy leaves out the commas, and Python would join such strings
        text = re.sub(r"""(["'])\s+(?=["'])""", r"\1, ", text.strip())
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = ast.literal_eval(text)
    return found if isinstance(found, list) and all(isinstance(t, str) for t in found) else None


def _name(value) -> str:
    """Read a cell as the name of a photo, with forward slashes and without Flickr's "#0"."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):  # a photo itself, as Hugging Face stores it
        keys = ("path", "file_name", "filename", "name")
        value = next((value[key] for key in keys if value.get(key)), None)
    name = "" if value is None else str(value).strip(_BLANK)
    return re.sub(r"#\d+$", "", name).replace("\\", "/")


def _fields(separator: str) -> re.Pattern:
    """Match a field with the separator before it: quoted (group 1), or not (group 2)."""
    end = f"(?={re.escape(separator)}|\\Z)"
    quoted, plain = r'\s*"((?:[^"]|""|\\")*)"\s*', f"([^{re.escape(separator)}]*)"
    return re.compile(f"(?:\\A|{re.escape(separator)})(?:{quoted}{end}|{plain})")


def _cut(record: str, fields: re.Pattern) -> list[tuple[str, str]]:
    """Cut a record into fields, each with and without its quotes."""
    cut = []
    for hit in fields.finditer(record):
        raw = hit[0][1:] if cut else hit[0]
        value = raw if hit[1] is None else hit[1]
        if hit[1] and '"' in value.replace('""', ""):
            value = value.replace('\\"', '"')
        cut.append((raw, value if hit[1] is None else value.replace('""', '"')))
    value = cut[0][1]
    if len(cut) == 1 and value != record and len(whole := _cut(value, fields)) > 1:
        return whole  # a line that was put between quotes
    return cut


def _parse_text(text: str, names: _Names) -> _Table | None:
    lines = _LINE_END.split(text)
    for i, line in enumerate(lines):  # comments, and Excel's line that names the separator
        comment = re.match(r"\s*(#|sep=.$|$)", line)
        if not comment or any(map(names.weight, re.split("[\t|;,]", line))):
            break
        lines[i] = ""
    filled = [line for line in lines if line.strip()]
    sample = filled[:50] + filled[50 :: 1 + len(filled) // 200]
    scores = {}
    for separator in "\t|;,^~":
        cuts = [_cut(line, _fields(separator)) for line in sample]
        weights = [max(names.weight(v) for _, v in cut) for cut in cuts if len(cut) > 1]
        scores[separator] = sum(weights)
    separator = max(scores, key=scores.get)
    if not scores[separator]:
        pairs = [_pair(line) for line in sample]
        if not any(names.weight(pair[0]) for pair in pairs if len(pair) > 1):
            return _parse_blocks(lines, names)
        pairs = ((i, _pair(line)) for i, line in enumerate(lines, 1) if line.strip())
        rows = [(i, [(part, part) for part in parts]) for i, parts in pairs]
        return _Table("text", [], rows, " ")
    fields = _fields(separator)
    return _Table("text", [], _read_rows(lines, fields, separator, names), separator)


def _parse_blocks(lines: list[str], names: _Names) -> _Table | None:
    """Read captions below the line of their photo's name and suffix, None if few lines are so."""
    rows, found = [], [""]
    for number, line in enumerate(map(str.strip, lines), 1):
        if (name := line.removesuffix(":")) != _without_suffix(name):
            found.append(name)
        elif line:
            caption = re.sub(r"^(?:[-*\u2022]|\d+[.)])\s+|^\W+$", "", line)
            rows.append((number, [(found[-1], found[-1]), (caption, caption)]))
    if len(rows) < len(found) - 1 or not any(map(names.weight, found)):
        return None
    return _Table("text, captions below the names", [], rows, "\n")


def _pair(line: str) -> list[str]:
    """Cut a line into a name and what follows a space, or a sign such as ": ", "- " or "-> "."""
    hit = _PAIR.match(line)
    return [part for part in hit.groups() if part] if hit else line.split()


_ANY_SUFFIX = "|".join(re.escape(suffix) for suffix in sorted(st.PHOTO_SUFFIXES, reverse=True))
# A name with a suffix may hold spaces, and needs none before what follows.
_PAIR = re.compile(
    rf"\s*(?:(.+?(?:{_ANY_SUFFIX})(?:#\d+)?)"
    r"(?:\s*(?:::?|=>?|->|\uff1a|\u2192)\s*|\s+(?:[-\u2013\u2014]\s+)?)"
    r"|(\S+?)\s*(?:[:=\uff1a\u2192\u2013\u2014-]|[-=]>)?\s+)(\S.*)",
    re.I,
)


def _is_open(record: str) -> bool:
    return record.replace('""', "").replace('\\"', "").count('"') % 2 == 1


def _read_rows(lines: list[str], fields: re.Pattern, separator: str, names: _Names) -> list:
    """Read records that end with their line, or with the quote that they open."""
    opens = re.compile(f'(?:\\A|{re.escape(separator)})\\s*"')
    rows, number = [], 0
    while number < len(lines):
        record, last, named = lines[number], number, 0
        # A quote that is never closed does not swallow the captions after it.
        while _is_open(record) and opens.search(record) and last + 1 < len(lines):
            named += any(names.weight(value) for _, value in _cut(lines[last], fields))
            last += 1
            record += "\n" + lines[last]
            if named > 1 or last > number + 50:
                break
        if last > number:
            named += any(names.weight(value) > 1 for _, value in _cut(lines[last], fields))
        if _is_open(record) or named > 1:
            record, last = lines[number], number
        if record.strip():
            rows.append((number + 1, _cut(record, fields)))
        number = last + 1
    return rows


_CAPTION_HEADER = re.compile(
    r"(?:^|[^a-z])(?:captions?|texts?|descriptions?|sentences?|comments?|raw|utterances?"
    r"|beschreibung(?:en)?|l[eé]gende|descripci[oó]n|descri[cç][aã]o|descrizione|описание|描述|说明)"
    r"(?:[^a-z]|$)"
)


_PHOTO_HEADER = re.compile(r"[a-z_]*(?:image|img|photo|picture|file|path|name)[a-z_]*\Z")


def _is_sentence(value) -> bool:
    return any(map(_is_said, _texts(value)))


def _is_said(text: str) -> bool:
    letters = sum(character.isalpha() for character in text)
    spaced = " " in text or (letters > 3 and not text.isascii())
    return letters > 2 and spaced and not text.startswith("http")


@dataclass
class _Columns:
    """The columns of a table that are read."""

    header: list[str]
    width: int
    photo: int
    caption: int
    others: list[int]  # columns that might be captions too
    numbered: bool  # the column before the caption holds numbers

    def name(self, column: int) -> str:
        return repr(self.header[column]) if self.header else f"number {column + 1}"


def _choose_columns(table: _Table, names: _Names, asked: str) -> _Columns | None:
    """Choose the photo and caption columns, by the header if there is one and by their cells."""
    rows = table.values()
    header = table.header
    if table.separator not in ("", "\n") and rows and _is_header(rows[0], names):
        header = [cell.strip() for cell in rows.pop(0)]
        del table.rows[0]
    if not rows:
        return None
    # Unquoted captions with commas make some rows longer.
    width = len(header) or max(2, sorted(map(len, rows))[len(rows) // 20])
    if table.separator and not header:  # or even all: what follows a comma begins with a space
        starts = [[raw[:1] == " " for raw, _ in cells] for _, cells in table.rows]
        spaced = [all(start[c] for start in starts if len(start) > c) for c in range(width)]
        while width > 2 and spaced[width - 1] and not spaced[1]:
            width -= 1
    sample = [row for row in rows if len(row) == width] or [row for row in rows if len(row) > width]
    sample = sample[:: 1 + len(sample) // 300]
    if not sample:
        return None
    columns = list(zip(*(row[:width] for row in sample), strict=True))
    weights = [sum(map(names.weight, column)) for column in columns]
    titled = [bool(header and _PHOTO_HEADER.match(header[c].lower())) for c in range(width)]
    photo = max(range(width), key=lambda c: (weights[c], titled[c]))
    texts = [c for c in range(width) if c != photo and weights[c] < len(sample)]
    share = {c: sum(map(_is_sentence, columns[c])) / len(sample) for c in texts}
    texts = [c for c in texts if not all(map(_split_of, columns[c]))]
    wordy = [c for c in texts if any(ch.isalpha() for cell in columns[c] for ch in str(cell))]
    named = [c for c in wordy if header and _CAPTION_HEADER.search(header[c].lower())]
    said = [c for c in texts if share[c] > max(0.3, max(share.values()) / 2)]
    varied = [c for c in said if len(set(map(str, columns[c]))) > 1] or said
    captions = [c for c in named if c in said] or named or varied or wordy[-1:]
    if asked:
        known = [cell.casefold() for cell in header] or [str(c + 1) for c in range(width)]
        found = [c for c, cell in enumerate(known) if cell == asked.casefold()]
        captions = [*found, *(c for c in captions if c not in found)]
        if not found:
            raise st.ArtifactError(
                f"caption_column is {asked!r}; the columns are {', '.join(known)}."
            )
    if not weights[photo] or not captions:
        return None
    first, *others = captions
    before = [str(row[first - 1]).strip().isdigit() for row in sample]
    numbered = first - 1 not in (-1, photo) and sum(before) > len(before) / 2
    return _Columns(header, width, photo, first, others, numbered)


def _is_header(cells: list[str], names: _Names) -> bool:
    short = all(len(cell.split()) < 4 for cell in cells)
    known = any(
        _CAPTION_HEADER.search(cell.lower()) or _PHOTO_HEADER.match(cell.lower()) for cell in cells
    )
    plain = not any(character.isdigit() for cell in cells for character in cell)
    return short and (known or plain) and max(map(names.weight, cells)) == 0


def _shape(cells: list, columns: _Columns, separator: str) -> list | None:
    """Bring a row to the table's width; None if it is not clear how."""
    if not separator:
        return cells
    while len(cells) > columns.width and not cells[-1][0].strip():
        cells = cells[:-1]  # ",,," as spreadsheets leave it
    values = [value for _, value in cells]
    extra, at = len(cells) - columns.width, columns.caption
    # Flickr30k has a row without its second separator: "x.jpg| 4   A dog runs ."
    last = columns.numbered and at == columns.width - 1 and len(cells) >= at
    if last and (re.match(r"\s*\d+\s+\S", values[at - 1]) or _is_sentence(values[at - 1])):
        whole = separator.join(raw for raw, _ in cells[at - 1 :]) if extra >= 0 else values[at - 1]
        return [*values[: at - 1], "", re.sub(r"^\s*\d+\s+", "", whole)]
    if extra > 0 and columns.others:  # a separator in which of the captions?
        return None
    if extra > 0:  # a caption with commas, but without quotes around it
        whole = separator.join(raw for raw, _ in cells[at : at + extra + 1])
        return [*values[:at], whole, *values[at + extra + 1 :]]
    return values + [""] * -extra


# Signs of a wrong encoding: replaced or control characters, Latin with Greek or Cyrillic in one
# word, UTF-8 read as Latin letters. And of a row that did not end: the name of another photo.
_DOUBTFUL = re.compile(
    "[\ufffd\0-\x08\x0e-\x1f\x7f-\x9f]|[A-Za-z][\u0370-\u052f]|[\u0370-\u052f][A-Za-z]"
    "|\xc3[\xa0-\xbf]|\xe2\u20ac|\\w\\.(?i:jpe?g|png)\\b"
)


def _plain(text: str) -> str:
    """Remove web pages' marks ("&amp;", "<br>") and Flickr30k Entities' ("[/EN#1/people Men]").

    And a quote that is never closed.
    """
    if text.startswith('"') and text.count('"') == 1:
        text = text[1:].strip()
    if "<" in text:
        text = re.sub(r"(?i)</?(?:p|br|b|i|em|span|div)(?:\s[^<>]*|/)?>", " ", text)
        text = " ".join(text.split())
    text = re.sub(r"\[/EN#\d+\S* ([^\]]*)\]", r"\1", text)
    return re.sub(r"&#?\w+;", lambda hit: html.unescape(hit[0]), text)


@dataclass
class Captions:
    """Captions as written, and every line or name that could not be used.

    rows             (photo name, caption)
    unread           (line number, what it lacks) of lines without a usable caption
    without_photo    names that no photo has, with their number of captions
    without_caption  photos that no caption names
    doubtful         (line number, caption) of captions with signs of a wrong encoding
    files            the caption files, below the dataset's folder -> sha256
    notes            how the files were read
    written          how names matched photos -> number of captions
    """

    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    unread: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    without_photo: Counter = dataclasses.field(default_factory=Counter)
    without_caption: list[str] = dataclasses.field(default_factory=list)
    doubtful: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    written: Counter = dataclasses.field(default_factory=Counter)

    def add(self, line: int, names: _Names, folder: Path, name: str, texts: list[str]) -> None:
        """Add a row of the table: a photo's name and its captions."""
        texts = [text for text in map(_plain, texts) if text]
        if not name or not texts:
            self.unread.append((line, "no caption" if name else "no photo name"))
            return
        photo, way = names.find(name, folder)
        for text in texts:
            if photo is None:
                self.without_photo[name] += 1
                continue
            self.rows.append((photo, text))
            self.written[way] += 1
            if _DOUBTFUL.search(text):
                self.doubtful.append((line, text))

    def source(self) -> str:
        return ", ".join(self.files)

    def fits(self) -> bool:
        return len(self.rows) >= self.without_photo.total()

    def describe(self, photos: int) -> str:
        """Describe how the captions of a dataset of `photos` photos were read, with three examples.

        Raises ArtifactError if most of them have no photo, or most of the photos no caption.
        """
        lines = [*self.notes, *(f"  {name}: {text}" for name, text in self.rows[:3])]
        named = len({name for name, _ in self.rows})
        lines.append(f"{len(self.rows)} captions of {named} photos")
        for way, count in self.written.items():
            if way != "as written":
                lines.append(f"{count} captions match a photo only {way}")
        lost = self.without_photo.total()
        counts = [
            ("lines that are no caption", len(self.unread), self.unread, 0),
            ("captions with doubtful signs", len(self.doubtful), self.doubtful, 0),
            ("captions without a photo", lost, list(self.without_photo), len(self.rows) + lost),
            ("photos without a caption", len(self.without_caption), self.without_caption, photos),
        ]
        for what, count, examples, of in counts:
            line = f"{what}: {count} {examples[:3] if count else ''}".rstrip()
            if 2 * count > of > 0:
                raise st.ArtifactError(
                    f"More than half are {line}, of {of} in {self.source()}. Is this "
                    "the photos' caption file? Set dataset_dir or captions, or remove the others."
                )
            bold = 100 * count > of > 0
            lines.append(f"\033[1mWarning: {line} of {of}\033[0m" if bold else line)
        return "\n".join(lines)


def read_captions(dataset: st.Dataset, captions: str = "", caption_column: str = "") -> Captions:
    """Read every caption of a dataset, whatever the format of its file (notebooks/README.md).

    captions        the file, below the dataset's folder; a pattern such as "captions_*.json" reads
                    several; empty: the only one that holds captions
    caption_column  which to read if a table has several; empty: the first

    Raises ArtifactError if there is no such file, if there are several, or if none names a photo.
    """
    names = _Names(dataset.photos)
    of_photos = _files_of_photos(dataset, names)
    tables = [path for path in dataset.tables if path not in of_photos]
    if captions:
        tables = sorted(dataset.folder.glob(captions)) if not Path(captions).is_absolute() else []
        tables = [path for path in tables or [Path(captions)] if path.is_file()]
        if not tables:
            known = ", ".join(str(path.relative_to(dataset.folder)) for path in dataset.tables[:20])
            raise st.ArtifactError(
                f"captions {captions!r} is not in {dataset.folder}; it has {known}."
            )
    reads, broken = [], None
    for path in tables:
        try:
            read = _read_captions_of(path, names, caption_column, dataset.folder)
        except st.ArtifactError as error:
            if captions:
                raise
            broken = error
            continue
        new = read is not None and (read.rows or read.without_photo)
        if new and all(read.rows != other.rows for other in reads):
            reads.append(read)
    if not captions:
        read = _read_files_of_photos(of_photos, names)
        if read.rows and all(sorted(read.rows) != sorted(other.rows) for other in reads):
            reads.append(read)
    reads = reads if captions else [read for read in reads if read.fits()] or reads
    if not reads:
        raise broken or st.ArtifactError(
            f"No file of {dataset.folder} holds captions: no line names a photo and says something "
            f"about it. Tried: {', '.join(p.name for p in (tables or dataset.tables)[:20])}."
        )
    if len(reads) > 1 and not captions:
        raise st.ArtifactError(
            f"{dataset.folder} has several files of captions: "
            f"{', '.join(repr(read.source()) for read in reads)}. Choose with captions='...'."
        )
    return _joined(reads, dataset)


def _joined(reads: list[Captions], dataset: st.Dataset) -> Captions:
    whole = Captions()
    for read in reads:
        whole.files |= read.files
        for field in ("rows", "unread", "doubtful", "notes"):
            getattr(whole, field).extend(getattr(read, field))
        whole.without_photo += read.without_photo
        whole.written += read.written
    if not whole.rows:
        count = whole.without_photo.total()
        first = next(iter(whole.without_photo), "")
        files = Counter(Path(name).name for name in dataset.photos)
        many = files[Path(first).name]
        raise st.ArtifactError(
            f"None of the {count} captions in {dataset.folder / whole.source()} names a photo of "
            f"{dataset.folder}; the first is of {first!r}"
            + (f", and {many} photos have that name: leave only one of them." if many > 1 else ".")
        )
    captioned = {name for name, _ in whole.rows}
    whole.without_caption = [name for name in dataset.photos if name not in captioned]
    return whole


def _read_captions_of(path: Path, names: _Names, asked: str, folder: Path) -> Captions | None:
    table, encoding = _read_table(path, names)
    columns = table and _choose_columns(table, names, asked)
    if not columns:
        return None
    read = Captions(files={os.path.relpath(path, folder): st.sha256(path)})
    how = {"\t": "a tab", " ": "a space", "\n": "a line break"}.get(
        table.separator, repr(table.separator)
    )
    parts = f"{table.form}, {encoding}" + (f", separated by {how}" if table.separator else "")
    photo = columns.name(columns.photo)
    said = columns.name(columns.caption)
    read.notes.append(f"{read.source()} ({parts}): photos in column {photo}, captions in {said}")
    if columns.others:
        listed = ", ".join(map(columns.name, columns.others))
        read.notes.append(f"captions also in {listed}: caption_column chooses another")
    used = {columns.photo, columns.caption, *columns.others}
    if unused := [columns.name(c) for c in range(columns.width) if c not in used]:
        read.notes.append(f"columns that are ignored: {', '.join(unused)}")
    for line, cells in table.rows:
        values = _shape(cells, columns, table.separator)
        if values is None:
            read.unread.append((line, "more fields than columns"))
            continue
        texts = _texts(values[columns.caption])
        read.add(line, names, path.parent, _name(values[columns.photo]), texts)
    return read


# If a photo has several files, the last of these formats is read.
_OF_A_PHOTO = [".json", ".txt", ".caption"]


def _files_of_photos(dataset: st.Dataset, names: _Names) -> dict[Path, str]:
    """Find files named after a photo: beside it, or elsewhere if half of the photos have one."""
    photo_of = {path.with_suffix(""): name for name, path in dataset.photos.items()}
    files, elsewhere = {}, {}
    for path in dataset.tables:
        if path.suffix.lower() not in _OF_A_PHOTO:
            continue
        stem = path.with_suffix("")
        if stem in photo_of:
            files[path] = photo_of[stem]
        elif photo := names.find(stem.relative_to(dataset.folder).as_posix())[0]:
            elsewhere[path] = photo
    return files | elsewhere if 2 * len(elsewhere) >= len(dataset.photos) else files


def _read_files_of_photos(files: dict[Path, str], names: _Names) -> Captions:
    """Read one file per photo: text with one caption per line, or JSON that holds captions.

    If no line of any is a sentence, they hold something else, such as a detector's boxes.
    """
    paths = sorted(files, key=lambda path: (_OF_A_PHOTO.index(path.suffix.lower()), path))
    chosen = {files[path]: path for path in paths}
    read = Captions(files={"a file for each photo": ""})
    for photo, path in chosen.items():
        text, _ = _decode(path.read_bytes())
        lines = _LINE_END.split(text)
        if path.suffix.lower() == ".json":
            lines = []
            with contextlib.suppress(ValueError, RecursionError):
                lines = _texts(json.loads(text))
        read.add(0, names, "", photo, [" ".join(line.split()) for line in lines])
    if not any(_is_sentence(caption) for _, caption in read.rows):
        return Captions()
    read.notes.append(f"{len(chosen)} files named after photos: one caption per line, or JSON")
    return read


def find_copies(photos: dict[str, Path]) -> dict[str, str]:
    """Find photos with identical files. Returns photo -> the first photo with the same bytes."""
    alike = defaultdict(list)
    for name, path in photos.items():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            alike[size, file.read()].append(name)
    first = {name: name for name in photos}
    for group in alike.values():
        known: dict[str, str] = {}
        for name in group if len(group) > 1 else ():
            first[name] = known.setdefault(st.sha256(photos[name]), name)
    return first


def split_photos(
    names: Sequence[str], seed: int, splits: str = "", copies: dict[str, str] | None = None
) -> dict[str, str]:
    """Put every photo into train, val or test.

    names   photo names
    splits  empty: 80/10/10 at random by `seed`; else a folder with lists of the photos (train, val
            and maybe test in their names: text, CSV, COCO's JSON), or a file with a column `split`
            (a table, Karpathy's JSON). A photo is listed by its path, its file name or that without
            its suffix; unlisted photos are in no split
    copies  photo -> its first copy (`find_copies`): copies stay together, in test rather than val,
            and in val rather than train

    All captions of a photo are in its split: splitting by caption would leak test photos into
    training. Returns photo name -> split, in the order of `names`. Raises ArtifactError for lists
    that overlap or do not fit.
    """
    first = copies or {}
    groups = [first.get(name, name) for name in names]
    if splits:
        split_of = _listed_splits(names, Path(splits))
    else:
        split_of = _random_splits(names, groups, seed)
    held_out = ("test", "val", "train")
    best: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        if name in split_of:
            best[group] = min(best.get(group, "train"), split_of[name], key=held_out.index)
    return {n: best[g] for n, g in zip(names, groups, strict=True) if n in split_of}


def _random_splits(names: Sequence[str], groups: list[str], seed: int) -> dict[str, str]:
    from sklearn.model_selection import GroupShuffleSplit

    if len(set(groups)) < 10:
        raise st.ArtifactError(
            f"{len(set(groups))} captioned photos are too few to split into train, val and test."
        )
    groups = np.array(groups)
    held_out = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
    train, rest = next(held_out.split(groups, groups=groups))
    halves = GroupShuffleSplit(1, test_size=0.5, random_state=seed)
    val, test = (rest[part] for part in next(halves.split(rest, groups=groups[rest])))
    parts = (("train", train), ("val", val), ("test", test))
    return {names[i]: split for split, part in parts for i in part}


def _listed_splits(names: Sequence[str], path: Path) -> dict[str, str]:
    finder = _Names({name: Path(name) for name in names})
    split_of: dict[str, str] = {}
    listed = Counter()
    for split, cells in _split_lists(path, finder):
        listed[split] += 1
        photo = finder.find(_name(max(cells, key=finder.weight, default="")))[0] or ""
        if split_of.setdefault(photo, split) != split and photo:
            raise st.ArtifactError(f"{path} puts {photo} into both {split_of[photo]} and {split}.")
    if not listed["train"] or not listed["val"]:
        raise st.ArtifactError(
            f"splits {path} must be a folder with train.txt and val.txt (test.txt is optional) or "
            "the Flickr_8k.*Images.txt lists, or a table or JSON that gives the split of each "
            "photo as train, val or test."
        )
    split_of.pop("", None)
    for split in ("train", "val"):
        if split not in split_of.values():
            raise st.ArtifactError(
                f"{path} has no {split} photo of this dataset ({listed[split]} listed)."
            )
    return {name: split_of[name] for name in names if name in split_of}


_SPLIT_FILE = re.compile(
    r"(?:^|[^a-z])(train|val|dev|test)(?:id|idation|ing)?(?:[^a-z]|images|set|$)", re.I
)


def _split_of(cell, match=_SPLIT_FILE.fullmatch) -> str:
    """Return the split that a cell is the name of (by `search`: that it mentions), or ""."""
    hit = match(str(cell).strip().lower().replace("restval", "train"))
    return hit[1].replace("dev", "val") if hit else ""


def _split_lists(path: Path, names: _Names) -> Iterator[tuple[str, Iterable]]:
    """Yield the split and the cells of each row that may name a photo."""
    table = _read_table(path, names)[0] if path.is_file() else None
    if table and (rows := table.values()) and rows[0]:
        header = [str(cell).strip().lower() for cell in table.header or rows[0]]
        named = [
            sum(bool(_split_of(row[c])) for row in rows if len(row) > c) for c in range(len(header))
        ]
        at = header.index("split") if "split" in header else named.index(max(named))
        if "split" in header or 2 * named[at] > len(rows):
            for row in rows:
                if len(row) > at and (split := _split_of(row[at], _SPLIT_FILE.search)):
                    yield split, _names_first(header, row, at)
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        hit = _SPLIT_FILE.search(file.stem)
        if not hit or file.suffix.lower() not in st.TABLE_SUFFIXES:
            continue
        split = hit[1].lower().replace("dev", "val")
        text, _ = _decode(file.read_bytes())
        rows = _listed_json(text) or _listed_rows(text, names)
        yield from ((split, row) for row in rows if row)


def _listed_json(text: str) -> list[list]:
    """Read a list of photos as JSON, in COCO's all images; empty if it is none."""
    records = []
    if text.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            records = json.loads(text)["images"]  # those without captions too
        if not records and (read := _read_json(text)):
            records, _ = read
    return [list(r.values()) if isinstance(r, dict) else [r] for r in records]


def _names_first(header: list[str], row: list, without: int | None = None) -> list:
    """Put the cells whose headers are of photos first: of two that may be names, the first is."""
    places = [i for i in range(min(len(header), len(row))) if i != without]
    return [row[i] for i in sorted(places, key=lambda i: not _PHOTO_HEADER.match(header[i]))]


def _listed_rows(text: str, names: _Names) -> list[list[str]]:
    """Cut a list of photos into rows of what may be a name: the line, its cells, its parts."""
    lines = [line for line in _LINE_END.split(text.replace('"', "")) if line.strip()]
    rows = [re.split("[,;|\t]", line) for line in lines]
    if len(lines) == 1 and names.weight(lines[0]) < 2:  # all in a line
        parts = re.split(r"[\s,;|\[\]']+", lines[0])
        if sum(names.weight(part) > 1 for part in parts) > ("[" not in lines[0]):
            return [[part] for part in parts]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    rows = [
        [line, *(_names_first(header, row) if len(row) == len(header) else row)]
        for line, row in zip(lines, rows, strict=True)
    ]
    return [row if max(map(names.weight, row)) > 1 else row + _pair(row[0]) for row in rows]
