/** Texts of the panels: English here, other languages in locales/LANGUAGE/main.json under the same keys. */

export const ENGLISH = Object.freeze({
  idle: "Progress appears here while the workflow runs.",
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
  nearest: "{gain} nearest",
  won: "Layers won: {list}",
  weightError: "weight error {error}",
  outputError: "output error {error}",
  medianWeightError: "median error {error}",
  medianOutputError: "median output error {error}",
  largestWeightErrors: "Largest weight errors",
  largestWeightErrorsTip: "‖Ŵ − W‖ / ‖W‖ of a layer",
  largestOutputErrors: "Largest output errors",
  largestOutputErrorsTip: "‖XŴᵀ − XWᵀ‖ / ‖XWᵀ‖ of a layer, for the inputs of the calibration",
  calibrating: "calibrating {layers}",
  calibrated: "calibrated {layers}",
  tokens: "{tokens} tokens or more of each layer's inputs",
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
  reached: "after {finished} of {total} {unit}",
  planned: "going to be quantized",
  keptFor: "kept in full precision: {reason}",
  scale: "scale {low}",
  scales: "scale {low} to {high}",
  legendPlanned: "to do",
  legendKept: "kept",
  legendRefused: "kept (NaN or Inf)",
  shades: "The stronger a colour, the more of the error of rounding to nearest is gone.",
  progress: "Progress",
  strip: "Layers; Enter copies a keep rule",
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
  savedText: "The saved file's path, and how it was verified, appear here after a run.",
});

let chosen = {};

/** Switch the language; texts that it lacks stay English. */
export function speak(words = {}) {
  chosen = words;
}

/** The text of a key, with values in place of {their names}. */
export function say(key, values = {}) {
  return (chosen[key] ?? ENGLISH[key]).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
