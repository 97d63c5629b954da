/** Show the Markdown reports of this pack as tables in ComfyUI's Preview as Text, where it can render them. */

import { app } from "../../scripts/app.js";
import { originOf } from "./graph_lookup.js";

const PREVIEW = "PreviewAny";
const MODE = "preview_mode"; // of newer frontends, which do not save it: true is Markdown
const OURS = /^LearnedRounding/;

/** Switch a preview to Markdown when one of our nodes is connected to it; the user can switch back. */
export function renderReports(node) {
  if (node.comfyClass !== PREVIEW) return;
  const { onConnectionsChange } = node;
  node.onConnectionsChange = function (...given) {
    onConnectionsChange?.apply(this, given);
    requestAnimationFrame(() => useMarkdown(node)); // once the whole workflow is connected
  };
}

function useMarkdown(node) {
  const mode = node.widgets?.find(({ name }) => name === MODE);
  if (!mode || mode.value || !node.graph || !OURS.test(originOf(app.rootGraph, node, 0)?.comfyClass)) return;
  mode.value = true;
  mode.callback?.(true);
}
