"""The project's words: a docstring can be read in a tooltip, and no class name or odd phrase appears twice.

The rule for a docstring's first line: it is a sentence or an imperative that makes sense without the name
next to it. So it ends in a period, and its first word is a verb in the imperative, an article or a noun, all
listed in tests/support/first_words.txt, or a piece of code in backticks. Add a word to the list when a
docstring needs it. A word like "What", "Of", "Its" or "Returns" never belongs there.
"""

import ast
import collections
import re
from pathlib import Path

import pytest
from paths import DOCS, EXAMPLES, ROOT, SUPPORT, TESTS

import minitp

PACKAGE = Path(minitp.__file__).parent
SOURCES = sorted(
    path for folder in (PACKAGE, TESTS, EXAMPLES, ROOT / "benchmarks") for path in folder.rglob("*.py")
)
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])

FIRST_WORDS = {
    word
    for line in (SUPPORT / "first_words.txt").read_text(encoding="utf-8").splitlines()
    for word in line.split()
    if not line.startswith("#")
}

# Phrases that a reader stumbles over, with what to write instead.
ODD = {
    r"\bbehind\b": "after",
    r"\b(hold|holds|held|holding)\b[^.]{0,60}\bagainst\b": "check against, compare with",
    r"\banew\b": "again",
    r"\bto be had\b": "cannot be found, cannot be downloaded",
    r"\bwhoever\b": "anyone who",
    r"\bso many\b": "that many, the number of",
    r"\bin spite of\b": "although, despite",
    r"\bwants\b": "needs",
    r"\bwho holds what\b": "which rank holds what",
    r"\bthe front\b(?! of)": "the launcher, the supervisor",
    r"\bhas come of\b|\bcomes of\b|\bcame of\b": "results from",
    r"\bnobody\b": "no one, nothing, or a plain passive",
}


def docstrings():
    """Yield (where, docstring) of each module, class and function."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    name = getattr(node, "name", "module")
                    yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {name}", text


def fault_of(first_line):
    """Return what is wrong with a docstring's first line, or None."""
    word = re.match(r"[\w'-]*", first_line).group().lower().removesuffix("'s")
    if not first_line.endswith("."):
        return "does not end in a period"
    if not first_line.startswith("`") and word not in FIRST_WORDS:
        return f"begins with {first_line.split()[0]!r}, which is no verb, opener or noun of the lists"
    return None


def test_docstrings_make_sense_in_a_tooltip():
    found = [(where, text.splitlines()[0]) for where, text in docstrings()]
    faults = [f"{where}: {line!r} {fault}" for where, line in found if (fault := fault_of(line))]
    assert len(found) > 1000
    assert not faults, f"{len(faults)} of {len(found)}:\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "line",
    [
        "Of the node that has most.",
        "That each rank sends in a ring all-reduce.",
        "What it ends with.",
        "Whether all are strings.",
        "Its blocks are taken.",
        "Returns the sum.",
        "Return the sum",
        "Behind the sum, once.",
    ],
)
def test_the_rule_rejects(line):
    assert fault_of(line)


@pytest.mark.parametrize(
    "line",
    [
        "Ranks on the fullest node.",
        "Return the bytes that each rank sends in a ring all-reduce.",
        "The closing chunks of a stream.",
        "`minitp check`: every step against the oracle.",
    ],
)
def test_the_rule_accepts(line):
    assert fault_of(line) is None


def strings(path):
    """Yield (line number, text) of all strings in a Python file, docstrings included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def odd_phrases(texts, where):
    """Return a line for each odd phrase in (line number, text) pairs."""
    return [
        f"{where}:{number}: {found.group()!r}; write {instead}"
        for number, text in texts
        for pattern, instead in ODD.items()
        for found in re.finditer(pattern, text, re.IGNORECASE)
    ]


def test_no_odd_phrase_in_docstrings_and_messages():
    package = [path for path in SOURCES if path.is_relative_to(PACKAGE)]
    faults = [fault for path in package for fault in odd_phrases(strings(path), path.relative_to(ROOT))]
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)


def test_no_odd_phrase_in_docs():
    faults = []
    for path in PAGES:
        lines = path.read_text(encoding="utf-8").splitlines()
        faults += odd_phrases(enumerate(lines, start=1), path.relative_to(ROOT))
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)


def test_no_class_name_twice():
    places = collections.defaultdict(list)
    for path in SOURCES:
        if path.is_relative_to(PACKAGE):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


# Nouns that messages count. `counted` gives them the right number; "times" and "bytes/s" are no counts.
COUNTED = (
    "token rank byte row line column head layer file sequence request position process host node GPU point "
    "tensor array dimension range step expert element core second minute character message prompt part name"
)
PLURAL = re.compile(
    rf" (?!has |needs |for )(?:\w+ )?(?:{COUNTED.replace(' ', '|')})(?:s|es)\b(?![/-])(?! as)"
)


def counts_without_counted(path):
    """Yield (line, code) of each number in an f-string that is followed by a plural noun.

    A constant is known not to be one. So is a number in a conditional expression, or after "all" or "the".
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {id(part) for node in ast.walk(tree) if isinstance(node, ast.IfExp) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr) or id(node) in known:
            continue
        texts = [part.value if isinstance(part, ast.Constant) else "" for part in node.values]
        for before, value, after in zip(["", *texts], node.values, [*texts[1:], ""], strict=False):
            if isinstance(value, ast.FormattedValue) and PLURAL.match(after):
                code = ast.unparse(value.value)
                if not code.isupper() and not before.endswith(("all ", "the ", " of ")):
                    yield value.lineno, code + after


def test_counts_agree_with_their_nouns():
    """Check that no message can say "1 tokens". Kernels raise errors only for a mistake in minitp."""
    alone = {"kernels", "oracle", "tour.py"}  # which cannot use `counted`, or need not
    paths = [path for path in PACKAGE.rglob("*.py") if not alone & {*path.parts}]
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {code}"
        for path in paths
        for line, code in counts_without_counted(path)
    ]
    assert wrong == [], "use counted(number, noun)"
