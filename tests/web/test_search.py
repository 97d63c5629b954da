"""The node search of real pages: what a user types on the empty canvas, and which node comes first."""

import contextlib

import pytest

from learned_rounding.hosts.browser import load_workflow
from learned_rounding.tests.nodes.test_schema import ALIASES
from learned_rounding.tests.web.english import english_titles

TimeoutError = pytest.importorskip("playwright.sync_api").TimeoutError
pytestmark = pytest.mark.browser

EMPTY = {"nodes": [], "links": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0}
WORDS = ("fp8", "int8", "int4", "nvfp4", "w4a8", "quantize", "compress", "shrink", "smaller", "vram", "gguf")
PLACE = (800, 600)
QUANTIZE = "LearnedRoundingQuantize"
GENERIC = ("save", "load", "image", "sampler", "clip", "vae", "text")
# The input and the first entry of the dialog, in older frontends and in newer ones.
INPUT = "[id^=comfy-vue-node-search-box-input], [role=dialog] input[role=combobox]"
FIRST = ".p-autocomplete-option[aria-posinset='1'], #result-item-0"
# Every alias, without typing it: both dialogs call this.
_SEARCH = """(words) => {
    const nodes = window.app.extensionManager._p._s.get('nodeDef')
    return words.map((word) => nodes.nodeSearchService.searchNode(word, [], {limit: 64}).map(({name}) => name))
}"""
_IS_CLEAR = "(place) => document.elementFromPoint(...place).tagName === 'CANVAS'"
_TITLE = "(name) => window.app.extensionManager._p._s.get('nodeDef').nodeDefsByName[name].display_name"


# The page reads the aliases when its extensions have been loaded.
_READY = """(name) => {
    const {nodeSearchService} = window.app.extensionManager._p._s.get('nodeDef')
    return nodeSearchService.searchNode('gguf', [], {limit: 64})[0]?.name === name
}"""


def open_empty(open_comfy_page, language="en"):
    page = open_comfy_page(settings={"Comfy.Locale": language})
    load_workflow(page, EMPTY)
    page.wait_for_function(_READY, arg=QUANTIZE)
    return page


@pytest.fixture(scope="module")
def page(open_comfy_page):
    return open_empty(open_comfy_page)


def open_search(page, place=PLACE):
    """Double click on the empty canvas; a page that is slow to hear the second click takes them for two."""
    while not page.locator(INPUT).count():
        page.mouse.dblclick(*place)
        with contextlib.suppress(TimeoutError):
            page.locator(INPUT).wait_for(timeout=3000)


def first_entry(page, word, title):
    """Title of the first entry after typing, once one with ``title`` is there."""
    page.wait_for_function(_IS_CLEAR, arg=PLACE)  # the dialog of the word before has faded out
    open_search(page)
    page.locator(INPUT).press_sequentially(word)
    entry = page.locator(FIRST).filter(has_text=title)
    entry.wait_for()
    text = entry.inner_text()
    page.locator(INPUT).press("Escape")
    page.locator(INPUT).wait_for(state="detached")
    return text.splitlines()[0].strip()


def first_nodes(page, words):
    return [names[0] for names in page.evaluate(_SEARCH, list(words))]


def test_the_quantizing_node_comes_first_for_what_people_type(page):
    title = page.evaluate(_TITLE, QUANTIZE)
    assert title == "Learned Round Quantize (FP8 / INT8 / INT4)"
    assert [first_entry(page, word, title) for word in WORDS] == [title] * len(WORDS)


def test_every_alias_finds_its_node_first_and_other_words_do_not(page):
    words = {word: name for name, aliases in ALIASES.items() for word in aliases}
    assert dict(zip(words, first_nodes(page, words), strict=True)) == words
    assert not any(name.startswith("LearnedRounding") for name in first_nodes(page, GENERIC))


def test_english_titles_find_their_nodes(page):
    titles = {title.lower(): name for name, title in english_titles().items()}
    assert dict(zip(titles, first_nodes(page, titles), strict=True)) == titles


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_english_titles_find_their_nodes_in_other_languages(open_comfy_page, language):
    titles = {title.lower(): name for name, title in english_titles().items()}
    page = open_empty(open_comfy_page, language)
    assert dict(zip(titles, first_nodes(page, titles), strict=True)) == titles
