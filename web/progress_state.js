/**
 * State of the progress panels as plain values, without DOM and ComfyUI, so that node can test it.
 *
 * The messages of a run are "measuring", "start", "block", "layer", "kept", "checking", "done", "calibrating", "calibrated", "stopped"
 * (nodes/ui/progress.py), each with the run's prompt and its sequence number. A page that missed some gets all of them
 * again, and until then shows the available ones.
 */

import { say } from "./words.js";

export const WORST = 3;

export const IDLE = Object.freeze({ phase: "idle", prompt: null, seq: -1, cells: Object.freeze([]) });

/** Totals of parts, such as the encoders of a CLIP, that finished earlier in the same run. */
const NO_PARTS = Object.freeze({
  count: 0, layers: 0, seconds: 0, bytesIn: 0, bytesOut: 0, medians: [], outputs: [], gains: [], solvers: {}, worst: [],
});

const FRESH = Object.freeze({
  phase: "running", measuring: false, checked: null, before: NO_PARTS, label: "", source: "", total: 0, finished: 0, layer: null,
  block: null, rounding: "", learned: "", eta: null, rate: null, bytes: 0, since: null, unit: null, worst: [], kept: [], warnings: [], cells: [],
  places: new Map(),
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

/** Error reduction of a layer relative to round to nearest; empty without a comparison. */
const learnedWords = ({ solver, gain = null, output_error = null }) =>
  [
    gain !== null && `${solver} ${nearestWords(gain)}`,
    output_error !== null && say("outputError", { error: formatError(output_error) }),
  ].filter(Boolean).join(" · ");

const nameAndErrors = ({ name, error, output_error = null }) => ({ name, error, output_error });

const labelOf = ({ format, granularity }) => [format, granularity && `per ${granularity}`].filter(Boolean).join(" ");

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
      bytesIn: before.bytesIn + event.bytes_in,
      bytesOut: before.bytesOut + event.bytes_out,
      medians: andKnown(before.medians, event.median_error),
      outputs: andKnown(before.outputs, event.median_output_error),
      gains: andKnown(before.gains, event.median_gain),
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
  if (!(event.state in REDUCERS) || (event.prompt === state.prompt && event.seq <= state.seq)) return state;
  const before = event.prompt === state.prompt ? state : IDLE;
  return { ...REDUCERS[event.state](before, event, replaced), prompt: event.prompt, seq: event.seq };
}

/** Return whether a message directly follows a state. */
export function follows(state, event) {
  return event.seq === 0 || (event.prompt === state.prompt && event.seq <= state.seq + 1);
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
 * [first line, second line, detail]: text about the state; the detail, if there is one, is for a tooltip.
 * The name of the current layer is not included.
 */
export function words(state) {
  const join = (...facts) => facts.filter(Boolean).join(" · ");
  switch (state.phase) {
    case "idle":
      return [say("idle"), ""];
    case "running": {
      if (state.unit) return calibratingWords(state, join);
      if (state.layer === null && state.block === null) return [say("reading"), ""];
      if (state.measuring) return ["", say("measuring", { number: state.finished + 1, total: state.total })];
      if (state.checked !== null) return ["", say("checking", { percent: Math.floor(100 * state.checked) })];
      if (state.block !== null && state.finished < state.total) return ["", join(state.block, state.eta !== null && leftWords(state.eta))];
      const eta = state.finished < state.total ? leftWords(state.eta) : say("writing");
      return ["", join(eta, state.rate && `${formatBytes(state.rate)}/s`, state.learned)];
    }
    case "done": {
      if (state.calibrated) {
        const { tokens, bytes, seconds } = state.calibrated;
        return [say("tokens", { tokens }), inWords(formatBytes(bytes), seconds)];
      }
      const { layers, seconds, bytesIn, bytesOut, medians, outputs, gains, solvers } = state.parts;
      const share = bytesIn ? ` (${Math.round((100 * bytesOut) / bytesIn)} %)` : "";
      return [
        join(`${formatBytes(bytesIn)} → ${formatBytes(bytesOut)}${share}`, gains.length > 0 && say("nearest", { gain: formatRange(gains, formatGain) })),
        join(
          inWords(layersWord(layers), seconds),
          outputs.length > 0
            ? say("medianOutputError", { error: formatRange(outputs) })
            : medians.length > 0 && say("medianWeightError", { error: formatRange(medians) }),
        ),
        gains.length > 0 && say("won", { list: Object.entries(solvers).map(([solver, count]) => `${solver} ${count}`).join(", ") }),
      ].filter(Boolean);
    }
    default: {
      const { finished, total, unit } = state;
      const reached = total ? say("reached", { finished, total, unit: say(`${unit ?? "layers"}Unit`) }) : "";
      return state.interrupted ? [say("interrupted"), reached] : [state.reason, reached];
    }
  }
}

/** Number, name and step of a block, or the rounding that was kept: "block 3 of 57, double_blocks.2: gradient step 40 of 120". */
function blockWords({ index, total, name, step, done, total_steps: steps, kept, error, calibrated_error: calibrated }) {
  const what = kept
    ? say("blockKept", { kept, error: formatError(error), calibrated: formatError(calibrated) })
    : say(BLOCK_STEPS[step] ?? "blockStarted", { done, steps });
  return say("block", { number: index + 1, total, name: shortName(name), what });
}

const BLOCK_STEPS = {
  rounding: "blockRounding", comparing: "blockComparing", reconstructing: "blockReconstructing", running: "blockRunning",
};

function calibratingWords({ unit, finished, total, rate, eta }, join) {
  const left = finished < total ? rate && leftWords(eta) : "";
  const pace = () =>
    rate >= 1
      ? say("rate", { rate: rate.toFixed(1), unit: say(`${unit}Unit`) })
      : say("each", { time: formatDuration(1 / rate), unit: say(ONE_OF_CALIBRATION[unit]) });
  return [say(`${unit}Doing`), join(left, rate && pace())];
}

const ONE_OF_CALIBRATION = { steps: "step", prompts: "prompt", probes: "probe" };

const leftWords = (seconds) => say("left", { time: formatDuration(seconds) });

const inWords = (what, seconds) => say("in", { what, time: formatDuration(seconds) });

const nearestWords = (gain) => say("nearest", { gain: formatGain(gain) });

/** At most three lines about a layer for its card, without its name. `rounding`: that of the run. */
export function cellLines(cell, rounding) {
  const shape = cell.shape?.join("×") ?? "";
  if (cell.state !== "quantized") {
    return [shape, cell.state === "planned" ? say("planned") : say("keptFor", { reason: cell.reason })];
  }
  const rotated = cell.convrot ? `, ConvRot ${cell.convrot}` : "";
  const [low, high] = cell.scale ?? [];
  const scale = low !== undefined && say(high > low ? "scales" : "scale", { low: formatScale(low), high: high > low ? formatScale(high) : "" });
  return [`${shape} · ${labelOf(cell)}${rotated}`, errorWords(cell, rounding), [cell.solver, scale].filter(Boolean).join(" · ")];
}

// The gain is that of the displayed error, except for principal rounding, which minimizes another one.
function errorWords({ error, output_error = null, gain = null }, rounding) {
  const [shown, key] = output_error === null ? [error, "weightError"] : [output_error, "outputError"];
  const comparable = gain > 0 && (output_error !== null || rounding !== "principal");
  const words = say(key, { error: `${comparable ? `${formatError(shown / gain)} → ` : ""}${formatError(shown)}` });
  return gain === null ? words : `${words} (${nearestWords(gain)})`;
}

/** One entry per way in which layers are stored: [{kind, label, count}], in order of first occurrence. */
export function legend(cells) {
  const found = []; // one cell per way and its count; texts are created for these only
  for (const cell of cells) {
    const same = found.find(({ like }) => STORED.every((key) => like[key] === cell[key]));
    if (same) same.count += 1;
    else found.push({ like: cell, count: 1 });
  }
  return found.map(({ like, count }) => {
    const [kind, label] = KINDS[like.state](like);
    return { kind, label, count };
  });
}

const STORED = ["state", "format", "granularity"];

const KINDS = {
  planned: () => ["planned", say("legendPlanned")],
  kept: () => ["kept", say("legendKept")],
  refused: () => ["refused", say("legendRefused")],
  quantized: (cell) => [cell.format, labelOf(cell)],
};

/** Strength of the colour of a cell, 0.4 to 1; it grows with the reduction of the error of round to nearest. */
export function shade({ gain }) {
  return 1 - 0.6 * Math.min(1, Math.max(0, ((gain ?? 1) - 0.4) / 0.6));
}

/** Keep pattern of Configure Quantization that matches this layer only. */
export function keepRule(name) {
  return `^${name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}$`;
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

/** The name of a layer without the prefix that all names share. */
export function shortName(name) {
  return name.replace(/^(model\.)?diffusion_model\./, "").replace(/\.weight$/, "");
}

/** [head, tail] of a name: the tail, from the block number on, stays readable in a narrow space. */
export function splitName(name) {
  const number = name.search(/\.\d+\./);
  const cut = number > 0 ? number : name.lastIndexOf(".");
  return cut > 0 ? [name.slice(0, cut), name.slice(cut)] : ["", name];
}

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** Decimal units with three digits, as in the report: 19.2 MB. */
export function formatBytes(count) {
  let power = 0;
  while (count >= 999.5 && power < UNITS.length - 1) {
    count /= 1000;
    power += 1;
  }
  return `${Number(count.toPrecision(3))} ${UNITS[power]}`;
}

/** 0.4 s, 42 s, 3 min 05 s, 2 h 07 min. */
export function formatDuration(seconds) {
  if (!Number.isFinite(seconds)) return "…";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

const layersWord = (count) => say(count === 1 ? "layer" : "layers", { count });

const formatScale = (scale) => String(Number(scale.toPrecision(3)));

/** Relative weight error ‖Ŵ − W‖/‖W‖ with five decimals, as in the report. */
export function formatError(error) {
  return Number.isFinite(error) ? error.toFixed(5) : "–";
}

/** The minimized error relative to round to nearest: 0.52×. */
export function formatGain(gain) {
  return `${gain.toFixed(2)}×`;
}

// The median of all parts is between the smallest and the largest median of a part.
function formatRange(medians, format = formatError) {
  const [low, high] = [Math.min(...medians), Math.max(...medians)].map((median) => format(median));
  return low === high ? low : `${low}–${high}`;
}
