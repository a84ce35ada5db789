// What the keyboard does in our panels.

const NEXT = new Set(["ArrowDown", "ArrowRight"]);
const BEFORE = new Set(["ArrowUp", "ArrowLeft"]);
// Keys that the page acts on wherever the focus is: it deletes and moves nodes, pans, opens menus.
const NAMED = new Set([
  "Delete", "Backspace", "Enter", "Home", "End", "PageUp", "PageDown", ...NEXT, ...BEFORE,
]);

/** Where a key leads in a row of that many places; null where it leads nowhere. */
export function placeAfter(key, place, count, page = 1) {
  const last = count - 1;
  const to = (wanted) => Math.min(last, Math.max(0, wanted));
  if (NEXT.has(key)) return to(place + 1);
  if (BEFORE.has(key)) return to(place - 1);
  if (key === "PageDown") return to(place + page);
  if (key === "PageUp") return to(place - page);
  return { Home: 0, End: last }[key] ?? null;
}

/** Moves the focus among the items by arrow keys, Home and End. */
export function moveFocus(event, items) {
  const from = items.indexOf(event.target);
  const place = from === -1 || hasModifier(event) ? null : placeAfter(event.key, from, items.length);
  if (place === null) return;
  event.preventDefault();
  items[place].focus();
}

/** Whether the page would take the key for a shortcut of its own, though it was meant for a panel.
 *
 * Tab, Escape, function keys and whatever has Ctrl, Alt or Meta stay the page's.
 */
export function isForPanel(event) {
  return !hasModifier(event) && (event.key.length === 1 || NAMED.has(event.key));
}

export const hasModifier = (event) => event.ctrlKey || event.altKey || event.metaKey;
