/** Words of a preview, without DOM and ComfyUI, so that node can test them. */

import { formatBytes } from "./numbers.js";
import { changeWords } from "./progress_text.js";
import { say } from "./words.js";

const FORMATS = 3; // most formats with a line of their own

/** [label, text] of each line of a preview, see nodes/ui/preview.py; a string for one sentence. */
export function previewRows({ error, bytes_in: before, bytes_out: after, layers, unquantized, formats, seconds, device }) {
  if (error) return error;
  return [
    [say("previewSize"), sizeWords(before, after)],
    [say("previewLayers"), say("previewLayersText", { layers, unquantized })],
    [say("previewTime"), seconds === null ? say("previewTimeUnknown", { device }) : say("previewTimeText", { time: roughly(seconds), device })],
    ...formats.slice(0, FORMATS).map(([name, count, support, elements]) => [
      say("previewStock"),
      say(`previewStock_${support}`, { format: formats.length > 1 ? `${name} (${count})` : name, elements }),
    ]),
  ];
}

function sizeWords(before, after) {
  if (after === null) return say("previewSizeUnknown", { before: formatBytes(before) });
  return `${formatBytes(before)} → ${formatBytes(after)}, ${changeWords(after / before)}`;
}

const STEPS = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 40, 50, 60];

/** A time in s with one or two digits, as exact as an estimate is: "40 s", "3 min", "2 h". */
export function roughly(seconds) {
  const [value, unit] = seconds <= 60 ? [seconds, "s"] : seconds <= 3600 ? [seconds / 60, "min"] : [seconds / 3600, "h"];
  const distance = (step) => Math.abs(Math.log(step / value));
  return `${value > 60 ? Math.round(value) : STEPS.reduce((best, step) => (distance(step) < distance(best) ? step : best))} ${unit}`;
}
