// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { cellLines } from "../../web/progress_text.js";
import { ENGLISH, say, speak, translate } from "../../web/words.js";

test("words are said in the language that was chosen, and in English where it has none", () => {
  try {
    speak({ left: "noch {time}" });
    assert.equal(say("left", { time: "3 s" }), "noch 3 s");
    assert.equal(say("layers", { count: 4 }), "4 layers");
  } finally {
    speak();
  }
  assert.equal(say("left", { time: "3 s" }), "3 s left");
});

test("messages of the server are translated with their values, and stay as they are where the language has none", () => {
  const messages = { "few inputs ({count})": "{count} Eingänge", "8 bits: {reason}": "8 Bit: {reason}", "{a}, {b}": "{b} und {a}", embedding: "Einbettung" };
  try {
    speak({}, messages);
    assert.equal(translate("embedding"), "Einbettung");
    assert.equal(translate("8 bits: few inputs (16)"), "8 Bit: 16 Eingänge");
    assert.equal(translate("embedding, a.b"), "a.b und Einbettung");
    assert.equal(translate("embeddings"), "embeddings");
    assert.equal(cellLines({ state: "kept", name: "a", shape: [2, 2], reason: "embedding" })[1], "unquantized: Einbettung");
  } finally {
    speak();
  }
  assert.equal(translate("embedding"), "embedding");
});

test("every language has the messages, with the same values in them", () => {
  const valuesOf = (text) => [...text.matchAll(/\{\w+\}/g)].map(([value]) => value).sort();
  const [zh, ja] = ["zh", "ja"].map((language) => JSON.parse(readFileSync(new URL(`../../locales/${language}/main.json`, import.meta.url))).learnedRoundingMessages);
  assert.deepEqual(Object.keys(zh).sort(), Object.keys(ja).sort());
  for (const words of [zh, ja]) for (const [english, text] of Object.entries(words)) assert.deepEqual(valuesOf(text), valuesOf(english), english);
});

test("every language has the panels' words, with the same values in them", () => {
  const valuesOf = (text) => [...text.matchAll(/\{\w+\}/g)].map(([value]) => value).sort();
  for (const language of ["zh", "ja"]) {
    const words = JSON.parse(readFileSync(new URL(`../../locales/${language}/main.json`, import.meta.url))).learnedRounding;
    assert.deepEqual(Object.keys(words).sort(), Object.keys(ENGLISH).sort());
    for (const [key, text] of Object.entries(ENGLISH)) assert.deepEqual(valuesOf(words[key]), valuesOf(text), `${language}: ${key}`);
  }
});
