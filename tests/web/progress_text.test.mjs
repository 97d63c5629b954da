// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { cellLines, keepRule, shortName, splitName } from "../../web/progress_text.js";

const layer = (index, error, more) => ({
  state: "layer", index, total: 4, name: `blocks.${index}.attn.qkv.weight`, shape: [8, 8], format: "int8_tensorwise",
  granularity: "row", error, seconds: 1, bytes_in: 2_000_000, bytes_out: 1_000_000, elapsed: index + 1, eta: 3 - index, ...more,
});

test("a keep rule finds its layer alone", () => {
  const name = "model.blocks.1.attn(0)[x]+$\\.weight";
  const rule = new RegExp(keepRule(name));
  assert.ok(rule.test(name));
  for (const other of [name.replace(".", "x"), `a${name}`, `${name}a`]) assert.ok(!rule.test(other));
  assert.equal(keepRule("blocks.1.w.weight"), "^blocks\\.1\\.w\\.weight$");
});

test("names are shown from the block's number on", () => {
  const shown = (name) => splitName(shortName(name));
  assert.deepEqual(shown("model.diffusion_model.double_blocks.12.img_attn.qkv.weight"), ["double_blocks", ".12.img_attn.qkv"]);
  assert.deepEqual(shown("context_embedder.weight"), ["", "context_embedder"]);
  assert.deepEqual(shown("time_in.in_layer.weight"), ["time_in", ".in_layer"]);
});

test("an error before rounding is told only where it is known", () => {
  const error = (more, rounding) => cellLines({ ...layer(0, 0.02), state: "quantized", solver: "nearest", ...more }, rounding)[1];
  assert.equal(error({}, "nearest"), "weight error 0.02");
  assert.equal(error({ gain: 0.8 }, "auto"), "weight error 0.025 → 0.02 (0.8× RTN)");
  assert.equal(error({ gain: 0.8, solver: "gptq" }, "principal"), "weight error 0.02 (0.8× RTN)");
});
