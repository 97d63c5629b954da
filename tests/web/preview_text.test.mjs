// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { previewRows, roughly } from "../../web/preview_text.js";
import { ENGLISH } from "../../web/words.js";

const answer = (more) => ({
  source: "model.safetensors", bytes_in: 23_800_000_000, bytes_out: 11_900_000_000, layers: 304, unquantized: 476, seconds: 37,
  device: "NVIDIA H200", formats: [["int8_tensorwise per row, ConvRot 256", 304, "native", "INT8"]], ...more,
});

test("a preview has size, layers, time and what stock ComfyUI does", () => {
  assert.deepEqual(previewRows(answer()), [
    ["Size", "23.8 GB → 11.9 GB, 50 % smaller"],
    ["Layers", "304 quantized, 476 other tensors unchanged"],
    ["Time", "about 40 s on NVIDIA H200 (estimate)"],
    ["Stock ComfyUI", "int8_tensorwise per row, ConvRot 256: multiplied natively here, INT8 activations"],
  ]);
});

test("several formats are listed with their layers", () => {
  const formats = [["asym_w4a8_int8 per group of 16", 200, "native", "INT8"], ["int8_blockwise per block of 128", 4, "unsupported", ""]];
  assert.deepEqual(previewRows(answer({ formats })).slice(3).map(([, text]) => text), [
    "asym_w4a8_int8 per group of 16 (200): multiplied natively here, INT8 activations",
    "int8_blockwise per block of 128 (4): not read here; this pack runs it",
  ]);
  assert.equal(previewRows(answer({ formats: Array.from({ length: 9 }, () => formats[0]) })).length, 6);
});

test("what is not known is said", () => {
  const [size, , time] = previewRows(answer({ bytes_out: null, seconds: null, formats: [] }));
  assert.equal(size[1], "23.8 GB → chosen during the run");
  assert.equal(time[1], "not measured for this rounding on NVIDIA H200");
  assert.equal(previewRows(answer({ bytes_out: 29_750_000_000 }))[0][1], "23.8 GB → 29.8 GB, 25 % larger");
});

test("a refusal is one sentence", () => {
  assert.equal(previewRows({ error: "The file is damaged." }), "The file is damaged.");
});

test("every support has its words", () => {
  for (const support of ["native", "decoded", "unsupported"]) assert.ok(ENGLISH[`previewStock_${support}`].includes("{format}"));
});

test("estimates are rounded to what they can say", () => {
  assert.deepEqual([0.2, 4, 37, 41, 100, 3000, 30_000].map(roughly), ["1 s", "4 s", "40 s", "40 s", "2 min", "50 min", "8 h"]);
});
