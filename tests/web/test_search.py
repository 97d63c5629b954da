"""The node search of real pages: what a user types on the empty canvas, and which node comes first."""

import contextlib

import pytest

from learned_rounding.hosts.browser import load_workflow, open_page
from learned_rounding.tests.nodes.test_schema import ALIASES
from learned_rounding.tests.web.english import english_titles

TimeoutError = pytest.importorskip("playwright.sync_api").TimeoutError
pytestmark = pytest.mark.browser

EMPTY = {"nodes": [], "links": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0}
WORDS = ("fp8", "int8", "int4", "nvfp4", "w4a8", "quantize", "compress", "shrink", "smaller", "vram", "gguf")
PLACE = (800, 600)
QUANTIZE = "LearnedRoundingQuantize"
GENERIC = ("save", "load", "image", "compare text", "sampler", "clip", "report")
# The input and the first entry of the dialog, in older frontends and in newer ones.
INPUT = "[id^=comfy-vue-node-search-box-input], [role=dialog] input[role=combobox]"
FIRST = ".p-autocomplete-option[aria-posinset='1'], #result-item-0"
# Every alias, without typing it: both dialogs call this.
_SEARCH = """(words) => {
    const nodes = window.app.extensionManager._p._s.get('nodeDef')
    return words.map((word) => nodes.nodeSearchService.searchNode(word, [], {limit: 64}).map(({name}) => name))
}"""
_IS_CLEAR = "(place) => document.elementFromPoint(...place).tagName === 'CANVAS'"
_IN_PAGE = "(name) => LiteGraph.registered_node_types[name].title"


@pytest.fixture(scope="module", params=["en", "zh", "ja"])
def page(comfy, request):
    with open_page(comfy, settings={"Comfy.Locale": request.param}, timeout=60) as page:
        load_workflow(page, EMPTY)
        page.language = request.param
        yield page
    comfy.post("/api/settings", {"Comfy.Locale": "en"})


def open_search(page):
    """Double click on the empty canvas; a page that is slow to hear the second click takes them for two."""
    while not page.locator(INPUT).count():
        page.mouse.dblclick(*PLACE)
        with contextlib.suppress(TimeoutError):
            page.locator(INPUT).wait_for(timeout=3000)


def first_entry(page, word):
    """Title of the first entry after a double click on the empty canvas and typing."""
    page.wait_for_function(_IS_CLEAR, arg=PLACE)  # the dialog of the word before has faded out
    open_search(page)
    page.locator(INPUT).press_sequentially(word)
    entry = page.locator(FIRST).filter(has_text=page.evaluate(_IN_PAGE, QUANTIZE))
    entry.wait_for()
    text = entry.inner_text()
    page.locator(INPUT).press("Escape")
    page.locator(INPUT).wait_for(state="detached")
    return text.splitlines()[0].strip()


@pytest.mark.parametrize("word", WORDS)
def test_the_quantizing_node_comes_first_for_what_people_type(page, word):
    assert first_entry(page, word) == page.evaluate(_IN_PAGE, QUANTIZE)


def test_every_alias_and_english_title_finds_its_node_first(comfy, page):
    words = {word: name for name, aliases in ALIASES.items() for word in aliases}
    words |= {title.lower(): name for name, title in english_titles().items()}
    found = page.evaluate(_SEARCH, list(words))
    assert {word: names[0] for word, names in zip(words, found, strict=True)} == words


def test_words_of_other_nodes_stay_theirs(page):
    for word, names in zip(GENERIC, page.evaluate(_SEARCH, list(GENERIC)), strict=True):
        assert not names[0].startswith("LearnedRounding"), word
