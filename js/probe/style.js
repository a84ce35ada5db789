// How a probe looks.

import { panelRules } from "../shared/elements.js";

export const style = new CSSStyleSheet();
style.replaceSync(`
  ${panelRules}
  .panel { overflow: auto; overscroll-behavior: contain; }
  .head { display: flex; flex-wrap: wrap; align-items: start; gap: 2px 8px; flex: none; }
  .headline { flex: 1 1 200px; }
  .state {
    flex: none; padding: 1px 7px; border-radius: 9px; background: var(--line);
  }
  .state.running::before {
    content: ""; display: inline-block; width: 7px; height: 7px; margin-right: 5px;
    border-radius: 50%; background: var(--activations); animation: beat 1.2s infinite;
  }
  .state.interrupted, .state.failed { background: var(--alarm-ground); color: #fff; }
  @keyframes beat { 50% { opacity: 0.25; } }
  @media (prefers-reduced-motion: reduce) { .state.running::before { animation: none; } }
  .where { flex: none; color: var(--muted); overflow-wrap: anywhere; }
  .where.pointed { color: inherit; }
  .plot { position: relative; flex: 1 1 0; min-height: 72px; }
  .plot svg, .plot .pointer { position: absolute; inset: 0; width: 100%; height: 100%; }
  .plot .pointer { touch-action: none; }
  svg { overflow: visible; }
  svg text { font-size: 10px; fill: var(--muted); }
  svg .grid { stroke: var(--line); stroke-width: 1; }
  svg .weights { fill: var(--weights); } svg .activations { fill: var(--activations); }
  svg .other { fill: var(--other); }
  svg .step { stroke: var(--ground); stroke-width: 1; opacity: 0.55; }
  svg .cell { fill: var(--line); } svg .cell.odd { fill: var(--line); opacity: 0.45; }
  svg .cut { fill: none; stroke: var(--ground); stroke-width: 2.5; }
  svg .ceiling { stroke: var(--alarm); stroke-width: 1.5; }
  svg .peak-line { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 4 3; }
  svg .peak-dot { fill: var(--ink); stroke: var(--ground); }
  svg .label {
    fill: var(--ink); font-weight: 600; paint-order: stroke;
    stroke: var(--ground); stroke-width: 3px; stroke-linejoin: round;
  }
  svg .cursor { stroke: var(--ink); stroke-width: 1; }
  .details { flex: 1 1 0; min-height: 72px; overflow: auto; overscroll-behavior: contain; }
  .details h4 { margin: 6px 0 2px; font-size: 11px; color: var(--muted); font-weight: 600; }
  .details h4:first-child { margin-top: 0; }
  .details dl {
    display: grid; grid-template-columns: fit-content(52%) 1fr; gap: 1px 12px; margin: 0;
  }
  .details dd { margin: 0; text-align: right; user-select: text; }
  .details dd.absent { color: var(--muted); font-style: italic; }
  .details p { margin: 0 0 2px; user-select: text; }
  .buttons { display: flex; flex-wrap: wrap; gap: 4px; justify-content: space-between; }
  .buttons span { display: flex; gap: 4px; }
  button { white-space: nowrap; }
  button[aria-pressed="true"] { background: var(--line); }
  button[aria-pressed="true"] { border-color: var(--muted); }
`);
