/**
 * Widgets that matter only for some values of others, as nodes/schema.py declares them: shown where they do. A hidden one
 * keeps its value and the workflow keeps it too, but the prompt holds its default, so that nothing out of sight acts.
 */

const NO_SPACE = [0, -4]; // older canvases leave 4 below each widget, a hidden one too

/**
 * Whether one of an input's conditions holds: [{other: [values]}], or {not: [values]} for all other values.
 * valueOf(other) is undefined for what another node decides, which may be anything.
 */
export function matters(conditions, valueOf) {
  const holds = ([other, told]) => {
    const value = valueOf(other);
    return value === undefined || (Array.isArray(told) ? told.includes(value) : !told.not.includes(value));
  };
  return conditions.some((condition) => Object.entries(condition).every(holds));
}

/** Show and hide the widgets of a node that depend on others, from now on. */
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
    const before = node.computeSize()[1];
    if (!update()) return;
    const after = node.computeSize()[1];
    node.setSize([node.size[0], Math.max(after, node.size[1] + after - before)]);
    node.setDirtyCanvas(true, true);
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
  after(node, "onConfigure", update); // values of a workflow, with the size that suits them
  after(node, "onConnectionsChange", update);
  updateAndResize();
}

/** For the canvas and for nodes drawn by Vue, which look at one of the two. */
function setHidden(widget, hidden) {
  widget.hidden = hidden;
  widget.options.hidden = hidden;
  if (hidden) widget.computeSize = () => NO_SPACE;
  else delete widget.computeSize;
}

/** Nodes drawn by Vue look at their widgets again when the list of these changes, those of older frontends when they are added. */
function redraw(node) {
  node.widgets.push(node.widgets.pop());
  if (!LiteGraph.vueNodesMode || Object.getOwnPropertyDescriptor(node, "inputs")?.get) return;
  const callbacks = node.widgets.map(({ callback }) => callback); // would be wrapped once more
  node.graph?.onNodeAdded?.(node);
  node.widgets.forEach((widget, place) => (widget.callback = callbacks[place]));
}

/** Have something done after a method of an object, which may have none yet. */
function after(object, method, work) {
  const before = object[method];
  object[method] = function (...given) {
    const result = before?.apply(this, given);
    work();
    return result;
  };
}
