/** Find nodes of a workflow, also in subgraphs; plain functions without DOM. */

const SUBGRAPH_INPUT = "-10"; // ComfyUI's id of the source of a subgraph's inputs

/** The node of an execution id: "12:3" is node 3 in the subgraph of node 12 of the root graph. */
export function nodeByExecutionId(root, executionId) {
  const path = String(executionId).split(":");
  const own = path.pop();
  const graph = path.reduce((graph, id) => graph?.getNodeById(id)?.subgraph, root);
  return graph?.getNodeById(own) ?? null;
}

/** The node whose output is connected to an input, through reroutes and edges of subgraphs; null if there is none. */
export function originOf(root, node, slot) {
  const { graph } = node;
  const link = graph?.getLink(node.inputs[slot]?.link);
  if (!link) return null;
  const place = Number(link.origin_slot);
  if (String(link.origin_id) === SUBGRAPH_INPUT) {
    const outer = subgraphNode(root, graph);
    return outer && originOf(root, outer, place);
  }
  const origin = graph.getNodeById(link.origin_id);
  if (origin?.isVirtualNode && origin.inputs?.length === 1) return originOf(root, origin, 0);
  if (!origin?.subgraph) return origin ?? null;
  const inner = origin.subgraph.getLink(origin.subgraph.outputs[place]?.linkIds[0]);
  return inner ? origin.subgraph.getNodeById(inner.origin_id) : null;
}

/** The first node that represents a subgraph. */
function subgraphNode(root, subgraph) {
  for (const node of root.nodes) {
    const found = node.subgraph === subgraph ? node : node.subgraph && subgraphNode(node.subgraph, subgraph);
    if (found) return found;
  }
  return null;
}
