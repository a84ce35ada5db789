// What our panels are made of: elements, and the rules of style that they share.

import palette from "./palette.js";

export function make(name, className, content = "") {
  const element = document.createElement(name);
  element.className = className;
  element.textContent = content;
  return element;
}

/** Says something where it is not said yet: what is said again is read out again. */
export function tell(element, content) {
  if (element.textContent !== (content ?? "")) element.textContent = content ?? "";
}

const colours = Object.entries(palette.parts)
  .map(([part, colour]) => `--${part}: ${colour};`)
  .join(" ");

/** Rules for a panel, its legend and what is hidden. Text and ground are the theme's own colours. */
export const panelRules = `
  :host { display: block; height: 100%; min-height: 0; box-sizing: border-box; }
  * { box-sizing: border-box; }
  .panel {
    ${colours} --alarm: ${palette.alarm};
    --focus: var(--weights); --alarm-ground: color-mix(in srgb, var(--alarm) 80%, #000);
    --ground: var(--comfy-input-bg, ${palette.ground}); --ink: var(--input-text, ${palette.ink});
    --muted: color-mix(in srgb, var(--ink) 80%, transparent);
    --warning: color-mix(in srgb, var(--alarm) 60%, var(--ink));
    --line: color-mix(in srgb, var(--ink) 16%, transparent);
    display: flex; flex-direction: column; gap: 4px; height: 100%; padding: 8px; overflow: hidden;
    border: 1px solid var(--line); border-radius: 8px;
    background: var(--ground); color: var(--ink);
    font-family: inherit; font-size: 11px; line-height: 1.35;
    font-variant-numeric: tabular-nums; cursor: default;
  }
  .panel.nodes-2 {
    --ground: var(--component-node-widget-background, var(--comfy-input-bg, ${palette.ground}));
    --ink: var(--component-node-foreground, var(--input-text, ${palette.ink}));
  }
  [hidden] { display: none !important; }
  .empty { margin: auto; max-width: 32em; text-align: center; color: var(--muted); }
  .headline { flex: none; font-size: 12px; overflow-wrap: anywhere; }
  .headline.none { position: absolute; } /* a live region must stay in the tree */
  .verdict { font-size: 14px; font-weight: 650; line-height: 1.2; }
  .spoken {
    position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
    white-space: nowrap;
  }
  button {
    padding: 3px 8px; border: 1px solid var(--line); border-radius: 5px; background: transparent;
    color: inherit; font: inherit; cursor: pointer;
  }
  button:hover { background: var(--line); }
  button:disabled { opacity: 0.4; cursor: default; background: transparent; }
  :focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; border-radius: 3px; }
  .legend { display: flex; flex-wrap: wrap; gap: 0 10px; }
  .legend .part { white-space: nowrap; }
  .legend .part::before {
    content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 5px;
    border-radius: 2px; background: var(--part);
  }
  .legend b { font-weight: 600; margin-left: 4px; }
`;
