/** Shared by the DOM widgets: build elements and attach them to nodes, on the canvas and drawn by Vue. */

import { app } from "../../scripts/app.js";

const MARGIN = 10; // ComfyUI's margin around DOM widgets on the canvas; their height includes it

/** Create an element with children (nodes or text) and attributes. */
export function element(tag, className, children = [], attributes = {}) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Set text and title if they differ: unchanged text causes no layout and is not read aloud again. */
export function setText(target, text, title = "") {
  if (target.textContent !== text) target.textContent = text;
  if (target.title !== title) target.title = title;
}

/**
 * Attach a read-only element to a node.
 *
 * height, width  minimum size in canvas units
 * fixed          whether the height is also the maximum
 */
export function addPanel(node, name, root, { height, width, fixed = false }) {
  root.style.minHeight = `${height}px`; // nodes drawn by Vue measure the element
  root.classList.add("widget-expands"); // older ones leave space below other elements empty
  const widget = node.addDOMWidget(name, name.toUpperCase(), root, {
    serialize: false, // not a value of the prompt
    hideOnZoom: false,
    getMinHeight: () => height + 2 * MARGIN,
    ...(fixed && { getMaxHeight: () => height + 2 * MARGIN }),
  });
  widget.serialize = false; // not saved in the workflow
  const [needed, tall] = node.computeSize();
  node.setSize([Math.max(node.size[0], needed, width), Math.max(node.size[1], tall)]);
  root.addEventListener("wheel", zoomCanvas, { passive: false });
  return widget;
}

/**
 * When a workflow is loaded again over the same nodes, as undo does, nodes drawn by Vue keep showing the elements of the
 * previous nodes. Replace the element of the previous node by that of this one.
 */
export function bringIntoView(node, root) {
  if (root.isConnected || node.graph !== app.canvas.graph) return;
  document.querySelector(`[data-node-id="${node.id}"] .${root.classList[1]}`)?.replaceWith(root);
}

/** Return whether a panel of the node is empty. */
export function isBlank(node) {
  return node.widgets?.some(({ element }) => element?.matches?.(".lr-panel[data-state=idle]")) ?? false;
}

// Nodes drawn by Vue forward the wheel themselves; on the canvas it has no effect over a widget.
function zoomCanvas(event) {
  if (!event.currentTarget.closest("[data-node-id]")) app.canvas.processMouseWheel(event);
}
