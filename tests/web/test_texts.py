"""Translations and help pages: complete, in step in all languages, and found where the frontends look for them."""

import json
import re
from pathlib import Path

import pytest
import tomllib
from PIL import Image

from learned_rounding.hosts.browser import load_workflow
from learned_rounding.quant_core.recipes import roles
from learned_rounding.quant_core.recipes import rules as tables
from learned_rounding.quant_core.run.output_run import BIAS_CORRECTED, NON_FINITE
from learned_rounding.tests.web.english import LOCALE, PAGES, ROOT, definitions, is_plain

LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir() if path.name != "en")
EMPTY = {"nodes": [], "links": [], "version": 0.4}
HELP = "/extensions/learned_rounding/docs"


# Our settings as the page knows them: their keys in settings.json, and the headings above them.
_OUR_SETTINGS = """() => Object.fromEntries(Object.values(window.app.ui.settings.settingsLookup)
    .filter(({id}) => id.startsWith('LearnedRounding.'))
    .map(({id, category}) => [id.replaceAll('.', '_'), category.slice(0, 2)]))"""


def our_nodes(comfy):
    return {name: info for name, info in comfy.object_info().items() if name.startswith("LearnedRounding")}


def inputs_of(info):
    return {name for group in ("required", "optional") for name in info["input"].get(group, {})}


def read(language, name="nodeDefs"):
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def strings(value):
    return [value] if isinstance(value, str) else [text for part in value.values() for text in strings(part)]


def test_english_is_what_the_nodes_and_their_pages_say(comfy):
    """make texts writes it."""
    assert json.loads(LOCALE.read_text(encoding="utf-8")) == definitions(comfy.object_info())
    for page in PAGES:
        assert (page.with_suffix("") / "en.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_of_the_nodes_is_translated(comfy, language):
    texts = comfy.get("/i18n")[language]["nodeDefs"]
    for name, info in our_nodes(comfy).items():
        assert {"display_name", "description"} <= set(texts[name])
        assert set(texts[name]["inputs"]) == inputs_of(info)
        assert set(texts[name]["outputs"]) == {str(slot) for slot in range(len(info["output"]))}
        for text in [*texts[name]["inputs"].values(), *texts[name]["outputs"].values()]:
            assert text["name"]
            assert text["tooltip"]
    assert set(read(language)) == set(our_nodes(comfy))


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_nothing_in_a_translation_is_syntax(language):
    for path in (ROOT / "locales" / language).glob("*.json"):
        texts = json.loads(path.read_text(encoding="utf-8"))
        for ours in ("learnedRounding", "learnedRoundingMessages"):  # which web/words.js reads
            texts.pop(ours, None)
        assert [text for text in strings(texts) if not is_plain(text)] == []


def test_settings_and_categories_are_translated(comfy, comfy_page):
    shown = comfy_page.evaluate(_OUR_SETTINGS)
    assert shown
    for language in LANGUAGES:
        assert read(language, "settings").keys() == shown.keys()
        assert all(text["name"] and text["tooltip"] for text in read(language, "settings").values())
        main = read(language, "main")
        assert main["nodeCategories"].keys() == {
            part for info in our_nodes(comfy).values() for part in info["category"].split("/")
        }
        assert main["settingsCategories"].keys() == {part for parts in shown.values() for part in parts}


def reasons() -> set[str]:
    """Every reason for which a layer stays unquantized, as a template."""
    presets = [
        tomllib.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "quant_core/recipes/presets").glob("*.toml")
    ]
    rules = [rule for preset in presets for part in preset.values() if isinstance(part, list) for rule in part]
    texts = {rule["reason"] for rule in rules if isinstance(rule, dict) and "reason" in rule}
    constants = (value for name, value in vars(roles).items() if name.isupper() and isinstance(value, str))
    return {
        *texts,
        *constants,
        *(reason for _, reason in (*tables._ELIGIBLE, *tables._HEURISTICS)),
        NON_FINITE,
        BIAS_CORRECTED,
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_reason_of_an_unquantized_layer_is_translated(language):
    found = reasons()
    assert len(found) > 70
    assert found - read(language, "main")["learnedRoundingMessages"].keys() == set()


def test_every_node_has_a_help_page_that_tells_of_all_inputs_and_outputs(comfy):
    for name, info in our_nodes(comfy).items():
        page = comfy.get(f"{HELP}/{name}.md")
        assert page.startswith(f"# {info['display_name']}\n")
        for told in [*inputs_of(info), *info["output_name"]]:
            assert f"**{told}**" in page, f"{name}: {told}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_help_is_translated_under_the_names_that_a_page_in_its_language_shows(comfy, language):
    for name, texts in read(language).items():
        page = comfy.get(f"{HELP}/{name}/{language}.md")
        assert page.startswith(f"# {texts['display_name']}\n")
        for told in (*texts["inputs"].values(), *texts["outputs"].values()):
            assert f"**{told['name']}**" in page, f"{name}: {told['name']}"


def test_every_help_page_has_a_picture_that_carries_a_workflow_with_the_node(comfy):
    for name in our_nodes(comfy):
        for page in (f"{name}.md", *(f"{name}/{language}.md" for language in ("en", *LANGUAGES))):
            assert re.findall(r"!\[.*\]\((.*)\)", comfy.get(f"{HELP}/{page}")) == [
                f"images/{name}.png"
            ]  # frontends add the folder
        with Image.open(ROOT / "web" / "docs" / "images" / f"{name}.png") as picture:
            nodes = {node["type"]: node for node in json.loads(picture.text["workflow"])["nodes"]}
        assert {name} <= nodes.keys() <= {*comfy.object_info(), "MarkdownNote"}
        assert len(nodes[name].get("widgets_values", ())) >= len(
            [slot for slot in nodes[name]["inputs"] if "widget" in slot]
        )


# What a page does with a picture that is dragged from its help onto the canvas.
_DROP = """async (url) => {
    const data = new DataTransfer()
    data.setData('text/uri-list', url)
    const canvas = window.app.canvas.canvas ?? window.app.canvasEl
    const {left, top} = canvas.getBoundingClientRect()
    const options = {dataTransfer: data, bubbles: true, cancelable: true, clientX: left + 300, clientY: top + 300}
    canvas.dispatchEvent(new DragEvent('dragover', options))
    canvas.dispatchEvent(new DragEvent('drop', options))
}"""


_HOLDS = """([type, count]) => {
    const nodes = window.app.graph._nodes
    return nodes.length === count && nodes.some((node) => node.type === type)
}"""


def test_the_pictures_of_the_help_open_their_workflow_when_dropped_on_the_canvas(comfy, comfy_page):
    for name in our_nodes(comfy):
        with Image.open(ROOT / "web" / "docs" / "images" / f"{name}.png") as picture:
            count = len(json.loads(picture.text["workflow"])["nodes"])
        load_workflow(comfy_page, EMPTY)
        comfy_page.evaluate(_DROP, f"{comfy.url}{HELP}/images/{name}.png")
        comfy_page.wait_for_function(_HOLDS, arg=[name, count])


# Puts a node into the graph, chooses it, and presses its info button. Just after a page was opened it may not notice a choice; it is made again then.
_OPEN_HELP = """(type) => {
    const {canvas, graph} = window.app
    const node = LiteGraph.createNode(type)
    node.pos = [600, 250]
    graph.add(node)
    let frame = 0
    return new Promise((done, fail) => requestAnimationFrame(function next() {
        const button = document.querySelector('[data-testid=info-button]')
        if (frame && button) return done(button.click())
        if (frame === 600) return fail(new Error('no info button'))
        if (frame++ % 20 === 0) {
            canvas.deselectAll()
            canvas.processSelect(node)
        }
        requestAnimationFrame(next)
    }))
}"""
_HELP_IS = """(title) => {
    const root = document.querySelector('.node-help-content')
    const picture = root?.querySelector('img')
    return root?.querySelector('h1')?.innerText === title && picture?.complete && picture.naturalWidth > 0
}"""


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_help_of_every_node_opens_with_its_picture_and_asks_for_nothing_that_is_not_there(
    comfy, open_comfy_page, language
):
    """By the info button above a chosen node."""
    page, asked = open_comfy_page(settings={"Comfy.Locale": language}), []

    def record(answer):
        if HELP in answer.url:
            asked.append((answer.url.removeprefix(f"{comfy.url}{HELP}/"), answer.status))

    page.on("response", record)
    for name in our_nodes(comfy):
        load_workflow(page, EMPTY)
        page.evaluate(_OPEN_HELP, name)
        page.wait_for_function(_HELP_IS, arg=read(language)[name]["display_name"])
    page.remove_listener("response", record)
    pages = {f"{name}/{language}.md" for name in our_nodes(comfy)}
    assert {url for url, _ in asked} - {f"images/{name}.png" for name in our_nodes(comfy)} == pages
    assert {status for _, status in asked} <= {200, 304}


def test_the_page_speaks_the_chosen_language(open_comfy_page, host):
    if host.version.startswith("0.3."):
        pytest.skip("this frontend loads its own translations late, over those of node packs")
    page = open_comfy_page(settings={"Comfy.Locale": "zh"})
    load_workflow(page, Path(__file__).parent / "workflow.json")
    names = read("zh")
    titles = page.evaluate("() => window.app.graph._nodes.map((node) => [node.type, node.title])")
    assert titles == [[name, names[name]["display_name"]] for name, _ in titles]
    labels = page.evaluate("() => window.app.graph.getNodeById(3).inputs.map((input) => input.localized_name)")
    assert labels == [entry["name"] for entry in names["LearnedRoundingQuantize"]["inputs"].values()]
    category = page.evaluate("() => LiteGraph.registered_node_types.LearnedRoundingQuantize.category")
    assert category == "/".join(read("zh", "main")["nodeCategories"].values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_panels_speak_the_chosen_language(open_comfy_page, language):
    words = read(language, "main")["learnedRounding"]
    page = open_comfy_page(settings={"Comfy.Locale": language})
    load_workflow(page, Path(__file__).parent / "workflow.json")
    assert page.locator(".lr-first").inner_text() == words["idle"]
    assert page.locator(".lr-text").all_inner_texts() == [words["fileText"], words["savedText"]]
