/** Entry point of the page: attaches widgets to nodes and routes events to them. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addComparisonWidget, showComparison } from "./comparison_widget.js";
import { addDependentOptions } from "./dependent_options.js";
import { fitInVue, fitToContent } from "./fitting.js";
import { nodeByExecutionId } from "./graph_lookup.js";
import { afterSaving, refreshLoaderLists } from "./loader_lists.js";
import { isBlank } from "./panel.js";
import { followGraph, updatePreviews } from "./preview.js";
import { addProgressWidget, endLostRuns, showProgress, showRun, showSummary } from "./progress_widget.js";
import { QUANTIZE_ENTRY } from "./quantize_entry.js";
import { renderReports } from "./report_preview.js";
import { keepUnrotated } from "./saved_rotation.js";
import { addAliasesToSearch } from "./search.js";
import { orderTemplates } from "./template_order.js";
import { addTextWidget, showText } from "./text_widget.js";
import { say, speak } from "./words.js";

const PROGRESS_EVENT = "learned_rounding.progress";
const PROGRESS_ROUTE = "/learned_rounding/progress";

const FILE = { width: 440 }; // wide enough for the name of a file and its folder

const WIDGETS = {
  LearnedRoundingConfigure: fitToContent,
  LearnedRoundingOptions: fitToContent,
  LearnedRoundingQuantize: (node) => addProgressWidget(node, "quantize"),
  LearnedRoundingCalibrate: (node) => addProgressWidget(node, "calibrate"),
  LearnedRoundingCalibrateText: (node) => addProgressWidget(node, "calibrate"),
  LearnedRoundingLoadModel: (node) => addTextWidget(node, say("fileText"), FILE),
  LearnedRoundingLoadQuantized: (node) => addTextWidget(node, say("quantizedText"), FILE),
  LearnedRoundingLoadCalibration: (node) => addTextWidget(node, say("calibrationText"), { lines: 8, ...FILE }),
  LearnedRoundingSaveCalibration: (node) => addTextWidget(node, say("savedCalibrationText"), { lines: 3 }),
  LearnedRoundingCompare: addComparisonWidget,
  LearnedRoundingSave: (node) => addTextWidget(node, say("savedText"), { lines: 6 }),
  LearnedRoundingInspect: (node) => addTextWidget(node, say("fileText"), { lines: 16, width: 480, columns: true }),
};

/** Height of nodes on the canvas with the image that ComfyUI adds after a run: they do not grow over their neighbours then. */
const WITH_IMAGE = { LearnedRoundingReport: 420, LearnedRoundingCompareText: 420 };

const SHOWS_IMAGES = ["LearnedRoundingCalibrate", "LearnedRoundingCompare"]; // in space that is empty until then

/** The mode of native INT8 layers of a stored value: version 0.1.0 stored booleans. */
const nativeInt8Mode = (value) => ({ true: "on", false: "auto" })[value] ?? value;

const NATIVE_INT8 = {
  id: "LearnedRounding.NativeInt8",
  category: ["Learned Rounding", "Kernels", "NativeInt8"],
  name: "Native INT8 layers on this pack's Triton kernels",
  tooltip:
    "auto: for every layer shape where they are faster than ComfyUI's own kernels, measured once per GPU and remembered; on: always; off: never, and FP8 layers run by ComfyUI's own code too. Needs an NVIDIA GPU, SM 8.0 or newer.",
  type: "combo",
  options: ["auto", "on", "off"],
  defaultValue: "auto",
  onChange(mode, before) {
    // The page reports the stored value when it loads, and replaces a boolean; the server has both already.
    if (typeof before !== "string" || mode === before) return;
    const headers = { "Content-Type": "application/json" };
    return api.fetchApi("/learned_rounding/native_int8", { method: "POST", headers, body: JSON.stringify(mode) });
  },
};

/** Replace a boolean that ComfyUI's settings contain: the menu shows strings only. */
async function convertNativeInt8Setting() {
  const { setting } = app.extensionManager;
  const stored = setting.get(NATIVE_INT8.id);
  const mode = nativeInt8Mode(stored);
  if (mode !== stored) await setting.set(NATIVE_INT8.id, mode);
}

/** Replace a boolean in the node's switch whenever a workflow of version 0.1.0 fills its widgets. */
function convertNativeInt8Widget(node) {
  const widget = node.widgets?.find(({ name }) => name === "native_int8_kernels");
  if (!widget) return;
  const { onConfigure } = node;
  node.onConfigure = function (...args) {
    onConfigure?.apply(this, args);
    widget.value = nativeInt8Mode(widget.value);
  };
}

/** Show a node's output in its panel. Returns whether the panel is complete. */
function showOutput(node, { text, learned_rounding: summaries, learned_rounding_comparison: comparisons }) {
  if (comparisons) showComparison(node, comparisons[0]);
  if (text) showText(node, [text].flat());
  return !summaries || showSummary(node, summaries);
}

/** Request all messages of the latest runs of the current workflow, and the outputs of other nodes, which the page missed. */
async function catchUp() {
  const { id } = app.rootGraph;
  const answer = await api.fetchApi(`${PROGRESS_ROUTE}?workflow=${encodeURIComponent(id)}`);
  const nodes = answer.ok ? await answer.json() : [];
  if (app.rootGraph.id !== id) return; // another workflow was opened meanwhile and makes its own request
  for (const { node: executionId, run, output } of nodes) {
    const node = nodeByExecutionId(app.rootGraph, executionId);
    if (node && run) showRun(node, run);
    else if (node) showOutput(node, output);
  }
  if (reconnected) endLostRuns(new Set(nodes.map(({ run }) => run?.at(-1).prompt)));
  reconnected = false;
}

/** Whether the connection was lost since the last request: the server may have been restarted. */
let reconnected = false;

/** Wrap an async function: calls during its execution cause one further execution. */
function oneAtATime(work) {
  let again = false;
  let busy = false;
  return async () => {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again) {
        again = false;
        await work();
      }
    } catch {
      // No answer: the next message out of sequence requests again.
    } finally {
      busy = false;
    }
  };
}

const catchingUp = oneAtATime(catchUp);
const refreshing = oneAtATime(refreshLoaderLists);

app.registerExtension({
  name: "LearnedRounding.Widgets",
  settings: [NATIVE_INT8],
  ...QUANTIZE_ENTRY,

  /** Load the texts of the page's language before nodes are created; they come with the texts of all nodes. */
  async init() {
    const language = app.ui.settings.getSettingValue("Comfy.Locale");
    if (!language || language === "en") return;
    const answer = await api.fetchApi("/i18n");
    if (!answer.ok) return;
    const { learnedRounding, learnedRoundingMessages } = (await answer.json())[language] ?? {};
    speak(learnedRounding, learnedRoundingMessages);
  },

  async setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./learned_rounding.css", import.meta.url).href;
    document.head.append(style);

    api.addEventListener(PROGRESS_EVENT, ({ detail }) => {
      if (detail.workflow !== null && detail.workflow !== app.rootGraph.id) return; // for another page or tab
      const node = nodeByExecutionId(app.rootGraph, detail.node);
      if (node && !showProgress(node, detail)) catchingUp();
    });
    followGraph();
    api.addEventListener("reconnected", () => {
      reconnected = true;
      catchingUp();
    });
    api.addEventListener("execution_error", ({ detail }) => {
      const node = nodeByExecutionId(app.rootGraph, detail.node_id);
      if (node) showText(node, [detail.exception_message.trim()], "failed");
    });
    api.addEventListener("execution_cached", ({ detail }) => {
      const nodes = (detail.nodes ?? []).map((id) => nodeByExecutionId(app.rootGraph, id));
      if (nodes.some((node) => node && isBlank(node))) catchingUp(); // the node is cached, so ComfyUI sends no event for it
    });
    await convertNativeInt8Setting();
    orderTemplates(api);
    await addAliasesToSearch(app.extensionManager);
  },

  /** A workflow was opened or the page reloaded, possibly during a run. Not awaited: ComfyUI would block the user until it ends. */
  afterConfigureGraph() {
    catchingUp();
    updatePreviews();
  },

  nodeCreated(node) {
    addDependentOptions(node);
    convertNativeInt8Widget(node);
    afterSaving(node, refreshing);
    keepUnrotated(node);
    renderReports(node);
    if (node.comfyClass in WITH_IMAGE && !LiteGraph.vueNodesMode) node.setSize([Math.max(node.size[0], 360), WITH_IMAGE[node.comfyClass]]);
    if (!(node.comfyClass in WIDGETS)) return;
    WIDGETS[node.comfyClass](node);
    if (!SHOWS_IMAGES.includes(node.comfyClass)) fitInVue(node);
    const { onExecuted } = node;
    node.onExecuted = function (output, ...others) {
      onExecuted?.call(this, output, ...others);
      if (!showOutput(node, output ?? {})) catchingUp(); // a result of an earlier run, whose messages the server may have
    };
  },
});
