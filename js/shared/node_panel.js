// A panel of ours on a node: a DOM widget that is part of no prompt and of no workflow's file.

import { app } from "../../../scripts/app.js";
import { isForPanel } from "./keys.js";

const views = new WeakMap(); // by the view's element
const left = new Map(); // weak: elements of removed nodes, by node and panel
const FRAMES = 120; // in which the page mounts a loaded graph

/** The view in the node's panel of that name, if it has one. */
export function viewOf(node, name) {
  const widget = node?.widgets?.find((candidate) => candidate.name === name);
  return widget?.element && views.get(widget.element);
}

const keyOf = (node, name) => `${node.id}/${name}`;

/** Shows the panels of a graph that has just been loaded.
 *
 * Nodes 2.0 keeps what it shows of a node when undo puts another one with the same id in its place:
 * the panel of the removed node stayed on the screen, and answered to nothing.
 */
export function showPanels(nodes, name) {
  const panels = nodes.map((node) => {
    const { element } = node.widgets?.find((widget) => widget.name === name) ?? {};
    return { element, old: left.get(keyOf(node, name))?.deref() };
  });
  const show = (frames) => {
    for (const { element, old } of panels) {
      if (element && !element.isConnected && old?.isConnected) old.replaceWith(element);
    }
    const isMounted = panels.every(({ element }) => !element || element.isConnected);
    if (!isMounted && frames > 0) requestAnimationFrame(() => show(frames - 1));
  };
  // The page has its say first, in the frame after this one.
  requestAnimationFrame(() => requestAnimationFrame(() => show(FRAMES)));
}

/** Puts a view on the node, as large as wanted where the node is not larger.
 *
 * @param view has an `element`, `canScroll` (whether the mouse wheel should scroll what it is over)
 *   and `draw()`.
 * @param ended an AbortController, which ends when the node is removed.
 * @param size `width` of the node, `height` of the panel and the `least` it may shrink to, in
 *   pixels.
 */
export function addPanel(node, { name, view, ended, size }) {
  views.set(view.element, view);
  const widget = node.addDOMWidget(name, name, view.element, {
    serialize: false, // not part of a prompt
    hideOnZoom: false,
    hideInPanel: true, // else the page's properties panel lists it and gives it its own width
    getMinHeight: () => size.least,
  });
  widget.serialize = false; // nor of the workflow's file
  passToCanvas(node, view, ended.signal);
  keepFromPage(view.element, ended.signal);
  const { onRemoved } = node;
  node.onRemoved = function (...args) {
    ended.abort();
    const key = keyOf(this, name);
    // A node that was replaced before the page has shown it leaves the one that is on the screen.
    const isShown = view.element.isConnected || !left.get(key)?.deref()?.isConnected;
    if (isShown) left.set(key, new WeakRef(view.element));
    return onRemoved?.apply(this, args);
  };
  const [width, height] = node.computeSize();
  const roomy = height + size.height - size.least;
  node.setSize([Math.max(size.width, width), Math.max(roomy, node.size[1])]);
  view.draw();
}

/** In the classic canvas, lets zoom, pan and the node's menu work over the panel. */
function passToCanvas(node, view, signal) {
  const { element } = view;
  const isClassic = () => element.closest(".dom-widget") !== null;
  const pass = (event, act) => {
    if (!isClassic()) return; // Nodes 2.0 does so by itself
    event.preventDefault();
    act();
  };
  const wheel = (event) => {
    if (event.ctrlKey || !view.canScroll) pass(event, () => app.canvas.processMouseWheel(event));
  };
  const middle = (act) => (event) => {
    if (event.button === 1 || event.buttons & 4) pass(event, () => act(event));
  };
  const menu = (event) =>
    pass(event, () => {
      app.canvas.adjustMouseEvent(event);
      app.canvas.processContextMenu(node, event);
    });
  const on = (kind, act) => element.addEventListener(kind, act, { signal, passive: false });
  on("wheel", wheel);
  on("pointerdown", middle((event) => app.canvas.processMouseDown(event)));
  on("pointermove", middle((event) => app.canvas.processMouseMove(event)));
  on("pointerup", middle((event) => app.canvas.processMouseUp(event)));
  on("contextmenu", menu);
}

/** Keys that are meant for the panel delete no node and pan no canvas; those after a click do. */
function keepFromPage(element, signal) {
  const stop = (event) => isForPanel(event) && event.stopPropagation();
  element.addEventListener("keydown", stop, { signal });
  const press = (event) => {
    // A group scrolls, and has text to select.
    if (!event.composedPath()[0].closest?.("[tabindex]:not([role=group])")) return;
    event.preventDefault(); // only the keyboard focuses it
    app.canvas.canvas.focus({ preventScroll: true });
  };
  element.addEventListener("mousedown", press, { signal });
}
