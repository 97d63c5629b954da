// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import * as states from "../../web/progress_state.js";
import * as texts from "../../web/progress_text.js";

const state = { ...states, ...texts };

const start = (more) => ({
  state: "start", source: "model.safetensors", format: "int8_tensorwise", granularity: "row", preset: "flux",
  rounding: "auto", total: 4, kept: 2, bytes_in: 8000, plan: [], reasons: [], ...more,
});
const planned = (count) => ({
  plan: Array.from({ length: count }, (_, index) => [`blocks.${index}.attn.qkv.weight`, [8, 8], 0]), reasons: [""],
});
const layer = (index, error, more) => ({
  state: "layer", index, total: 4, name: `blocks.${index}.attn.qkv.weight`, shape: [8, 8], format: "int8_tensorwise",
  granularity: "row", error, seconds: 1, bytes_in: 2_000_000, bytes_out: 1_000_000, elapsed: index + 1, eta: 3 - index, ...more,
});
const done = (more) => ({
  state: "done", layers: 4, seconds: 4, bytes_in: 8_000_000, bytes_out: 4_100_000, median_error: 0.025,
  worst: [{ name: "blocks.3.attn.qkv.weight", error: 0.04 }], ...more,
});
// Each message follows the one before.
const play = (events, prompt = "run", from = state.IDLE) =>
  events.reduce((now, event) => state.advance(now, { prompt, seq: now.prompt === prompt ? now.seq + 1 : 0, ...event }), from);

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
  const again = play([measuring(0)], "again", play([start(), done()]));
  assert.deepEqual([again.phase, again.finished, again.cells.length], ["running", 0, 0]);
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

  const written = play([layer(2, 0.03), layer(3, 0.04)], "run", half);
  assert.ok(state.words(written)[1].startsWith("writing the file"));
  const checking = play([{ state: "checking", done: 3_000_000, total: 4_100_000 }], "run", written);
  assert.deepEqual(state.words(checking), ["", "checking the written file: 73 %"]);
  assert.equal(state.words(play([start()], "run", checking))[1].includes("checking"), false);

  const end = play([done()], "run", checking);
  assert.equal(end.phase, "done");
  assert.equal(state.percent(end), 100);
  assert.deepEqual(state.words(end), ["8 MB → 4.1 MB, 49 % smaller", "4 layers in 4.0 s · median error 0.025"]);
});

test("a rounding that runs the model tells of blocks and of their steps", () => {
  const block = (more) => ({ state: "block", index: 2, total: 57, name: "double_blocks.2", ...more });
  const begun = play([start(), block()]);
  assert.deepEqual(state.words(begun), ["", "block 3 of 57, double_blocks.2: reading its activations"]);
  const step = (name, done, total_steps) => state.words(play([block({ step: name, done, total_steps })], "run", begun))[1];
  assert.equal(step("rounding", 1, 5), "block 3 of 57, double_blocks.2: rounding, 1 of 5");
  assert.equal(step("comparing", 2, 16), "block 3 of 57, double_blocks.2: comparing, call 2 of 16");
  assert.equal(step("reconstructing", 40, 120), "block 3 of 57, double_blocks.2: gradient step 40 of 120");
  assert.equal(step("running", 3, 64), "block 3 of 57, double_blocks.2: running it, call 3 of 64");
  assert.equal(step("of a later release", 3, 64), "block 3 of 57, double_blocks.2: reading its activations");
  const kept = block({ kept: "sequential", error: 0.0123, calibrated_error: 0.015, weights_only_error: null });
  const text = "block 3 of 57, double_blocks.2: sequential kept, error 0.0123, calibrated 0.015";
  const ended = play([kept, layer(0, 0.01)], "run", begun);
  assert.deepEqual(state.words(ended), ["", `${text} · 3.0 s left`]);
  assert.equal(state.percent(ended), 25);
  const written = play([layer(1, 0.01), layer(2, 0.01), layer(3, 0.01)], "run", ended);
  assert.ok(state.words(written)[1].startsWith("writing the file"));
  assert.equal(play([done()], "run", written).block, null);
  assert.equal(play([start()], "run", ended).block, null);
});

test("warnings of all parts are kept once, also where a part's first message was missed", () => {
  const parts = play([start({ warnings: ["a"] }), layer(0, 0.01), done({ warnings: ["a"] }), start({ warnings: ["b", "a"] })]);
  assert.deepEqual(parts.warnings, ["a", "b"]);
  assert.deepEqual(play([layer(0, 0.01), done({ warnings: ["c"] })]).warnings, ["c"]);
  assert.deepEqual(play([start(), done()]).warnings, []);
  assert.deepEqual(state.summarised(state.IDLE, [done({ warnings: ["d"] })]).warnings, ["d"]);
  assert.deepEqual(play([start()], "again", parts).warnings, []);
});

test("what learned rounding won is told while it runs and at the end", () => {
  const learned = { solver: "gptq", gain: 0.517, output_error: 0.01 };
  const running = play([start(), layer(0, 0.01, learned)]);
  assert.equal(state.words(running)[1], "3.0 s left · 2 MB/s · gptq 0.517× RTN · output error 0.01");
  const plain = play([layer(1, 0.01, { solver: "nearest", gain: null, output_error: null })], "run", running);
  assert.equal(state.words(plain)[1], "2.0 s left · 2 MB/s");
  const end = play([done({ median_gain: 0.5, solvers: { gptq: 3, nearest: 1 } })], "run", plain);
  assert.deepEqual(state.words(end), [
    "8 MB → 4.1 MB, 49 % smaller · 0.5× RTN", "4 layers in 4.0 s · median error 0.025", "Layers won: gptq 3, nearest 1",
  ]);
  const both = play([start(), done({ median_gain: 0.6, solvers: { gptq: 2, adamw: 1 } })], "run", end);
  assert.equal(state.words(both)[0], "16 MB → 8.2 MB, 49 % smaller · 0.5×–0.6× RTN");
  assert.equal(state.words(both)[2], "Layers won: gptq 5, nearest 1, adamw 1");
});

test("only the worst three layers are kept, worst first", () => {
  const errors = [0.3, 0.1, 0.6, 0.2, 0.5, 0.4, 0.7];
  const now = play([start({ total: 7 }), ...errors.map((error, index) => layer(index, error, { total: 7 }))]);
  assert.deepEqual(now.worst.map(({ error }) => error), [0.7, 0.6, 0.5]);
  assert.deepEqual(Object.keys(now.worst[0]), ["name", "error", "output_error"]);
});

test("layers are ranked by the error of the output where it is known, as the summary is", () => {
  const now = play([start(), layer(0, 0.01, { output_error: 0.3 }), layer(1, 0.9), layer(2, 0.02, { output_error: 0.1 })]);
  assert.deepEqual(now.worst.map(state.worstError), [0.3, 0.1]);
  const worst = [{ name: "a", error: 0.5, output_error: 0.01 }, { name: "b", error: 0.1, output_error: 0.2 }];
  const end = play([done({ worst, median_output_error: 0.02 })], "run", now);
  assert.deepEqual(end.worst.map(({ name }) => name), ["b", "a"]);
});

test("states are values: an event leaves the one before as it was", () => {
  const before = play([start(), layer(0, 0.01)]);
  const copy = structuredClone(before);
  play([layer(1, 0.02), { state: "kept", name: "x", reason: "NaN" }, done()], "run", before);
  assert.deepEqual(before, copy);
});

test("a page that comes late shows what it can", () => {
  const now = play([layer(2, 0.03, { seq: 7 })]);
  assert.equal(now.phase, "running");
  assert.equal(state.percent(now), 75);
  assert.equal(now.label, "int8_tensorwise per row");
  assert.equal(now.rate, 2_000_000); // of what it saw, not of the whole time
  assert.equal(now.cells.length, 1);
  assert.equal(play([done({ seq: 9 })]).phase, "done");
});

test("a layer that had to be kept counts as finished and is told", () => {
  const now = play([start(), layer(0, 0.01), { state: "kept", name: "blocks.1.w", reason: "holds NaN" }]);
  assert.equal(now.finished, 2);
  assert.deepEqual(now.kept, [{ name: "blocks.1.w", reason: "holds NaN" }]);
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
  assert.deepEqual(state.words(second), ["16 MB → 8.2 MB, 49 % smaller", "8 layers in 8.0 s · median error 0.02–0.03"]);
  assert.deepEqual(second.worst.map(({ name }) => name), ["b", "blocks.3.attn.qkv.weight"]);
  const other = play([start(), done()], "next run", second);
  assert.match(state.words(other)[1], /^4 layers/);
});

test("a run without layers has no median", () => {
  const end = play([start({ total: 0 }), done({ layers: 0, median_error: null, worst: [], bytes_out: 8_000_000 })]);
  assert.deepEqual(state.words(end), ["8 MB → 8 MB, 0 % smaller", "0 layers in 4.0 s"]);
});

test("every layer has a cell, from the plan on, in the order of the source", () => {
  const plan = [["embed.weight", [4, 4], 1], ["blocks.0.attn.qkv.weight", [8, 8], 0], ["blocks.1.attn.qkv.weight", [8, 8], 0]];
  const begun = play([start({ total: 2, plan, reasons: ["", "an embedding"] })]);
  assert.deepEqual(begun.cells.map(({ state }) => state), ["kept", "planned", "planned"]);
  const nan = { state: "kept", name: "blocks.1.attn.qkv.weight", shape: [8, 8], reason: "holds NaN" };
  const end = play([layer(0, 0.02, { gain: 0.5, output_error: 0.01, solver: "gptq", scale: [0.001, 0.00234], convrot: 16 }), nan], "run", begun);
  assert.deepEqual(end.cells.map(({ name }) => name), plan.map(([name]) => name));
  assert.deepEqual(end.cells.map((cell) => state.cellLines(cell, end.rounding)), [
    ["4×4", "unquantized: an embedding"],
    ["8×8 · int8_tensorwise per row, ConvRot 16", "output error 0.02 → 0.01 (0.5× RTN)", "gptq · scale 0.001 to 0.00234"],
    ["8×8", "unquantized: holds NaN"],
  ]);
  assert.deepEqual(state.legend(end.cells), [
    { kind: "kept", label: "unquantized", count: 1 },
    { kind: "int8_tensorwise", label: "int8_tensorwise per row, ConvRot 16", count: 1 },
    { kind: "refused", label: "unquantized (NaN or Inf)", count: 1 },
  ]);
  assert.deepEqual(state.cellLines(begun.cells[1]), ["8×8", "going to be quantized"]);
  const second = play([done(), start({ plan: [["other.weight", [2, 2], 0]], reasons: [""] })], "run", end);
  assert.equal(second.cells.length, 4);
});

test("a cell is filled by the share of the error of round to nearest that is removed", () => {
  assert.deepEqual([{ gain: null }, { gain: 1.2 }, { gain: 1 }, { gain: 0.75 }, { gain: 0 }].map(state.removedShare), [0, 0, 0, 0.25, 1]);
});

test("the rotation is named in the label, in the legend and on the card", () => {
  const rotated = (index, convrot) => layer(index, 0.01, { convrot });
  const half = play([start(planned(4)), rotated(0, 256), layer(1, 0.01)]);
  assert.equal(state.labelWords(half), "int8_tensorwise per row, ConvRot 256");
  assert.deepEqual(state.legend(half.cells).map(({ label, count }) => [label, count]), [
    ["int8_tensorwise per row, ConvRot 256", 1], ["int8_tensorwise per row", 1], ["to do", 2],
  ]);
  assert.equal(state.labelWords(play([rotated(2, 64)], "run", half)), "int8_tensorwise per row, ConvRot 64–256");
  const known = state.summarised(state.IDLE, [done({ format: "int8_tensorwise", granularity: "row", rotations: [16] })]);
  assert.equal(state.labelWords(known), "int8_tensorwise per row, ConvRot 16");
});

test("layers of an earlier run are not part of rate and time left, and are told", () => {
  const old = { elapsed: 500, seconds: 100, eta: 9000 };
  const resumed = play([start(planned(4)), layer(0, 0.01, old), layer(1, 0.01, old), { state: "resumed", layers: 2, total: 4, elapsed: 0.5 }]);
  assert.deepEqual([resumed.finished, resumed.rate, resumed.eta], [2, null, null]);
  assert.deepEqual(state.words(resumed), ["", "resumed at 2 of 4"]);
  const third = play([layer(2, 0.01, { elapsed: 2.5, seconds: 2, eta: 2 })], "run", resumed);
  assert.equal(state.words(third)[1], "2.0 s left · 1 MB/s · resumed at 2 of 4");
  const end = play([done({ resumed: 2 })], "run", third);
  assert.match(state.words(end)[1], /^4 layers in 4.0 s · median .* · 2 of them resumed$/);
});

test("a run that ended with its server says how far it came and what to do", () => {
  const lost = state.endLost(play([start(planned(4)), layer(0, 0.01)]));
  assert.deepEqual([lost.phase, ...state.words(lost)], ["stopped", "Stopped at 1 of 4; run again to resume.", "ComfyUI was restarted during the run."]);
  assert.equal(lost.cells.length, 4);
  const step = { state: "calibrating", layers: 36, unit: "steps", done: 3, total: 40, elapsed: 1 };
  assert.equal(state.words(state.endLost(play([step])))[0], "Stopped at 3 of 40 steps; run again.");
  assert.equal(state.words(state.endLost(play([{ state: "block", index: 0, total: 4, name: "blocks.0" }])))[0], "Stopped; run again.");
  const finished = play([start(), done()]);
  assert.equal(state.endLost(finished), finished);
  assert.equal(play([start()], "next", lost).phase, "running");
});

test("the summary has the model's error of a run that ran the model, of every encoder", () => {
  const end = play([start(), done({ model_errors: [0.0684] }), start(), done({ model_errors: [0.0123] })]);
  assert.match(state.words(end)[1], /^8 layers in 8.0 s · model error 0.0123–0.0684 · median/);
  assert.doesNotMatch(state.words(play([done({ model_errors: [] })]))[1], /model/);
});

test("a strip shows all its cells, none too narrow to be hit", () => {
  for (const count of [1, 3, 57, 304, 1000, 2000]) {
    const { columns, rows, width, height } = state.layout(count, 330, 44);
    assert.ok(columns * rows >= count && columns * (rows - 1) < count, `${count}`);
    assert.ok(columns * width <= 330.001 && rows * height <= 44.001);
  }
  assert.deepEqual(state.layout(57, 330, 44).rows, 1);
  assert.ok(state.layout(800, 330, 44).width >= 4);
});

test("missed messages are noticed, and all of them make the same state", () => {
  const messages = [start(planned(4)), layer(0, 0.01), layer(1, 0.02), layer(2, 0.03)]
    .map((message, seq) => ({ prompt: "run", seq, ...message }));
  const whole = messages.reduce(state.advance, state.IDLE);
  const late = state.advance(state.IDLE, messages[2]);
  assert.ok(!state.follows(state.IDLE, messages[2]));
  assert.ok(state.follows(whole, { ...layer(3, 0.04), prompt: "run", seq: 4 }));
  assert.ok(!state.follows(whole, { ...layer(3, 0.04), prompt: "run", seq: 5 }));
  assert.ok(!state.follows(whole, { ...layer(3, 0.04), prompt: "another", seq: 4 }));
  assert.ok(state.follows(whole, { ...start(), prompt: "another", seq: 0 }));
  assert.deepEqual(state.replay(late, messages), whole);
  assert.deepEqual(state.replay(state.IDLE, messages), whole);
  assert.equal(state.replay(whole, messages.slice(0, 2)), whole, "what is further stays");
  assert.equal(state.advance(whole, messages[3]), whole, "a message that comes twice counts once");
});

test("the end of a run is shown where no message of it was seen, and changes nothing where all were", () => {
  const end = play([start(planned(4)), layer(0, 0.01), done()]);
  const summary = done({ format: "int8_tensorwise", granularity: "row", rounding: "auto", source: "model.safetensors" });
  assert.equal(state.summarised(end, [summary]), end);
  const fresh = state.summarised(state.IDLE, [summary]);
  assert.deepEqual([fresh.phase, fresh.label, fresh.source], ["done", "int8_tensorwise per row", "model.safetensors"]);
  assert.deepEqual(state.words(fresh), state.words(end));
  assert.notEqual(state.summarised(end, [done({ seconds: 5 })]), end, "another run's");
  const both = state.summarised(state.IDLE, [summary, summary]);
  assert.match(state.words(both)[1], /^8 layers in 8.0 s/);
  const calibrated = { state: "calibrated", layers: 36, tokens: 512, bytes: 19_200_000, seconds: 42 };
  const known = state.summarised(state.IDLE, [calibrated]);
  assert.deepEqual(state.words(known), ["512 tokens or more of each layer's activations", "19.2 MB in 42 s"]);
  assert.equal(state.summarised(known, [calibrated]), known);
  const next = play([start()], "next", fresh);
  assert.deepEqual([next.phase, next.prompt], ["running", "next"]);
});

test("all messages of a large run are replayed in time in proportion to them", () => {
  const messagesOf = (count) =>
    [start({ total: count, ...planned(count) }), ...Array.from({ length: count }, (_, index) => layer(index, 0.01, { total: count }))]
      .map((message, seq) => ({ prompt: "run", seq, ...message }));
  let copied = 0;
  const { with: withOne } = Array.prototype;
  Array.prototype.with = function (...given) {
    copied += this.length;
    return withOne.apply(this, given);
  };
  try {
    assert.equal(state.replay(state.IDLE, messagesOf(2000)).cells.filter((cell) => cell.state === "quantized").length, 2000);
    assert.equal(copied, 0);
  } finally {
    Array.prototype.with = withOne;
  }
});

test("a calibration tells of steps, probes, and what it made", () => {
  const step = (unit, done, total, elapsed) => ({ state: "calibrating", layers: 36, unit, done, total, elapsed });
  const half = play([step("steps", 0, 40, 0), step("steps", 20, 40, 10)]);
  assert.equal(half.label, "calibrating 36 layers");
  assert.equal(state.percent(half), 50);
  assert.deepEqual(state.words(half), ["Sampling with the original model", "10 s left · 2 steps/s"]);
  const probing = play([step("probes", 3, 72, 12)], "run", half);
  assert.deepEqual(state.words(probing), ["Measuring what an error of each layer does", "4 min 36 s left · 4.0 s each probe"]);
  const end = play([{ state: "calibrated", layers: 36, tokens: 512, bytes: 19_200_000, seconds: 42 }], "run", probing);
  assert.deepEqual(state.words(end), ["512 tokens or more of each layer's activations", "19.2 MB in 42 s"]);
  assert.equal(state.percent(end), 100);
  const stopped = play([{ state: "stopped", reason: "interrupted" }], "run", half);
  assert.deepEqual(state.words(stopped), ["Interrupted", "after 20 of 40 steps"]);
});

test("unknown events change nothing", () => {
  const now = play([start()]);
  assert.equal(state.advance(now, { state: "of a later release" }), now);
});
