# SPDX-License-Identifier: MIT
"""Do the pages say what the code does? Their Python runs and prints what they print, every equation has its page,
function and tests, every link and anchor leads somewhere, and the mathematics is closed where it is opened."""
import doctest
import re
from pathlib import Path

import pytest

import ranet

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------------- docs

PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
READING_ORDER = ["README", "eq1", "eq2", "eq3", "eq4", "regions", "eq5", "eq6", "eq7", "eq8", "differences"]
EXPLAINED = {f"eq{n}": [name for name, f in vars(ranet).items() if (f.__doc__ or "").startswith(f"Eq. {n}:")]
             for n in range(1, 9)} | {"regions": ["connected_regions", "join_lone_pixels", "select_representatives"]}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)


def prose(text):
    """A page without its code and its comments; the formulas stay."""
    text = FENCE.sub("", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    return re.sub(r"(\$`[^`]+`\$)|`[^`]+`", lambda match: match[1] or "", text)


def run_python(text):
    """Runs a page's Python blocks in one namespace, those with >>> as doctests; returns what went wrong."""
    space, report, runner = {}, [], doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for _, language, code in FENCE.findall(text):
        if language == "python" and ">>> " in code:
            test = doctest.DocTestParser().get_doctest(code, space, "page", None, 0)
            runner.run(test, out=report.append, clear_globs=False)
            space.update(test.globs)                            # a doctest works on a copy
        elif language == "python":
            exec(compile(code, "page", "exec"), space)         # noqa: S102  what a page shows
    return "".join(report)


def anchors(text):
    """The anchors of a page as GitHub makes them: of its headings, and <a id="...">."""
    found = re.findall(r'<a (?:id|name)="([^"]+)"', text)
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        again = sum(re.fullmatch(re.escape(name) + r"(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{again}" if again else name)
    return found


def broken_links(text, folder):
    targets = re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)", prose(text))
    targets += re.findall(r"^\[[^\]]+\]: *(\S+)", prose(text), re.MULTILINE)
    targets += re.findall(r'(?:src|href)="([^"]+)"', prose(text))
    broken = []
    for target in targets:
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", file):
            continue                                            # another site
        path = folder / file
        if file and not path.exists() or anchor and anchor not in anchors(path.read_text() if file else text):
            broken.append(target)
    return broken


def broken_math(text):
    """Formulas that are not closed. A formula is a ```math block, $$...$$, $`...`$ or $...$."""
    if len(re.findall(r"^ *```", text, re.MULTILINE)) % 2:
        return ["an odd number of ``` lines"]
    rest = prose(text)
    formulas = [code for _, language, code in FENCE.findall(text) if language == "math"]
    for pattern in (r"\$\$(.+?)\$\$", r"\$`([^`]+)`\$", r"(?<!\\)\$([^$\n]+?)(?<!\\)\$"):
        formulas += re.findall(pattern, rest, re.DOTALL)
        rest = re.sub(pattern, "", rest, flags=re.DOTALL)
    broken = re.findall(r".*(?<!\\)\$.*", rest)
    for formula in formulas:
        bare = re.sub(r"\\[{}\\]", "", formula)
        pairs = bare.count("{") == bare.count("}") and formula.count(r"\left") - formula.count(r"\leftrightarrow") == \
            formula.count(r"\right") - formula.count(r"\rightarrow")
        if not pairs or re.findall(r"\\begin\{(\w+)", formula) != re.findall(r"\\end\{(\w+)", formula):
            broken.append(formula)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_docs_python_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run_python(PAGES[page].read_text())
    assert not report, report


@pytest.mark.parametrize("page", PAGES)
def test_docs_links_and_formulas_are_whole(page):
    text = PAGES[page].read_text()
    assert broken_links(text, PAGES[page].parent) == []
    assert broken_math(text) == []


@pytest.mark.parametrize("page", EXPLAINED)
def test_docs_page_function_and_tests_name_each_other(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    row = re.findall(rf"^\|.*\]\({page}\.md[#)].*$", (ROOT / "docs/README.md").read_text(), re.MULTILINE)
    assert EXPLAINED[page] and row, "a function, and a row of the map"
    assert "(explore.html)" in text.split("\n## ")[0]
    prefixes = ["test_regions_", "test_lone_", "test_reps_"] if page == "regions" else [f"test_{page}_"]
    for prefix in prefixes:
        assert f"`{prefix}*`" in text and f"`{prefix}*`" in "".join(row)
        assert f"\ndef {prefix}" in (ROOT / "test_ranet.py").read_text()
    opening = text.split("\n## ")[0]
    for function in EXPLAINED[page]:
        assert f"`{function}`" in opening and f"`{function}`" in "".join(row)
        assert f"import {function}" in text or f", {function}" in text, "an example calls it"
    order = READING_ORDER.index(page)
    nav = re.findall(r"\]\((\w+)\.md\)", text.strip().splitlines()[-1])
    assert nav == [READING_ORDER[order - 1], "README", READING_ORDER[order + 1]], "previous, map, next"
    if page != "regions":
        assert text.startswith(f"# Eq. {page[2:]}: ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
            "The equation", "Symbols", "The idea", "By hand", "Gradient", "The released code"]


def test_docs_name_only_what_exists():
    tests = {name for file in (ROOT / "test_ranet.py", *ROOT.glob("tests/*.py"))
             for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    for page, path in PAGES.items():
        for name, star in re.findall(r"\b(test_\w+)\b(?!\.py)(\*?)", path.read_text()):
            assert any(t == name or star and t.startswith(name) for t in tests), f"{page}: no test {name}{star}"
    for page in EXPLAINED:
        for name in re.findall(r"`(_\w+)`", (ROOT / "docs" / f"{page}.md").read_text()):
            assert hasattr(ranet, name), f"{page}: no {name} in ranet.py"


def test_docs_checks_notice_mistakes():
    page = "# A title\n\n```python\n>>> x = 1\n>>> x + 1\n2\n\n```\n\n$`a_{b}`$ and [here](#a-title)\n\n```math\n\\frac12\n```\n"
    here = ROOT / "docs"
    assert (run_python(page), broken_links(page, here), broken_math(page)) == ("", [], [])
    assert run_python(page.replace("\n2\n", "\n3\n")) and run_python(page.replace("x + 1", "y + 1"))
    with pytest.raises(NameError):
        run_python("```python\nnothing\n```\n")
    for link in ("#no-title", "none.md", "eq1.md#none"):
        assert broken_links(page.replace("#a-title", link), here) == [link]
    for old, new in (("b}`$", "b`$"), ("`$", "`"), ("\\frac", "\\left( \\frac"), ("```\n\n$", "\n\n$"), ("$`a", "$$a")):
        assert broken_math(page.replace(old, new)), new
