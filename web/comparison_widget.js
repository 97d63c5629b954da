/** The numbers of Compare as a table on the node: metrics, and memory, time and activations of both models. */

import { addPanel, bringIntoView, element } from "./panel.js";
import { formatBytes, formatDuration, formatNumber } from "./numbers.js";
import { say } from "./words.js";

export const COMPARISON_WIDGET = "learned_rounding_comparison";

/** Panels by node, as weak references: ComfyUI does not report removed nodes. */
const panels = new WeakMap();

/** Attach the panel, and make room for the image that ComfyUI shows below it: half the size of what nodes/compare.py draws. */
export function addComparisonWidget(node) {
  const root = element("div", "lr-panel lr-comparison", [say("comparisonText")], { role: "status" });
  root.dataset.state = "idle";
  const widget = addPanel(node, COMPARISON_WIDGET, root, { height: 228, width: 500, fixed: true });
  node.setSize([node.size[0], node.computeSize()[1] + IMAGE]);
  if (LiteGraph.vueNodesMode) leaveSpace(widget, root);
  panels.set(node, root);
}

const IMAGE = 640;

/** Leave the free space of a node drawn by Vue to the image: frontends give half of it to widgets with one of these marks. */
function leaveSpace(widget, root) {
  widget.computeLayoutSize = undefined;
  root.classList.remove("widget-expands");
}

/** Show {scores: {metric: text}, models: [reference, compared], notes}, see nodes/compare.py. */
export function showComparison(node, { scores, models, notes }) {
  const root = panels.get(node);
  if (!root) return;
  const rows = [
    ...Object.entries(scores).map(([metric, value]) => [metric, "", value]),
    [say("comparisonMemory"), ...models.map(({ weight_bytes: bytes }) => formatBytes(bytes))],
    [say("comparisonStep"), ...models.map(({ step_seconds: seconds }) => formatStep(seconds))],
    [say("comparisonActivations"), ...models.map(activations)],
  ];
  const line = (tag, cells) => element("tr", "", cells.map((cell) => element(tag, "", [cell])));
  const head = line("th", ["", say("comparisonReference"), say("comparisonCompared")]);
  root.replaceChildren(
    element("table", "lr-table", [element("thead", "", [head]), element("tbody", "", rows.map((row) => line("td", row)))]),
    ...notes.map((note) => element("p", "lr-note", [note])),
  );
  root.dataset.state = "done";
  bringIntoView(node, root);
}

/** A time of a step: 0.0123 s has milliseconds. */
const formatStep = (seconds) => (seconds < 1 ? `${formatNumber(1000 * seconds)} ms` : formatDuration(seconds));

function activations({ quantized_activations: quantized, quantized_layers: layers }) {
  if (!quantized) return say("comparisonNotQuantized");
  return say(quantized === layers ? "comparisonQuantized" : "comparisonPartly", { quantized, layers });
}
