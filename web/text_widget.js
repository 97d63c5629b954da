/** Show the text output of a node (`ui.text`) on it; ComfyUI does so for its own nodes only. */

import { addPanel, bringIntoView, element, setText } from "./panel.js";
import { translate } from "./words.js";

export const TEXT_WIDGET = "learned_rounding_text";

/** Panels by node, as weak references: ComfyUI does not report removed nodes. */
const panels = new WeakMap();

const LINE = 16;

/** Attach a text panel of `lines` lines to a node; `placeholder` is shown until it has run. `columns`: spaces align the text. */
export function addTextWidget(node, placeholder, { lines = 4, width = 320, columns = false } = {}) {
  const root = element("div", `lr-panel lr-text${columns ? " lr-columns" : ""}`, [placeholder], { role: "status" });
  root.dataset.state = "idle";
  addPanel(node, TEXT_WIDGET, root, { height: (lines + 1) * LINE, width });
  panels.set(node, root);
}

/** Show lines on a node, of a run that is "done" or "failed"; nodes without a panel are skipped. */
export function showText(node, lines, state = "done") {
  const root = panels.get(node);
  if (!root) return;
  const text = lines.flatMap((line) => line.split("\n")).map(translate).join("\n");
  setText(root, text, text);
  root.dataset.state = state;
  bringIntoView(node, root);
}
