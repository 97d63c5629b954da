/** Texts of the progress panels about a state of progress_state.js, without DOM and ComfyUI, so that node can test it. */

import { formatBytes, formatDuration, formatGain, formatNumber, formatRange } from "./numbers.js";
import { say, translate } from "./words.js";

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
      const eta = state.finished < state.total ? state.eta !== null && leftWords(state.eta) : say("writing");
      const rate = state.rate && `${formatBytes(state.rate)}/s`;
      return ["", join(eta, rate, state.resumed > 0 && say("resuming", { resumed: state.resumed, total: state.total }), state.learned)];
    }
    case "done": {
      if (state.calibrated) {
        const { tokens, bytes, seconds } = state.calibrated;
        return [say("tokens", { tokens }), inWords(formatBytes(bytes), seconds)];
      }
      const { layers, seconds, resumed, bytesIn, bytesOut, medians, outputs, gains, models, solvers } = state.parts;
      const change = bytesIn ? `, ${changeWords(bytesOut / bytesIn)}` : "";
      return [
        join(`${formatBytes(bytesIn)} → ${formatBytes(bytesOut)}${change}`, gains.length > 0 && say("nearest", { gain: formatRange(gains, formatGain) })),
        join(
          inWords(layersWord(layers), seconds),
          models.length > 0 && say("modelError", { error: formatRange(models) }),
          outputs.length > 0
            ? say("medianOutputError", { error: formatRange(outputs) })
            : medians.length > 0 && say("medianWeightError", { error: formatRange(medians) }),
          resumed > 0 && say("resumedOf", { resumed }),
        ),
        gains.length > 0 && say("won", { list: Object.entries(solvers).map(([solver, count]) => `${solver} ${count}`).join(", ") }),
      ].filter(Boolean);
    }
    default: {
      const { finished, total, unit } = state;
      if (state.lost) return [lostWords(state), say("restarted")];
      const reached = total ? say("reached", { finished, total, unit: say(`${unit ?? "layers"}Unit`) }) : "";
      return state.interrupted ? [say("interrupted"), reached] : [translate(state.reason), reached];
    }
  }
}

/** How far a run came that ended with its server, and what to do. */
function lostWords({ finished, total, unit }) {
  if (!total) return say("lost");
  return unit ? say("lostCalibration", { finished, total, unit: say(`${unit}Unit`) }) : say("lostRun", { finished, total });
}

/** A size relative to that before: "46 % smaller". */
export function changeWords(ratio) {
  const saved = Math.round(100 * (1 - ratio));
  return say(saved < 0 ? "larger" : "smaller", { percent: Math.abs(saved) });
}

/** Format and granularity of a layer or of a run, with the rotation: "int8_tensorwise per row, ConvRot 256". */
export const labelOf = ({ format, granularity, convrot }) =>
  [[format, granularity && `per ${granularity}`].filter(Boolean).join(" "), convrot && rotationWords([convrot])].filter(Boolean).join(", ");

const rotationWords = (sizes) => `ConvRot ${formatRange(sizes)}`;

/** The label of a run with the sizes of the rotation that its layers have. */
export const labelWords = ({ label = "", rotations = [] }) => [label, rotations.length > 0 && rotationWords(rotations)].filter(Boolean).join(", ");

/** Error reduction of a layer relative to round to nearest; empty without a comparison. */
export const learnedWords = ({ solver, gain = null, output_error = null }) =>
  [
    gain !== null && `${solver} ${nearestWords(gain)}`,
    output_error !== null && say("outputError", { error: formatNumber(output_error) }),
  ].filter(Boolean).join(" · ");

/** Number, name and step of a block, or the rounding that was kept: "block 3 of 57, double_blocks.2: gradient step 40 of 120". */
export function blockWords({ index, total, name, step, done, total_steps: steps, kept, error, calibrated_error: calibrated }) {
  const what = kept
    ? say("blockKept", { kept, error: formatNumber(error), calibrated: formatNumber(calibrated) })
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
      ? say("rate", { rate: formatNumber(rate), unit: say(`${unit}Unit`) })
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
    return [shape, cell.state === "planned" ? say("planned") : say("keptFor", { reason: translate(cell.reason) })];
  }
  const [low, high] = cell.scale ?? [];
  const scale = low !== undefined && say(high > low ? "scales" : "scale", { low: formatNumber(low), high: high > low ? formatNumber(high) : "" });
  return [`${shape} · ${labelOf(cell)}`, errorWords(cell, rounding), [cell.solver, scale].filter(Boolean).join(" · ")];
}

// The gain is that of the displayed error, except for principal rounding, which minimizes another one.
function errorWords({ error, output_error = null, gain = null }, rounding) {
  const [shown, key] = output_error === null ? [error, "weightError"] : [output_error, "outputError"];
  const comparable = gain > 0 && (output_error !== null || rounding !== "principal");
  const words = say(key, { error: `${comparable ? `${formatNumber(shown / gain)} → ` : ""}${formatNumber(shown)}` });
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

const STORED = ["state", "format", "granularity", "convrot"];

const KINDS = {
  planned: () => ["planned", say("legendPlanned")],
  kept: () => ["kept", say("legendKept")],
  refused: () => ["refused", say("legendRefused")],
  quantized: (cell) => [cell.format, labelOf(cell)],
};

/** Keep pattern of Configure Quantization that matches this layer only. */
export function keepRule(name) {
  return `^${name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}$`;
}

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

export const layersWord = (count) => say(count === 1 ? "layer" : "layers", { count });
