// The question to Fit to VRAM: its inputs, read from the open graph or from a prompt.
//
// A question is { width, height, batch_size, budget_gib, prefer, has_vae, has_clip }. Sizes that are
// known only in the run, such as those of a loaded picture, are null. No page is needed here.

export const SIZES = ["width", "height", "batch_size"];
// The origin of a link from outside of a subgraph; newer pages have ids as text.
const SUBGRAPH_INPUT = "-10";
const MUTED = 2; // a node's modes
const BYPASSED = 4;

/** The question that a node of the open graph asks now.
 *
 * @param outerOf gives the node that stands for a subgraph.
 */
export function questionOf(node, outerOf = () => null) {
  const asks = (of) => (name) => placeOf(of, name, outerOf)?.widget.value;
  const has = (name) => originOf(node, linkOf(node, name), outerOf) !== null;
  return question(asks(sizedBy(node, outerOf)), asks(node), has);
}

/** The node whose widgets are the picture's size: the latent's, or the node itself.
 *
 * Null where the latent comes from a subgraph's node, or where none arrives.
 */
export function sizedBy(node, outerOf) {
  const latent = latentOf(node);
  if (!latent) return node;
  return originOf(node, latent, outerOf)?.node ?? null;
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
  const origin = originOf(node, linkOf(node, name), outerOf);
  if (!origin) return placeIn(node, widgetOf(node, name));
  return placeIn(origin.node, origin.widget ?? widgetOf(origin.node, "value"));
}

const placeIn = (node, widget) => (widget ? { node, widget } : null);

const widgetOf = (node, name) => node?.widgets?.find((candidate) => candidate.name === name);

const linkIn = (graph, id) => graph?.getLink?.(id) ?? graph?.links?.[id];

/** The node that an input comes from, and the widget where a subgraph's node shows one for it.
 *
 * Null where nothing arrives: the prompt then has the node's own widget. The node is null where it
 * is known only in the run.
 */
function originOf(node, input, outerOf, type = input?.type) {
  const link = input?.link != null && linkIn(node.graph, input.link);
  if (!link) return null;
  if (String(link.origin_id) !== SUBGRAPH_INPUT) {
    const origin = node.graph.getNodeById(link.origin_id);
    // The page writes its value into the widget, whatever its mode.
    if (origin?.type === "PrimitiveNode") return { node: origin };
    if (!origin || origin.mode === MUTED) return null;
    const isPassing = origin.type === "Reroute" || origin.mode === BYPASSED;
    if (!isPassing) return { node: origin.subgraph ? null : origin };
    return originOf(origin, inputFor(origin, link.origin_slot, type), outerOf, type);
  }
  const outer = outerOf(node.graph);
  const slot = outer?.inputs?.[link.origin_slot];
  if (slot?.link != null) return originOf(outer, slot, outerOf, type);
  const widget = slot?._widget ?? widgetOf(outer, slot?.widget?.name ?? slot?.name);
  return widget ? { node: outer, widget } : null;
}

/** The input that a bypassed node or a reroute gives out in place of an output, as the page does. */
function inputFor({ type: kind, inputs = [] }, slot, type) {
  const passes = (input) => input && (kind === "Reroute" || [type, "*"].includes(input.type));
  return passes(inputs[slot]) ? inputs[slot] : inputs.find(passes);
}
