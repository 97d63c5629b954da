/**
 * Texts of the panels: English here, other languages in locales/LANGUAGE/main.json under the same keys. Messages of the server are
 * English; the same files have their translations under the English text, with {names} in place of its values.
 */

export const ENGLISH = Object.freeze({
  quantizeThis: "Quantize this model",
  idle: "Progress appears here while the workflow runs.",
  previewSize: "Size",
  previewSizeUnknown: "{before} → chosen during the run",
  previewLayers: "Layers",
  previewLayersText: "{layers} quantized, {unquantized} other tensors unchanged",
  previewTime: "Time",
  previewTimeText: "about {time} on {device} (estimate)",
  previewTimeUnknown: "not measured for this rounding on {device}",
  previewStock: "Stock ComfyUI",
  previewStock_native: "{format}: multiplied natively here, {elements} activations",
  previewStock_decoded: "{format}: decoded here, saves memory only",
  previewStock_unsupported: "{format}: not read here; this pack runs it",
  reading: "Reading the model…",
  measuring: "measuring what each format costs, layer {number} of {total}",
  block: "block {number} of {total}, {name}: {what}",
  blockStarted: "reading its activations",
  blockRounding: "rounding, {done} of {steps}",
  blockComparing: "comparing, call {done} of {steps}",
  blockReconstructing: "gradient step {done} of {steps}",
  blockRunning: "running it, call {done} of {steps}",
  blockKept: "{kept} kept, error {error}, calibrated {calibrated}",
  writing: "writing the file",
  checking: "checking the written file: {percent} %",
  left: "{time} left",
  each: "{time} each {unit}",
  rate: "{rate} {unit}/s",
  in: "{what} in {time}",
  layer: "{count} layer",
  layers: "{count} layers",
  smaller: "{percent} % smaller",
  larger: "{percent} % larger",
  nearest: "{gain} RTN",
  won: "Layers won: {list}",
  weightError: "weight error {error}",
  outputError: "output error {error}",
  medianWeightError: "median error {error}",
  medianOutputError: "median output error {error}",
  largestWeightErrors: "Largest weight errors",
  largestWeightErrorsTip: "‖Ŵ − W‖ / ‖W‖ of a layer",
  largestOutputErrors: "Largest output errors",
  largestOutputErrorsTip: "‖XŴᵀ − XWᵀ‖ / ‖XWᵀ‖ of a layer, for the activations of the calibration",
  calibrating: "calibrating {layers}",
  calibrated: "calibrated {layers}",
  tokens: "{tokens} tokens or more of each layer's activations",
  stepsDoing: "Sampling with the original model",
  promptsDoing: "Encoding prompts with the original model",
  probesDoing: "Measuring what an error of each layer does",
  step: "step",
  prompt: "prompt",
  probe: "probe",
  stepsUnit: "steps",
  promptsUnit: "prompts",
  probesUnit: "probes",
  layersUnit: "layers",
  interrupted: "Interrupted",
  failed: "Failed",
  resuming: "resumed at {resumed} of {total}",
  resumedOf: "{resumed} of them resumed",
  modelError: "model error {error}",
  lostRun: "Stopped at {finished} of {total}; run again to resume.",
  lostCalibration: "Stopped at {finished} of {total} {unit}; run again.",
  lost: "Stopped; run again.",
  restarted: "ComfyUI was restarted during the run.",
  reached: "after {finished} of {total} {unit}",
  planned: "going to be quantized",
  keptFor: "unquantized: {reason}",
  scale: "scale {low}",
  scales: "scale {low} to {high}",
  legendPlanned: "to do",
  legendKept: "unquantized",
  legendRefused: "unquantized (NaN or Inf)",
  shades: "The higher the full colour in a cell, the more of the error of round to nearest (RTN) is removed.",
  progress: "Progress",
  strip: "Layers; Enter copies a keep rule",
  noLayer: "no layer chosen",
  hint: "Click a layer to copy a rule that keeps it.",
  copied: "Keep rule copied: {rule}",
  notCopied: "The browser lets no page copy here; select it by hand: {rule}",
  addToKeep: "Add to keep",
  addToKeepTip: "Add the rule to the keep list of the connected Configure Quantization",
  added: "Added to keep of {node}",
  known: "Already in keep of {node}",
  cancel: "Cancel",
  cancelTip: "Cancel the running workflow",
  cancelling: "Cancelling…",
  fileText: "What the file holds appears here after a run.",
  quantizedText: "The file's formats, and what runs them, appear here after a run.",
  calibrationText: "What the calibration holds appears here after a run.",
  savedCalibrationText: "The saved file's path appears here after a run.",
  comparisonText: "Metrics, memory and time of both models appear here after a run.",
  comparisonReference: "reference",
  comparisonCompared: "compared",
  comparisonMemory: "weight memory",
  comparisonStep: "time per step",
  comparisonActivations: "activations",
  comparisonQuantized: "quantized",
  comparisonPartly: "quantized in {quantized} of {layers} layers",
  comparisonNotQuantized: "not quantized",
  savedText: "The saved file's path, and how it was verified, appear here after a run.",
});

let chosen = {};
let messages = []; // [pattern of the English text, translation], texts with the most characters of their own first

/** Switch the language: texts of the panels, and messages of the server. What it lacks stays English. */
export function speak(words = {}, translations = {}) {
  chosen = words;
  const own = (text) => text.replace(VALUE, "").length;
  messages = Object.entries(translations)
    .sort(([a], [b]) => own(b) - own(a))
    .map(([english, translation]) => [patternOf(english), translation]);
}

const VALUE = /\{(\w+)\}/g;

/** "few inputs ({count})" as a pattern with a group named count. */
function patternOf(text) {
  const parts = text.split(VALUE); // every second one is the name of a value
  return new RegExp(`^${parts.map((part, place) => (place % 2 ? `(?<${part}>.+?)` : part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"))).join("")}$`, "s");
}

/** A message of the server in the chosen language, its values too where they are messages. */
export function translate(message) {
  for (const [pattern, translation] of messages) {
    const values = pattern.exec(message);
    if (values) return translation.replace(VALUE, (_, name) => translate(values.groups[name]));
  }
  return message;
}

/** The text of a key, with values in place of {their names}. */
export function say(key, values = {}) {
  return (chosen[key] ?? ENGLISH[key]).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
