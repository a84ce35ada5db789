// What our panels are made of: elements, and the rules of style that they share.

export function make(name, className, content = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = content;
  return element;
}

/** Rules for a panel, its legend and what is hidden. Text and ground are the theme's own colours. */
export const panelRules = `
  :host { display: block; height: 100%; min-height: 0; box-sizing: border-box; }
  * { box-sizing: border-box; }
  .panel {
    --weights: #4c86e0; --activations: #f0a030; --other: #8d93a1; --alarm: #e5484d;
    --ground: var(--comfy-input-bg, #222); --ink: var(--input-text, #ddd);
    --muted: color-mix(in srgb, var(--ink) 68%, transparent);
    --line: color-mix(in srgb, var(--ink) 16%, transparent);
    display: flex; flex-direction: column; gap: 4px; height: 100%; padding: 8px; overflow: hidden;
    border: 1px solid var(--line); border-radius: 8px;
    background: var(--ground); color: var(--ink);
    font-family: inherit; font-size: 11px; line-height: 1.35;
    font-variant-numeric: tabular-nums; cursor: default;
  }
  .panel.nodes-2 {
    --ground: var(--component-node-widget-background, var(--comfy-input-bg, #222));
    --ink: var(--component-node-foreground, var(--input-text, #ddd));
  }
  [hidden] { display: none !important; }
  .empty { margin: auto; max-width: 32em; text-align: center; color: var(--muted); }
  .head { display: flex; align-items: baseline; gap: 2px 8px; white-space: nowrap; }
  .legend { display: flex; flex-wrap: wrap; gap: 0 10px; }
  .legend .part { white-space: nowrap; }
  .legend .part::before {
    content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 5px;
    border-radius: 2px; background: var(--part);
  }
  .legend b { font-weight: 600; margin-left: 4px; }
`;
