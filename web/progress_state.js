/**
 * State of the progress panels as plain values, without DOM and ComfyUI, so that node can test it.
 *
 * The messages of a run are "measuring", "start", "block", "layer", "kept", "checking", "done", "calibrating", "calibrated", "stopped",
 * and "resumed" after the layers of an earlier run (nodes/ui/progress.py), each with the run's prompt and its sequence number. A page that missed some gets all of them
 * again, and until then shows the available ones.
 */

import { blockWords, labelOf, layersWord, learnedWords } from "./progress_text.js";
import { say } from "./words.js";

export const WORST = 3;

export const IDLE = Object.freeze({ phase: "idle", prompt: null, seq: -1, cells: Object.freeze([]) });

/** Totals of parts, such as the encoders of a CLIP, that finished earlier in the same run. */
const NO_PARTS = Object.freeze({
  count: 0, layers: 0, seconds: 0, bytesIn: 0, bytesOut: 0, resumed: 0, medians: [], outputs: [], gains: [], models: [],
  solvers: {}, worst: [],
});

const FRESH = Object.freeze({
  phase: "running", measuring: false, checked: null, before: NO_PARTS, label: "", source: "", total: 0, finished: 0, layer: null,
  block: null, rounding: "", learned: "", eta: null, rate: null, bytes: 0, since: null, unit: null, resumed: null, rotations: [], worst: [], kept: [],
  warnings: [], cells: [], places: new Map(),
});

const running = (state) => (state.phase === "running" ? state : FRESH);

/** Sort layers by the error of the summary: output error where a layer has one, else weight error. */
function worstOf(layers) {
  const measured = layers.filter(isMeasured);
  return [...(measured.length ? measured : layers)].sort((a, b) => worstError(b) - worstError(a)).slice(0, WORST);
}

export const isMeasured = ({ output_error }) => (output_error ?? null) !== null;

export const worstError = ({ error, output_error }) => output_error ?? error;

const sumOf = (left, right) =>
  Object.fromEntries([...new Set([...Object.keys(left), ...Object.keys(right)])].map((key) => [key, (left[key] ?? 0) + (right[key] ?? 0)]));

/** Warnings of a state and of a message, each once; messages of earlier releases have none. */
const withWarnings = (warnings, event) => [...new Set([...warnings, ...(event.warnings ?? [])])];

const andKnown = (values, value) => ((value ?? null) === null ? values : [...values, value]);

/** Rotation sizes of a state and of further layers, each once, in rising order. */
const withRotations = (rotations, sizes) => [...new Set([...rotations, ...sizes])].sort((a, b) => a - b);

const nameAndErrors = ({ name, error, output_error = null }) => ({ name, error, output_error });

const anew = (cells, place, cell) => cells.with(place, cell);

/** Like `anew`, for cells without other references: linear in the number of layers. */
function inPlace(cells, place, cell) {
  cells[place] = cell;
  return cells;
}

/** Cells with that of one layer replaced, or appended if the plan was missed. */
function withCell({ cells, places }, cell, replaced) {
  const place = places.get(cell.name);
  return cells[place]?.state === "planned" ? replaced(cells, place, cell) : [...cells, cell];
}

const REDUCERS = {
  measuring(state, event) {
    return { ...running(state), measuring: true, total: event.total, finished: event.index, layer: event.name };
  },

  start(state, event) {
    const next = state.phase === "done";
    const planned = event.plan.map(([name, shape, place]) => {
      const reason = event.reasons[place];
      return { state: reason ? "kept" : "planned", name, shape, reason };
    });
    const cells = next ? [...state.cells, ...planned] : planned;
    return {
      ...FRESH,
      before: next ? state.parts : NO_PARTS,
      worst: next ? state.worst : [],
      kept: next ? state.kept : [],
      rotations: next ? state.rotations : [],
      warnings: withWarnings(next ? state.warnings : [], event),
      cells,
      places: new Map(planned.map(({ name }, place) => [name, cells.length - planned.length + place])),
      label: labelOf(event),
      rounding: event.rounding,
      source: event.source ?? "",
      total: event.total,
      since: 0,
    };
  },

  /** Layers of an earlier run took no time in this one: rate and time left are those of the others. */
  resumed(state, { layers, total, elapsed }) {
    return { ...running(state), measuring: false, total, resumed: layers, bytes: 0, since: elapsed, eta: null, rate: null, learned: "" };
  },

  block(state, event) {
    return { ...running(state), measuring: false, block: blockWords(event) };
  },

  layer(state, event, replaced) {
    const run = running(state);
    const since = run.since ?? event.elapsed - event.seconds;
    const bytes = run.bytes + event.bytes_in;
    return {
      ...run,
      measuring: false,
      label: run.label || labelOf(event),
      total: event.total,
      finished: Math.max(run.finished, event.index + 1),
      layer: event.name,
      learned: learnedWords(event),
      rotations: event.convrot && !run.rotations.includes(event.convrot) ? withRotations(run.rotations, [event.convrot]) : run.rotations,
      eta: event.eta,
      since,
      bytes,
      rate: event.elapsed > since ? bytes / (event.elapsed - since) : null,
      worst: worstOf([...run.worst, nameAndErrors(event)]),
      cells: withCell(run, { ...event, state: "quantized" }, replaced),
    };
  },

  kept(state, event, replaced) {
    const run = running(state);
    const { name, reason, shape } = event;
    return {
      ...run,
      finished: run.finished + 1,
      kept: [...run.kept, { name, reason }],
      cells: withCell(run, { state: "refused", name, shape, reason }, replaced),
    };
  },

  checking(state, event) {
    return { ...running(state), checked: event.done / event.total };
  },

  done(state, event) {
    const run = running(state);
    const before = state.phase === "done" ? state.parts : run.before; // without start messages between summaries
    const parts = {
      count: before.count + 1,
      layers: before.layers + event.layers,
      seconds: before.seconds + event.seconds,
      resumed: before.resumed + (event.resumed ?? 0),
      bytesIn: before.bytesIn + event.bytes_in,
      bytesOut: before.bytesOut + event.bytes_out,
      medians: andKnown(before.medians, event.median_error),
      outputs: andKnown(before.outputs, event.median_output_error),
      gains: andKnown(before.gains, event.median_gain),
      models: [...before.models, ...(event.model_errors ?? [])],
      solvers: sumOf(before.solvers, event.solvers ?? {}),
      worst: worstOf([...before.worst, ...event.worst.map(nameAndErrors)]),
    };
    return {
      ...run,
      phase: "done",
      label: run.label || labelOf(event),
      rounding: run.rounding || event.rounding,
      source: run.source || (event.source ?? ""),
      finished: run.total,
      layer: null,
      block: null,
      eta: null,
      rate: null,
      parts,
      rotations: withRotations(run.rotations, event.rotations ?? []),
      worst: parts.worst,
      warnings: withWarnings(run.warnings, event),
    };
  },

  calibrating(state, event) {
    const { unit, done, total, elapsed, layers } = event;
    const rate = done && elapsed > 0 ? done / elapsed : null;
    return {
      ...running(state), unit, total, finished: done, rate, eta: rate && (total - done) / rate, label: say("calibrating", { layers: layersWord(layers) }),
    };
  },

  calibrated(state, event) {
    const { layers, tokens, bytes, seconds } = event;
    return { ...running(state), phase: "done", label: say("calibrated", { layers: layersWord(layers) }), calibrated: { layers, tokens, bytes, seconds } };
  },

  stopped(state, event) {
    const run = state.phase === "idle" ? FRESH : state;
    return { ...run, phase: "stopped", interrupted: event.reason === "interrupted", reason: event.reason };
  },
};

/** The state after a message; unchanged by a message it already includes, and by one of a later release. */
export function advance(state, event) {
  return advanced(state, event, anew);
}

function advanced(state, event, replaced) {
  if (!Object.hasOwn(REDUCERS, event.state) || (event.prompt === state.prompt && event.seq <= state.seq)) return state;
  const before = event.prompt === state.prompt ? state : IDLE;
  return { ...REDUCERS[event.state](before, event, replaced), prompt: event.prompt, seq: event.seq };
}

/** Return whether a message directly follows a state. */
export function follows(state, event) {
  return event.seq === 0 || (event.prompt === state.prompt && event.seq <= state.seq + 1);
}

/** The state of a running node whose run has ended without a message: the server was restarted. */
export function endLost(state) {
  return state.phase === "running" ? { ...state, phase: "stopped", lost: true, interrupted: false } : state;
}

/** The state after all messages of a run, or the given state if it is further. */
export function replay(state, run) {
  const replayed = run.reduce((before, event) => advanced(before, event, inPlace), IDLE);
  return replayed.prompt === state.prompt && replayed.seq < state.seq ? state : replayed;
}

/**
 * The state at the end of a run, also without its messages: {state: "done" or "calibrated", …} of each of its parts.
 * The given state is kept if it describes the same end in more detail.
 */
export function summarised(state, summaries) {
  const replayed = replay(IDLE, summaries.map((summary, seq) => ({ ...summary, prompt: "", seq })));
  return state.phase === "done" && secondsOf(state) === secondsOf(replayed) ? state : replayed;
}

const secondsOf = ({ parts, calibrated }) => (calibrated ?? parts).seconds;

/** Progress of the run, 0 to 100. */
export function percent({ phase, finished, total }) {
  if (phase === "done") return 100;
  return total ? Math.min(100, Math.floor((100 * finished) / total)) : 0;
}

/**
 * Layout of a strip of a given size for a number of cells: in rows, so that cells are wide enough to click.
 *
 * Returns {columns, rows, width, height}; width and height of a cell are in the units of the size.
 */
export function layout(count, width, height) {
  const rows = Math.max(1, Math.min(Math.ceil((count * MIN_CELL) / width), Math.floor(height / MIN_CELL)));
  const columns = Math.max(1, Math.ceil(count / rows));
  return { columns, rows: Math.max(1, Math.ceil(count / columns)), width: width / columns, height: height / rows };
}

const MIN_CELL = 4;

/** Share of the error of round to nearest that a cell has removed, 0 to 1; 0 without a comparison. */
export function removedShare({ gain }) {
  return Math.min(1, Math.max(0, 1 - (gain ?? 1)));
}
