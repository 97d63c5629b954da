/** What Learned Round Quantize will do, shown on the node before anything runs: sizes, layers, time, and what stock ComfyUI does. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { originOf } from "./graph_lookup.js";
import { previewRows } from "./preview_text.js";

const ROUTE = "/learned_rounding/preview";

/** Nodes that load a model file → {model: "folder/name", …} of their values; null where the file is not what is quantized. */
const FILES = {
  LearnedRoundingLoadModel: ({ model, requantize }) => ({ model, requantize }),
  UNETLoader: ({ unet_name, weight_dtype }) => (weight_dtype === "default" ? { model: `diffusion_models/${unet_name}` } : null),
};

/** Nodes with a panel → its function that shows rows. */
const shown = new Map();

/** Latest request of each node as JSON: an unchanged one is not sent again. */
const sent = new WeakMap();

/** Show previews on a node by `show`, called with rows [label, text] or with one sentence; [] for none. */
export function addPreview(node, show) {
  shown.set(node, show);
  const { onRemoved } = node;
  node.onRemoved = function (...args) {
    shown.delete(node);
    onRemoved?.apply(this, args);
  };
}

/** Follow the graph: ComfyUI reports every change that can be undone. */
export function followGraph() {
  api.addEventListener("graphChanged", updatePreviews);
}

/** Request the previews of nodes whose inputs have changed. */
export function updatePreviews() {
  for (const [node, show] of shown) if (node.graph) update(node, show);
}

async function update(node, show) {
  const request = makeRequest(node);
  const body = JSON.stringify(request);
  if (sent.get(node) === body) return;
  sent.set(node, body);
  const rows = request ? await ask(body) : [];
  if (sent.get(node) === body) show(rows);
}

/** The rows of an answer; none without one: the preview is a convenience, and the run reports every error. */
async function ask(body) {
  try {
    const answer = await api.fetchApi(ROUTE, { method: "POST", headers: { "Content-Type": "application/json" }, body });
    return answer.ok ? previewRows(await answer.json()) : [];
  } catch {
    return [];
  }
}

/** What the route takes, see nodes/ui/preview.py; null while no file is connected, or where another node provides a value. */
function makeRequest(node) {
  const file = fileOf(node, "source");
  const configure = connected(node, "recipe");
  const recipe = configure && valuesOf(configure);
  const more = configure && connected(configure, "options");
  const options = more && valuesOf(more);
  const own = valuesOf(node);
  if (!file || recipe === undefined || options === undefined || !own) return null;
  return { ...file, recipe, options, calibrated: isConnected(node, "calibration"), general: Boolean(own.general) };
}

/** The file that reaches an input, from a loader or through nodes that patch a MODEL, such as Load LoRA. */
function fileOf(node, input, depth = 0) {
  const origin = connected(node, input);
  if (!origin || depth > 50) return null;
  const values = origin.comfyClass in FILES ? valuesOf(origin) : null;
  return values ? FILES[origin.comfyClass](values) : fileOf(origin, "model", depth + 1);
}

const slotOf = (node, input) => node.inputs?.findIndex(({ name }) => name === input) ?? -1;

const isConnected = (node, input) => node.inputs?.[slotOf(node, input)]?.link != null;

/** The node connected to an input; null without one. */
function connected(node, input) {
  return isConnected(node, input) ? originOf(app.rootGraph, node, slotOf(node, input)) : null;
}

/** The values of a node's widgets as a prompt has them, by name; undefined where another node provides one. */
function valuesOf(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  const values = {};
  for (const widget of node.widgets ?? []) {
    const { name } = widget;
    if (!(name in { ...required, ...optional })) continue;
    if (isConnected(node, name)) return undefined;
    values[name] = widget.serializeValue ? widget.serializeValue(node, node.widgets.indexOf(widget)) : widget.value;
  }
  return values;
}
