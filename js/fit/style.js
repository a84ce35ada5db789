// How Fit to VRAM looks.

import { panelRules } from "../shared/elements.js";

export const style = new CSSStyleSheet();
style.replaceSync(`
  ${panelRules}
  .panel {
    --workspace: var(--other); --fits: #3fa66a; --tight: #e09b2d; gap: 4px; overflow: auto;
    --thin: color-mix(in srgb, var(--activations) 35%, var(--ink)); overscroll-behavior: contain;
  }
  .verdict:not(:empty)::before, .error::before {
    content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 6px;
    border-radius: 50%; background: var(--verdict, var(--other));
  }
  .fits { --verdict: var(--fits); } .tight { --verdict: var(--tight); }
  .too-large { --verdict: var(--alarm); }
  .asked { color: var(--muted); }
  .offers { display: flex; flex-wrap: wrap; align-items: center; gap: 4px; flex: none; }
  .offers .offer { padding: 1px 8px; border-radius: 9px; }
  .offers span.offer { border: 1px dashed var(--line); }
  .offers button { background: var(--line); font-weight: 600; }
  .offers button:hover { border-color: currentcolor; }
  .error { --verdict: var(--alarm); color: inherit; overflow-wrap: anywhere; user-select: text; }
  .chart { position: relative; flex: 1 0 auto; display: flex; flex-direction: column; }
  .above, .below { position: relative; height: 14px; color: var(--muted); font-size: 10px; }
  .above span, .below span { position: absolute; white-space: nowrap; }
  .budget-label { color: var(--ink); font-weight: 600; }
  .stages { flex: 1 0 auto; display: flex; flex-direction: column; justify-content: space-around; }
  .stage { display: grid; grid-template-columns: 1fr auto; gap: 0 8px; padding: 1px 0; }
  .name { font-weight: 600; }
  .peak { text-align: right; font-weight: 600; }
  .over .peak { color: var(--warning); }
  .setting { grid-column: 1 / -1; color: var(--muted); overflow-wrap: anywhere; }
  .track {
    grid-column: 1 / -1; position: relative; height: 16px; margin-top: 1px;
    border-radius: 3px; background: color-mix(in srgb, var(--ink) 7%, transparent);
  }
  .bar { display: flex; height: 12px; border-radius: 3px; overflow: hidden; }
  .bar div { flex: none; min-width: 0; opacity: 0.9; background: var(--part); }
  .stock {
    position: absolute; bottom: 0; height: 3px; background: var(--thin);
    border-radius: 0 2px 2px 0;
  }
  .mark { position: absolute; top: -2px; bottom: -2px; width: 2px; margin-left: -1px; }
  .mark.budget { background: var(--ink); }
  .mark.card { background: var(--alarm); }
  .legend .part.thin::before { height: 3px; vertical-align: middle; background: var(--thin); }
  .legend .of { font-weight: 600; }
  .foot { color: var(--muted); }
`);
