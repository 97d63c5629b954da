/**
 * What the progress widget shows, as values: no DOM, no ComfyUI, so that plain node can test it.
 *
 * A run is told by events "measuring", "start", "layer", "kept", "done", "stopped" (nodes/progress.py). The page may have missed
 * the first ones (reloaded, or another workflow was open), so every event stands on its own feet.
 */

export const WORST = 5;

export const IDLE = Object.freeze({ phase: "idle" });

/** How many parts, such as the encoders of a CLIP, were finished before in the same execution: their sums. */
const NO_PARTS = Object.freeze({
  count: 0, layers: 0, seconds: 0, bytesIn: 0, bytesOut: 0, medians: [], gains: [], solvers: {}, worst: [],
});

const fresh = (execution) => ({
  phase: "running", measuring: false, execution, before: NO_PARTS, label: "", source: "", total: 0, finished: 0,
  layer: null, learned: "", eta: null, rate: null, bytes: 0, since: null, worst: [], kept: [],
});

const worstOf = (layers) => [...layers].sort((a, b) => b.error - a.error).slice(0, WORST);

const sumOf = (left, right) =>
  Object.fromEntries([...new Set([...Object.keys(left), ...Object.keys(right)])].map((key) => [key, (left[key] ?? 0) + (right[key] ?? 0)]));

/** What rounding a layer brought; empty where nothing was compared with nearest. */
const learnedWords = ({ solver, gain = null, output_error = null }) =>
  [
    gain !== null && `${solver} ${formatGain(gain)} nearest`,
    output_error !== null && `output error ${formatError(output_error)}`,
  ].filter(Boolean).join(" · ");

const nameAndError = ({ name, error }) => ({ name, error });

const REDUCERS = {
  measuring(state, event, execution) {
    const run = state.phase === "running" && state.execution === execution ? state : fresh(execution);
    return { ...run, measuring: true, total: event.total, finished: event.index, layer: event.name };
  },

  start(state, event, execution) {
    const next = state.phase === "done" && execution !== null && state.execution === execution;
    return {
      ...fresh(execution),
      before: next ? state.parts : NO_PARTS,
      worst: next ? state.worst : [],
      kept: next ? state.kept : [],
      label: [event.format, event.granularity && `per ${event.granularity}`].filter(Boolean).join(" "),
      source: event.source ?? "",
      total: event.total,
      since: 0,
    };
  },

  layer(state, event, execution) {
    const run = state.phase === "running" ? state : fresh(execution);
    const since = run.since ?? event.elapsed - event.seconds;
    const bytes = run.bytes + event.bytes_in;
    return {
      ...run,
      measuring: false,
      label: run.label || `${event.format} per ${event.granularity}`,
      total: event.total,
      finished: Math.max(run.finished, event.index + 1),
      layer: event.name,
      learned: learnedWords(event),
      eta: event.eta,
      since,
      bytes,
      rate: event.elapsed > since ? bytes / (event.elapsed - since) : null,
      worst: worstOf([...run.worst, nameAndError(event)]),
    };
  },

  kept(state, event, execution) {
    const run = state.phase === "running" ? state : fresh(execution);
    return { ...run, finished: run.finished + 1, kept: [...run.kept, { name: event.name, reason: event.reason }] };
  },

  done(state, event, execution) {
    const run = state.phase === "running" ? state : fresh(execution);
    const { before } = run;
    const parts = {
      count: before.count + 1,
      layers: before.layers + event.layers,
      seconds: before.seconds + event.seconds,
      bytesIn: before.bytesIn + event.bytes_in,
      bytesOut: before.bytesOut + event.bytes_out,
      medians: event.median_error === null ? before.medians : [...before.medians, event.median_error],
      gains: (event.median_gain ?? null) === null ? before.gains : [...before.gains, event.median_gain],
      solvers: sumOf(before.solvers, event.solvers ?? {}),
      worst: worstOf([...before.worst, ...event.worst.map(nameAndError)]),
    };
    return { ...run, phase: "done", finished: run.total, layer: null, eta: null, rate: null, parts, worst: parts.worst };
  },

  stopped(state, event, execution) {
    const run = state.phase === "idle" ? fresh(execution) : state;
    return { ...run, phase: "stopped", interrupted: event.reason === "interrupted", reason: event.reason };
  },
};

/** The state after an event. `execution` tells one press of the run button from another; null if that is not known. */
export function advance(state, event, execution = null) {
  return REDUCERS[event.state]?.(state, event, execution) ?? state;
}

/** Finished share of the run, 0 to 100. */
export function percent({ phase, finished, total }) {
  if (phase === "done") return 100;
  return total ? Math.min(100, Math.floor((100 * finished) / total)) : 0;
}

/**
 * [first line, second line, detail] of plain words about the state; the detail, if there is one, is for a tooltip.
 * The current layer's name is not among them.
 */
export function words(state) {
  const kept = state.kept?.length ? `${state.kept.length} kept (NaN or Inf)` : "";
  const join = (...facts) => facts.filter(Boolean).join(" · ");
  switch (state.phase) {
    case "idle":
      return ["Progress appears here while the workflow runs.", ""];
    case "running": {
      if (state.layer === null) return ["Reading the model…", join(kept)];
      if (state.measuring) return ["", `measuring what each format costs, layer ${state.finished + 1} of ${state.total}`];
      const eta = state.finished < state.total ? `${formatDuration(state.eta)} left` : "writing the file";
      return ["", join(eta, state.rate && `${formatBytes(state.rate)}/s`, state.learned, kept)];
    }
    case "done": {
      const { layers, seconds, bytesIn, bytesOut, medians, gains, solvers } = state.parts;
      const share = bytesIn ? ` (${Math.round((100 * bytesOut) / bytesIn)} %)` : "";
      return [
        join(`${formatBytes(bytesIn)} → ${formatBytes(bytesOut)}${share}`, gains.length > 0 && `${formatRange(gains, formatGain)} nearest`),
        join(
          `${layers} ${layers === 1 ? "layer" : "layers"} in ${formatDuration(seconds)}`,
          medians.length > 0 && `median error ${formatRange(medians)}`,
          kept,
        ),
        gains.length > 0 && `Layers won: ${Object.entries(solvers).map(([solver, count]) => `${solver} ${count}`).join(", ")}`,
      ].filter(Boolean);
    }
    default: {
      const reached = state.total ? `after ${state.finished} of ${state.total} layers` : "";
      return state.interrupted ? ["Interrupted", reached] : [state.reason, reached];
    }
  }
}

/** A layer's name without what all names share. */
export function shortName(name) {
  return name.replace(/^(model\.)?diffusion_model\./, "").replace(/\.weight$/, "");
}

/** [head, tail]: the tail, from the block's number on, stays readable when there is no room for the whole name. */
export function splitName(name) {
  const number = name.search(/\.\d+\./);
  const cut = number > 0 ? number : name.lastIndexOf(".");
  return cut > 0 ? [name.slice(0, cut), name.slice(cut)] : ["", name];
}

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** Decimal units, three digits, as in the report: 19.2 MB. */
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

/** Relative weight error ‖Ŵ − W‖/‖W‖, with the report's five decimals. */
export function formatError(error) {
  return Number.isFinite(error) ? error.toFixed(5) : "–";
}

/** What was minimised, relative to rounding to nearest: 0.52×. */
export function formatGain(gain) {
  return `${gain.toFixed(2)}×`;
}

// The median of all parts together lies between the smallest and the largest of theirs.
function formatRange(medians, format = formatError) {
  const [low, high] = [Math.min(...medians), Math.max(...medians)].map((median) => format(median));
  return low === high ? low : `${low}–${high}`;
}

/** The node of an execution id such as "12:3": node 3 in the subgraph that node 12 of the root graph stands for. */
export function nodeByExecutionId(root, executionId) {
  const path = String(executionId).split(":");
  const own = path.pop();
  const graph = path.reduce((graph, id) => graph?.getNodeById(id)?.subgraph, root);
  return graph?.getNodeById(own) ?? null;
}
