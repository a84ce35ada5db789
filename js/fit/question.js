// The question to Fit to VRAM: its inputs, read from the open graph or from a prompt.
//
// A question is { width, height, batch_size, budget_gib, prefer, has_vae, has_clip }. Sizes that are
// known only in the run, such as those of a loaded picture, are null. No page is needed here.

export const SIZES = ["width", "height", "batch_size"];
const SUBGRAPH_INPUT = -10; // the origin of a link that comes from outside of a subgraph
const RUNS = new Set([undefined, 0]); // a node's mode where it is neither muted nor bypassed

/** The question that a node of the open graph asks now.
 *
 * @param outerOf gives the node that stands for a subgraph.
 */
export function questionOf(node, outerOf = () => null) {
  const asks = (of) => (name) => placeOf(of, name, outerOf)?.widget.value;
  const has = (name) => linkOf(node, name) !== undefined;
  return question(asks(sizedBy(node, outerOf)), asks(node), has);
}

/** The node whose widgets are the picture's size: the latent's, or the node itself.
 *
 * Null where the latent comes from a subgraph's node, or from one that does not run.
 */
export function sizedBy(node, outerOf) {
  const latent = latentOf(node);
  if (!latent) return node;
  const origin = originOf(node, latent, outerOf)?.node;
  return origin && RUNS.has(origin.mode) ? origin : null;
}

/** The node's input for a latent where something is wired to it. */
export const latentOf = (node) => linkOf(node, "latent");

const linkOf = (node, name) =>
  node.inputs?.find((input) => input.name === name && input.link != null);

/** The question that the node asked in a prompt; null where the prompt does not have it. */
export function questionInPrompt(nodes, id) {
  const own = nodes?.[id]?.inputs;
  if (!own) return null;
  const linked = (value) => (Array.isArray(value) ? nodes[value[0]]?.inputs : null);
  const asks = (inputs) => (name) => {
    const value = inputs?.[name];
    return Array.isArray(value) ? linked(value)?.value : value;
  };
  return question(asks("latent" in own ? linked(own.latent) : own), asks(own), (name) => name in own);
}

function question(sized, own, has) {
  const sizes = SIZES.map((name) => [name, sized(name)]);
  const isKnown = sizes.every(([, value]) => typeof value === "number");
  const asked = Object.fromEntries(sizes.map(([name, value]) => [name, isKnown ? value : null]));
  const set = { budget_gib: own("budget_gib") ?? null, prefer: own("prefer") ?? null };
  return { ...asked, ...set, has_vae: has("vae"), has_clip: has("clip") };
}

/** The widget that sets a node's input, its own or that of what is wired to it.
 *
 * @returns {?{node: object, widget: object}} null where no widget of the graph sets it.
 */
export function placeOf(node, name, outerOf) {
  if (!node) return null;
  const input = linkOf(node, name);
  const origin = input ? originOf(node, input, outerOf) : { node };
  const widget = origin?.widget ?? (origin && widgetOf(origin.node, input ? "value" : name));
  return widget ? { node: origin.node, widget } : null;
}

const widgetOf = (node, name) => node.widgets?.find((candidate) => candidate.name === name);

/** The node that an input comes from, and the widget where a subgraph's node shows one for it. */
function originOf(node, input, outerOf) {
  const link = node.graph?.getLink?.(input.link) ?? node.graph?.links?.[input.link];
  if (!link) return null;
  if (link.origin_id !== SUBGRAPH_INPUT) {
    const origin = node.graph.getNodeById(link.origin_id);
    if (origin?.type === "Reroute") {
      const before = origin.inputs?.[0];
      return before ? originOf(origin, before, outerOf) : null;
    }
    return origin?.subgraph ? null : { node: origin };
  }
  const outer = outerOf(node.graph);
  const slot = outer?.inputs?.[link.origin_slot];
  if (!slot) return null;
  if (slot.link != null) return originOf(outer, slot, outerOf);
  const widget = slot._widget ?? widgetOf(outer, slot.widget?.name ?? slot.name);
  return widget ? { node: outer, widget } : null;
}
