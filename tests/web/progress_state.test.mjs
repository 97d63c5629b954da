// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as state from "../../web/progress_state.js";

const start = (more) => ({
  state: "start", source: "model.safetensors", format: "int8_tensorwise", granularity: "row", preset: "flux",
  total: 4, kept: 2, bytes_in: 8000, ...more,
});
const layer = (index, error, more) => ({
  state: "layer", index, total: 4, name: `blocks.${index}.attn.qkv.weight`, shape: [8, 8], format: "int8_tensorwise",
  granularity: "row", error, seconds: 1, bytes_in: 2_000_000, bytes_out: 1_000_000, elapsed: index + 1, eta: 3 - index, ...more,
});
const done = (more) => ({
  state: "done", layers: 4, seconds: 4, bytes_in: 8_000_000, bytes_out: 4_100_000, median_error: 0.025,
  worst: [{ name: "blocks.3.attn.qkv.weight", error: 0.04 }], ...more,
});
const play = (events, execution = "run", from = state.IDLE) =>
  events.reduce((now, event) => state.advance(now, event, execution), from);

test("formats are measured before the run itself starts", () => {
  const measuring = (index) => ({ state: "measuring", index, total: 4, name: `blocks.${index}.attn.qkv.weight` });
  const half = play([measuring(0), measuring(1), measuring(2)]);
  assert.equal(state.percent(half), 50);
  assert.deepEqual(state.words(half), ["", "measuring what each format costs, layer 3 of 4"]);
  const missed = play([measuring(3), layer(0, 0.01)]);
  assert.equal(missed.finished, 3);
  assert.deepEqual(state.words(missed)[1].includes("measuring"), false);
  const run = play([start({ format: "measured", granularity: "" }), layer(0, 0.01)], "run", half);
  assert.equal(run.label, "measured");
  assert.equal(state.percent(run), 25);
  assert.equal(play([measuring(0)], "again", play([done()])).finished, 0);
});

test("a run goes from idle over its layers to a summary", () => {
  assert.deepEqual(state.words(state.IDLE), ["Progress appears here while the workflow runs.", ""]);
  const begun = play([start()]);
  assert.equal(begun.phase, "running");
  assert.equal(begun.label, "int8_tensorwise per row");
  assert.equal(state.percent(begun), 0);

  const half = play([layer(0, 0.01), layer(1, 0.02)], "run", begun);
  assert.equal(half.layer, "blocks.1.attn.qkv.weight");
  assert.equal(half.finished, 2);
  assert.equal(state.percent(half), 50);
  assert.deepEqual(state.words(half), ["", "2.0 s left · 2 MB/s"]);

  const end = play([layer(2, 0.03), layer(3, 0.04), done()], "run", half);
  assert.equal(end.phase, "done");
  assert.equal(state.percent(end), 100);
  assert.deepEqual(state.words(end), ["8 MB → 4.1 MB (51 %)", "4 layers in 4.0 s · median error 0.02500"]);
});

test("what learned rounding won is told while it runs and at the end", () => {
  const learned = { solver: "sequential", gain: 0.517, output_error: 0.01 };
  const running = play([start(), layer(0, 0.01, learned)]);
  assert.equal(state.words(running)[1], "3.0 s left · 2 MB/s · sequential 0.52× nearest · output error 0.01000");
  const plain = play([layer(1, 0.01, { solver: "nearest", gain: null, output_error: null })], "run", running);
  assert.equal(state.words(plain)[1], "2.0 s left · 2 MB/s");
  const end = play([done({ median_gain: 0.5, solvers: { sequential: 3, nearest: 1 } })], "run", plain);
  assert.deepEqual(state.words(end), [
    "8 MB → 4.1 MB (51 %) · 0.50× nearest", "4 layers in 4.0 s · median error 0.02500", "Layers won: sequential 3, nearest 1",
  ]);
  const both = play([start(), done({ median_gain: 0.6, solvers: { sequential: 2, adamw: 1 } })], "run", end);
  assert.equal(state.words(both)[0], "16 MB → 8.2 MB (51 %) · 0.50×–0.60× nearest");
  assert.equal(state.words(both)[2], "Layers won: sequential 5, nearest 1, adamw 1");
});

test("only the worst five layers are kept, worst first", () => {
  const errors = [0.3, 0.1, 0.6, 0.2, 0.5, 0.4, 0.7];
  const now = play([start({ total: 7 }), ...errors.map((error, index) => layer(index, error, { total: 7 }))]);
  assert.deepEqual(now.worst.map(({ error }) => error), [0.7, 0.6, 0.5, 0.4, 0.3]);
  assert.deepEqual(Object.keys(now.worst[0]), ["name", "error"]);
});

test("states are values: an event leaves the one before as it was", () => {
  const before = play([start(), layer(0, 0.01)]);
  const copy = structuredClone(before);
  play([layer(1, 0.02), { state: "kept", name: "x", reason: "NaN" }, done()], "run", before);
  assert.deepEqual(before, copy);
});

test("a page that comes late shows what it can", () => {
  const now = play([layer(2, 0.03)], null);
  assert.equal(now.phase, "running");
  assert.equal(state.percent(now), 75);
  assert.equal(now.label, "int8_tensorwise per row");
  assert.equal(now.rate, 2_000_000); // of what it saw, not of the whole time
  assert.equal(play([done()], null).phase, "done");
});

test("a layer that had to be kept counts as finished and is told", () => {
  const now = play([start(), layer(0, 0.01), { state: "kept", name: "blocks.1.w", reason: "holds NaN" }]);
  assert.equal(now.finished, 2);
  assert.match(state.words(now)[1], /1 kept \(NaN or Inf\)$/);
});

test("interruption and errors are told apart, with how far the run came", () => {
  const running = play([start(), layer(0, 0.01)]);
  const interrupted = play([{ state: "stopped", reason: "interrupted" }], "run", running);
  assert.deepEqual(state.words(interrupted), ["Interrupted", "after 1 of 4 layers"]);
  assert.equal(state.percent(interrupted), 25);
  const failed = play([{ state: "stopped", reason: "The disk is full." }], "run", running);
  assert.deepEqual(state.words(failed), ["The disk is full.", "after 1 of 4 layers"]);
  assert.equal(failed.interrupted, false);
  const early = play([{ state: "stopped", reason: "No such file." }]);
  assert.deepEqual(state.words(early), ["No such file.", ""]);
});

test("parts of one execution are added up, another execution begins anew", () => {
  const first = play([start(), layer(0, 0.01), done({ median_error: 0.02 })]);
  const second = play([start(), done({ median_error: 0.03, worst: [{ name: "b", error: 0.09 }] })], "run", first);
  assert.deepEqual(state.words(second), ["16 MB → 8.2 MB (51 %)", "8 layers in 8.0 s · median error 0.02000–0.03000"]);
  assert.deepEqual(second.worst.map(({ name }) => name), ["b", "blocks.3.attn.qkv.weight"]);
  const other = play([start(), done()], "next run", second);
  assert.match(state.words(other)[1], /^4 layers/);
  const unknown = play([start(), done()], null, play([start(), done()], null));
  assert.match(state.words(unknown)[1], /^4 layers/);
});

test("a run without layers has no median", () => {
  const end = play([start({ total: 0 }), done({ layers: 0, median_error: null, worst: [], bytes_out: 8_000_000 })]);
  assert.deepEqual(state.words(end), ["8 MB → 8 MB (100 %)", "0 layers in 4.0 s"]);
});

test("unknown events change nothing", () => {
  const now = play([start()]);
  assert.equal(state.advance(now, { state: "of a later release" }), now);
});

test("numbers", () => {
  const cases = [
    [state.formatBytes, [[0, "0 B"], [999, "999 B"], [999.6, "1 kB"], [19_234_567, "19.2 MB"], [23.8e9, "23.8 GB"], [5e15, "5000 TB"]]],
    [state.formatDuration, [[0.44, "0.4 s"], [9.96, "10 s"], [59.7, "1 min 00 s"], [185, "3 min 05 s"], [7620, "2 h 07 min"], [null, "…"]]],
    [state.formatError, [[0.0263412, "0.02634"], [null, "–"]]],
  ];
  for (const [format, pairs] of cases) {
    for (const [value, text] of pairs) assert.equal(format(value), text);
  }
});

test("names are shown from the block's number on", () => {
  const shown = (name) => state.splitName(state.shortName(name));
  assert.deepEqual(shown("model.diffusion_model.double_blocks.12.img_attn.qkv.weight"), ["double_blocks", ".12.img_attn.qkv"]);
  assert.deepEqual(shown("context_embedder.weight"), ["", "context_embedder"]);
  assert.deepEqual(shown("time_in.in_layer.weight"), ["time_in", ".in_layer"]);
});

test("nodes are found by execution id, in subgraphs too", () => {
  const graph = (nodes) => ({ getNodeById: (id) => nodes[id] });
  const inner = { id: 3 };
  const root = graph({ 7: { id: 7 }, 12: { id: 12, subgraph: graph({ 5: { id: 5, subgraph: graph({ 3: inner }) }, 3: { id: 3 } }) } });
  assert.equal(state.nodeByExecutionId(root, "7").id, 7);
  assert.equal(state.nodeByExecutionId(root, 7).id, 7);
  assert.equal(state.nodeByExecutionId(root, "12:5:3"), inner);
  for (const missing of ["8", "8:3", "7:3", "12:4", "12:3:1"]) assert.equal(state.nodeByExecutionId(root, missing), null);
});
