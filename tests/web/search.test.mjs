// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { rankByAlias } from "../../web/search.js";

const node = (name, title) => ({ name, display_name: title });
const quantize = node("Quantize", "Quantize (FP8)");
const compare = node("Compare", "Compare Models");
const loader = node("UnetLoaderGGUF", "Load GGUF");
const sampler = node("Sampler", "Sampler");
const ALIASED = [
  [quantize, ["fp8", "quantize", "gguf", "vram"]],
  [compare, ["psnr"]],
];
const rank = (query, ...found) => rankByAlias(query, found, ALIASED).map(({ name }) => name);

test("a complete alias comes first, however it is typed", () => {
  assert.deepEqual(rank("vram", sampler), ["Quantize", "Sampler"]);
  assert.deepEqual(rank(" VRAM ", sampler, quantize), ["Quantize", "Sampler"]);
  assert.deepEqual(rank("fp8", node("Fp8Loader", "Load FP8"), quantize), ["Quantize", "Fp8Loader"]);
});

test("a word in the titles of other nodes is theirs first", () => {
  assert.deepEqual(rank("gguf", loader, sampler), ["UnetLoaderGGUF", "Quantize", "Sampler"]);
  assert.deepEqual(rank("psnr", node("Dpsnramp", "Dpsnramp")), ["Compare", "Dpsnramp"]);
});

test("the beginning of an alias finds the node without changing the order", () => {
  assert.deepEqual(rank("vr", sampler), ["Sampler", "Quantize"]);
  assert.deepEqual(rank("quant", sampler, quantize), ["Sampler", "Quantize"]);
});

test("other words leave the result as it is", () => {
  assert.deepEqual(rank("sampler", sampler, compare), ["Sampler", "Compare"]);
  assert.deepEqual(rank("", sampler), ["Sampler"]);
  assert.deepEqual(rank("a vram", sampler), ["Sampler"]);
});
