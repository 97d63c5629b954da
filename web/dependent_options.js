/**
 * Show and hide widgets whose effect depends on other widgets, as nodes/ui/schema.py declares them. A hidden widget keeps
 * its value, also in the saved workflow, but the prompt gets its default, so that no hidden value has an effect.
 */

import { fitHeight } from "./fitting.js";

const NO_SPACE = [0, -4]; // older canvases reserve 4 below each widget, including hidden ones

/**
 * Return whether one of an input's conditions holds: [{other: [values]}], or {not: [values]} for all other values.
 * valueOf(other) is undefined for a value that another node provides; such a value satisfies every condition.
 */
export function matters(conditions, valueOf) {
  const holds = ([other, expected]) => {
    const value = valueOf(other);
    return value === undefined || (Array.isArray(expected) ? expected.includes(value) : !expected.not.includes(value));
  };
  return conditions.some((condition) => Object.entries(condition).every(holds));
}

/** Show and hide the dependent widgets of a node, now and after every change. */
export function addDependentOptions(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  const specs = { ...required, ...optional };
  const conditionsOf = ({ name }) => specs[name]?.[1]?.matters_for;
  const dependents = node.widgets?.filter(conditionsOf) ?? [];
  if (!dependents.length) return;

  const isConnected = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const valueOf = (name) => (isConnected(name) ? undefined : node.widgets.find((widget) => widget.name === name)?.value);
  const isIdle = (widget) => !isConnected(widget.name) && !matters(conditionsOf(widget), valueOf);

  const update = () => {
    const changed = dependents.filter((widget) => Boolean(widget.hidden) !== isIdle(widget));
    for (const widget of changed) setHidden(widget, !widget.hidden);
    if (changed.length) redraw(node);
    return changed.length > 0;
  };
  const updateAndResize = () => {
    if (update()) fitHeight(node);
  };

  for (const widget of dependents) {
    const { serializeValue } = widget;
    widget.serializeValue = function (...place) {
      if (isIdle(widget)) return specs[widget.name][1].default;
      return serializeValue ? serializeValue.apply(this, place) : widget.value;
    };
  }
  const deciding = new Set(dependents.flatMap(conditionsOf).flatMap(Object.keys));
  for (const widget of node.widgets.filter(({ name }) => deciding.has(name))) after(widget, "callback", updateAndResize);
  after(node, "onConfigure", update); // after the values and the size of a workflow are set
  after(node, "onConnectionsChange", update);
  updateAndResize();
}

/** Set visibility for the canvas and for nodes drawn by Vue; each reads one of the two properties. */
function setHidden(widget, hidden) {
  widget.hidden = hidden;
  widget.options.hidden = hidden;
  if (hidden) widget.computeSize = () => NO_SPACE;
  else delete widget.computeSize;
}

/** Make nodes drawn by Vue update: they observe the list of widgets; older frontends observe additions to it only. */
function redraw(node) {
  node.widgets.push(node.widgets.pop());
  if (!LiteGraph.vueNodesMode || Object.getOwnPropertyDescriptor(node, "inputs")?.get) return;
  const callbacks = node.widgets.map(({ callback }) => callback); // adding a widget again wraps its callback
  node.graph?.onNodeAdded?.(node);
  node.widgets.forEach((widget, place) => (widget.callback = callbacks[place]));
}

/** Call a function after a method of an object, which need not have that method. */
function after(object, method, work) {
  const before = object[method];
  object[method] = function (...given) {
    const result = before?.apply(this, given);
    work();
    return result;
  };
}
