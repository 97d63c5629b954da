/** The browser half of Learned Rounding: which node gets which widget, and which events reach it. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nodeByExecutionId } from "./progress_state.js";
import { addProgressWidget, showProgress } from "./progress_widget.js";
import { addTextWidget } from "./text_widget.js";

const PROGRESS_EVENT = "learned_rounding.progress";

const WIDGETS = {
  LearnedRoundingQuantize: addProgressWidget,
  LearnedRoundingLoadModel: (node) => addTextWidget(node, "What the file holds appears here after a run."),
  LearnedRoundingSave: (node) => addTextWidget(node, "The saved file's path, and how it was verified, appear here after a run.", { lines: 6 }),
  LearnedRoundingInspect: (node) => addTextWidget(node, "What the file holds appears here after a run.", { lines: 16, width: 480 }),
};

const NATIVE_INT8 = {
  id: "LearnedRounding.NativeInt8",
  category: ["Learned Rounding", "Kernels", "NativeInt8"],
  name: "Native INT8 layers on this pack's Triton kernels",
  tooltip:
    "Wherever ComfyUI would run INT8 layers in plain torch, as it does below CUDA 13. Needs an NVIDIA card, SM 8.0 or newer.",
  type: "boolean",
  defaultValue: false,
  onChange: (on) => api.fetchApi("/learned_rounding/native_int8", { method: "POST", body: JSON.stringify(on) }),
};

app.registerExtension({
  name: "LearnedRounding.Widgets",
  settings: [NATIVE_INT8],

  setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./learned_rounding.css", import.meta.url).href;
    document.head.append(style);

    let execution = null;
    api.addEventListener("execution_start", ({ detail }) => {
      execution = detail.prompt_id;
    });
    api.addEventListener(PROGRESS_EVENT, ({ detail }) => {
      const node = nodeByExecutionId(app.rootGraph, detail.node);
      if (node) showProgress(node, detail, execution);
    });
  },

  nodeCreated(node) {
    WIDGETS[node.comfyClass]?.(node);
  },
});
